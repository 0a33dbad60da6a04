"""Reading files, flags and overrides: where a value came from, and one clear message for what cannot be read."""

import pytest

from luthier.config.load import load_infer, load_train
from luthier.config.source import COMMAND_LINE, read
from luthier.core.errors import ConfigError

OLD_SCRIPT = (
    "--stage sft --do_train --model_name_or_path models/a --dataset a,b --template default --finetuning_type lora "
    "--lora_target q_proj,v_proj --output_dir saves --overwrite_cache --per_device_train_batch_size 4 "
    "--gradient_accumulation_steps 4 --lr_scheduler_type cosine --logging_steps 10 --save_steps 1000 "
    "--learning_rate 5e-5 --num_train_epochs 3.0 --plot_loss --fp16"
)
NAMES = {"a", "b", "do_train", "plot_loss", "no_cuda", "learning_rate", "kwargs"}


def words(*argv):
    written = read(list(argv), (), NAMES.__contains__)
    return {name: entry.value for name, entry in written.entries.items()}, written.problems


def write(tmp_path, text, name="run.yaml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ("# only a comment\n", "holds no keys"),
        ("- a\n- b\n", "must be a mapping"),
        ("just words\n", "must be a mapping"),
        ("a: [1, 2\nb: 3\n", "is not valid YAML"),
        ("a: b: c\n", "is not valid YAML"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML"),
        ("a: !!python/name:os.system x\n", "is not valid YAML"),
        ("a: 2024-13-45\n", "is not valid YAML"),
        ("\ta: 1\n", "is not valid YAML"),
        (b"model: \xff\xfe\n", "is not UTF-8 text (byte 7)"),
    ],
)
def test_a_file_that_cannot_be_read_gives_one_message(tmp_path, text, reason):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_train(path)
    (problem,) = caught.value.problems
    assert reason in problem.reason and problem.file == str(path) and caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("name", "text", "line", "words"),
    [
        (
            "fsdp2.yaml",
            "debug: false\ndistributed_type: FSDP\n",
            2,
            ("accelerate", "--config_file {} -m luthier train"),
        ),
        (
            "z3.json",
            '{"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}',
            1,
            ("DeepSpeed", "deepspeed: {}"),
        ),
    ],
)
def test_a_configuration_of_a_launcher_is_told_where_it_belongs(tmp_path, name, text, line, words):
    path = write(tmp_path, text, name)
    with pytest.raises(ConfigError) as caught:
        load_train(path, ["model_name_or_path=m"])
    (problem,) = caught.value.problems
    library, remedy = words
    assert library in problem.reason and remedy.format(path) in problem.remedy and problem.line == line


def test_the_line_of_a_syntax_error_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.yaml:2: run file: is not valid YAML"):
        load_train(write(tmp_path, "a: 1\nb: c: d\n"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [('{"a": 1', "is not valid JSON"), ("[1]", "must be an object"), ('{"a": 1,}', "is not valid JSON")],
)
def test_bad_json(tmp_path, text, reason):
    with pytest.raises(ConfigError, match=reason):
        load_train(write(tmp_path, text, "run.json"))


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_train(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="does not exist"):
        load_train([str(tmp_path / "none.yaml")])
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        load_train(tmp_path / "folder.yaml")
    with pytest.raises(ConfigError, match=r"ends in \.yaml"):
        load_train(tmp_path / "run.txt")


def test_a_key_written_twice_is_named_with_both_lines(tmp_path):
    path = write(tmp_path, "model_name_or_path: m\ntemplate: a\n\ntemplate: b\n")
    with pytest.raises(ConfigError) as caught:
        load_infer(path)
    (problem,) = caught.value.problems
    assert (problem.key, problem.line) == ("template", 4) and "lines 2 and 4" in problem.reason


def test_a_nested_key_written_twice(tmp_path):
    path = write(tmp_path, "a: 1\nkwargs:\n  x: 1\n  x: 2\n")
    (problem,) = read(path, (), NAMES.__contains__).problems
    assert problem.key == "kwargs.x" and "lines 3 and 4" in problem.reason


def test_a_json_key_written_twice(tmp_path):
    path = write(tmp_path, '{\n "a": 1,\n "b": {"a": 2},\n "a": 3\n}', "run.json")
    (problem,) = read(path, (), NAMES.__contains__).problems
    assert problem.key == "a" and "lines 2 and 4" in problem.reason


def test_a_nested_json_key_written_twice(tmp_path):
    text = '{\n "a": {"x": 1},\n "b": [{"c": {"x": 1, "x": 2}}],\n "d": {"x": 1}\n}'
    (problem,) = read(write(tmp_path, text, "run.json"), (), NAMES.__contains__).problems
    assert (problem.key, problem.line) == ("b", 3) and "holds the key x twice" in problem.reason


@pytest.mark.parametrize(("text", "name"), [("a: &x\n  b: *x\n", "run.yaml"), ('{"a":' * 99_999, "run.json")])
def test_a_file_that_has_no_end_in_depth(tmp_path, text, name):
    with pytest.raises(ConfigError, match="nested too deeply, or an alias"):
        load_train(write(tmp_path, text, name))


def test_lines_of_json_keys(tmp_path):
    path = write(tmp_path, '{"a": "x, y: {",\n\n "b" : [1,\n 2], "kwargs":{}}', "run.json")
    entries = read(path, (), NAMES.__contains__).entries
    assert {name: (entry.value, entry.line) for name, entry in entries.items()} == {
        "a": ("x, y: {", 1),
        "b": ([1, 2], 3),
        "kwargs": ({}, 4),
    }


def test_json_with_a_byte_order_mark(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbf{"a": 1}', "run.json")
    assert read(path, (), NAMES.__contains__).entries["a"].value == 1


def test_an_empty_json_object(tmp_path):
    assert read(write(tmp_path, "{ }", "run.json"), (), NAMES.__contains__).entries == {}


def test_lines_of_yaml_keys_with_a_byte_order_mark_and_anchors(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbfa: &x {y: 1}\n\nb: *x\nkwargs:\n  <<: *x\n  z: 2\n")
    entries = read(path, (), NAMES.__contains__).entries
    assert {name: (entry.value, entry.line) for name, entry in entries.items()} == {
        "a": ({"y": 1}, 1),
        "b": ({"y": 1}, 3),
        "kwargs": ({"y": 1, "z": 2}, 4),
    }


def test_numbers_inside_mappings_are_numbers(tmp_path):
    entries = read(write(tmp_path, "kwargs: {x: 1e-4, y: 5E6, z: 1.5e3, w: e4}\n"), (), NAMES.__contains__).entries
    assert entries["kwargs"].value == {"x": 1e-4, "y": 5e6, "z": 1500.0, "w": "e4"}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--a", "1", "--b=2"], {"a": "1", "b": "2"}),
        (["a=1", "b=x=y"], {"a": "1", "b": "x=y"}),
        (["--do_train", "--a", "1"], {"do_train": True, "a": "1"}),
        (["--do_train", "false", "--plot_loss"], {"do_train": "false", "plot_loss": True}),
        (["--no_plot_loss", "--a", "1"], {"plot_loss": False, "a": "1"}),
        (["--no_cuda"], {"no_cuda": True}),
        (["--learning-rate", "-1e-4"], {"learning_rate": "-1e-4"}),
        (["--do_train", "a=1"], {"do_train": True, "a": "1"}),
        (["--a", "x=1"], {"a": "x=1"}),
        (["a=1", "--a", "2"], {"a": "2"}),
        (
            ["kwargs.x=1e-4", "kwargs.y.z=true", "--kwargs.w", "text"],
            {"kwargs": {"x": 1e-4, "y": {"z": True}, "w": "text"}},
        ),
        (['kwargs={"x": 1}', "kwargs.y=2"], {"kwargs": {"x": 1, "y": 2}}),
    ],
)
def test_words_of_the_command_line(argv, expected):
    assert words(*argv) == (expected, [])


def test_a_word_without_a_key_is_an_error():
    _, problems = words("--a", "1", "2")
    assert [problem.key for problem in problems] == ["2"] and problems[0].file == COMMAND_LINE


@pytest.mark.parametrize("argv", [["a=1", "a.x=2"], ["kwargs.x=1", "kwargs.x.y=2"]])
def test_a_dotted_key_needs_a_mapping(argv):
    _, problems = words(*argv)
    assert "holds no mapping" in problems[0].reason


def test_overrides_go_before_the_file_and_leave_the_rest_of_a_mapping(tmp_path):
    schedule = "lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {power: 1, lr_end: 2}\n"
    path = write(tmp_path, f"model_name_or_path: m\n{schedule}dataset: d\noutput_dir: o\n")
    run = load_train([str(path), "lr_scheduler_kwargs.lr_end=3", "--lora_rank", "4"])
    assert run.training["lr_scheduler_kwargs"] == {"power": 1, "lr_end": 3} and run.adapter.lora_rank == 4
    assert run.source == str(path)


def test_the_old_script_form():
    run = load_train(OLD_SCRIPT.split())
    assert (run.stage, run.data.dataset, run.adapter.lora_target) == ("sft", ("a", "b"), ("q_proj", "v_proj"))
    assert run.data.overwrite_cache and run.finetuning.plot_loss and run.training["fp16"] and run.trains
    assert run.training["learning_rate"] == 5e-5 and run.training["save_steps"] == 1000
    assert run.warnings == ()


def test_a_flag_without_its_value_is_named():
    with pytest.raises(ConfigError, match="output_dir: true: needs a value: must be text -> write --output_dir VALUE"):
        load_train(["--model_name_or_path", "m", "--dataset", "d", "--output_dir"])
