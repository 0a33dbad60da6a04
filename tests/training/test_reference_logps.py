"""Under what the log-probabilities of a reference are kept: whatever changes what it computes, and nothing else."""

import threading
from itertools import count
from types import SimpleNamespace

import peft
import pyarrow as pa
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.data.cache.store import Cache
from luthier.data.collate import concatenate_rows
from luthier.data.rows.table import Table
from luthier.model.attention import isolate_samples
from luthier.model.kernels.fuse import fuse
from luthier.training import reference_logps
from luthier.training.parts import collator
from luthier.training.reference_logps import LOGPS_FILE, ReferenceScorer, weights_digest
from tests.tiny import TINY_LLAMA


def model(**changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**TINY_LLAMA, **changes}))


def adapted(**changes):
    torch.manual_seed(1)
    keys = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": False, **changes}
    return peft.get_peft_model(model(), peft.LoraConfig(**keys))


def test_its_name_does_not_matter():
    renamed = model()
    renamed.config._name_or_path = renamed.name_or_path = "somewhere/else"
    assert weights_digest(renamed) == weights_digest(model())


@pytest.mark.parametrize(
    "changes", [{"rms_norm_eps": 1e-3}, {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}]
)
def test_the_same_weights_with_another_config_are_another_model(changes):
    one, other = model(), model(**changes)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert weights_digest(one) != weights_digest(other)


def test_the_same_adapter_with_another_scale_is_another_model():
    assert weights_digest(adapted()) == weights_digest(adapted())
    assert weights_digest(adapted(lora_alpha=16)) != weights_digest(adapted())


def test_a_changed_weight_is_another_model():
    changed = model()
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1
    assert weights_digest(changed) != weights_digest(model())


def test_tensors_are_read_beside_each_other_with_the_same_digest(monkeypatch):
    own, both, numbers = reference_logps._tensor_digest, threading.Barrier(2), count()
    expected = weights_digest(model())

    def digest(tensor):
        if next(numbers) < 2:
            both.wait(30)
        return own(tensor)

    monkeypatch.setattr(reference_logps, "_tensor_digest", digest)
    assert weights_digest(model(), 2) == expected


@pytest.mark.parametrize("change", [lambda w: w.t(), lambda w: w.double(), lambda w: w.flatten()])
def test_shape_and_format_are_part_of_the_digest(change):
    weight = torch.zeros(2, 3)
    assert reference_logps._tensor_digest(change(weight)) != reference_logps._tensor_digest(weight)


def test_formats_of_the_same_size_are_told_apart():
    one, other = (torch.zeros(2, 3, dtype=dtype) for dtype in (torch.float16, torch.bfloat16))
    assert reference_logps._tensor_digest(one) != reference_logps._tensor_digest(other)


def test_each_part_of_each_row_has_its_own_log_probability(tmp_path):
    """Five rows in batches of two, each with an answer of its own length in both parts."""
    answers = [([10 + n] * (n + 1), [30 + n, 40 + n]) for n in range(5)]
    rows = [
        {f"{part}_{name}": [5, 6, *answer] if name == "input_ids" else [-100, -100, *answer]
         for part, answer in zip(("chosen", "rejected"), pair, strict=True) for name in ("input_ids", "labels")}
        for pair in answers
    ]  # fmt: skip
    args = SimpleNamespace(bf16=False, fp16=False, eval_batch_size=2, world_size=1, process_index=0)
    args.device, policy = torch.device("cpu"), model().train()
    scorer = ReferenceScorer(policy, collator(0, None), (False,) * 3, args, Cache(tmp_path))
    found = scorer.add_to({"train": Table(pa.Table.from_pylist(rows))})["train"].logps
    assert policy.training, "as it was"
    for own, pair in zip(found.tolist(), answers, strict=True):
        for value, answer in zip(own, pair, strict=True):
            logps = policy(torch.tensor([[5, 6, *answer]])).logits[0, 1:-1].log_softmax(-1)
            assert value == pytest.approx(logps.gather(-1, torch.tensor(answer)[:, None]).sum().item(), abs=1e-4)


def test_another_batch_rounds_differently_and_is_cached_apart(tmp_path):
    rows = Table(
        pa.Table.from_pylist(
            [{f"{part}{name}": [5, 6, 7] for part in ("chosen_", "rejected_") for name in ("input_ids", "labels")}] * 3
        )
    )
    found = []
    for concatenates in (True, False):
        policy = model().eval()
        if concatenates:
            isolate_samples(policy)
        for size in (1, 2):
            args = SimpleNamespace(bf16=False, fp16=False, eval_batch_size=size, world_size=1, process_index=0)
            args.device = torch.device("cpu")
            scorer = ReferenceScorer(
                policy,
                collator(0, concatenate_rows if concatenates else None),
                (concatenates, False, False),
                args,
                Cache(tmp_path),
            )
            logps = scorer.add_to({"train": rows})["train"].logps
            assert logps.shape == (3, 2)
            torch.testing.assert_close(torch.tensor(logps), torch.tensor(logps[:1, :1]).expand(3, 2), atol=1e-5, rtol=0)
            found.append(len(list(tmp_path.rglob(LOGPS_FILE))))
    assert found == [1, 2, 3, 4]


def test_another_attention_and_other_kernels_round_differently(tmp_path):
    rows = Table(pa.table({name: [[5, 6, 7]] * 3 for name in ("input_ids", "labels")}))
    args = SimpleNamespace(bf16=False, fp16=False, eval_batch_size=2, world_size=1, process_index=0)
    args.device, found = torch.device("cpu"), []
    for attention, is_fused in (("sdpa", False), ("eager", False), ("sdpa", True), ("sdpa", False)):
        policy = model().eval()
        policy.set_attn_implementation(attention)
        if is_fused:
            fuse(policy)
        scorer = ReferenceScorer(policy, collator(0, None), (False,) * 3, args, Cache(tmp_path))
        scorer.add_to({"train": rows})
        found.append(len(list(tmp_path.rglob(LOGPS_FILE))))
    assert found == [1, 2, 3, 3]
