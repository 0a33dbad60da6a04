"""The parts of a trainer that are computed."""

from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch

from luthier.data.collate import concatenate_rows
from luthier.data.rows.table import Table
from luthier.model.attention import isolate_samples
from luthier.training.parts import collator, policy_head, with_fillers
from tests.tiny import TINY_LLAMA

ROWS = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]


def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TINY_LLAMA)).eval()


def args(**changes):
    return SimpleNamespace(**{"fsdp": "", "deepspeed_plugin": None, "torch_compile": False, **changes})


def test_rows_are_concatenated_without_padding_or_padded():
    assert collator(0, concatenate_rows)(ROWS)["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert collator(9, None)(ROWS)["input_ids"].tolist() == [[5, 6, 7, *[9] * 5], [8, *[9] * 7]]


@pytest.mark.parametrize("changes", [{"fsdp": "full_shard"}, {"deepspeed_plugin": object()}, {"torch_compile": True}])
def test_a_sharded_or_compiled_model_calls_its_own_head(changes):
    policy = model()
    isolate_samples(policy)
    assert policy_head(policy, args(), None).linear is policy.lm_head
    assert policy_head(policy, args(**changes), None).linear is None


def test_a_launcher_may_shard_too(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert policy_head(model(), args(), None).linear is None


@pytest.mark.parametrize("multiple", [1, 2, 3, 8])
def test_fillers_complete_the_last_batch_and_have_no_labels(multiple):
    rows = Table(pa.Table.from_pylist(ROWS))
    filled = with_fillers(rows, multiple)
    assert len(filled) % multiple == 0 and len(filled) - len(rows) < multiple
    assert list(filled.select(range(2))) == ROWS
    assert all(label == -100 for row in list(filled)[2:] for label in row["labels"])
    assert (filled is rows) == (len(rows) % multiple == 0)
    assert torch.tensor(filled[0]["input_ids"]).tolist() == [5, 6, 7]
