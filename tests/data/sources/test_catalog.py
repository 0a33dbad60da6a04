"""Each fault of a dataset_info.json, and of data that do not fit it, is named with its place and a remedy."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from luthier.core.errors import DataError
from luthier.core.kinds import FORMATS
from luthier.data.sources.catalog import OTHER_COMMAS, Columns, Source, Tags, check_datasets, load_catalog
from luthier.data.sources.read import read_rows
from luthier.data.types import Dialogue, Feedback, Preference, Prompt

EXAMPLES = Path(__file__).parents[3] / "examples" / "data"
TAG_NAMES = ("role_tag", "content_tag", "user_tag", "assistant_tag")
ALPACA_ROWS = [{"instruction": "q", "input": "", "output": "a"}]


@pytest.fixture
def folder(tmp_path):
    """Returns a function that writes dataset_info.json (an object, or text) and data files, and gives the folder."""

    def write(info, **files):
        text = info if isinstance(info, str) else json.dumps(info, indent=1)
        (tmp_path / "dataset_info.json").write_text(text, encoding="utf-8")
        for name, rows in files.items():
            (tmp_path / f"{name}.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
        return str(tmp_path)

    return write


def check(dataset_dir, *names, stage="sft", eval_dataset=()):
    data = SimpleNamespace(dataset=names, eval_dataset=eval_dataset, dataset_dir=dataset_dir, media_dir=None)
    return check_datasets(data, stage)


def errors_of(dataset_dir, *names, **options):
    errors, _ = check(dataset_dir, *names, **options)
    return [str(problem).replace(f"{dataset_dir}/", "") for problem in errors]


def warnings_of(dataset_dir, *names, **options):
    errors, warnings = check(dataset_dir, *names, **options)
    assert not errors, errors
    return [str(problem).replace(f"{dataset_dir}/", "") for problem in warnings]


class TestDescriptions:
    def test_defaults(self, folder):
        spec = load_catalog(folder({"d": {"file_name": "d.json"}})).get("d")
        assert spec.source.kind == "file" and spec.source.location.endswith("/d.json")
        assert (spec.formatting, spec.ranking, spec.subset, spec.split) == ("alpaca", False, None, "train")
        assert (spec.columns, spec.tags, spec.line) == (Columns(), Tags(), 2)
        assert (spec.columns_given, spec.tags_given) == (False, False)

    def test_null_is_the_default(self, folder):
        entry = {"file_name": "d.json", "subset": None, "columns": None, "ranking": None, "num_samples": None}
        assert load_catalog(folder({"d": entry})).get("d").columns == Columns()

    def test_giving_columns_or_tags_clears_the_defaults(self, folder):
        entry = {
            "hf_hub_url": "o/r",
            "formatting": "sharegpt",
            "columns": {"messages": "talk"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "u", "assistant_tag": "a"},
        }
        spec = load_catalog(folder({"d": entry})).get("d")
        assert spec.columns.messages == "talk" and spec.columns.prompt is None
        assert spec.tags.assistant_tag == "a" and spec.tags.system_tag is None
        assert spec.columns_given and spec.tags_given

    @pytest.mark.parametrize(
        ("entry", "source"),
        [
            (
                {"hf_hub_url": "o/r", "script_url": "s", "cloud_file_name": "s3://b/f.json", "file_name": "f"},
                Source("hf_hub", "o/r"),
            ),
            ({"cloud_file_name": "gs://b/f.json", "file_name": "f"}, Source("cloud", "gs://b/f.json")),
            ({"ms_hub_url": "m/r", "om_hub_url": "o/r"}, Source("ms_hub", "m/r")),
            ({"om_hub_url": "o/r"}, Source("om_hub", "o/r")),
            ({"hf_hub_url": "h/r", "ms_hub_url": "m/r"}, Source("hf_hub", "h/r")),
            ({"file_name": "/elsewhere/f.json"}, Source("file", "/elsewhere/f.json")),
        ],
    )
    def test_precedence(self, folder, entry, source, monkeypatch):
        monkeypatch.delenv("USE_MODELSCOPE_HUB", raising=False)
        assert load_catalog(folder({"d": entry})).get("d").source == source

    def test_the_environment_chooses_the_hub(self, folder, monkeypatch):
        catalog_folder = folder({"d": {"hf_hub_url": "h/r", "ms_hub_url": "m/r", "om_hub_url": "o/r"}})
        monkeypatch.setenv("USE_OPENMIND_HUB", "true")
        assert load_catalog(catalog_folder).get("d").source == Source("om_hub", "o/r")
        monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
        assert load_catalog(catalog_folder).get("d").source == Source("ms_hub", "m/r")

    def test_media_dir_is_the_folder_unless_given(self, folder):
        catalog_folder = folder({"d": {"file_name": "d.json"}})
        assert load_catalog(catalog_folder).get("d").media_dir == catalog_folder
        assert load_catalog(catalog_folder, "/media").get("d").media_dir == "/media"


FAULTS = [
    ({"file_nam": "d.json"}, "d.file_nam: 'd.json': unknown key of a dataset description -> did you mean 'file_name'?"),
    ({"file_name": 3}, "d.file_name: 3: must be text"),
    ({"file_name": "d.json", "ranking": "yes"}, "d.ranking: 'yes': must be true or false"),
    ({"file_name": "d.json", "num_samples": True}, "d.num_samples: true: must be a whole number"),
    ({"file_name": "d.json", "num_samples": 0}, "d.num_samples: 0: must be at least 1"),
    ({"file_name": "d.json", "columns": "x"}, "d.columns: 'x': must be an object"),
    (
        {"file_name": "d.json", "columns": {"promt": "x"}},
        "d.columns.promt: 'x': unknown key of 'columns' -> did you mean 'prompt'?",
    ),
    ({"file_name": "d.json", "columns": {"prompt": 1}}, "d.columns.prompt: 1: must be text (a name that the data use)"),
    (
        {"file_name": "d.json", "tags": {"role": "x"}},
        "d.tags.role: 'x': unknown key of 'tags' -> did you mean 'role_tag'?",
    ),
    (
        {"file_name": "d.json", "formatting": "share_gpt"},
        "d.formatting: 'share_gpt': unknown formatting -> did you mean 'sharegpt'?",
    ),
    (
        {"script_url": "s", "file_name": "d.json"},
        "d.script_url: 's': dataset scripts cannot be run: the library `datasets` has refused to run them since "
        "version 4 -> convert the data to json, jsonl, csv or parquet and give `file_name`",
    ),
    (
        {"cloud_file_name": "data/d.json"},
        "d.cloud_file_name: 'data/d.json': must start with s3://, gs:// or gcs:// -> local files go to `file_name`",
    ),
    ({}, "d: does not say where the rows are -> give `file_name`, `cloud_file_name` or `hf_hub_url`"),
    ([], "d: the description of a dataset is an object"),
    (
        {"file_name": "d.json", "split": "test"},
        "d.split: 'test': a local file has the split 'train' only -> give each part its own file, or use "
        "`num_samples` or `max_samples`",
    ),
    (
        {"file_name": "d.json", "ranking": True, "columns": {"prompt": "q", "chosen": "c"}},
        "d.columns: ranking data need a column for 'rejected' -> "
        'add "rejected": "<its name in the data>" to `columns`',
    ),
    (
        {
            "file_name": "d.json",
            "ranking": True,
            "columns": {"prompt": "q", "chosen": "c", "rejected": "r", "kto_tag": "k"},
        },
        "d.columns.kto_tag: 'k': excludes `ranking` -> a dataset is either ranked pairs or single ratings",
    ),
    (
        {"file_name": "d.json", "columns": {"prompt": "q", "kto_tag": "k"}},
        'd.columns: names a `kto_tag` but no `response` that it rates -> add "response"',
    ),
    (
        {"file_name": "d.json", "formatting": "openai", "columns": {"tools": "tools"}},
        'd.columns: names no `messages` column, and giving `columns` clears the defaults -> add "messages"',
    ),
    (
        {"file_name": "d.json", "columns": {"response": "a"}},
        'd.columns: names no `prompt` column, and giving `columns` clears the defaults -> add "prompt"',
    ),
    (
        {
            "file_name": "d.json",
            "formatting": "sharegpt",
            "tags": {"role_tag": "r", "content_tag": "c", "user_tag": "u"},
        },
        'd.tags: names no `assistant_tag`, and giving `tags` clears the defaults -> add "assistant_tag"',
    ),
]


class TestFaultyDescriptions:
    @pytest.mark.parametrize(("entry", "problem"), FAULTS, ids=[problem[:50] for _, problem in FAULTS])
    def test_each_is_one_error(self, folder, entry, problem):
        dataset_dir = folder({"fine": {"file_name": "fine.json"}, "d": entry}, fine=ALPACA_ROWS)
        (error,) = errors_of(dataset_dir, "d")
        place, _, text = error.partition(": ")
        assert text == problem
        assert place.startswith("dataset_info.json:")
        with pytest.raises(DataError, match="has an invalid description"):
            load_catalog(dataset_dir).get("d")
        assert warnings_of(dataset_dir, "fine") == [error]

    def test_several_faults_in_descriptions_that_are_not_used_are_one_line(self, folder):
        wrong = {f"d{number}": {"file_name": "a.json", "rankng": True} for number in range(7)}
        dataset_dir = folder({"fine": {"file_name": "fine.json"}, **wrong}, fine=ALPACA_ROWS)
        assert warnings_of(dataset_dir, "fine") == [
            "dataset_info.json: d0, d1, d2, d3, d4 and 2 others: not described as they must be; this run does not use"
            " them -> `luthier check RUN dataset=d0` says what is wrong with it"
        ]

    def test_all_at_once_each_with_its_line(self, folder):
        text = '{\n "d": {\n  "file_name": 1,\n  "columns": {\n   "promt": "x"\n  },\n  "folders": "y"\n }\n}'
        lines = [error.split(":")[1] for error in errors_of(folder(text), "d")]
        assert lines == ["3", "7", "5"]

    def test_keys_written_twice(self, folder):
        text = '{\n "d": {"file_name": "d.json",\n  "file_name": "e.json"},\n "e": {"file_name": "d.json"},\n "e": {}}'
        dataset_dir = folder(text, d=ALPACA_ROWS)
        assert errors_of(dataset_dir, "d") == [
            "dataset_info.json:3: d.file_name: appears twice -> remove one of the two"
        ]
        assert errors_of(dataset_dir, "e") == ["dataset_info.json:5: e: appears twice -> remove one of the two"]

    @pytest.mark.parametrize(
        ("entry", "warning"),
        [
            ({"file_name": "d.json", "folder": "x"}, "d.folder: 'x': is read for hub repositories only"),
            ({"file_name": "d.json", "tags": {"role_tag": "r"}}, "d.tags: is read by the formats sharegpt and openai"),
            (
                {"file_name": "d.json", "columns": {"prompt": "instruction", "messages": "m"}},
                "d.columns.messages: 'm': is not read by the format alpaca",
            ),
            (
                {"file_name": "d.json", "columns": {"prompt": "instruction", "chosen": "output", "query": "input"}},
                "d.columns.chosen: 'output': is read for ranking data only -> add \"ranking\": true",
            ),
            (
                {"hf_hub_url": "o/r", "file_name": "d.json"},
                "d.file_name: 'd.json': is not read, since `hf_hub_url` is given too",
            ),
        ],
    )
    def test_known_keys_that_nothing_reads_are_warnings(self, folder, entry, warning):
        dataset_dir = folder({"d": entry}, d=ALPACA_ROWS)
        assert any(warning in text for text in warnings_of(dataset_dir, "d"))

    @pytest.mark.parametrize(
        "key",
        ["file_sha1", "dataset_sha1", "description", "license", "comment", "notes", "_comment", "//", "#1", "$schema"],
    )
    @pytest.mark.parametrize("value", ["x", 1, None, ["x"], {"x": 1}])
    def test_keys_without_effect_are_accepted_and_named(self, folder, key, value):
        dataset_dir = folder({"d": {"file_name": "d.json", key: value}}, d=ALPACA_ROWS)
        assert errors_of(dataset_dir, "d") == []
        (warning,) = warnings_of(dataset_dir, "d")
        assert warning.startswith(f"dataset_info.json:4: d.{key}: ") and "has no effect: " in warning
        assert [row.data for row in read_rows(load_catalog(dataset_dir).get("d"), seed=0)] == ALPACA_ROWS

    @pytest.mark.parametrize("group", ["columns", "tags"])
    def test_comments_among_columns_and_tags_are_accepted_and_named(self, folder, group):
        given = {"columns": {"messages": "m"}, "tags": dict(zip(TAG_NAMES, "rcua", strict=True))}
        given[group]["_comment"] = "x"
        entry = {"file_name": "d.json", "formatting": "sharegpt", **given}
        row = {"m": [{"r": "u", "c": "q"}, {"r": "a", "c": "a"}]}
        dataset_dir = folder({"d": entry}, d=[row])
        assert errors_of(dataset_dir, "d") == []
        (warning,) = warnings_of(dataset_dir, "d")
        assert f"d.{group}._comment: 'x': has no effect: it is a comment" in warning

    @pytest.mark.parametrize("key", ["file_sha", "licence_", "coment", "file_names", "Comment", "sha1_file"])
    def test_keys_that_are_only_like_one_without_effect_are_errors(self, folder, key):
        dataset_dir = folder({"d": {"file_name": "d.json", key: "x"}}, d=ALPACA_ROWS)
        (error,) = errors_of(dataset_dir, "d")
        assert "unknown key of a dataset description" in error

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ('{"d": {"file_name": "x"},}', r"dataset_info.json:1: not JSON: a key in double quotes is expected"),
            ('{"d":\n {"file_name" "x"}}', r"dataset_info.json:2: not JSON: ':' is expected"),
            ('{"d":\n {"file_name": "x" "y": 1}}', r"dataset_info.json:2: not JSON: ',' is expected"),
            ('{"d": {}} x', r"dataset_info.json:1: not JSON: text after the end"),
            ("", r"dataset_info.json:1: not JSON: Expecting value"),
            ('["d"]', r"must be an object of dataset names"),
            ("[" * 100_000, r"not JSON that can be read"),
        ],
    )
    def test_files_that_are_no_catalog(self, folder, text, reason):
        with pytest.raises(DataError, match=reason):
            load_catalog(folder(text))

    def test_not_utf8(self, tmp_path):
        (tmp_path / "dataset_info.json").write_bytes(b'{"caf\xe9": {}}')
        with pytest.raises(DataError, match=r"not UTF-8 \(byte 0xe9 at 5\)"):
            load_catalog(str(tmp_path))

    def test_byte_order_mark_is_fine(self, tmp_path):
        (tmp_path / "dataset_info.json").write_bytes(b'\xef\xbb\xbf{"d": {"file_name": "x"}}')
        assert load_catalog(str(tmp_path)).names == ("d",)


class TestWhereTheCatalogIs:
    def test_absent(self, tmp_path):
        with pytest.raises(DataError, match=r"holds no dataset_info.json -> give the folder"):
            load_catalog(str(tmp_path))
        with pytest.raises(DataError, match=r"does not exist -> give the folder"):
            load_catalog(str(tmp_path / "nowhere"))
        (tmp_path / "dataset_info.json").write_text("{}")
        with pytest.raises(DataError, match=r"is a file -> give the folder"):
            load_catalog(str(tmp_path / "dataset_info.json"))
        with pytest.raises(
            DataError, match=r"does not exist -> write it as .*/a/b: a backslash separates folders on W"
        ):
            load_catalog(str(tmp_path / "a\\b"))
        (error,), _ = check(str(tmp_path / "nowhere"), "d")
        assert error.key == "dataset_dir" and "does not exist" in error.reason

    def test_online_names_are_repositories(self):
        spec = load_catalog("ONLINE").get("owner/repository")
        assert (spec.source, spec.columns) == (Source("hf_hub", "owner/repository"), Columns())
        assert check("ONLINE", "owner/repository") == ([], [])

    def test_remote_catalog(self, folder, monkeypatch):
        import huggingface_hub

        asked = {}

        def hf_hub_download(repository, file, *, repo_type, token, cache_dir):
            asked.update(repository=repository, repo_type=repo_type, token=token, cache_dir=cache_dir)
            return f"{local}/{file}"

        local = folder({"d": {"file_name": "sub/d.jsonl"}, "e": {"hf_hub_url": "o/r"}})
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
        catalog = load_catalog("REMOTE:owner/data", hf_hub_token="t", cache_dir="kept")
        assert catalog.get("d").source == Source("cloud", "hf://datasets/owner/data/sub/d.jsonl")
        assert catalog.get("e").source == Source("hf_hub", "o/r")
        assert asked == {"repository": "owner/data", "repo_type": "dataset", "token": "t", "cache_dir": "kept"}

    def test_remote_catalog_out_of_reach(self):
        with pytest.raises(DataError, match=r"'nobody/nothing' cannot be fetched .* -> check the name, the network"):
            load_catalog("REMOTE:nobody/nothing")
        assert check("REMOTE:nobody/nothing", "d") == ([], [])

    def test_descriptions_from_python(self, tmp_path):
        (tmp_path / "d.json").write_text(json.dumps(ALPACA_ROWS))
        catalog = load_catalog({"d": {"file_name": str(tmp_path / "d.json")}, "e": {"file": "x"}})
        assert [row.data for row in read_rows(catalog.get("d"), seed=0)] == ALPACA_ROWS
        with pytest.raises(DataError, match=r"dataset_dir: e\.file: 'x': unknown key"):
            catalog.get("e")

    def test_of_many_names_some_are_offered(self, folder):
        names = [f"set_{number}" for number in range(22)]
        (error,) = errors_of(folder({name: {"file_name": "a.json"} for name in names}), "zzz")
        assert error.endswith(f" -> one of {', '.join(names[:20])} and 2 others")

    def test_unknown_name(self, folder):
        dataset_dir = folder({"identity": {"file_name": "d.json"}}, d=ALPACA_ROWS)
        with pytest.raises(DataError, match=r"'identiti': is not described in .* -> did you mean 'identity'\?"):
            load_catalog(dataset_dir).get("identiti")
        assert errors_of(dataset_dir, "identiti", "zzz") == [
            "dataset: 'identiti': is not described in dataset_info.json -> did you mean 'identity'?",
            "dataset: 'zzz': is not described in dataset_info.json -> one of identity",
        ]
        assert errors_of(dataset_dir, "identity", eval_dataset=("x",))[0].startswith("eval_dataset: 'x'")

    def test_a_file_in_the_place_of_a_name(self, folder, tmp_path, monkeypatch):
        """The path is absolute; `errors_of` leaves the folder out."""
        dataset_dir = folder({"identity": {"file_name": "d.json"}}, d=ALPACA_ROWS)
        monkeypatch.chdir(tmp_path)
        for name in ("d.json", str(tmp_path / "d.json")):
            (error,) = errors_of(dataset_dir, name)
            assert error.endswith('-> add "my_data": {"file_name": "d.json"} to it, and name my_data here')

    @pytest.mark.parametrize("mark", OTHER_COMMAS)
    def test_names_without_a_comma_between_them(self, folder, mark):
        (error,) = errors_of(folder({"a": {"file_name": "d.json"}}, d=ALPACA_ROWS), f"a{mark}b")
        assert error.endswith(f"-> write a comma (,) between two names, not {mark!r}")


def talk(*roles, **more):
    return {"conversations": [{"from": role, "value": "x"} for role in roles], **more}


class TestDataThatDoNotFit:
    def test_absent_file(self, folder):
        dataset_dir = folder({"d": {"file_name": "data.json"}}, date=ALPACA_ROWS)
        (error,) = errors_of(dataset_dir, "d")
        assert error == "dataset_info.json:2: d: data.json: no such file -> did you mean 'date.json'?"

    def test_a_path_written_on_windows(self, folder, tmp_path):
        dataset_dir = folder({"d": {"file_name": "sub\\d.json"}, "e": {"file_name": "sub\\e.json"}})
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "d.json").write_text(json.dumps(ALPACA_ROWS))
        assert check(dataset_dir, "d") == ([], [])
        assert [row.data for row in read_rows(load_catalog(dataset_dir).get("d"), seed=0)] == ALPACA_ROWS
        (error,) = errors_of(dataset_dir, "e")
        assert "sub/e.json: no such file -> did you mean 'd.json'?" in error

    def test_a_path_of_a_drive(self, folder):
        (error,) = errors_of(folder({"d": {"file_name": "C:\\data\\d.json"}}), "d")
        assert "C:/data/d.json: there is no folder" in error

    def test_default_column_that_the_data_lack(self, folder):
        dataset_dir = folder({"d": {"file_name": "d.json"}}, d=[{"instructions": "q", "output": "a"}])
        assert errors_of(dataset_dir, "d") == [
            "dataset_info.json:2: d.columns.prompt: 'instruction': the data have no such column (the default, since "
            "`columns` is not given) -> did you mean 'instructions'?"
        ]

    @pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
    def test_a_csv_file_with_another_separator(self, folder, tmp_path, mark, name):
        dataset_dir = folder({"d": {"file_name": "d.csv"}})
        (tmp_path / "d.csv").write_text(f"instruction{mark}output\nq{mark}a\n")
        errors = errors_of(dataset_dir, "d")
        assert errors and all(
            error.endswith(f"-> the file separates its columns by {name}: save it with commas") for error in errors
        )

    @pytest.mark.parametrize(
        ("messages", "remedy"),
        [
            ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], 'set "formatting": "openai"'),
            ([{"who": "human", "what": "q"}], "name them in `tags`: the message has who, what"),
        ],
    )
    def test_messages_with_the_names_of_another_format(self, folder, messages, remedy):
        description = {"file_name": "d.json", "formatting": "sharegpt", "columns": {"messages": "messages"}}
        (error,) = errors_of(folder({"d": description}, d=[{"messages": messages}]), "d")
        assert "no row can be used" in error and remedy in error.partition(" -> ")[2]

    @pytest.mark.parametrize(
        ("row", "description", "remedy"),
        [
            ({"conversations": [{"from": "human", "value": "q"}]}, {}, 'set "formatting": "sharegpt"'),
            ({"messages": [{"role": "user", "content": "q"}]}, {}, 'set "formatting": "openai"'),
            ({"messages": [{"role": "user"}]}, {"formatting": "sharegpt"}, 'set "formatting": "openai"'),
            ({"messages": ["q"]}, {}, "the data have messages"),
            ({"messages": []}, {}, "the data have messages"),
            ({"prompt": "q", "completion": "a"}, {}, 'add "columns": {"prompt": "prompt", "response": "completion"}'),
            (
                {"instruction": "q", "response": "a"},
                {},
                'add "columns": {"prompt": "instruction", "response": "response"}',
            ),
            ({"text": "t"}, {}, 'add "columns": {"prompt": "text"}'),
            ({"question": "q"}, {}, "the data have question"),
            ({"text": "t"}, {"formatting": "sharegpt"}, "the data have text"),
        ],
    )
    def test_columns_of_another_format_or_tool(self, folder, row, description, remedy):
        errors = errors_of(folder({"d": {"file_name": "d.json", **description}}, d=[row]), "d")
        assert errors and all(error.endswith(f" -> {remedy}") for error in errors)

    @pytest.mark.parametrize(("column", "key"), [("image", "images"), ("audio", "audios"), ("functions", "tools")])
    def test_a_column_that_another_tool_reads_is_named(self, folder, column, key):
        rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], column: "x"}]
        (warning,) = warnings_of(folder({"d": {"file_name": "d.json", "formatting": "openai"}}, d=rows), "d")
        assert f"the column {column!r} of the data is not read" in warning and f'add "{key}": "{column}"' in warning

    def test_given_column_that_the_data_lack(self, folder):
        columns = {"prompt": "instruction", "query": "inptu", "response": "answer"}
        dataset_dir = folder({"d": {"file_name": "d.json", "columns": columns}}, d=ALPACA_ROWS)
        assert errors_of(dataset_dir, "d") == [
            "dataset_info.json:2: d.columns.query: 'inptu': the data have no such column -> did you mean 'input'?",
            "dataset_info.json:2: d.columns.response: 'answer': the data have no such column -> "
            "the data have instruction, input, output",
        ]

    def test_a_column_that_only_later_rows_have_is_a_warning(self, folder):
        columns = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
        rows = [*ALPACA_ROWS * 50, {**ALPACA_ROWS[0], "system": "s"}]
        dataset_dir = folder({"d": {"file_name": "d.json", "columns": columns}}, d=rows)
        (warning,) = warnings_of(dataset_dir, "d")
        assert "d.columns.system: 'system': the data have no such column" in warning

    def test_a_header_or_schema_decides_for_all_rows(self, folder, tmp_path):
        from pyarrow import Table, parquet

        dataset_dir = folder(
            {"csv": {"file_name": "a.csv"}, "parquet": {"file_name": "a.parquet"}, "txt": {"file_name": "a.txt"}}
        )
        (tmp_path / "a.csv").write_text("instruction,answer\nq,a\n")
        (tmp_path / "a.txt").write_text("text\n")
        parquet.write_table(Table.from_pylist([{"instruction": "q", "answer": "a"}]), tmp_path / "a.parquet")
        for name in ("csv", "parquet"):
            (error,) = errors_of(dataset_dir, name)
            assert f"{name}.columns.response: 'output': the data have no such column" in error
        assert 'add "columns": {"prompt": "text"}' in errors_of(dataset_dir, "txt")[0]

    @pytest.mark.parametrize(
        ("columns", "row", "warning"),
        [
            (
                {"prompt": "instruction", "response": "output"},
                {"instruction": "q", "input": "x", "output": "a"},
                "the column 'input' of the data is not read: giving `columns` cleared the default that reads it -> "
                'add "query": "input", or remove the column from the data',
            ),
            (
                {"prompt": "instruction", "response": "output"},
                {"instruction": "q", "output": "a", "history": []},
                "the column 'history' of the data is not read: `columns` names no 'history' -> "
                'add "history": "history", or remove the column from the data',
            ),
            (
                None,
                {"instruction": "q", "output": "a", "system": "s"},
                "the column 'system' of the data is not read: `columns` names no 'system' -> "
                'add "system": "system", or remove the column from the data',
            ),
        ],
    )
    def test_a_column_that_vanishes_is_named(self, folder, columns, row, warning):
        dataset_dir = folder({"d": {"file_name": "d.json", "columns": columns}}, d=[row])
        assert warnings_of(dataset_dir, "d") == [f"dataset_info.json:2: d.columns: {warning}"]

    def test_columns_of_no_meaning_are_not_mentioned(self, folder):
        dataset_dir = folder({"d": {"file_name": "d.json"}}, d=[{**ALPACA_ROWS[0], "id": 1, "source": "web"}])
        assert warnings_of(dataset_dir, "d") == []

    def test_roles_that_tags_cleared_are_named(self, folder):
        tags = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
        entry = {"file_name": "d.json", "formatting": "sharegpt", "tags": tags}
        dataset_dir = folder({"d": entry}, d=[talk("human", "gpt"), talk("system", "human", "gpt")])
        first, second = warnings_of(dataset_dir, "d")
        assert first == (
            "dataset_info.json:2: d.tags: the data have messages of role 'system', and giving `tags` cleared "
            '\'system_tag\': such rows are dropped -> add "system_tag": "system"'
        )
        assert "1 of the first 2 rows cannot be used" in second

    @pytest.mark.parametrize(
        ("key", "stage", "remedy"),
        [(key, "pt", "use stage: sft") for key in ("weight", "loss", "train")],
    )
    def test_weights_of_messages_are_not_ignored_silently(self, folder, key, stage, remedy):
        row = talk("human", "gpt")
        row["conversations"][1][key] = 0
        dataset_dir = folder({"d": {"file_name": "d.json", "formatting": "sharegpt"}}, d=[row])
        (warning,) = warnings_of(dataset_dir, "d", stage=stage)
        assert f"messages carry {key!r}, which is not read" in warning and remedy in warning

    @pytest.mark.parametrize(("key", "value"), [("loss", 0.5), ("weight", 0), ("train", False)])
    def test_a_stage_that_reads_the_weights_of_messages_does_not_warn_of_them(self, folder, key, value):
        row = talk("human", "gpt")
        row["conversations"][1][key] = value
        dataset_dir = folder({"d": {"file_name": "d.json", "formatting": "sharegpt"}}, d=[row])
        assert check(dataset_dir, "d") == ([], [])

    def test_no_usable_row(self, folder):
        entry = {"file_name": "d.json", "formatting": "sharegpt"}
        dataset_dir = folder({"d": entry}, d=[talk("human"), talk("gpt", "human")])
        (error,) = errors_of(dataset_dir, "d")
        assert error == (
            "dataset_info.json:2: d: no row can be used, for example d.json, row 1: the conversation "
            "ends with message 1 of role 'human', not with 'gpt' or 'function_call'"
        )

    @pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl.gz", "saved"])
    def test_no_usable_row_of_a_table(self, folder, tmp_path, kind):
        """A schema says that the columns are there, not that a row fits the tags."""
        import datasets

        rows = datasets.Dataset.from_list([{"conversations": [{"role": "user", "content": "q"}]}] * 20)
        path = tmp_path / f"d.{kind}"
        if kind == "parquet":
            rows.to_parquet(path)
        elif kind == "saved":
            rows.save_to_disk(path)
        elif kind == "arrow":
            rows.save_to_disk(tmp_path / "folder")
            (tmp_path / "folder" / "data-00000-of-00001.arrow").rename(path)
        else:
            rows.to_json(path, compression="gzip")
        dataset_dir = folder({"d": {"file_name": f"d.{kind}", "formatting": "sharegpt"}})
        (error,) = errors_of(dataset_dir, "d")
        assert "d: no row can be used, for example " in error and "row 1: message 1 has no 'from'" in error

    def test_some_usable_rows_of_a_table(self, folder, tmp_path):
        import datasets

        rows = [talk("human"), *[talk("human", "gpt")] * 20]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
        dataset_dir = folder({"d": {"file_name": "d.parquet", "formatting": "sharegpt"}})
        (warning,) = warnings_of(dataset_dir, "d")
        assert "1 of the first 10 rows cannot be used, for example" in warning

    def test_a_column_that_only_later_rows_of_a_compressed_file_have(self, folder, tmp_path):
        columns = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
        rows = [*ALPACA_ROWS * 30_000, {**ALPACA_ROWS[0], "system": "s"}]
        (tmp_path / "d.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
        dataset_dir = folder({"d": {"file_name": "d.json.gz", "columns": columns}})
        (warning,) = warnings_of(dataset_dir, "d")
        assert "d.columns.system: 'system': the data have no such column" in warning

    @pytest.mark.parametrize("bad", [{"instruction": 1, "output": "a"}, {"question": "q"}, 7])
    def test_a_usable_row_after_many_that_are_not(self, folder, bad):
        dataset_dir = folder({"d": {"file_name": "d.json"}}, d=[bad] * 30 + [{"instruction": "q", "output": "a"}])
        assert errors_of(dataset_dir, "d") == []
        assert "of the first 10 rows" in " ".join(map(str, warnings_of(dataset_dir, "d")))

    @pytest.mark.parametrize("rows", ["[", "", "[]", '[{"a": 1'])
    def test_broken_files(self, folder, rows):
        assert len(errors_of(folder({"d": {"file_name": "d.json"}}, d=rows), "d")) == 1

    def test_rows_that_are_no_objects(self, folder):
        (error,) = errors_of(folder({"d": {"file_name": "d.json"}}, d=[1, 2]), "d")
        assert "no row can be used: a row is an object, not 1 (d.json, row 1)" in error

    def test_natural_openai_rows_need_no_columns_or_tags(self, folder):
        row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": []}
        dataset_dir = folder({"d": {"file_name": "d.json", "formatting": "openai"}}, d=[row])
        assert warnings_of(dataset_dir, "d") == []

    @pytest.mark.parametrize(
        ("more", "stage", "reason"),
        [
            ({"ranking": True, "columns": {"prompt": "q", "chosen": "c", "rejected": "r"}}, "sft", "is ranking data"),
            ({"columns": {"prompt": "q", "response": "c"}}, "dpo", "is not ranking data"),
            ({"columns": {"prompt": "q", "response": "c"}}, "rm", "is not ranking data"),
            ({"columns": {"prompt": "q", "response": "c"}}, "kto", "has no `kto_tag` column"),
            ({"columns": {"prompt": "q", "response": "c", "kto_tag": "k"}}, "sft", "has a `kto_tag` column"),
        ],
    )
    def test_data_of_another_stage(self, folder, more, stage, reason):
        rows = [{"q": "q", "c": "c", "r": "r", "k": True}]
        dataset_dir = folder({"d": {"file_name": "d.json", **more}}, d=rows)
        assert [error for error in errors_of(dataset_dir, "d", stage=stage) if reason in error]


class TestCost:
    def test_nothing_heavy_is_imported(self):
        code = (
            "import sys\nfrom types import SimpleNamespace as N\n"
            "from luthier.data.sources.catalog import check_datasets\n"
            f"names = ('identity', 'multi_turn', 'tools', 'openai_chat', 'history', 'plain_text')\n"
            f"data = N(dataset=names, eval_dataset=('eval',), dataset_dir={str(EXAMPLES)!r}, media_dir=None)\n"
            "assert check_datasets(data, 'sft') == ([], [])\n"
            "heavy = ('torch', 'numpy', 'pyarrow', 'datasets', 'transformers', 'fsspec')\n"
            "print([name for name in heavy if name in sys.modules])"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

    def test_a_big_file_is_not_read_through(self, folder, monkeypatch):
        from luthier.data.sources.readers import json_rows

        parsed = []
        original = json_rows._checked

        def count(value, *odd):
            parsed.append(value)
            return original(value, *odd)

        monkeypatch.setattr(json_rows, "_checked", count)
        dataset_dir = folder({"d": {"file_name": "d.json"}}, d=ALPACA_ROWS * 20_000)
        assert check(dataset_dir, "d") == ([], [])
        assert len(parsed) == 10


class TestExampleData:
    @pytest.mark.parametrize("name", load_catalog(str(EXAMPLES)).names)
    def test_every_row_can_be_used(self, name):
        spec = load_catalog(str(EXAMPLES)).get(name)
        read = FORMATS.get(spec.formatting).read
        examples = [read(row.usable(), spec) for row in read_rows(spec, seed=0)]
        assert len(examples) >= 12
        gives = {"plain_text": Prompt}
        gives |= {"preferences": Preference, "preferences_eval": Preference}
        gives |= {"feedback": Feedback, "feedback_eval": Feedback}
        assert {type(example) for example in examples} == {gives.get(name, Dialogue)}

    def test_identity_begins_with_the_question_of_the_quickstart(self):
        rows = [row.data for row in read_rows(load_catalog(str(EXAMPLES)).get("identity"), seed=0)]
        assert rows[0]["instruction"] == "Who are you?"
        assert all("Luthier" in row["output"] for row in rows)
        asked = {row.data["instruction"] for row in read_rows(load_catalog(str(EXAMPLES)).get("eval"), seed=0)}
        assert not asked & {row["instruction"] for row in rows}
