"""A decoding step without the model's own code: the same logits, and only where the model computes just that."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.infer.batch import generate_answers
from luthier.infer.cache import new_cache
from luthier.infer.lean_step import lean_step
from luthier.infer.types import Settings
from luthier.model.kernels.fuse import fuse
from luthier.model.modules import cache_name
from tests.tiny import TINY_LLAMA, byte_tokenizer

SMALL = {**TINY_LLAMA, "head_dim": 16}
LEAN = {
    "llama": {},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama3 rope": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma": {},
}
OTHER = {
    "granite": {"embedding_multiplier": 12.0},
    "gemma2": {},
    "phi3": {},
    "smollm3": {"num_hidden_layers": 4},
    "ministral3": {"max_position_embeddings": 2**17},  # scales queries far from the beginning
    "qwen3_moe": {"num_experts": 4},
    "olmo2": {},
    "gpt_neox": {},
}


def random_model(name, keys):
    config = AutoConfig.for_model(**{"model_type": name, **SMALL, **keys})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.copy_(torch.randn(weight.shape) * 0.2 + (weight.ndim == 1))
    return model


def next_logits(model, step, lengths):
    """(B, V) after random prompts, by the step and by the model."""
    ids = torch.arange(len(lengths) * max(lengths)).view(len(lengths), -1) * 13 % 300
    ends, places = torch.tensor(lengths)[:, None], torch.arange(max(lengths))
    mask, positions = (places >= max(lengths) - ends).long(), (places - max(lengths) + ends).clamp(min=0)
    caches, name = [new_cache(model.config), new_cache(model.config)], cache_name(model)
    for cache in caches:
        model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], **{name: cache})
    own = model(ids[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], **{name: caches[0]})
    return step(ids[:, -1:], lengths, caches[1]), own.logits[:, -1]


@pytest.mark.parametrize("name", LEAN)
@pytest.mark.parametrize("lengths", [[7], [4, 9, 6]], ids=str)
def test_the_logits_are_the_same(name, lengths):
    model = random_model(name, LEAN[name])
    step = lean_step(model)
    assert step is not None
    found, expected = next_logits(model, step, lengths)
    torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=1e-5, rtol=1e-5)


def test_fused_modules_and_bfloat16(tmp_path):
    model = random_model("llama", {}).bfloat16()
    expected = next_logits(model, lean_step(model), [4, 9])
    fuse(model)
    found = next_logits(model, lean_step(model), [4, 9])
    for logits in (*found, expected[0]):
        assert (logits - expected[1]).abs().max() <= 0.04 * expected[1].abs().max()


@pytest.mark.parametrize("name", OTHER)
def test_other_models_take_their_own_code_and_say_so(name, said, monkeypatch):
    monkeypatch.setattr("luthier.infer.lean_step._reasons", set())
    assert lean_step(random_model(name, OTHER[name])) is None
    assert [message for message in said if message.startswith("answers: ") and "the model's own code" in message]


def test_so_does_a_model_that_was_changed():
    for change in (
        lambda model: model.model.layers[1].register_forward_hook(lambda *_: None),
        lambda model: setattr(model.model.layers[1].self_attn, "forward", model.model.layers[1].self_attn.forward),
        lambda model: model.set_attn_implementation("flex_attention"),
    ):
        model = random_model("llama", {})
        assert lean_step(model) is not None
        change(model)
        assert lean_step(model) is None


@pytest.mark.parametrize("name", LEAN)
def test_greedy_answers_are_the_same_and_fast_path_false_keeps_the_models_own_code(name, monkeypatch):
    model, tokenizer = random_model(name, LEAN[name]), byte_tokenizer()
    prompts = [[65, 66, 67], [70] * 9, [80, 81]]
    steps = []
    original = type(lean_step(model)).__call__
    monkeypatch.setattr(
        "luthier.infer.lean_step.LeanStep.__call__", lambda *args: steps.append(len(args[2])) or original(*args)
    )

    def answers(fast_path):
        settings = Settings(do_sample=False, max_new_tokens=12)
        return list(generate_answers(model, tokenizer, prompts, settings, set(), 2, fast_path=fast_path))

    expected = answers(False)
    assert not steps
    assert answers(True) == expected
    assert set(steps) == {1, 2}
