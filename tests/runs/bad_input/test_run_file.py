"""Faults in the run file and on the command line: told before torch is imported, with key, line, reason and remedy."""

import json

import pytest

from luthier.config.source import SUFFIXES


def test_misspelt_key(person):
    said = person.is_refused(learning_rat=0.1)
    assert "run.yaml:7: learning_rat: 0.1: unknown key -> did you mean learning_rate?" in said


def test_all_problems_at_once(person):
    said = person.is_refused(learning_rat=0.1, max_steps="many", dataset="nubers", drop=["output_dir"])
    assert "4 problems" in said
    for part in ("learning_rat: 0.1", "max_steps: 'many'", "dataset: 'nubers'", "output_dir: is missing"):
        assert part in said


@pytest.mark.parametrize("command", ["train", "check"])
def test_keys_and_what_they_point_to_in_one_round(person, command):
    """A misspelt key, a missing dataset, a missing model, a broken rule and a warning, in the order of the lines."""
    lines = {
        "model_name_or_path": "no/such/model",
        "dataset_dir": person.keys["dataset_dir"],
        "dataset": "nubers",
        "template": "chatlm",
        "output_dir": str(person.out),
        "do_train": True,
        "learning_rat": 0.1,
        "num_train_epochs": 0,
        "warmup_ratio": 0.1,
        "warmup_steps": 5,
    }
    outcome = person.types(command, person.run_file("".join(f"{key}: {value}\n" for key, value in lines.items())))
    path = person.folder / "run.yaml"
    errors = [line.strip() for line in outcome.complaint().splitlines()]
    model = f"{path}:1: model_name_or_path: 'no/such/model': "
    others = [
        f"{path}:3: dataset: 'nubers': is not described in ",
        f"{path}:4: template: 'chatlm': no chat format has this name -> did you mean chatml or chatglm3?",
        f"{path}:7: learning_rat: 0.1: unknown key -> did you mean learning_rate?",
        f"{path}:8: num_train_epochs: 0: leaves nothing to train -> ",
    ]
    expected = [
        f"luthier: {path}: {5 if command == 'train' else 4} problems",
        *([model] * (command == "train")),
        *others,
    ]
    assert len(errors) == len(expected)
    assert all(line.startswith(start) for line, start in zip(errors, expected, strict=True))
    told = [line for line in (outcome.out + outcome.err).splitlines() if line.startswith("warning: ")]
    noted = [f"warning: {path}:9: warmup_ratio: 0.1: is not read, since warmup_steps takes precedence"]
    noted = noted if command == "train" else [f"warning: {model}", *noted]  # the model may be on another machine
    assert len(told) == len(noted) and all(line.startswith(start) for line, start in zip(told, noted, strict=True))
    assert outcome.out == ("" if command == "train" else "\n".join(told) + "\n")


@pytest.mark.parametrize(
    ("changes", "drop"),
    [
        ({"model_name_or_path": ["no", "such"]}, []),
        ({"model_name_or_pth": "no/such"}, ["model_name_or_path"]),
        ({"dataset_dir": ["no/such"]}, []),
        ({"datset": "numbers"}, ["dataset"]),
        ({"stage": "kot"}, []),
        ({"stage": "dppo", "pref_beta": 0.2}, []),
        ({"quantization_method": "bmb", "quantization_bit": 3, "finetuning_type": "lora"}, []),
        ({"evaluation_strategy": ["steps"]}, []),
    ],
)
def test_nothing_is_concluded_from_the_default_of_a_key_at_fault(person, changes, drop):
    """What the first of the changes was meant to say is not known, so nothing else is said."""
    outcome = person.types("train", person.run_file(**changes, drop=drop))
    assert len(outcome.complaint().splitlines()) == 2
    assert f": {next(iter(changes))}: " in outcome.err and "warning: " not in outcome.err


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("max_steps", "many", "must be a whole number"),
        ("max_steps", 1.5, "must be a whole number"),
        ("learning_rate", "fast", "must be a number"),
        ("do_train", "maybe", "must be true or false"),
        ("dataset", {"a": 1}, "must be a list of texts"),
        ("model_name_or_path", None, "must be text"),
        ("model_name_or_path", "", "is empty"),
        ("output_dir", "", "is missing"),
        ("dataset", "", "is missing"),
        ("dataset", None, "is missing"),
        ("stage", "sftt", "did you mean sft?"),
        ("finetuning_type", "qlora", "set finetuning_type: lora and quantization_bit: 4"),
        ("report_to", "wandbb", "did you mean wandb?"),
        ("template", "chatnl", "did you mean chatml?"),
        ("template", "", "no chat format has this name"),
        ("lr_scheduler_type", "cosin", "did you mean cosine?"),
        ("metric_for_best_model", "blue", "no evaluation of this version gives this metric"),
    ],
)
def test_wrong_value(person, key, value, reason):
    said = person.is_refused(**{key: value})
    assert f"{key}: " in said
    assert reason in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_steps", 0),
        ("max_steps", -5),
        ("per_device_train_batch_size", 0),
        ("per_device_train_batch_size", -1),
        ("gradient_accumulation_steps", 0),
        ("learning_rate", -1),
        ("weight_decay", -1),
        ("max_grad_norm", -1),
        ("adam_beta1", 1.5),
        ("adam_beta2", -0.1),
        ("warmup_ratio", 2),
        ("warmup_steps", -1),
        ("seed", -1),
        ("seed", 2**70),
        ("val_size", -0.1),
        ("val_size", 1.5),
        ("cutoff_len", 0),
        ("cutoff_len", -3),
        ("max_samples", 0),
        ("logging_steps", 0),
        ("dataloader_num_workers", -1),
        ("neftune_noise_alpha", -1),
        ("label_smoothing_factor", 2),
    ],
)
def test_number_out_of_range(person, key, value):
    assert f"{key}: {value}: " in person.is_refused(**{key: value})


def test_numbers_out_of_range_together_with_other_keys(person):
    assert "num_train_epochs: 0: leaves nothing" in person.is_refused(num_train_epochs=0, drop=["max_steps"])
    assert "save_steps: 0: must be above 0" in person.is_refused(save_strategy="steps", save_steps=0)
    assert "eval_steps: 0: must be above 0" in person.is_refused(eval_strategy="steps", eval_steps=0, val_size=2)
    assert "lora_rank: 0: must be at least 1" in person.is_refused(finetuning_type="lora", lora_rank=0)
    said = person.is_refused(finetuning_type="freeze", freeze_trainable_layers=0)
    assert "freeze_trainable_layers: 0: leaves nothing to train" in said


def test_nothing_to_do(person):
    assert "there is nothing to do" in person.is_refused(drop=["dataset", "do_train"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ("# nothing yet\n", "holds no keys"),
        ("- a\n- b\n", "must be a mapping of keys to values"),
        ("hello", "must be a mapping of keys to values"),
        ("stage: sft\n\tdo_train: true\n", ":2: run file: is not valid YAML: found a tab"),
        ("stage: sft\nstage: pt\n", ":2: stage: written twice, on lines 1 and 2"),
        ("stage: sft\n---\nstage: pt\n", "another document"),
        ('{"stage": "sft"', "is not valid YAML"),
        ("stage: *here\n", "undefined alias"),
        ("stage: !!python/object/apply:os.system [ls]\n", "is not valid YAML"),
        ("stage: sft\n".encode("utf-16"), "is not UTF-8 text"),
        ("# caf\xe9\n".encode("latin-1"), "is not UTF-8 text"),
    ],
)
def test_run_file_that_cannot_be_read(person, text, reason):
    assert reason in person.is_refused_words("train", person.run_file(text))


def test_truncated_json_run_file(person):
    path = person.folder / "run.json"
    path.write_text(json.dumps(person.keys, indent=1)[:100])
    assert "run file: is not valid JSON" in person.is_refused_words("train", str(path))


def test_a_byte_order_mark_and_windows_line_ends_are_fine(person):
    text = (person.folder / person.run_file()).read_text()
    path = person.run_file("\ufeff" + text.replace("\n", "\r\n"))
    assert person.types("check", path).status == 0


@pytest.mark.parametrize("command", ["train", "check", "data", "chat", "export", "eval"])
def test_run_file_that_is_not_there_or_not_named(person, command):
    assert "does not exist" in person.is_refused_words(command, str(person.folder / "run.yaml"))
    assert "run file" in person.is_refused_words(command)
    (person.folder / "folder.yaml").mkdir()
    assert "is a folder" in person.is_refused_words(command, str(person.folder / "folder.yaml"))
    assert "is a folder" in person.is_refused_words(command, str(person.folder))
    assert all(suffix in person.is_refused_words(command, "run.txt") for suffix in SUFFIXES)


def test_stray_words(person):
    path = person.run_file()
    assert "write key=value" in person.is_refused_words("train", path, "max_steps")
    assert "write key=value without spaces" in person.is_refused_words("train", path, "max_steps", "=", "2")
    assert "max_steps: '': must be a whole number" in person.is_refused_words("train", path, "max_steps=")
    assert "a run file must be the first argument" in person.is_refused_words("train", path, path)
    assert "a run file must be the first argument" in person.is_refused_words("train", "max_steps=1", path)
    assert "did you mean max_steps?" in person.is_refused_words("train", path, "--max_stesp", "2")


def test_unknown_command(person):
    assert person.is_refused_words("trian", "run.yaml").startswith("luthier: unknown command `trian`; did you mean")
    assert "unknown command" in person.is_refused_words("run.yaml")
    assert "unknown command" in person.is_refused_words("")


def test_unknown_names(person):
    assert "did you mean lora_rank?" in person.is_refused_words("explain", "lora_rnk")
    assert "did you mean 'chatml'?" in person.is_refused_words("template", "show", "chatnl")
    missing = str(person.folder / "talks.json")
    assert "talks.json" in person.is_refused_words("template", "render", "chatml", missing)
    assert "no such folder" in person.is_refused_words("verify", missing)
