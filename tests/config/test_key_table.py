"""The table of all keys: complete, explained, in step with the installed transformers and with the documents."""

import ast
import dataclasses
import json
from pathlib import Path

import pytest

import luthier
from luthier.config import describe, reference
from luthier.config.key_table import catalog, keys_of, sections
from luthier.config.keys.bridge import BridgeConfig
from luthier.config.keys.later import LATER
from luthier.config.keys.legacy import LegacyTrainingConfig, training_arguments_kwargs
from luthier.config.keys.mcore import McoreConfig
from luthier.config.keys.training import TABLE, TrainingKeys, training_table
from luthier.config.load import load_train
from luthier.core.errors import InvalidInput, UnknownVariant
from tools import training_keys

REFERENCE_KEYS = (Path(__file__).parent / "reference_keys.txt").read_text(encoding="utf-8").split()
OWN_KEYS = {
    "checkpoint_every",
    "cache_media_features",
    "compare",
    "epsilon",
    "epsilon_high",
    "eval_tasks",
    "export_check",
    "export_gguf",
    "export_max_kl",
    "fast_path",
    "gkd_beta",
    "gkd_lambda",
    "gkd_temperature",
    "grpo_beta",
    "html",
    "judge_model",
    "judge_url",
    "loftq_init",
    "loss_type",
    "max_nonfinite_steps",
    "metrics",
    "num_generations",
    "num_iterations",
    "on_nonfinite",
    "on_overlong",
    "reward_funcs",
    "reward_weights",
    "rollout_backend",
    "rollout_folder",
    "rollout_gpu_util",
    "rollout_server",
    "save_on_signal_seconds",
    "skip_memory_check",
    "sp_size",
    "teacher_model",
    "teacher_model_adapters",
    "tp_size",
}
PACKAGE = Path(luthier.__file__).parent
BASE = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "do_train": True}


def test_the_list_of_reference_keys_is_whole():
    assert len(REFERENCE_KEYS) == len(set(REFERENCE_KEYS)) == 268


@pytest.mark.parametrize("name", REFERENCE_KEYS)
def test_every_key_of_the_reference_is_known_and_explained(name):
    text = describe.explain(name)
    key = catalog()[name][0]
    assert text.startswith(f"{name}\n  ") and len(describe.help_of(key)) > 10
    assert key.is_required == (name == "model_name_or_path")


def test_no_key_is_there_without_being_asked_for():
    legacy = {field.name for field in dataclasses.fields(LegacyTrainingConfig)}
    former_ray = {"ray_run_name", "ray_storage_path", "placement_strategy", "resources_per_worker"}
    smoothing = {"label_smoothing_factor"}
    megatron = {field.name for kind in (McoreConfig, BridgeConfig) for field in dataclasses.fields(kind)}
    known = {*REFERENCE_KEYS, *training_table(), *legacy, *OWN_KEYS, *former_ray, *smoothing, *megatron}
    assert set(catalog()) == known


def test_every_key_of_the_command_line_is_explained():
    for name, keys in catalog().items():
        for key in keys:
            assert describe.help_of(key).endswith(".") or "." in describe.help_of(key), name
            assert key.status in ("supported", "no_effect", "refused", "renamed", "later")
            assert key.reason or key.status in ("supported", "later"), name
            assert key.remedy or key.status != "refused", name
            assert not key.current or key.current in training_table(), name


def test_owners_of_one_key_agree_on_its_type():
    for name, keys in catalog().items():
        assert len({str(key.type) for key in keys}) == 1, name


def test_defaults_are_of_their_type():
    from luthier.config.decode import decode

    for keys in catalog().values():
        for key in keys:
            if not key.is_required:
                default = key.default
                assert decode(default, key.type, key.choices) == default, key.name


def test_a_section_that_waits_for_a_key_waits_for_a_known_one():
    for section in sections():
        assert not section.key or section.key in catalog(), section.name


def test_types_are_objects_and_not_text():
    for section in sections():
        for key in keys_of(section):
            assert not isinstance(key.type, str), (
                f"{key.name}: no `from __future__ import annotations` in {section.name}"
            )


def test_later_sections_hold_no_key_that_works():
    for section in LATER:
        assert all(key.status in ("refused", "no_effect", "later") for key in keys_of(section)), section.name


def test_what_explain_says():
    text = describe.explain("val_size")
    assert "type      number" in text and "default   0.0" in text and "read by   every run" in text
    assert "val_size (together with eval_dataset)" in text
    assert "default   none, it must be given" in describe.explain("model_name_or_path")
    assert "refused unless false: an environment variable decides it" in describe.explain("use_mca")
    assert "one of auto, disabled, sdpa, fa2, fa3" in describe.explain("flash_attn")
    assert "finetuning_type: lora, finetuning_type: oft" in describe.explain("additional_target")
    assert "mask_history (together with train_on_prompt)" in describe.explain("train_on_prompt")
    assert "lora_rank: must be at least 1" in describe.explain("lora_rank")
    with pytest.raises(UnknownVariant, match="did you mean lora_rank"):
        describe.explain("lora_rnk")


def test_the_table_of_training_keys_is_that_of_the_installed_transformers():
    written, installed = json.loads(TABLE.read_text(encoding="utf-8")), json.loads(json.dumps(training_keys.table()))
    if written["transformers"] != installed["transformers"]:
        pytest.skip(f"the table is that of transformers {written['transformers']}: run `make keys`")
    assert written == installed


def test_every_training_key_has_help_and_none_is_left_over():
    assert set(describe._training_help()) == set(training_table())


def test_the_key_reference_is_up_to_date():
    assert reference.FILE.read_text(encoding="utf-8") == reference.markdown(), "run `make keys`"


def test_the_check_of_the_key_reference_can_fail(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reference, "FILE", tmp_path / "docs" / "keys.md")
    assert reference.main(["--check"]) == 1
    assert reference.main([]) == 0 and reference.main(["--check"]) == 0
    reference.FILE.write_text("other", encoding="utf-8")
    assert reference.main(["--check"]) == 1


def test_the_schema_describes_every_key():
    schema = describe.schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema" and not schema["additionalProperties"]
    assert set(schema["properties"]) == set(catalog())
    json.dumps(schema)
    assert schema["properties"]["lora_rank"] == {
        "description": "Rank r of the update B A.",
        "anyOf": [{"type": "integer"}, {"$ref": "#/$defs/interpolation"}],
        "default": 8,
    }
    assert {"enum": ["auto", "disabled", "sdpa", "fa2", "fa3", "flex"]} in schema["properties"]["flash_attn"]["anyOf"]
    assert {"type": "array", "items": {"type": "string"}} in schema["properties"]["dataset"]["anyOf"]
    assert "default" not in schema["properties"]["model_name_or_path"]
    assert (
        schema["properties"]["use_mca"]["deprecated"] and "Megatron" in schema["properties"]["use_mca"]["description"]
    )
    assert {"type": "string", "pattern": r"^\s*\{"} in schema["properties"]["vllm_config"]["anyOf"]
    assert {"const": False} in schema["properties"]["save_strategy"]["anyOf"]


def test_what_transformers_is_given():
    given = {"warmup_ratio": 0.1, "overwrite_output_dir": True, "remove_unused_columns": False, "report_to": "none"}
    run = load_train(
        {**BASE, **given, "evaluation_strategy": "no", "label_smoothing_factor": 0.1, "fsdp_config": {"a": 1}}
    )
    kwargs = training_arguments_kwargs(run.training)
    assert kwargs == {
        "output_dir": "o",
        "do_train": True,
        "report_to": ["none"],
        "eval_strategy": "no",
        "fsdp_config": {"a": 1},
        "warmup_steps": 0.1,
    }
    assert kwargs["fsdp_config"] is not run.training["fsdp_config"]


def test_warmup_steps_go_before_the_ratio():
    run = load_train({**BASE, "warmup_ratio": 0.1, "warmup_steps": 5})
    assert training_arguments_kwargs(run.training)["warmup_steps"] == 5


def test_transformers_takes_what_it_is_given(tmp_path):
    from transformers import Seq2SeqTrainingArguments

    keys = {"warmup_ratio": 0.25, "logging_steps": 10, "save_steps": 0.5, "lr_scheduler_type": "cosine_with_min_lr"}
    keys |= {
        "lr_scheduler_kwargs": '{"min_lr": 1e-6}',
        "optim": "adafactor",
        "use_cpu": True,
        "output_dir": str(tmp_path),
    }
    arguments = Seq2SeqTrainingArguments(**training_arguments_kwargs(load_train({**BASE, **keys}).training))
    assert arguments.get_warmup_steps(100) == 25 and arguments.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert arguments.logging_steps == 10 and arguments.report_to == []


def test_a_key_that_an_older_transformers_lacks_is_named():
    with pytest.raises(InvalidInput, match="does not know a_key_of_tomorrow"):
        training_arguments_kwargs(TrainingKeys({"a_key_of_tomorrow": 1}))


def supported_keys():
    """Without those that are handed on by their names, all at once."""
    for section in sections():
        if (
            section.config not in (TrainingKeys, LegacyTrainingConfig, McoreConfig, BridgeConfig)
            and section not in LATER
        ):
            yield from (key.name for key in keys_of(section) if key.status == "supported")


def test_every_supported_key_is_read_somewhere():
    """As an attribute, a word or a parameter in a file outside `config`, or in a property of a run."""
    words: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(PACKAGE / "config") and path.name != "runs.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                words.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
    unread = sorted(set(supported_keys()) - words)
    assert unread == []
