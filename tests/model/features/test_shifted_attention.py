"""Shifted groups: what a dense mask gives, for every way in which rows reach the model."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.config.load import load_train
from luthier.core.errors import ModelError
from luthier.model.attention import isolate_samples, isolates_samples
from luthier.model.backends import load_for_training
from luthier.model.features.shifted_attention import shift_attention
from luthier.model.files.sources import ModelSource
from luthier.model.tokenizer import fit_tokenizer, load_tokenizer
from tests.tiny import TINY_LLAMA

LENGTHS = (16, 23, 1, 6, 40)
NUM_HEADS = TINY_LLAMA["num_attention_heads"]


def build(name: str = "llama", **changes):
    torch.manual_seed(3)
    config = AutoConfig.for_model(name, **{**TINY_LLAMA, "initializer_range": 0.2, **changes})
    return AutoModelForCausalLM.from_config(config).train()


def dense_mask(length: int) -> torch.Tensor:
    """(H, n, n): j <= i, and both in one group; groups of the second half of the heads lie half a group later."""
    size = -(-length // 4)
    place = torch.arange(length)
    groups = [place // size] * (NUM_HEADS // 2) + [(place - size // 2).div(size, rounding_mode="floor")] * (
        NUM_HEADS // 2
    )
    same = torch.stack([group[:, None] == group[None] for group in groups])
    return same & torch.ones(length, length, dtype=torch.bool).tril()


def expected_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Plain attention of transformers with the mask of every head added to the scores."""
    bias = torch.zeros(1, NUM_HEADS, len(ids), len(ids)).masked_fill(~dense_mask(len(ids)), float("-inf"))
    model.set_attn_implementation("eager")
    return model(input_ids=ids[None], attention_mask=bias, use_cache=False).logits[0]


def texts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 250, (length,), generator=generator) for length in LENGTHS]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_every_length_gives_what_a_dense_mask_gives(name):
    model = build(name, **({"n_layer": 2, "n_embd": 64, "n_head": 4, "attn_pdrop": 0} if name == "gpt2" else {}))
    if name == "gpt2":
        model.config.resid_pdrop = model.config.embd_pdrop = 0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    for ids in texts():
        expected = expected_logits(model, ids)
        shift_attention(model)
        found = model(input_ids=ids[None], use_cache=False).logits[0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_texts_in_one_row_and_padded_texts_are_those_of_each_alone():
    model = build()
    expected = torch.cat([expected_logits(model, ids) for ids in texts()])
    shift_attention(model)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    assert isolates_samples(model) is None
    isolate_samples(model)
    together = model(
        input_ids=torch.cat(texts())[None],
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS])[None],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=max(LENGTHS),
        max_length_k=max(LENGTHS),
        use_cache=False,
    ).logits[0]
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)
    ids = torch.nn.utils.rnn.pad_sequence(texts(), batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in texts()], batch_first=True)
    padded = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    torch.testing.assert_close(padded, expected, atol=1e-4, rtol=1e-4)


def test_no_token_sees_a_later_one_and_gradients_are_those_of_the_mask():
    model = build()
    ids = texts()[-1]
    expected_logits(model, ids).square().sum().backward()
    expected = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    shift_attention(model)
    model(input_ids=ids[None], use_cache=False).logits.square().sum().backward()
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, expected, atol=1e-3, rtol=1e-3)
    changed = torch.cat([ids[:-1], torch.tensor([249])])
    before = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    after = model(input_ids=changed[None], use_cache=False).logits[0, :-1]
    assert torch.equal(before, after)


def test_evaluation_and_generation_see_everything():
    model = build().eval()
    batch = {
        "input_ids": torch.tensor([[256, 256, 5, 6, 7, 8, 9, 4, 3, 2], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]),
        "attention_mask": torch.tensor([[0, 0, *[1] * 8], [1] * 10]),
    }
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        logits, words = model(**batch).logits[kept], model.generate(**batch, max_new_tokens=6, do_sample=False)
        shift_attention(model)
        torch.testing.assert_close(model(**batch).logits[kept], logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), words)


def test_a_run_asks_for_it(llama_folder, tmp_path):
    keys = {"model_name_or_path": str(llama_folder), "dataset": "x", "output_dir": str(tmp_path), "shift_attn": True}
    run = load_train(keys | {"flash_attn": "fa2"})
    assert [warning.key for warning in run.warnings if "shift_attn" in warning.reason] == ["flash_attn"]
    loaded = load_for_training(run, fit_tokenizer(load_tokenizer(ModelSource(str(llama_folder)))))
    assert loaded.attention.implementation == "luthier_shifted"
    assert loaded.padding_reason is None
    loaded.model(input_ids=torch.arange(3, 40, device=loaded.model.device)[None]).logits.sum().backward()
    assert all(weight.grad is not None for weight in loaded.model.parameters() if weight.requires_grad)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("bloom", {"n_layer": 2, "n_head": 4}, "does not let its attention be replaced"),
        ("gemma2", {"head_dim": 16}, "another attention than full"),
        ("gpt_oss", {"num_local_experts": 2, "head_dim": 16}, "another attention than full"),
        ("t5", {"d_model": 64, "num_layers": 1, "d_ff": 64}, "is not a plain decoder of text"),
    ],
)
def test_models_with_another_attention_say_so(name, changes, words):
    from transformers import AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(name, **{**TINY_LLAMA, **changes})
    auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    with pytest.raises(ModelError, match=f"{words} -> leave shift_attn out"):
        shift_attention(auto.from_config(config))
