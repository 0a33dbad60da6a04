"""Fields come from the table of keys, and problems of `luthier check` stand at them."""

import pytest

from luthier.config.key_table import catalog, sections
from luthier.webui.form import USUAL, check, groups, suggestions
from tests.small_world import small_world


def shown(values, command="train"):
    return {field.name: field for group in groups(command, values) for field in group.fields}


def test_every_supported_key_of_training_has_a_field_for_some_run(monkeypatch):
    seen = set()
    for section in sections():
        if section.environment:
            monkeypatch.setenv(section.environment, "1")
    runs = [{"stage": name} for name in catalog()["stage"][0].choices]
    runs += [{"finetuning_type": name} for name in catalog()["finetuning_type"][0].choices]
    switches = {key.section.key for keys in catalog().values() for key in keys if key.section.key} - {"stage"}
    runs.append(dict.fromkeys(switches, "true") | {"quantization_bit": "4", "loraplus_lr_ratio": "16"})
    for values in runs:
        seen |= set(shown(values))
    supported = {
        name
        for name, keys in catalog().items()
        if any(key.status == "supported" and "train" in key.section.commands for key in keys)
    }
    assert supported - seen <= {"infer_backend"}, "a new key appears by itself"


def test_keys_of_a_variant_appear_with_it():
    assert "pref_beta" in shown({"stage": "dpo"}) and "pref_beta" not in shown({})
    assert "oft_block_size" in shown({"finetuning_type": "oft"}) and "lora_rank" not in shown(
        {"finetuning_type": "oft"}
    )
    assert "stage" in shown({"stage": "no such stage"})
    assert "export_dir" in shown({}, "export") and "learning_rate" not in shown({}, "export")


@pytest.mark.parametrize(
    ("name", "kind", "default"),
    [
        ("stage", "choice", "sft"),
        ("learning_rate", "number", "5e-05"),
        ("packing", "choice", "null"),
        ("use_dora", "switch", "false"),
        ("dataset", "text", "null"),
        ("model_name_or_path", "text", ""),
        ("mix_strategy", "choice", "concat"),
    ],
)
def test_a_field_has_the_kind_of_its_key(name, kind, default):
    field = shown({})[name]
    assert (field.kind, field.default) == (kind, default) and field.help
    assert bool(field.choices) == (kind == "choice")


def test_the_usual_keys_are_keys():
    assert {name for names in USUAL.values() for name in names} <= catalog().keys()


def test_problems_and_warnings_stand_at_their_keys(tmp_path):
    values = small_world(tmp_path)
    text = "".join(f"{key}: {value}\n" for key, value in values.items())
    assert not check(text, "train").problems
    wrong = check(text + "learning_rat: 1\npref_beta: 0.2\nlora_rank: eight\n", "train")
    assert [problem.remedy for problem in wrong.at("learning_rat")] == ["did you mean learning_rate?"]
    assert "whole number" in wrong.at("lora_rank")[0].reason
    assert check("stage: [", "train").problems[0].key == "run file"
    (missing,) = check(text.replace(values["model_name_or_path"], "/nowhere"), "train").problems
    assert missing.key == "model_name_or_path"


def test_names_that_exist_are_suggested(tmp_path):
    values = small_world(tmp_path)
    assert "numbers" in suggestions("dataset", {"dataset_dir": values["dataset_dir"]})
    assert suggestions("dataset", {"dataset_dir": "/nowhere"}) == ()
    assert suggestions("template", {})[0] == "auto" and suggestions("seed", {}) == ()
