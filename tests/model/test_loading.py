"""From a checked run to a model: what the keys of a run file do to it."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from luthier.config.load import load_export, load_infer, load_train
from luthier.core.errors import ModelError
from luthier.core.machine import detect
from luthier.model.attention import isolate_samples, isolates_samples
from luthier.model.backends import load_for_inference, load_for_training
from luthier.model.files.sources import ModelSource
from luthier.model.heads.output_head import inspect_head
from luthier.model.loading.merged import load_for_export
from luthier.model.modules import unwrap
from luthier.model.tokenizer import fit_tokenizer, load_tokenizer
from tests.tiny import tiny_llama


def run_of(folder, tmp_path, **keys):
    run = load_train(
        {"model_name_or_path": str(folder), "dataset": "x", "output_dir": str(tmp_path / "out"), "do_train": True}
        | keys
    )
    tokenizer = load_tokenizer(ModelSource(run.model.model_name_or_path))
    fitted = fit_tokenizer(
        tokenizer,
        add_tokens=run.features.new_tokens.add_tokens,
        add_special_tokens=run.features.new_tokens.add_special_tokens,
    )
    return run, fitted


def training(folder, tmp_path, **keys):
    return load_for_training(*run_of(folder, tmp_path, **keys))


def learning(loaded) -> set[str]:
    return {name for name, weight in loaded.model.named_parameters() if weight.requires_grad}


def test_lora_is_the_default_and_reproducible(llama_folder, tmp_path, said):
    first, second = (training(llama_folder, tmp_path, finetuning_type="lora", seed=3) for _ in range(2))
    assert all("lora_" in name for name in learning(first))
    assert first.num_trainable == sum(p.numel() for p in first.model.parameters() if p.requires_grad)
    for (name, a), (_, b) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert first.padding_reason is None
    assert first.dtype == torch.float32
    assert f"trainable parameters: {first.num_trainable:,} of {first.num_parameters:,}" in "\n".join(said)


@pytest.mark.parametrize("finetuning_type", ["lora", "freeze", "full"])
def test_without_bf16_all_weights_are_float32_on_an_accelerator_too(llama_folder, tmp_path, finetuning_type):
    """Only autocast, which bf16 turns on, computes with weights of two formats; a rounded float32 checkpoint would be
    another model."""
    accelerated = replace(detect(), device="cuda", bf16=True, fp16=True)
    run, fitted = run_of(llama_folder, tmp_path, finetuning_type=finetuning_type)
    model = load_for_training(run, fitted, machine=accelerated).model
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    saved = load_file(llama_folder / "model.safetensors")
    assert torch.equal(unwrap(model).model.norm.weight, saved["model.norm.weight"])


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, torch.float32),
        ({"bf16": True}, torch.bfloat16),
        ({"infer_dtype": "bfloat16"}, torch.bfloat16),
        ({"bf16": True, "infer_dtype": "float32"}, torch.float32),
    ],
)
def test_an_evaluation_has_the_number_format_of_the_checkpoint_or_that_of_bf16(llama_folder, tmp_path, keys, dtype):
    accelerated = replace(detect(), device="cuda", bf16=True, fp16=True)
    run, _ = run_of(llama_folder, tmp_path, do_train=False, do_eval=True, val_size=0.5, **keys)
    assert not run.trains
    assert {weight.dtype for weight in load_for_inference(run, accelerated).parameters()} == {dtype}


def test_chat_has_the_number_format_that_the_accelerator_is_fast_in(llama_folder):
    accelerated = replace(detect(), device="cuda", bf16=True, fp16=True)
    run = load_infer({"model_name_or_path": str(llama_folder)})
    assert {weight.dtype for weight in load_for_inference(run, accelerated).parameters()} == {torch.bfloat16}


def test_bf16_keeps_what_learns_in_float32(llama_folder, tmp_path):
    loaded = training(llama_folder, tmp_path, finetuning_type="lora", bf16=True, upcast_layernorm=True)
    dtypes = {name: weight.dtype for name, weight in loaded.model.named_parameters()}
    assert all(dtypes[name] == torch.float32 for name in learning(loaded))
    assert all(dtype == torch.float32 for name, dtype in dtypes.items() if "norm" in name)
    assert dtypes["base_model.model.model.embed_tokens.weight"] == torch.bfloat16
    pure = training(llama_folder, tmp_path, finetuning_type="lora", pure_bf16=True)
    assert {weight.dtype for weight in pure.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "keys",
    [
        {"bf16": True, "upcast_layernorm": True},
        {"bf16": True, "upcast_lmhead_output": True},
        {"bf16": True, "finetuning_type": "freeze"},
        {"bf16": True, "finetuning_type": "full"},
        {"pure_bf16": True},
    ],
)
def test_a_model_of_mixed_number_formats_can_be_tried_out(llama_folder, tmp_path, keys):
    loaded = training(llama_folder, tmp_path, **keys)
    assert loaded.padding_reason is None
    assert isolates_samples(loaded.model) is None
    assert inspect_head(loaded.model).linear is loaded.model.get_output_embeddings()


def test_full_and_freeze(llama_folder, tmp_path):
    full = training(llama_folder, tmp_path, finetuning_type="full")
    assert full.num_trainable == full.num_parameters
    frozen = training(llama_folder, tmp_path, finetuning_type="freeze", freeze_trainable_layers=1)
    assert all(".layers.1." in name for name in learning(frozen))


def test_added_tokens_grow_the_embedding_and_learn(tmp_path):
    folder = tiny_llama(tmp_path / "model", vocab_size=261)
    loaded = training(folder, tmp_path, finetuning_type="lora", add_special_tokens="<a>,<b>")
    base = loaded.model.get_base_model()
    assert base.config.vocab_size == 320
    assert any("embed_tokens" in name for name in learning(loaded))
    assert any("lm_head" in name for name in learning(loaded))


@pytest.mark.parametrize("key", ["add_tokens", "add_special_tokens"])
def test_tokens_that_the_model_has_already_train_no_embedding(llama_folder, tmp_path, key):
    """An adapter of some megabytes would become one of gigabytes."""
    loaded = training(llama_folder, tmp_path, finetuning_type="lora", **{key: "<|im_end|>,</s>"})
    assert all("lora_" in name for name in learning(loaded))
    asked = training(llama_folder, tmp_path, finetuning_type="lora", resize_vocab=True, **{key: "</s>"})
    assert any("embed_tokens" in name for name in learning(asked))


def test_attention_that_the_machine_lacks_is_replaced_and_said(llama_folder, tmp_path, said):
    loaded = training(llama_folder, tmp_path, flash_attn="fa2")
    if loaded.attention.implementation == "sdpa":
        assert f"flash_attn: fa2: {loaded.attention.reason}" in "\n".join(said)
    disabled = training(llama_folder, tmp_path, flash_attn="disabled")
    assert disabled.attention.implementation == "eager"


@pytest.mark.parametrize("keys", [{}, {"use_reentrant_gc": False}, {"disable_gradient_checkpointing": True}])
@pytest.mark.parametrize("kind", ["lora", "full", "freeze"])
def test_a_row_of_several_samples_gives_the_gradients_of_a_padded_batch(llama_folder, tmp_path, keys, kind):
    """Same losses and gradients, whichever way rows go into the model."""
    loaded = training(llama_folder, tmp_path, finetuning_type=kind, seed=1, **keys)
    model = loaded.model
    rows = [torch.arange(5, 5 + n, device=model.device) for n in (9, 4, 16)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=256)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    logits.square().sum().backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    isolate_samples(model)
    bounds = torch.tensor([0, 9, 13, 29], dtype=torch.int32, device=model.device)
    together = model(
        input_ids=torch.cat(rows)[None],
        position_ids=torch.cat([torch.arange(len(row), device=model.device) for row in rows])[None],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=16,
        max_length_k=16,
        use_cache=False,
    ).logits[0]
    torch.testing.assert_close(together, logits, atol=1e-5, rtol=0)
    together.square().sum().backward()
    assert set(expected) == learning(loaded)
    for name, weight in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(weight.grad, expected[name], atol=1e-5, rtol=1e-4)


def test_inference_and_export_merge_the_adapters(llama_folder, tmp_path):
    loaded = training(llama_folder, tmp_path, finetuning_type="lora")
    for name, weight in loaded.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    loaded.model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 30)[None]
    keys = {"model_name_or_path": str(llama_folder), "adapter_name_or_path": str(tmp_path / "adapter")}
    keys["infer_dtype"] = "float32"
    with torch.no_grad():
        expected = loaded.model.eval()(input_ids=ids.to(loaded.model.device), use_cache=False).logits.cpu()
        answering = load_for_inference(load_infer(keys))
        exported = load_for_export(load_export(keys | {"export_dir": str(tmp_path / "merged")}))
        for model in (answering, exported):
            found = model(input_ids=ids.to(model.device)).logits.cpu()
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
            assert model.config.use_cache
            assert not model.training
    half = load_for_export(load_export(keys | {"export_dir": str(tmp_path / "merged"), "infer_dtype": "bfloat16"}))
    assert half.dtype == torch.bfloat16


def test_an_export_keeps_the_number_format_of_the_checkpoint(tmp_path):
    folder = tiny_llama(tmp_path / "model")
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    run = {"model_name_or_path": str(folder), "export_dir": str(tmp_path / "merged")}
    assert load_for_export(load_export(run)).dtype == torch.float16


def test_a_missing_model_is_told(tmp_path):
    run = load_infer({"model_name_or_path": str(tmp_path / "none" / "here")})
    with pytest.raises(ModelError, match="no such model"):
        load_for_inference(run)
