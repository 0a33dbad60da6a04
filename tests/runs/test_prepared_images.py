"""Tables of rows with images: their columns in every stage, and what a second start does."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from luthier.config.load import load_train
from luthier.core.errors import DataError, ModelError
from luthier.core.kinds import STAGES
from luthier.data.media import reader
from luthier.data.media.blocks import MediaProcessor
from luthier.data.prepare import prepare
from luthier.workflow.preflight import content_problems
from luthier.workflow.text import load_text_side
from tests import killable
from tests.data.media.rows import TAG, answer, row, user
from tests.media_models import draw

NUM_LARGE = 400


@pytest.fixture
def keys(worlds, tmp_path):
    """The keys of a run on four rows with images of their own."""
    for number in range(4):
        draw(tmp_path / f"{number}.png", height=28 * (number + 1), seed=number)
    rows = [
        {
            **row(user(f"{TAG}what"), images=[f"{number}.png"]),
            "output": "y" * number, "liked": bool(number % 2), "chosen": answer("good"), "rejected": answer("bad"),
        }
        for number in range(4)
    ]  # fmt: skip
    talks = [{**data, "messages": [*data["messages"], answer(data["output"] or "none")]} for data in rows]
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "plain.json").write_text(json.dumps([{"instruction": "hi", "output": "ho"}]))
    columns = {"messages": "messages", "images": "images"}
    see = {"file_name": "talks.json", "formatting": "openai", "columns": columns}
    pairs = {"file_name": "rows.json", "formatting": "openai", "ranking": True}
    info = {
        "see": see,
        "likes": {**see, "columns": {**columns, "kto_tag": "liked"}},
        "pairs": {**pairs, "columns": {**columns, "chosen": "chosen", "rejected": "rejected"}},
        "plain": {"file_name": "plain.json"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    model = str(worlds("paddleocr_vl").folder / "model")
    return {"model_name_or_path": model, "dataset": "see", "dataset_dir": str(tmp_path), "output_dir": "unused"}


def prepared(keys, **changes):
    run = load_train({**keys, **changes})
    text = load_text_side(run)
    return prepare(run, STAGES.get(run.stage).rows, text.encoding)


def names(paths):
    return [os.path.basename(path) for path in paths]


def test_the_columns_of_a_row(keys, tmp_path):
    table = prepared(keys).table
    assert table.column_names == ["input_ids", "labels", "weights", "blocks", "images"]
    assert table["images"] == [[str(tmp_path / f"{number}.png")] for number in range(4)]
    assert table["blocks"] == [[6, 6 + 2 + number] for number in range(1, 5)]


def test_rows_of_a_dataset_without_images_have_the_columns_beside_those_with(keys):
    table = prepared(keys, dataset="plain,see").table
    assert names(table[1]["images"]) == ["0.png"]
    assert (table[0]["blocks"], table[0]["images"]) == ([], [])


def test_a_run_without_images_has_the_columns_of_before(keys):
    data = prepared(keys, dataset="plain")
    assert data.table.column_names == ["input_ids", "labels", "weights"]


def test_a_second_start_opens_no_image_and_calls_no_processor(keys, tmp_path, monkeypatch):
    first = prepared(keys)

    def refuse(*values):
        raise AssertionError("nothing has changed")

    with monkeypatch.context() as patch:
        patch.setattr(reader, "load_image", refuse)
        patch.setattr(reader, "decoded_size", refuse)
        patch.setattr(MediaProcessor, "_asked", refuse)
        second = prepared(keys)
    assert second.fingerprint == first.fingerprint
    assert second.ledger.to_json() == first.ledger.to_json()
    draw(tmp_path / "0.png", height=28 * 3)
    assert prepared(keys).table[0]["blocks"] == [6, 11]


def test_limits_of_the_processor_make_other_rows(keys):
    assert prepared(keys, image_max_pixels=2 * 28 * 28).table["blocks"] == [[6, 9], [6, 10], [6, 10], [6, 10]]


def test_packs(keys):
    """The blocks of a pack are at their places in it."""
    plain, data = prepared(keys), prepared(keys, packing=True, cutoff_len=128)
    assert sum(len(pack["images"]) for pack in data.table) == 4
    for pack in data.table:
        starts, stops = pack["blocks"][::2], pack["blocks"][1::2]
        for name, start, stop in zip(names(pack["images"]), starts, stops, strict=True):
            ids = plain.table[int(name[0])]["input_ids"]
            assert pack["input_ids"][start - 6 : stop] == ids[: 6 + stop - start]


def test_ranking(keys):
    table = prepared(keys, stage="rm", dataset="pairs").table
    assert table["chosen_blocks"] == table["rejected_blocks"] == [[6, 6 + 2 + number] for number in range(1, 5)]
    assert [names(paths) for paths in table["images"]] == [[f"{number}.png"] for number in range(4)]


def test_mismatched_pairs_keep_the_images_of_their_prompt(keys, tmp_path):
    """All ask the same of images of one size: their prompts differ in the images alone."""
    for number in range(4):
        draw(tmp_path / f"{number}.png", seed=number)
    table = prepared(keys, stage="kto", dataset="likes", pref_loss="kto_pair").table
    assert table["blocks"] == table["kl_blocks"] == [[6, 9]] * 4
    assert [names(paths) for paths in table["images"]] == [[f"{number}.png"] for number in range(4)]
    assert all(whole["kl_input_ids"][:9] == whole["input_ids"][:9] for whole in table)
    assert all(whole["kl_input_ids"] != whole["input_ids"] for whole in table)


def test_prompts_for_generation(keys):
    data = prepared(keys, predict_with_generate=True, do_predict=True, do_train=False, dataset="", eval_dataset="see")
    prompts = data.prompts[""]
    assert prompts["blocks"] == [[6, 6 + 2 + number] for number in range(1, 5)]
    assert [names(paths) for paths in prompts["images"]] == [[f"{number}.png"] for number in range(4)]
    assert min(map(min, prompts["labels"])) >= 0


def test_prompts_that_the_model_answers(keys, tmp_path):
    (tmp_path / "rewards.py").write_text("def length(prompts, answers): return [0.0 for _ in answers]")
    table = prepared(keys, stage="grpo", reward_funcs=f"{tmp_path}/rewards.py:length").table
    assert [names(paths) for paths in table["images"]] == [[f"{number}.png"] for number in range(4)]


def test_a_stream_has_the_same_rows(keys):
    whole = prepared(keys).table
    data = prepared(keys, streaming=True, max_steps=1, buffer_size=1)
    rows, ledger = data.streamed.first(4)
    assert rows == [whole[number] for number in range(4)]
    assert sum(account.images for account in ledger.accounts.values()) == 4


def test_tokenized_rows_are_read_again(keys, tmp_path):
    folder = str(tmp_path / "tokenized")
    first = prepared(keys, tokenized_path=folder)
    assert prepared(keys, tokenized_path=folder).fingerprint == first.fingerprint
    with pytest.raises(DataError, match="processor of images"):
        prepared(keys, tokenized_path=folder, image_max_pixels=28 * 28)


class TestBeforeDataAreRead:
    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"on_overlong": "split"}, "on_overlong: split would cut rows apart from their images -> set on_overlong"),
            ({"stage": "pt"}, "stage pt learns plain text without images -> "),
            ({"media_dir": "dataset_info.json"}, "media_dir: 'dataset_info.json': is a file, not a folder -> "),
            ({"media_dir": "no"}, "media_dir: 'no': is not there -> "),
        ],
    )
    def test_problems(self, keys, tmp_path, monkeypatch, changes, problem):
        monkeypatch.chdir(tmp_path)
        errors, _ = content_problems(load_train({**keys, **changes}), (), others=False)
        assert [problem in str(error) for error in errors] == [True], errors

    def test_a_model_that_reads_text(self, keys, llama_folder):
        with pytest.raises(ModelError, match="the model reads text only, and the data declare images -> "):
            prepared(keys, model_name_or_path=str(llama_folder), template="chatml")

    def test_images_would_be_text(self, keys):
        with pytest.raises(ModelError, match="split_special_tokens: true would write the tokens of media as text"):
            prepared(keys, split_special_tokens=True)

    def test_no_row_can_be_used(self, keys, tmp_path):
        for number in range(4):
            (tmp_path / f"{number}.png").unlink()
        with pytest.raises(DataError, match=r"dataset 'see' has no usable row\n  see: 4 dropped: column 'images'"):
            prepared(keys)


def test_media_dir_is_where_paths_start(keys, tmp_path):
    (tmp_path / "apart").mkdir()
    for number in range(4):
        (tmp_path / f"{number}.png").rename(tmp_path / "apart" / f"{number}.png")
    table = prepared(keys, media_dir=str(tmp_path / "apart")).table
    assert table[0]["images"] == [str(tmp_path / "apart" / "0.png")]


def test_images_in_a_table(keys, tmp_path):
    """As the hub has them: the bytes of each image beside its name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    contents = [{"bytes": (tmp_path / f"{number}.png").read_bytes(), "path": f"{number}.png"} for number in range(4)]
    columns = {"instruction": [f"{TAG}what"] * 4, "output": ["red"] * 4, "picture": [[item] for item in contents]}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    info = {
        "table": {
            "file_name": "rows.parquet",
            "columns": {"prompt": "instruction", "response": "output", "images": "picture"},
        }
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    table = prepared(keys, dataset="table").table
    assert table["blocks"] == prepared(keys, dataset="table").table["blocks"] == [[6, 8 + n] for n in range(1, 5)]
    for (path,), item in zip(table["images"], contents, strict=True):
        assert Path(path).read_bytes() == item["bytes"]


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_text_of_a_model_that_sees(keys, worlds, family):
    """The chat template of LLaVA writes no word of a content that is text."""
    data = prepared(keys, dataset="plain", model_name_or_path=str(worlds(family).folder / "model"))
    text = worlds(family).text.tokenizer.decode(data.table[0]["input_ids"])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"


def interrupted_when_it_measures(number: int, cache: str) -> None:
    os.environ["LUTHIER_CACHE"] = cache
    killable.at_call(reader, "decoded_size", number, partial(os.kill, os.getpid(), signal.SIGINT))


@pytest.mark.thorough
def test_an_interrupt_while_images_are_measured_loses_none(keys, tmp_path, monkeypatch):
    """What the process has measured until Ctrl-C, the next start does not open."""
    draw(tmp_path / "large.jpg", height=900, width=1200)
    rows = [{**row(user(f"{TAG}what"), answer("red"), images=[f"large-{number}.jpg"])} for number in range(NUM_LARGE)]
    for number in range(NUM_LARGE):
        os.link(tmp_path / "large.jpg", tmp_path / f"large-{number}.jpg")
    (tmp_path / "talks.json").write_text(json.dumps(rows))
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    log, run = tmp_path / "log", {**keys, "output_dir": str(tmp_path / "out"), "do_train": True}
    changes = partial(interrupted_when_it_measures, 100, str(tmp_path / "cache"))
    process = killable.start(run, log, command="train", changes=changes)
    process.join()
    said, measured = log.read_text(), len((tmp_path / "cache" / "media" / "sizes.jsonl").read_text().splitlines())
    assert process.exitcode == 130 and said.endswith("luthier: interrupted\n") and "Traceback" not in said
    assert 5 < measured < NUM_LARGE
    opened = []
    monkeypatch.setattr(reader, "decoded_size", lambda path, of=reader.decoded_size: opened.append(path) or of(path))
    assert len(prepared(keys).table) == NUM_LARGE
    assert len(opened) == NUM_LARGE - measured
