"""Keys of former versions of LLaMA-Factory are errors that name today's key, and nothing else."""

import pytest

from luthier.config.former_keys import named_in, remedy_of, table
from luthier.config.key_table import catalog
from luthier.config.load import load_train
from luthier.core.errors import ConfigError

BASE = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "do_train": True}
NOT_KEYS = {"columns"}
"""Names of dataset_info.json in remedies."""
NAMES = [name.replace("*", "dataset") for name in table()]


def problems_of(given):
    with pytest.raises(ConfigError) as caught:
        load_train(given)
    return caught.value.problems


@pytest.mark.parametrize("name", NAMES)
def test_a_former_key_is_one_error_that_names_keys_of_today(name):
    assert name not in catalog()
    named = named_in(remedy_of(name))
    assert named and all(key in catalog() or key in NOT_KEYS for key in named)
    (problem,) = problems_of({**BASE, name: "x"})
    assert (problem.key, problem.remedy) == (name, remedy_of(name)) and "former version" in problem.reason


@pytest.mark.parametrize(
    ("name", "successor"),
    [
        ("cache_path", "tokenized_path"),
        ("max_source_length", "cutoff_len"),
        ("max_target_length", "cutoff_len"),
        ("max_samples_per_dataset", "max_samples"),
        ("max_samples_per_ds", "max_samples"),
        ("checkpoint_dir", "adapter_name_or_path"),
        ("dpo_beta", "pref_beta"),
        ("sft_packing", "packing"),
    ],
)
def test_successors(name, successor):
    assert named_in(remedy_of(name))[0] == successor


def test_a_misspelt_key_is_no_former_key():
    assert remedy_of("cache_pat") == "" and remedy_of("max_samples_pr") == ""
    (problem,) = problems_of({**BASE, "lora_rnk": 4})
    assert problem.reason == "unknown key" and "lora_rank" in problem.remedy


def test_a_former_key_is_a_warning_when_extra_keys_are_allowed(monkeypatch):
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    (warning,) = load_train({**BASE, "cache_path": "x"}).warnings
    assert warning.reason == "key of a former version, not read" and "tokenized_path" in warning.remedy
