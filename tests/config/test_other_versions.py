"""Keys of other versions of LLaMA-Factory and of other programs are errors that name today's key, and nothing else."""

import inspect

import pytest

from luthier.config import describe
from luthier.config.key_table import catalog
from luthier.config.load import Draft, load_train, read_source
from luthier.config.other_versions import members, other_key, table
from luthier.core.errors import ConfigError, UnknownVariant

BASE = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "do_train": True}
NOT_KEYS = {"columns", "messages"}
"""Names of dataset_info.json and of rows in remedies."""
NAMES = [name.replace("*", "dataset") for name in table()]
FORMER, V1, OTHER = "key of a former version", "key of v1 of LLaMA-Factory", "key of another program"
LORA_OF_V1 = {
    "model": "m",
    "model_class": "llm",
    "peft_config": {"name": "lora", "r": 16, "target_modules": "all"},
    "kernel_config": {"name": "auto"},
    "dist_config": {"name": "fsdp2", "dcp_path": None},
    "quant_config": None,
    "train_dataset": "data/rows.yaml",
    "output_dir": "o",
    "micro_batch_size": 1,
    "cutoff_len": 2048,
    "learning_rate": 1e-4,
    "max_steps": 10,
    "sample_backend": "hf",
    "max_new_tokens": 128,
}


def problems_of(given):
    with pytest.raises(ConfigError) as caught:
        load_train(given)
    return caught.value.problems


@pytest.mark.parametrize("name", NAMES)
def test_a_key_of_another_version_is_one_error_that_names_keys_of_today(name):
    assert name not in catalog()
    known = other_key(name)
    assert known and known.named and all(key in catalog() or key in NOT_KEYS for key in known.named)
    (problem,) = problems_of({**BASE, name: "x"})
    assert (problem.key, problem.reason, problem.remedy) == (name, known.reason, known.remedy)


@pytest.mark.parametrize(
    ("name", "reason", "successor"),
    [
        ("cache_path", FORMER, "tokenized_path"),
        ("max_source_length", FORMER, "cutoff_len"),
        ("max_target_length", FORMER, "cutoff_len"),
        ("max_samples_per_dataset", FORMER, "max_samples"),
        ("max_samples_per_ds", FORMER, "max_samples"),
        ("checkpoint_dir", FORMER, "adapter_name_or_path"),
        ("dpo_beta", FORMER, "pref_beta"),
        ("sft_packing", FORMER, "packing"),
        ("model", V1, "model_name_or_path"),
        ("train_dataset", V1, "dataset"),
        ("micro_batch_size", V1, "per_device_train_batch_size"),
        ("cp_size", V1, "sp_size"),
        ("max_seq_length", OTHER, "cutoff_len"),
        ("target_modules", OTHER, "lora_target"),
        ("load_in_4bit", OTHER, "quantization_bit"),
    ],
)
def test_successors(name, reason, successor):
    key = other_key(name)
    assert key and (key.reason, key.named[0]) == (reason, successor)


def test_a_run_file_of_v1_is_refused_key_by_key_and_nothing_else_is_said_of_it():
    """`model` and `train_dataset` say which model and data are meant, so neither is called missing."""
    problems = problems_of(LORA_OF_V1)
    shared = {"output_dir", "cutoff_len", "learning_rate", "max_steps", "max_new_tokens"}
    assert {problem.key for problem in problems} == LORA_OF_V1.keys() - shared
    assert {problem.reason for problem in problems} == {V1}


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        (
            {"peft_config": {"name": "lora", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all"}},
            "finetuning_type: lora; lora_rank: 16; lora_alpha: 32; lora_dropout: 0.05; lora_target: all",
        ),
        (
            {"peft_config": {"name": "lora", "target_modules": ["q_proj", "v_proj"], "modules_to_save": None}},
            "finetuning_type: lora; lora_target: q_proj,v_proj",
        ),
        (
            {"peft_config": {"name": "freeze", "freeze_trainable_layers": 2, "freeze_extra_modules": None}},
            "finetuning_type: freeze; freeze_trainable_layers: 2",
        ),
        ({"quant_config": {"name": "bnb", "quantization_bit": 4}}, "quantization_method: bnb; quantization_bit: 4"),
        (
            {"optim_config": {"name": "muon", "wd": 0.1, "adamw_betas": [0.9, 0.95], "adamw_eps": 1e-8}},
            "use_muon: true; weight_decay: 0.1; adam_beta1: 0.9; adam_beta2: 0.95; adam_epsilon: 1e-08",
        ),
        (
            {"optim_config": {"name": "muon", "wd": 0.1, "momentum": 0.95, "nesterov": True, "ns_steps": 5}},
            "use_muon: true; weight_decay: 0.1",
        ),
        ({"dist_config": {"name": "fsdp2", "dcp_path": None}}, "fsdp: true"),
        ({"dist_config": {"name": "fsdpturbo", "ep_size": 1}}, "fsdp: true"),
        ({"dist_config": {"name": "deepspeed", "config_file": "ds.json"}}, "deepspeed: ds.json"),
        ({"kernel_config": {"name": "liger_kernel"}}, "enable_liger_kernel: true"),
    ],
)
def test_a_mapping_of_v1_is_written_out(given, lines):
    """Each line is one that a run file takes."""
    (problem,) = problems_of({**BASE, **given})
    assert problem.reason == V1 and problem.remedy == f"write {lines}"
    keys = dict(line.split(": ") for line in lines.split("; "))
    assert keys.keys() <= catalog().keys()
    words = [f"{name}={value}" for name, value in {**BASE, **keys}.items()]
    Draft("train", read_source(words), begins=False).finish()


@pytest.mark.parametrize("given", [{"name": "lora", "unheard_of": 1}, {"betas": 1}, None, "lora", {"name": "auto"}])
def test_a_mapping_with_unknown_members_names_the_keys(given):
    name = "optim_config" if given == {"betas": 1} else "kernel_config" if given == {"name": "auto"} else "peft_config"
    (problem,) = problems_of({**BASE, name: given})
    assert problem.remedy == table()[name].remedy


@pytest.mark.parametrize("changed", [{"momentum": 0.9}, {"nesterov": False}, {"ns_steps": 6}])
def test_muon_with_other_constants_has_no_lines(changed):
    """They are those of torch.optim.Muon, and no key changes them."""
    (problem,) = problems_of({**BASE, "optim_config": {"name": "muon", **changed}})
    assert problem.remedy == table()["optim_config"].remedy


def test_muon_has_the_constants_that_are_left_out():
    torch = pytest.importorskip("torch")
    defaults = inspect.signature(torch.optim.Muon).parameters
    assert [defaults[name].default for name in ("momentum", "nesterov", "ns_steps")] == [0.95, True, 5]


def test_every_member_has_a_key_of_today():
    assert members().keys() <= table().keys()
    for lines in members().values():
        for line in filter(None, lines.values()):
            assert all(name in catalog() for name in line.partition(":")[0].strip("[]").split(", "))


@pytest.mark.parametrize(("name", "ours"), [("flash_attention_2", "fa2"), ("eager", "disabled")])
def test_a_kernel_of_attention_by_its_name_in_transformers(name, ours):
    (problem,) = problems_of({**BASE, "flash_attn": name})
    assert problem.key == "flash_attn" and problem.remedy == f"set flash_attn: {ours}"


def test_a_misspelt_key_is_of_no_other_version():
    assert other_key("cache_pat") is None and other_key("max_samples_pr") is None
    (problem,) = problems_of({**BASE, "lora_rnk": 4})
    assert problem.reason == "unknown key" and "lora_rank" in problem.remedy


def test_a_key_of_another_version_is_a_warning_when_extra_keys_are_allowed(monkeypatch):
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    (warning,) = load_train({**BASE, "cache_path": "x"}).warnings
    assert warning.reason == f"{FORMER}, not read" and "tokenized_path" in warning.remedy


@pytest.mark.parametrize("name", ["cache_path", "micro_batch_size", "modules_to_save"])
def test_explain_says_what_to_write_instead(name):
    key = other_key(name)
    assert key
    with pytest.raises(UnknownVariant) as caught:
        describe.explain(name)
    assert str(caught.value) == f"{name}: {key.reason} -> {key.remedy}"
