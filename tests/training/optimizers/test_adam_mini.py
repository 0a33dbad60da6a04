"""Adam-mini: two steps worked out block by block, and the size of its state."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from luthier.training.optimizers.adam_mini import block_shape, head_size_of
from tests.training.optimizers.worlds import arguments, assert_resumes, built, fill_gradients, tiny_model, weights


def blocks_of(name: str, weight: torch.Tensor) -> list[torch.Tensor]:
    """Heads of 16 rows for queries and keys, single rows for other matrices, norms whole."""
    if weight.ndim == 1:
        return [weight]
    return list(weight.split(16 if "q_proj" in name or "k_proj" in name else 1))


@pytest.mark.parametrize(("beta1", "beta2", "eps"), [(0.9, 0.999, 1e-8), (0.7, 0.8, 0.1)], ids=["defaults", "others"])
def test_two_steps_by_hand(tmp_path, beta1, beta2, eps):
    model = tiny_model()
    keys = {"adam_beta1": beta1, "adam_beta2": beta2, "adam_epsilon": eps, "weight_decay": 0.1}
    optimizer = built("adam_mini", model, arguments(tmp_path, **keys), use_adam_mini=True)
    expected = weights(model)
    means: dict[str, torch.Tensor] = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    squares: dict[str, list[float]] = {name: [0.0] * len(blocks_of(name, w)) for name, w in expected.items()}
    for step in (1, 2):
        fill_gradients(model, step)
        for name, weight in model.named_parameters():
            means[name] = beta1 * means[name] + (1 - beta1) * weight.grad
            expected[name] *= 1 - 1e-2 * (0.0 if "norm" in name else 0.1)
            parts = zip(*(blocks_of(name, x) for x in (expected[name], means[name], weight.grad)), strict=True)
            for index, (block, mean, gradient) in enumerate(parts):
                square = beta2 * squares[name][index] + (1 - beta2) * gradient.square().mean().item()
                squares[name][index] = square
                size = (square / (1 - beta2**step)) ** 0.5 + eps
                block -= 1e-2 * mean / (1 - beta1**step) / size
        optimizer.step()
    for name, weight in weights(model).items():
        assert torch.allclose(weight, expected[name], atol=1e-6), name


def test_the_state_is_half_that_of_adamw(tmp_path):
    model = tiny_model()
    optimizer = built("adam_mini", model, arguments(tmp_path), use_adam_mini=True)
    fill_gradients(model, 0)
    optimizer.step()
    num_weights = sum(weight.numel() for weight in model.parameters())
    squares = sum(state["exp_avg_sq"].numel() for state in optimizer.state.values())
    # Two layers of q (4 heads), k (2 heads), rows of v, o and the three of the MLP, and two norms; then the two
    # vocabularies and the last norm.
    assert squares == 2 * (4 + 2 + 32 + 64 + 128 + 128 + 64 + 2) + 2 * 320 + 1
    assert sum(state["exp_avg"].numel() for state in optimizer.state.values()) == num_weights


def test_blocks_of_other_shapes():
    assert block_shape("layers.0.self_attn.q_proj.weight", (64, 64), 16) == 16
    assert block_shape("layers.0.self_attn.q_proj.lora_A.default.weight", (16, 64), 16) == 1
    assert block_shape("layers.0.self_attn.q_proj.lora_B.default.weight", (64, 16), 16) == 16
    assert block_shape("layers.0.self_attn.q_proj.bias", (64,), 16) == "whole"
    assert block_shape("layers.0.self_attn.k_proj.weight", (24, 64), 16) == 1, "no whole number of heads"
    assert block_shape("layers.0.mlp.experts.up_proj", (4, 8, 16), 16) == 1


@pytest.mark.parametrize(("head_dim", "expected"), [(24, 24), (None, 16)])
def test_heads_need_not_share_the_hidden_size(head_dim, expected):
    model = SimpleNamespace(config=LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=head_dim))
    assert head_size_of(model) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_resumes(tmp_path, dtype):
    assert_resumes("adam_mini", tmp_path, dtype=dtype, use_adam_mini=True)
