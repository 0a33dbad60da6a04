"""Models whose layers processes share: which have a plan."""

import pytest
from transformers import AutoConfig

from luthier.workflow.plan.engine import Engine
from luthier.workflow.plan.make import sketch
from luthier.workflow.plan.shape import Unplanned
from luthier.workflow.plan.split import narrow, wide_weights
from tests.plans import sides
from tests.small_world import WAYS, small_world
from tests.tiny import TINY_LLAMA, save_tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return {**small_world(tmp_path_factory.mktemp("world")), **WAYS["full"], "tp_size": 2}


def wide_of(world, folder, kind, **changes):
    config = AutoConfig.for_model(kind, **{**TINY_LLAMA, **changes})
    run, stage, text, _, machine = sides({**world, "model_name_or_path": str(save_tiny(folder, config))})
    drawn = sketch(run, stage, text, machine)
    return wide_weights(drawn.whole, drawn.shape, 2)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_narrow_model_has_the_shapes_of_one_process(world, tmp_path, kind):
    assert [tuple(weight.shape) for weight in wide_of(world, tmp_path, kind)] == [(320, 64), (320, 64)]


def test_a_tied_vocabulary_counts_once(world, tmp_path):
    assert len(wide_of(world, tmp_path, "llama", tie_word_embeddings=True)) == 1


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("phi3", {}),
        ("mixtral", {"num_local_experts": 2}),
        ("qwen3_moe", {"num_experts": 2, "moe_intermediate_size": 32}),
    ],
)
def test_layers_that_are_split_otherwise_have_no_plan(world, tmp_path, kind, changes):
    with pytest.raises(Unplanned, match="split"):
        wide_of(world, tmp_path, kind, **changes)


def test_parts_are_whole(world):
    config = AutoConfig.for_model("llama", **TINY_LLAMA)
    with pytest.raises(Unplanned, match=r"4 processes cannot have equal parts of its num_key_value_heads \(2\)"):
        narrow(config, 4)


def test_the_engine_says_how_many_processes_share_a_layer():
    assert str(Engine("tp", 2)) == "tp, 2 processes"
