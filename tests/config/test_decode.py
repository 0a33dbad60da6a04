"""Types are the same for YAML, JSON, `key=value` and `--flags`: what is right, or wrong, by one way is so by all."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from luthier.config.decode import Misfit, Text, decode
from luthier.config.load import load_train
from luthier.core.errors import ConfigError

BASE = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "do_train": True}


def by_yaml(folder: Path, key: str, text: str):
    path = folder / "run.yaml"
    path.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in BASE.items()) + f"{key}: {text}\n", encoding="utf-8")
    return load_train(path)


def by_json(folder: Path, key: str, text: str):
    path = folder / "run.json"
    head = json.dumps(BASE)[:-1]
    path.write_text(f'{head}, "{key}": {text}}}', encoding="utf-8")
    return load_train(path)


def by_override(folder: Path, key: str, text: str):
    return load_train(BASE, [f"{key}={text}"])


def by_flag(folder: Path, key: str, text: str):
    return load_train(["--model_name_or_path", "m", "--dataset=d", "--output_dir", "o", "--do_train", f"--{key}", text])


ROUTES = {"yaml": by_yaml, "json": by_json, "key=value": by_override, "flags": by_flag}

RIGHT = [
    ("learning_rate", "1e-4", 1e-4),
    ("learning_rate", "5.0e-6", 5e-6),
    ("learning_rate", "1", 1.0),
    ("cutoff_len", "1024", 1024),
    ("max_samples", "null", None),
    ("max_steps", "-1", -1),
    ("overwrite_cache", "true", True),
    ("overwrite_cache", "false", False),
    ("val_size", "0", 0.0),
    ("logging_steps", "10", 10),
    ("logging_steps", "0.5", 0.5),
    ("enable_thinking", "null", None),
    ("adam_epsilon", "1E-8", 1e-8),
]
WRONG = [
    ("cutoff_len", "true", "must be a whole number"),
    ("cutoff_len", "1.5", "must be a whole number"),
    ("overwrite_cache", "1", "must be true or false"),
    ("overwrite_cache", "0.0", "must be true or false"),
    ("learning_rate", "true", "must be a number"),
    ("lora_rank", "null", "must be a whole number"),
    ("report_to", "[1]", "must be one of none, all"),
]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("key", "text", "value"), RIGHT)
def test_a_right_value_is_the_same_by_every_route(route, key, text, value, tmp_path):
    run = ROUTES[route](tmp_path, key, text)
    assert run.given[key] == value and type(run.given[key]) is type(value)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("key", "text", "reason"), WRONG)
def test_a_wrong_value_is_wrong_by_every_route(route, key, text, reason, tmp_path):
    with pytest.raises(ConfigError) as caught:
        ROUTES[route](tmp_path, key, text)
    (problem,) = caught.value.problems
    assert problem.key == key and problem.reason.startswith(reason) and problem.has_value


@pytest.mark.parametrize("route", ROUTES)
def test_words_that_are_no_number_are_named(route, tmp_path):
    text = '"eight"' if route == "json" else "eight"
    with pytest.raises(ConfigError, match="lora_rank: 'eight': must be a whole number"):
        ROUTES[route](tmp_path, "lora_rank", text)


@pytest.mark.parametrize("text", ['"q_proj,v_proj"', '"q_proj, v_proj"', '["q_proj", "v_proj"]'])
@pytest.mark.parametrize("route", [by_yaml, by_json])
def test_lists_are_written_with_commas_or_brackets(route, text, tmp_path):
    assert route(tmp_path, "lora_target", text).adapter.lora_target == ("q_proj", "v_proj")


@pytest.mark.parametrize("text", ["q_proj,v_proj", "[q_proj, v_proj]", '["q_proj","v_proj"]'])
@pytest.mark.parametrize("route", [by_override, by_flag])
def test_lists_on_the_command_line(route, text, tmp_path):
    assert route(tmp_path, "lora_target", text).adapter.lora_target == ("q_proj", "v_proj")


def test_null_for_a_list_is_its_default(tmp_path):
    run = by_yaml(tmp_path, "lora_target", "null")
    assert run.adapter.lora_target == ("all",)
    assert by_override(tmp_path, "eval_dataset", "null").data.eval_dataset == ()


def test_shares_are_numbers(tmp_path):
    run = load_train({**BASE, "dataset": "a,b", "mix_strategy": "interleave_under", "interleave_probs": "0.3, 0.7"})
    assert run.data.interleave_probs == (0.3, 0.7)


@pytest.mark.parametrize("word", ["True", "yes", "ON"])
def test_booleans_of_the_command_line_may_be_words(word, tmp_path):
    assert by_flag(tmp_path, "bf16", word).training["bf16"] is True


def test_a_quoted_boolean_of_a_file_is_text(tmp_path):
    with pytest.raises(ConfigError, match="remove the quotes"):
        by_yaml(tmp_path, "bf16", '"true"')


def test_yaml_reads_the_word_no_as_false_and_it_is_meant_as_a_choice(tmp_path):
    assert by_yaml(tmp_path, "save_strategy", "no").training["save_strategy"] == "no"
    with pytest.raises(ConfigError):
        by_yaml(tmp_path, "lr_scheduler_type", "no")


def test_a_misspelt_choice_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="did you mean cosine") as caught:
        by_override(tmp_path, "lr_scheduler_type", "cosin")
    assert "linear" in caught.value.problems[0].reason


@pytest.mark.parametrize("text", ['{"num_cycles": 2, "min_lr": 1e-5}', "{num_cycles: 2, min_lr: 1e-5}"])
def test_mappings_may_be_text(text, tmp_path):
    expected = {"num_cycles": 2, "min_lr": 1e-5}
    schedule = {"lr_scheduler_type": "cosine_with_min_lr"}
    overridden = load_train({**BASE, **schedule}, [f"lr_scheduler_kwargs={text}"])
    written = by_yaml(tmp_path, "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs", text)
    assert overridden.training["lr_scheduler_kwargs"] == written.training["lr_scheduler_kwargs"] == expected


def test_a_path_may_stand_for_a_mapping(tmp_path):
    assert by_yaml(tmp_path, "fsdp_config", "fsdp.json").training["fsdp_config"] == "fsdp.json"


def test_digits_for_text_must_be_quoted_in_a_file_but_not_on_the_command_line(tmp_path):
    with pytest.raises(ConfigError, match='must be text -> write it in quotes: "2024"'):
        by_yaml(tmp_path, "run_name", "2024")
    assert by_flag(tmp_path, "run_name", "2024").training["run_name"] == "2024"


def test_paths_of_python_are_text():
    run = load_train({**BASE, "output_dir": Path("a") / "b"})
    assert run.training["output_dir"] == str(Path("a") / "b")


WORDS_LIKE_NULL = ["None", "none", "NONE", "nil", "nan", "NaN"]
TEXT_KEYS = [
    *(
        "default_system",
        "tokenized_path",
        "template",
        "run_name",
        "cache_dir",
        "hub_token",
        "dataset_dir",
    ),
    *("eval_dataset", "adapter_name_or_path", "additional_target", "max_samples", "enable_thinking"),
]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("key", TEXT_KEYS)
@pytest.mark.parametrize("word", WORDS_LIKE_NULL)
def test_other_words_for_nothing_are_refused(route, key, word, tmp_path):
    with pytest.raises(ConfigError) as caught:
        ROUTES[route](tmp_path, key, json.dumps(word) if route == "json" else word)
    (problem,) = (problem for problem in caught.value.problems if problem.key == key)
    assert problem.reason.endswith(f", not the word {word}")
    assert problem.remedy.startswith("write null" if key != "dataset_dir" else "write the text")


@pytest.mark.parametrize("key", ["default_system", "tokenized_path", "eval_dataset", "max_samples"])
@pytest.mark.parametrize("word", ["null", "Null", "NULL", "~"])
def test_every_spelling_of_null_is_nothing_in_yaml_and_on_the_command_line(key, word, tmp_path):
    for route in (by_yaml, by_override, by_flag):
        assert route(tmp_path, key, word).given[key] in (None, ())
    for quoted in (by_yaml, by_json):
        with pytest.raises(ConfigError, match="write null without quotes"):
            quoted(tmp_path, key, json.dumps(word))


def test_none_is_a_word_where_it_is_a_choice_and_part_of_a_text(tmp_path):
    assert by_yaml(tmp_path, "report_to", "none").training["report_to"] == ("none",)
    assert by_yaml(tmp_path, "default_system", "None of this is secret.").data.default_system.startswith("None of")
    assert by_yaml(tmp_path, "tokenized_path", "./None").data.tokenized_path == "./None"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("key", ["deepspeed", "fsdp_config", "lr_scheduler_kwargs", "accelerator_config"])
@pytest.mark.parametrize("word", WORDS_LIKE_NULL)
def test_words_for_nothing_inside_a_mapping_are_refused(route, key, word, tmp_path):
    for value, place in (({"a": {"b": word}}, "a.b"), ({"a": [{}, {"b": word}]}, "a.1.b")):
        with pytest.raises(ConfigError) as caught:
            ROUTES[route](tmp_path, key, json.dumps(value))
        (problem,) = (problem for problem in caught.value.problems if problem.key == key)
        assert problem.reason == f"holds the word {word} at {place}"
        assert problem.remedy == "write null without quotes, or leave it out"


def test_nothing_and_words_that_mean_it_inside_a_mapping(tmp_path):
    text = "{a: null, b: ~, c: '', optimizer: {device: none}, d: [null, Nothing]}"
    expected = {"a": None, "b": None, "c": "", "optimizer": {"device": "none"}, "d": [None, "Nothing"]}
    assert by_yaml(tmp_path, "deepspeed", text).training["deepspeed"] == expected
    with pytest.raises(ConfigError, match=r"holds nan at a.b, which is not a number"):
        by_yaml(tmp_path, "deepspeed", "{a: {b: .nan}}")


def test_nan_is_no_number(tmp_path):
    with pytest.raises(ConfigError, match="learning_rate: nan: must be a number"):
        by_yaml(tmp_path, "learning_rate", ".nan")


@pytest.mark.parametrize(
    ("value", "expected", "result"),
    [
        (Text("7"), int | None, 7),
        (Text("null"), int | None, None),
        (Text("NULL"), int | None, None),
        (Text("~"), str | None, None),
        (Text("true"), bool | str, True),
        (Text("all"), bool | str, "all"),
        (Text("a,b"), tuple[str, ...] | str | None, ("a", "b")),
        (Text("a.*b"), tuple[str, ...] | str | None, "a.*b"),
        (["a"], tuple[str, ...] | str | None, ("a",)),
        (3, int | float, 3),
        (0.5, int | float, 0.5),
        ({"a": 1}, dict[str, Any] | str, {"a": 1}),
        ("x", Literal["x", "y"], "x"),
    ],
)
def test_decode(value, expected, result):
    decoded = decode(value, expected)
    assert decoded == result and type(decoded) is type(result)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, int),
        (1, bool),
        (Text("1"), bool),
        (None, int),
        ([1], str),
        ("a\0b", str),
        ("\ud800", str),
        (["a", "b\0"], tuple[str, ...]),
        ({1: 2}, dict[str, Any]),
        ("z", Literal["x", "y"]),
        (Text(""), int),
        (Text("null"), str),
        (["a", "None"], tuple[str, ...]),
        ("a,nan", tuple[str, ...]),
        (True, int | float),
        ([True], tuple[float, ...]),
    ],
)
def test_decode_refuses(value, expected):
    with pytest.raises(Misfit):
        decode(value, expected)


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_a_whole_number_beyond_all_floats_is_no_number(value):
    with pytest.raises(Misfit, match="must be a number"):
        decode(value, float)
