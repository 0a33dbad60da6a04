"""The plan of a run on a GPU, made without one."""

from dataclasses import replace

import pytest

from luthier.model.loading.config import load_config
from luthier.workflow.plan.make import make_plan
from luthier.workflow.plan.memory import CONTEXT_BYTES, held_by
from luthier.workflow.plan.shape import build_shape
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
