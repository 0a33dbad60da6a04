"""Results on `meta` that are found quickly are those that PyTorch finds."""

import pytest
import torch

from luthier.workflow.plan import counter
from luthier.workflow.plan.meta_results import result_of
from tests.plans import plan_of
from tests.small_world import WAYS, small_world

aten = torch.ops.aten


def on_meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


A, B, ROW = on_meta(3, 4), on_meta(4, 3).T, on_meta(4)
HALF, NUMBERS = on_meta(3, 4, dtype=torch.bfloat16), on_meta(3, 4, dtype=torch.long)
CALLS = [
    (aten.mul.Tensor, (A, B), {}),
    (aten.mul.Tensor, (B, B), {}),
    (aten.mul.Tensor, (A, ROW), {}),
    (aten.mul.Tensor, (NUMBERS, 2), {}),
    (aten.mul.Tensor, (NUMBERS, 2.0), {}),
    (aten.eq.Tensor, (A, HALF), {}),
    (aten.add.Tensor, (A, HALF), {"alpha": 2}),
    (aten._to_copy.default, (A,), {"dtype": torch.bfloat16}),
    (aten.sum.dim_IntList, (A, [1]), {}),
    (aten.sum.dim_IntList, (A, [0], True), {}),
    (aten.cat.default, ([A, B], 1), {}),
    (aten.max.dim, (A, 1), {}),
    (aten.logaddexp.default, (A, B), {}),
    (aten.addmm.default, (on_meta(3), A, on_meta(4, 3)), {}),
    (aten.native_layer_norm.default, (A, [4], None, None, 1e-5), {}),
    (aten._foreach_mul.Scalar, ([A, NUMBERS], 2.0), {}),
    (aten.empty_like.default, (B,), {}),
    (aten.zeros.default, ([2, 3],), {"dtype": torch.long, "device": torch.device("meta")}),
]


def described(result):
    return [
        (one.shape, one.stride(), one.dtype, one.device, one.untyped_storage().nbytes())
        for one in (result if isinstance(result, tuple | list) else (result,))
    ]


def places_of(result):
    return {one.untyped_storage()._cdata for one in (result if isinstance(result, tuple | list) else (result,))}


@pytest.mark.parametrize(("func", "args", "kwargs"), CALLS, ids=lambda value: getattr(value, "__name__", ""))
def test_shapes_strides_formats_and_memory_are_those_of_pytorch(func, args, kwargs):
    expected = func(*args, **kwargs)
    for _ in range(2):
        found = result_of(func, args, kwargs)
        assert type(found) is type(expected) and described(found) == described(expected)
    again = result_of(func, args, kwargs)
    assert places_of(found).isdisjoint(places_of(again))


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.view.default, (A, [4, 3])),
        (aten._unsafe_view.default, (A, [4, 3])),
        (aten.t.default, (A,)),
        (aten.split.Tensor, (A, 1)),
        (aten.detach.default, (A,)),
    ],
)
def test_a_view_stays_in_the_memory_that_it_views(func, args):
    for _ in range(2):
        found = result_of(func, args, {})
        assert described(found) == described(func(*args))
        assert places_of(found) == places_of(A)


def test_what_is_written_into_is_returned():
    total, out = on_meta(3, 3), on_meta(3, 3)
    assert result_of(aten.add_.Tensor, (total, total), {}) is total
    assert result_of(aten.addmm_.default, (total, A, on_meta(4, 3)), {}) is total
    assert result_of(aten.mm.out, (A, on_meta(4, 3)), {"out": out}) is out
    grown = on_meta(0)
    assert result_of(aten.mm.out, (A, on_meta(4, 3)), {"out": grown}) is grown and grown.shape == (3, 3)
    turned = on_meta(3, 4)
    assert result_of(aten.t_.default, (turned,), {}).shape == turned.shape == (4, 3)


def test_numbers_are_computed():
    found = result_of(aten.mul.Tensor, (torch.tensor([2, 3]), 2), {})
    assert found.tolist() == [4, 6]
    number = torch.tensor([1.0])
    assert result_of(aten.add_.Tensor, (number, 2), {}) is number and number.item() == 3


def test_what_pytorch_refuses_is_refused():
    with pytest.raises(RuntimeError):
        result_of(aten.mul.Tensor, (A, on_meta(5)), {})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return {**small_world(tmp_path_factory.mktemp("world")), "max_steps": 2}


@pytest.mark.parametrize(
    "keys",
    [
        {**WAYS["lora"], "lora_dropout": 0.1},
        {"finetuning_type": "full", "bf16": True, "disable_gradient_checkpointing": False},
        {**WAYS["oft"], "stage": "dpo", "dataset": "pairs"},
        {"finetuning_type": "full", "use_galore": True, "galore_layerwise": True, "galore_target": "all"},
    ],
    ids=["lora", "full, bf16", "oft, dpo", "galore, layerwise"],
)
def test_a_step_is_counted_as_if_pytorch_had_found_them(monkeypatch, world, keys):
    quick = plan_of({**world, **keys})
    monkeypatch.setattr(counter, "result_of", lambda func, args, kwargs: func(*args, **kwargs))
    plain = plan_of({**world, **keys})
    assert (quick.traces.kept, quick.traces.recomputed) == (plain.traces.kept, plain.traces.recomputed)
