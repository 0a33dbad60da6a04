"""The plan of a run on a GPU, made without one."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from luthier.model.kernels import chunked_head
from luthier.model.loading.config import load_config
from luthier.stages import gkd
from luthier.workflow.plan.make import make_plan
from luthier.workflow.plan.memory import CONTEXT_BYTES, held_by
from luthier.workflow.plan.shape import build_shape
from luthier.workflow.plan.trace import Batch, against_frozen, trace_step
from tests.plans import plan_of, sides
from tests.small_world import WAYS, small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return {**small_world(tmp_path_factory.mktemp("world"), num_hidden_layers=6), "max_steps": 2}


def on_a_gpu(keys):
    """What `train` would plan on one, without its speed, which is not there to be measured."""
    run, stage, text, data, machine = sides({**keys, "bf16": True})
    gpu = {"device": "cuda", "num_accelerators": 1, "bf16": True, "fp16": True, "is_assumed": True}
    return make_plan(run, stage, text, data, replace(machine, **gpu))


@pytest.mark.parametrize("more", [{}, {"stage": "dpo", "dataset": "pairs"}], ids=["sft", "dpo"])
def test_on_a_gpu_all_samples_attend_in_one_call(world, more):
    """Those that share tokens, too: causally to their own, and to all of these."""
    keys = {**world, **WAYS["lora"], **more}
    plan = on_a_gpu(keys)
    scores = (
        2
        * 4
        * 16
        * sum(
            length * (length + 2 * sum(prefix[1::2]))
            for length, prefix in zip(plan.work.heaviest.lengths, plan.work.heaviest.prefixes, strict=True)
        )
    )
    counts = {call.operations: count for call, count in plan.trace.calls.items()}
    assert counts[scores] == counts[int(2.5 * scores)] == 6, "one call in each layer, forward and backward"


def test_kernels_that_only_a_gpu_has_are_planned_as_that_of_pytorch(world):
    keys = {**world, **WAYS["lora"]}
    plan = on_a_gpu({**keys, "flash_attn": "flex"})
    assert plan.resolved["flash_attn"].startswith("flex_attention")
    assert plan.trace == on_a_gpu(keys).trace


def test_the_context_of_cuda_is_planned_where_it_is_not_there_yet(world):
    assert on_a_gpu(world).held.libraries_bytes == CONTEXT_BYTES
    run, stage, text, _, machine = sides(world)
    here = replace(machine, device="cuda", num_accelerators=1)
    shape = build_shape(run, stage, text, load_config(text.source), machine)
    held = held_by(run, stage, text, shape, plan_of(world).work, here, 10**9)
    assert held.libraries_bytes == 0


def test_a_loss_of_whole_distributions_holds_several_of_them(world):
    keys = {**world, **WAYS["lora"]}
    own = plan_of(keys).trace.logits_bytes
    distilled = plan_of({**keys, "stage": "gkd", "teacher_model": world["model_name_or_path"]}).trace.logits_bytes
    anchored = plan_of({**keys, "use_asft_loss": True, "ref_model": world["model_name_or_path"]}).trace.logits_bytes
    assert distilled > anchored > own


@pytest.mark.parametrize("reads", ["gkd", "logps", "cross_entropy"])
@pytest.mark.parametrize(("half", "on_device"), [(None, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("trains_head", [True, False])
def test_parts_of_equal_shape_are_traced_once(monkeypatch, reads, half, on_device, trains_head):
    """The head goes through the positions chunk by chunk, and an objective in parts of these: as if all were traced."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=151_936, max_position_embeddings=4096, **sizes)).train()
    model.lm_head.requires_grad_(trains_head)
    method = SimpleNamespace(method=gkd.GkdConfig(teacher_model="another"))
    loss_of = against_frozen(gkd.STAGE, method, ["teacher"]) if reads == "gkd" else None

    def traced():
        kind = "cross_entropy" if reads == "gkd" else reads
        batch = Batch((1500,), 1500)
        return trace_step(model, batch, reads=kind, half=half, on_device=on_device, loss_of=loss_of)

    once = traced()

    def all_parts(num_rows, size):
        return (slice(at, min(at + size, num_rows)) for at in range(0, num_rows, size))

    monkeypatch.setattr(chunked_head, "slices", all_parts)
    assert once == traced()
