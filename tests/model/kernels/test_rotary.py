"""Rotary position embedding as one operation gives what the code of transformers gives, in value and gradient."""

import copy
import pickle

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from luthier.model.kernels.fuse import fuse
from luthier.model.kernels.rotary import Rotary, Rotating, rotated, rotation_of
from luthier.workflow.plan.trace import Affirming
from tests.tiny import TINY_LLAMA


def given(dtype=torch.float64, other=None, width=8):
    """q (2, 4, 5, 8), k (2, 2, 5, 8), cos and sin (2, 5, width) of any numbers."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 5, heads, 8).to(dtype).transpose(1, 2).requires_grad_() for heads in (4, 2))
    return q, k, *(torch.randn(2, 5, width).to(other or dtype) for _ in range(2))


def test_gradients_are_those_of_the_equations():
    q, _, cos, sin = given()
    assert torch.autograd.gradcheck(lambda x: Rotary.apply(x, cos[:, None], sin[:, None]), (q,))


@pytest.mark.parametrize("formats", [(torch.float32,), (torch.bfloat16,), (torch.bfloat16, torch.float32)])
def test_numbers_are_those_of_transformers(formats):
    ours, theirs = given(*formats), given(*formats)
    pairs = zip(rotated(*ours), modeling_llama.apply_rotary_pos_emb(*theirs), ours, theirs, strict=False)
    for found, expected, x, x2 in pairs:
        assert found.dtype == expected.dtype and found.stride() == expected.stride()
        dy = torch.randn_like(expected)
        found.backward(dy)
        expected.backward(dy)
        rounding = 1e-2 if torch.bfloat16 in formats else 1e-6
        for one, other in ((found, expected), (x.grad, x2.grad)):
            assert one.dtype == other.dtype
            assert (one - other).float().norm() <= rounding * other.float().norm()


@pytest.mark.parametrize(
    ("kind", "is_known"),
    [(LlamaAttention, True), (Qwen3Attention, True), (CohereAttention, False), (LlamaMLP, False)],
)
def test_rotations_are_known_by_what_they_compute(kind, is_known):
    """Those of Cohere are of neighboring numbers. A plan answers questions about numbers with yes."""
    assert (rotation_of(kind) is not None) == is_known
    with torch.device("meta"), Affirming():
        assert (rotation_of(kind) is not None) == is_known


def test_a_part_of_each_head_is_rotated_by_the_own_function():
    own = rotation_of(LlamaAttention).own
    assert own is modeling_llama.apply_rotary_pos_emb
    calls = []
    rotate = Rotating("", lambda *args, **more: calls.append(more) or own(*args, **more))
    q, k, cos, sin = given()
    torch.testing.assert_close(rotate(q, k, cos, sin), own(q, k, cos, sin))
    assert not calls
    swapped = (q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    torch.testing.assert_close(rotate(*swapped, unsqueeze_dim=2)[0].transpose(1, 2), own(q, k, cos, sin)[0])
    assert calls == [{"unsqueeze_dim": 2}]
    narrow = modeling_glm.apply_rotary_pos_emb
    partial = given(width=4)
    torch.testing.assert_close(Rotating("", narrow)(*partial), narrow(*partial))
    calls.clear()
    of_heads = Rotating("", lambda q, k, *_: calls.append("own") or (q, k))
    of_heads(q, k, cos[:, None], sin[:, None])
    assert calls == ["own"], "cos and sin with a dimension for the heads are not those of the kernel"


def test_other_models_of_the_same_code_keep_their_rotation():
    own = modeling_llama.apply_rotary_pos_emb
    config = LlamaConfig(**TINY_LLAMA, attn_implementation="eager")
    layer, seen = LlamaAttention(config, 0), []
    layer.q_proj.register_forward_hook(lambda *_: seen.append(modeling_llama.apply_rotary_pos_emb))
    fuse(layer)
    places = torch.randn(1, 3, config.head_dim)
    layer(torch.randn(1, 3, config.hidden_size), (places, places), None)
    assert seen[0] is not own and modeling_llama.apply_rotary_pos_emb is own


def test_a_model_can_be_copied_and_sent_to_another_process():
    layer = LlamaAttention(LlamaConfig(**TINY_LLAMA, attn_implementation="eager"), 0)
    fuse(layer)
    for one in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert one.forward.args[0] is one and one.forward.args[1].own is modeling_llama.apply_rotary_pos_emb
