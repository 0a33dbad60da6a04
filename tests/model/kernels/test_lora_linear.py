"""Value and gradients of a linear layer with LoRA are those of the equations."""

import pytest
import torch

from luthier.model.kernels.lora_linear import factors_of, lora_linear
from luthier.model.kernels.swiglu import SILU

SCALINGS = (0.7, 2.0)
SIZES = {"x": (7, 5), "up": (7, 5), "a1": (2, 5), "a2": (3, 5), "b1": (6, 2), "b2": (4, 3)}


def numbers(*sizes):
    torch.manual_seed(0)
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


def applied(x, up, weights, biases, a, b):
    activation = None if up is None else SILU
    factors = factors_of(a, b, SCALINGS[: len(a)], x.dtype)
    return lora_linear(x, weights, biases, factors, (*a, *b), up, activation)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("is_made", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_values_and_gradients_are_those_of_the_equations(num_layers, is_gated, is_made, has_bias):
    (*learned,) = (one.requires_grad_() for one in numbers(*SIZES.values()))
    weights, biases = numbers((6, 5), (4, 5))[:num_layers], numbers((6,), (4,))[:num_layers]
    given = [(lambda weight=weight: weight) if is_made else weight for weight in weights]
    biases = biases if has_bias else [None] * num_layers

    def compute(x, up, a1, a2, b1, b2):
        a, b = (a1, a2)[:num_layers], (b1, b2)[:num_layers]
        return applied(x, up if is_gated else None, given, biases, a, b)

    x, up, *factors = learned
    inputs = SILU.apply(x) * up if is_gated else x
    for i, y in enumerate(compute(*learned)):
        matrix = weights[i] + SCALINGS[i] * factors[2 + i] @ factors[i]
        torch.testing.assert_close(y, inputs @ matrix.T + (biases[i] if has_bias else 0))
    assert torch.autograd.gradcheck(compute, learned)


@pytest.mark.parametrize("learns", ["a", "b", ""])
def test_frozen_factors_get_no_gradient(learns):
    x, _, a1, a2, b1, b2 = numbers(*SIZES.values())
    weights = numbers((6, 5), (4, 5))
    for one in (x, a1, a2, b1, b2):
        one.requires_grad_()
    sum(y.square().sum() for y in applied(x, None, weights, [None] * 2, (a1, a2), (b1, b2))).backward()
    expected = {"a": a2.grad, "b": b2.grad, "x": x.grad}
    for one in (x, a1, a2, b1, b2):
        one.grad = None
    for name, pair in {"a": (a1, a2), "b": (b1, b2)}.items():
        for one in pair:
            one.requires_grad_(name in learns)
    sum(y.square().sum() for y in applied(x, None, weights, [None] * 2, (a1, a2), (b1, b2))).backward()
    for name, one in {"a": a2, "b": b2, "x": x}.items():
        if name in (*learns, "x"):
            torch.testing.assert_close(one.grad, expected[name])
        else:
            assert one.grad is None


@pytest.mark.parametrize("learns", [("x",), ("up",), ("a",), ("b",), ("x", "b"), ("up", "a")], ids="-".join)
def test_each_gradient_of_a_gated_input_does_without_the_others(learns):
    x, up, a, _, b, _ = numbers(*SIZES.values())
    (weight,) = numbers((6, 5))
    given = {"x": x, "up": up, "a": a, "b": b}
    for name in learns:
        given[name].requires_grad_()
    wanted = [given[name] for name in learns]
    (y,) = applied(x, up, [weight], [None], (a,), (b,))
    expected = (SILU.apply(x) * up) @ (weight + SCALINGS[0] * b @ a).T
    for one, other in zip(
        torch.autograd.grad(y.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_gradients_are_in_the_format_of_the_weights_and_need_no_copy():
    x, _, a1, a2, b1, b2 = (one.float().requires_grad_() for one in numbers(*SIZES.values()))
    half = torch.bfloat16
    factors = factors_of((a1, a2), (b1, b2), SCALINGS, half)
    weights = [weight.to(half) for weight in numbers((6, 5), (4, 5))]
    y1, y2 = lora_linear(x.to(half), weights, [None] * 2, factors, (a1, a2, b1, b2))
    (y1.sum() + y2.square().sum()).backward()
    grads = [one.grad for one in (a1, a2, b1, b2)]
    assert all(grad.dtype == torch.float32 and grad.is_contiguous() for grad in grads)
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 1
