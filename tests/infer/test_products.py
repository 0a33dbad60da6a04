"""Linear layers that oneDNN computes while a model answers: the same numbers, and afterwards the layers as before."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.infer.lean_layers import lean_layers
from luthier.infer.products import SHARE_FOR_COPIES, Products, together
from luthier.model.kernels.fuse import fuse
from luthier.model.kernels.plain_linear import PlainForward
from luthier.model.kernels.products import has_kernel, one_dnn
from tests.tiny import tiny_llama

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
PLENTY = 10**9
needs_kernel = pytest.mark.skipif(not has_kernel(torch.float32), reason="oneDNN does not multiply here")


@pytest.fixture
def model(tmp_path):
    return AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path, attention_bias=True)).eval().requires_grad_(False)


def own_forwards(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("free_bytes", [None, PLENTY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_are_the_same(model, dtype, free_bytes):
    if not has_kernel(dtype):
        pytest.skip("oneDNN does not multiply in this format here")
    model = model.to(dtype)
    products = Products(model, free_bytes)
    expected = model(IDS).logits
    with products.in_use():
        assert len(own_forwards(model)) == (0 if dtype is torch.bfloat16 and free_bytes is None else 15)
        found = model(IDS).logits
    assert not own_forwards(model)
    torch.testing.assert_close(found, expected, atol=1e-6 if dtype is torch.float32 else 2e-2, rtol=0)


@needs_kernel
@pytest.mark.parametrize("free_bytes", [None, PLENTY])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_one_or_two_tokens_take_products_of_few_rows(model, monkeypatch, free_bytes, num_rows):
    monkeypatch.setattr("luthier.model.kernels.products.is_better_here", lambda: True)
    attention, calls = model.model.layers[0].self_attn, counted(monkeypatch)
    x, ids = torch.randn(num_rows, 1, 64), IDS[:num_rows, :1]
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    expected, logits = [layer(x) for layer in layers], model(ids).logits
    products = Products(model, free_bytes)
    with products.in_use():
        found, whole, of_model = [layer(x) for layer in layers], together(layers)(x), model(ids).logits
    assert not calls
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(whole, torch.cat(expected, -1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(of_model, logits, atol=1e-6, rtol=0)
    with products.in_use():
        model(IDS)
    assert calls, "six tokens"


@pytest.mark.skipif(not has_kernel(torch.float32), reason="oneDNN is not in this PyTorch")
def test_weights_are_packed_only_where_there_is_memory_for_them(model, monkeypatch):
    packed = []
    monkeypatch.setattr("luthier.infer.products._packed", lambda weight: packed.append(weight.nbytes) or weight)
    total = sum(one.weight.nbytes for one in model.modules() if isinstance(one, torch.nn.Linear))
    for free_bytes, is_packed in (
        (None, False),
        (total / SHARE_FOR_COPIES - 1, False),
        (total / SHARE_FOR_COPIES, True),
    ):
        packed.clear()
        with Products(model, free_bytes).in_use():
            assert sum(packed) == (total if is_packed else 0)


def test_weights_that_have_changed_are_packed_again(model):
    products = Products(model, PLENTY)
    with products.in_use():
        before = model(IDS).logits
    layer = model.model.layers[0].mlp.down_proj
    layer.weight.data = layer.weight * 2
    expected = model(IDS).logits
    with products.in_use():
        found = model(IDS).logits
    assert (found - before).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_autocast_decides_the_number_format(model):
    layer, x = model.lm_head, torch.randn(3, 64)
    with Products(model, PLENTY).in_use(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16


def test_the_layers_come_back_after_an_error_and_changed_ones_stay(model):
    own = model.lm_head.forward = lambda x: x
    with pytest.raises(KeyError), Products(model).in_use():
        assert model.lm_head.forward is own
        raise KeyError
    assert own_forwards(model) == ["lm_head"]


def test_layers_that_training_has_changed_come_back_as_they_were(model):
    if not has_kernel(torch.float32):
        pytest.skip("oneDNN does not multiply here")
    layer = model.lm_head
    own = layer.forward = PlainForward(layer)
    expected = model(IDS).logits
    with Products(model, PLENTY).in_use():
        assert layer.forward is not own
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-6, rtol=0)
    assert layer.forward is own


def counted(monkeypatch):
    calls = []
    monkeypatch.setattr("luthier.infer.products.one_dnn", lambda x, *rest: calls.append(x.shape) or one_dnn(x, *rest))
    return calls


@needs_kernel
def test_layers_with_the_same_input_are_one_product(model, monkeypatch):
    calls = counted(monkeypatch)
    expected = model(IDS).logits
    with Products(model, PLENTY).in_use():
        found = model(IDS).logits
    assert len(calls) == 4 * len(model.model.layers) + 1  # q, k, v; o; gate, up; down; the head
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@needs_kernel
def test_what_was_computed_with_other_numbers_is_not_taken(model):
    attention = model.model.layers[0].self_attn
    q, k, v = layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    x, other = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    with Products(model, PLENTY).in_use():
        q(x)
        x.mul_(2)
        changed = k(x)
        v(other)
        again = k(x)
        whole = together(layers)(x)
        parts = [layer(x.flatten(0, 1)) for layer in layers]  # another tensor with the same numbers each time
    torch.testing.assert_close(changed, k(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(again, k(x), atol=1e-6, rtol=1e-5)
    for found in (whole.flatten(0, 1), torch.cat(parts, -1)):
        torch.testing.assert_close(found, together(layers)(x).flatten(0, 1), atol=1e-6, rtol=1e-5)


@needs_kernel
def test_layers_are_asked_one_by_one_unless_their_product_is_one(model, monkeypatch):
    attention, calls = model.model.layers[0].self_attn, counted(monkeypatch)
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    x = torch.randn(3, 64)

    def num_products(asked):
        """And whether their numbers are those of the layers, one by one."""
        whole = torch.cat([layer(x) for layer in asked], -1)
        calls.clear()
        torch.testing.assert_close(together(asked)(x), whole)
        return len(calls)

    with Products(model, PLENTY).in_use():
        assert num_products(layers) == num_products(layers[:2]) == num_products(layers[::-1]) == 1
        assert num_products([*layers[:2], attention.o_proj]) == 2
        assert together([attention.o_proj]) is not attention.o_proj
        for layer in (layers[0], attention.o_proj):
            layer.register_forward_hook(lambda *given: given[-1] * 2)
        num_products(layers)
        assert together([attention.o_proj]) is attention.o_proj


@needs_kernel
@pytest.mark.parametrize("layer_names", [["o_proj"], ["q_proj", "k_proj", "v_proj"]])
def test_layers_together_heed_the_format_of_x_and_autocast(model, layer_names):
    layers = [getattr(model.model.layers[0].self_attn, name) for name in layer_names]
    x, wide = torch.randn(3, 64, dtype=torch.bfloat16), torch.randn(3, 64)
    if not has_kernel(torch.bfloat16):
        pytest.skip("oneDNN does not multiply in this format here")
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.cat([layer(wide) for layer in layers], -1)
        with Products(model, PLENTY).in_use():
            assert torch.equal(together(layers)(wide), expected)
    model.to(torch.bfloat16)
    with Products(model, PLENTY).in_use():
        asked = together(layers)
        torch.testing.assert_close(asked(x), torch.cat([layer(x) for layer in layers], -1))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(asked(wide), torch.cat([layer(wide) for layer in layers], -1))


@needs_kernel
@pytest.mark.parametrize("is_fused", [False, True])
def test_layers_under_adapters_share_their_product_too(model, monkeypatch, is_fused):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    adapted.eval().requires_grad_(False)
    if is_fused:
        fuse(adapted)
    expected = adapted(IDS).logits
    calls = counted(monkeypatch)
    with lean_layers(adapted), Products(adapted, PLENTY).in_use():
        found = adapted(IDS).logits
    num_adapters = 0 if is_fused else 2 * 7  # of which `lean_layers` makes no call
    assert len(calls) == (4 + num_adapters) * model.config.num_hidden_layers + 1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
