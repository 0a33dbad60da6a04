"""Attention: the choice is explained, and samples in one row know nothing of each other."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.core.machine import detect
from luthier.data.collate import concatenate_rows, model_inputs
from luthier.data.shared_prefixes import concatenate_sharing_prefixes
from luthier.model.attention import (
    PER_SAMPLE,
    isolate_samples,
    isolates_samples,
    per_sample_attention,
    resolve_attention,
    shares_prefixes,
)
from luthier.model.classes import model_class
from tests.tiny import TINY_LLAMA

LENGTHS = (7, 1, 30, 12)
SLIDING = {"sliding_window": 8}
ISOLATED = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": SLIDING | {"head_dim": 16},
    "gemma2": SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_layer": 2, "n_embd": 64, "n_head": 4},
    "olmo2": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
}
PADDED = {
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "mamba": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "qwen3_next": {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "num_hidden_layers": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def build(name: str, changes: dict):
    """A random model with weights large enough that a leak shows."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(name, **{**TINY_LLAMA, "initializer_range": 0.2, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def one_row(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 250, (length,), generator=generator) for length in LENGTHS]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return rows, {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
    }


@pytest.mark.parametrize("name", ISOLATED)
def test_logits_of_samples_in_one_row_are_those_of_each_alone(name):
    model = build(name, ISOLATED[name])
    rows, batch = one_row()
    with torch.no_grad():
        alone = torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
        assert isolates_samples(model) is None
        isolate_samples(model)
        together = model(**batch, use_cache=False).logits[0]
    torch.testing.assert_close(together, alone, atol=1e-5 * alone.abs().max().item(), rtol=0)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_gradients_of_one_row_are_the_sum_of_those_of_its_samples(reentrant):
    model = build("llama", {}).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    rows, batch = one_row()
    for row in rows:
        model(input_ids=row[None], use_cache=False).logits.square().sum().backward()
    expected = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    isolate_samples(model)
    model(**batch, use_cache=False).logits.square().sum().backward()
    found = model.model.embed_tokens.weight.grad
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("name", ISOLATED)
def test_answers_that_share_tokens_are_those_that_have_their_own(name):
    """Logits at the targets, and gradients; prompts and answers are longer than the sliding windows.

    Some prompts begin alike."""
    model, rng = build(name, ISOLATED[name]), torch.Generator().manual_seed(2)

    def some(length):
        return torch.randint(1, 250, (length,), generator=rng).tolist()

    system = some(9)
    prompts = [system + some(12), system + some(3)]
    rows = [
        {"input_ids": prompts[which] + answer, "labels": [-100] * len(prompts[which]) + answer}
        for which, answer in ((0, some(9)), (1, some(2)), (0, some(1)), (1, some(15)), (0, some(20)))
    ]
    isolate_samples(model)
    assert shares_prefixes(model)
    found = []
    for layout in (concatenate_rows, concatenate_sharing_prefixes):
        batch = layout(rows)
        logits = model(**model_inputs(batch), use_cache=False).logits[0][batch["positions"]]
        model.zero_grad()
        logits.log_softmax(-1).gather(1, batch["targets"][:, None]).sum().backward()
        found.append((batch["input_ids"].numel(), logits.detach(), model.get_input_embeddings().weight.grad.clone()))
    (num_tokens, logits, grads), (num_shared, shared_logits, shared_grads) = found
    assert num_tokens - num_shared == 2 * 21 + 9 + 12
    torch.testing.assert_close(shared_logits, logits, atol=1e-5 * logits.abs().max().item(), rtol=0)
    torch.testing.assert_close(shared_grads, grads, atol=1e-5 * grads.abs().max().item(), rtol=0)


def test_tokens_are_not_shared_where_attention_does_not_know_how():
    model = build("llama", {})
    assert not shares_prefixes(model), "plain attention"
    isolate_samples(model)
    inner = model.model.forward
    model.model.forward = lambda *args, prefixes=None, **given: inner(*args, **given)
    assert not shares_prefixes(model), "the model does not pass them on"


def scored_one_by_one(dtype, dropout=0.0, softcap=None):
    """The output of samples of 7, 1 and 9 tokens, and their values, which are not as wide as the keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, 17, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for size in (6, 6, 4)
    )
    bounds = torch.tensor([0, 7, 8, 17], dtype=torch.int32)
    return per_sample_attention(torch.nn.Module(), q, k, v, None, None, dropout, None, softcap, bounds)[0], (q, k, v)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_weights_are_dropped_out(softcap):
    """Of the second sample, a single token, the one weight is 0 or 2."""
    for seed in range(8):
        torch.manual_seed(seed)
        out, (_, _, value) = scored_one_by_one(torch.float32, 0.5, softcap)
        for found, own in zip(out[0, 7], value[0, :, 7], strict=True):
            assert torch.equal(found, torch.zeros(4)) or torch.equal(found, 2 * own)
    assert not torch.equal(out, scored_one_by_one(torch.float32, 0.0, softcap)[0])


def test_16_bits_are_computed_in_32_on_a_cpu():
    out, states = scored_one_by_one(torch.bfloat16)
    exact, exact_states = scored_one_by_one(torch.float64)
    found = torch.autograd.grad(out.square().sum(), states)
    expected = torch.autograd.grad(exact.square().sum(), exact_states)
    for one, other in zip((out, *found), (exact, *expected), strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - other).norm() < 0.012 * other.norm()


def test_tokens_after_a_cache_see_those_in_it():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY_LLAMA)).eval()
    isolate_samples(model)
    ids = torch.arange(5, 14)[None]
    with torch.no_grad():
        expected = model(ids).logits
        start = model(ids[:, :5], use_cache=True)
        end = model(ids[:, 5:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(torch.cat([start.logits, end], 1), expected)


@pytest.mark.parametrize("window", [None, 50, 6, 1])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize(
    "prefixes", [None, [[0, 0], [0, 0], [1, 6], [0, 0]], [[0] * 4, [0, 3, 0, 0], [0, 3, 7, 1], [0] * 4]]
)
def test_samples_one_by_one_are_those_of_the_whole_matrix(window, softcap, prefixes):
    """Values of another size than keys are for no kernel of ours."""
    lengths, heads, groups = (7, 1, 9, 3), 4, 2
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, count, sum(lengths), size, generator=generator, dtype=torch.float64).requires_grad_()
        for count, size in ((heads, 6), (heads // groups, 6), (heads // groups, 4))
    )
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    given = None if prefixes is None else torch.tensor(prefixes, dtype=torch.int32)
    found, _ = per_sample_attention(
        torch.nn.Module(), q, k, v, None, 0.3, 0.0, window, softcap, cu_seq_lens_q=bounds, prefixes=given
    )
    mask = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    for number, (start, end) in enumerate(pairwise(bounds.tolist())):
        runs = [] if prefixes is None else zip(prefixes[number][::2], prefixes[number][1::2], strict=True)
        before = [token for first, count in runs for token in range(first, first + count)]
        for token in range(start, end):
            seen = [*before, *range(start, token + 1)]
            mask[token, seen if window is None else seen[-window:]] = True
    scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = (weights @ v.repeat_interleave(groups, 1)).transpose(1, 2)
    exactness = {} if softcap is None else {"rtol": 1e-5, "atol": 1e-6}  # transformers has the softmax in float32 too
    torch.testing.assert_close(found, expected, **exactness)
    shares = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((found * shares).sum(), (q, k, v)),
        torch.autograd.grad((expected * shares).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **exactness)


@pytest.mark.parametrize("name", PADDED)
def test_a_model_that_mixes_samples_is_refused_and_left_as_it_was(name):
    model = build(name, PADDED[name])
    before = model.config._attn_implementation
    assert isolates_samples(model)
    assert model.config._attn_implementation == before


def test_no_mask_of_row_by_row_size_is_built(monkeypatch):
    model = build("llama", {})
    isolate_samples(model)
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", lambda *a, **k: pytest.fail("a mask was built"))
    model(**one_row()[1], use_cache=False)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_padded_batches_and_generation_are_as_before(name):
    model = build(name, ISOLATED[name])
    batch = {
        "input_ids": torch.tensor([[256, 256, 5, 6, 7, 8, 9, 4, 3, 2], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]),
        "attention_mask": torch.tensor([[0, 0, *[1] * 8], [1] * 10]),
    }
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        logits = model(**batch).logits[kept]
        words = model.generate(**batch, max_new_tokens=8, do_sample=False)
        isolate_samples(model)
        torch.testing.assert_close(model(**batch).logits[kept], logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False), words)


def test_the_name_of_the_attention_is_not_saved(tmp_path):
    model = build("llama", {})
    isolate_samples(model)
    model.save_pretrained(tmp_path)
    assert PER_SAMPLE not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("asked", "device", "expected", "reason"),
    [
        ("auto", "cpu", "sdpa", ""),
        ("sdpa", "cpu", "sdpa", ""),
        ("disabled", "cpu", "eager", ""),
        ("fa2", "cpu", "sdpa", "needs a GPU"),
        ("fa3", "cuda", "sdpa", "not installed"),
        ("flex", "cpu", "sdpa", "needs a GPU"),
        ("flex", "cuda", "flex_attention", ""),
    ],
)
def test_the_best_that_the_machine_has_is_chosen_and_explained(asked, device, expected, reason):
    config = AutoConfig.for_model("llama", **TINY_LLAMA)
    machine = dataclasses.replace(detect(), device=device)
    choice = resolve_attention(
        asked, config=config, model_class=model_class(config), dtype=torch.bfloat16, machine=machine
    )
    assert choice.implementation == expected
    assert reason in choice.reason
    assert bool(reason) == bool(choice.reason)


def test_capped_scores_run_in_the_plain_implementation():
    config = AutoConfig.for_model("gemma2")
    choice = resolve_attention(
        "auto", config=config, model_class=model_class(config), dtype=torch.float32, machine=detect()
    )
    assert choice.implementation == "eager"


def test_flex_attention_is_chosen_by_what_the_class_of_the_model_says():
    machine = dataclasses.replace(detect(), device="cuda")

    def choose(name, **changes):
        config = AutoConfig.for_model(name, **changes)
        return resolve_attention(
            "flex", config=config, model_class=model_class(config), dtype=torch.bfloat16, machine=machine
        )

    assert choose("gemma2").implementation == "flex_attention"
    assert "uses attention dropout" in choose("llama", attention_dropout=0.1).reason
    assert "has no FlexAttention" in choose("bloom").reason


def test_a_model_that_needs_a_kernel_of_its_own_gets_it_or_says_what_it_lacks(monkeypatch):
    config, machine = AutoConfig.for_model("gpt_oss"), dataclasses.replace(detect(), device="cuda")
    for is_there in (True, False):
        monkeypatch.setattr("luthier.model.attention.is_installed", lambda module, found=is_there: found)
        choice = resolve_attention(
            "fa3", config=config, model_class=model_class(config), dtype=torch.bfloat16, machine=machine
        )
        if is_there:
            assert choice.implementation.startswith("kernels-community/")
        else:
            assert choice.implementation == "eager"
            assert "the library kernels, which fetches kernels-community/" in choice.reason


def in_8_bits(model):
    """The model with 8-bit layers of bitsandbytes, and inputs of which some are large enough to go apart."""
    pytest.importorskip("bitsandbytes")
    from luthier.config.keys.quantization import QuantizationConfig
    from luthier.core.kinds import QUANTIZERS
    from luthier.model.quantization._layers import quantize_in_memory

    keys, cpu = QuantizationConfig(quantization_bit=8), torch.device("cpu")
    linear = QUANTIZERS.get("bnb").linear
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("layernorm.weight"):
                weight.fill_(2.5)
    quantize_in_memory(model, lambda layer: linear(layer, keys, torch.float32, cpu), torch.float32, cpu)
    return model.eval()


def test_8_bit_layers_that_treat_large_inputs_of_all_tokens_together_do_not_hide_what_attention_does():
    """Padded rows change each other by as much as concatenated ones do, so padding would not keep them apart."""
    model = in_8_bits(build("llama", {}))
    rows, batch = one_row()
    with torch.no_grad():
        alone = torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        side_by_side = model(input_ids=padded, attention_mask=mask).logits[mask.bool()]
        assert isolates_samples(model) is None
        isolate_samples(model)
        together = model(**batch, use_cache=False).logits[0]
    assert all(m.state.threshold == 6 for m in model.modules() if type(m).__name__ == "Linear8bitLt")
    noise = (side_by_side - alone).norm()
    assert noise > 1e-3 * alone.norm()
    assert (together - alone).norm() < 1.5 * noise


@pytest.mark.parametrize("share", [1.0, 0.05])
def test_an_8_bit_model_that_mixes_samples_is_refused(monkeypatch, share):
    """An attention that hands each token a share of the mean of all tokens of the row."""
    from luthier.model import attention

    per_sample = attention.per_sample_attention

    def mixing(module, query, key, value, *args, **kwargs):
        out, weights = per_sample(module, query, key, value, *args, **kwargs)
        return out + share * out.mean(dim=1, keepdim=True), weights

    model = in_8_bits(build("llama", {}))
    monkeypatch.setattr(attention, "per_sample_attention", mixing)
    assert "the first one changed the second" in isolates_samples(model)
