"""A model written as GGUF and loaded again computes the same logits, in every layout that can be written."""

import pytest
import torch
import transformers

from luthier.core.errors import ModelError, RunFailed
from luthier.model.files.gguf.header import read_header
from luthier.model.files.gguf.vocabulary import read_vocabulary
from luthier.model.files.gguf.writer import LAYOUTS, check_writable, interleave, write_gguf
from luthier.model.files.sources import ModelSource
from luthier.model.loading.load import load_model
from luthier.model.tokenizer import load_tokenizer
from tests.tiny import TINY_LLAMA, save_tiny

IDS = torch.tensor([[259, *range(60, 120)]])
TIED = {**TINY_LLAMA, "tie_word_embeddings": True}
GEMMA = {**TIED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
CASES = {
    "llama": ("LlamaConfig", {**TINY_LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama with biases": ("LlamaConfig", {**TINY_LLAMA, "attention_bias": True}),
    "llama 3": ("LlamaConfig", {**TIED, "max_position_embeddings": 131072, "rope_parameters": LLAMA3}),
    "linear": (
        "LlamaConfig",
        {**TINY_LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "yarn": ("Qwen2Config", {**TINY_LLAMA, "rope_parameters": YARN}),
    "yarn with other bounds": (
        "Qwen2Config",
        {**TINY_LLAMA, "rope_parameters": {**YARN, "beta_fast": 4.0, "beta_slow": 2.0}},
    ),
    "mistral": ("MistralConfig", TINY_LLAMA),
    "qwen2": ("Qwen2Config", TINY_LLAMA),
    "qwen3": ("Qwen3Config", {**TINY_LLAMA, "head_dim": 32}),
    "gemma2": ("Gemma2Config", {**GEMMA, "attn_logit_softcapping": 20.0, "final_logit_softcapping": None}),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "num_hidden_layers": 7}),
    "phi3": ("Phi3Config", TINY_LLAMA),
    "phi3 with a window": ("Phi3Config", {**TINY_LLAMA, "sliding_window": 8}),
    "starcoder2": ("Starcoder2Config", TIED),
}


def saved(folder, config, tokenizer=None):
    """With weights large enough that norms, biases and places matter."""
    save_tiny(folder, config, tokenizer=tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn(weight.shape, generator=generator) * 0.1
    model.save_pretrained(folder)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("case", CASES)
def test_the_same_logits(tmp_path, case):
    name, settings = CASES[case]
    model = saved(tmp_path / "model", getattr(transformers, name)(**settings))
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32")
    again = load_model(ModelSource(str(tmp_path / "m.gguf")), dtype=torch.float32, attn_implementation="eager")
    assert (logits(again) - logits(model)).abs().max() < 1e-5


def test_a_window_that_is_lost_is_told(tmp_path, said):
    for folder, window in (("long", None), ("same", 512), ("short", 8)):
        saved(tmp_path / folder, transformers.MistralConfig(**TINY_LLAMA, sliding_window=window))
        write_gguf(tmp_path / folder, tmp_path / f"{folder}.gguf", "f32")
    found = [line for line in said if "looks back" in line]
    assert len(found) == 1 and "looks back 8 tokens" in found[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"layer_types": ["full_attention", "full_attention"]},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            }
        },
    ],
)
def test_layers_that_gguf_does_not_know_are_refused(settings):
    config = transformers.Gemma3TextConfig(**GEMMA)
    assert check_writable(config).architecture == "gemma3"
    with pytest.raises(ModelError, match="an unusual order of layers"):
        check_writable(transformers.Gemma3TextConfig(**{**GEMMA, **settings}))


def test_every_layout_is_tried():
    types = {getattr(transformers, name).model_type for name, _ in CASES.values()}
    assert types == set(LAYOUTS)


@pytest.mark.parametrize(("number_format", "within"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 5e-2)])
def test_number_formats(tmp_path, number_format, within):
    config = transformers.LlamaConfig(**TINY_LLAMA)
    model = saved(tmp_path / "model", config)
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", number_format)
    again = load_model(ModelSource(str(tmp_path / "m.gguf")), dtype=torch.float32)
    error = (logits(again) - logits(model)).abs().max() / logits(model).abs().max()
    assert 0 < error < within
    kinds = {tensor.name: tensor.kind for tensor in read_header(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.attn_norm.weight"] == 0  # vectors stay float32
    assert kinds["blk.0.ffn_down.weight"] == {"f16": 1, "bf16": 30, "q8_0": 8}[number_format]


def test_rows_of_a_head_by_hand():
    weight = torch.arange(8.0)[:, None]
    assert interleave(weight, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def trained(kind: str):
    """A small BPE with real merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>"]
    if kind == "gpt2":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        alphabet, special = [], [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    text = ["the cat sat on the mat, and the dog sat on the cat", "def f(x):\n    return x + 1", "Zürich 123"] * 5
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + 60, special_tokens=special, initial_alphabet=alphabet
    )
    backend.train_from_iterator(text, trainer)
    if kind == "llama":  # bytes are ordinary tokens
        import json

        parts = json.loads(backend.to_str())
        parts["added_tokens"] = parts["added_tokens"][:3]
        backend = Tokenizer.from_str(json.dumps(parts))
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<|im_end|>"
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_tokenizer_cuts_text_the_same_way(tmp_path, kind):
    tokenizer = trained(kind)
    tokenizer.chat_template = "{{ messages[0].content }}"
    config = transformers.LlamaConfig(**{**TINY_LLAMA, "vocab_size": 448})
    saved(tmp_path / "model", config, tokenizer)
    (tmp_path / "alone").mkdir()
    write_gguf(tmp_path / "model", tmp_path / "alone" / "m.gguf", "f16")
    again = load_tokenizer(ModelSource(str(tmp_path / "alone" / "m.gguf")))
    for text in ("the cat sat on", "return x + 1", "Zürich é 猫<|im_end|>", "two  blanks"):
        assert again.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<s>", "</s>", "<|im_end|>")
    assert again.chat_template == tokenizer.chat_template
    vocabulary = read_vocabulary(tokenizer, 448)
    assert len(vocabulary.tokens) == 448  # one for each row of the embedding
    assert vocabulary.kind == kind
    assert vocabulary.kinds[tokenizer.convert_tokens_to_ids("<|im_end|>")] == 3
    if kind == "llama":
        assert vocabulary.kinds[tokenizer.convert_tokens_to_ids("<0x41>")] == 6
        first = vocabulary.merges[0].replace(" ", "")
        assert vocabulary.scores[vocabulary.tokens.index(first)] == -1
        assert vocabulary.adds_space


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.GPT2Config(), "models of type gpt2 cannot be written as GGUF, only llama, mistral, qwen2"),
        (
            transformers.LlamaConfig(
                **TINY_LLAMA, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            "the rotary embedding 'dynamic' cannot be written",
        ),
        (
            transformers.Qwen2Config(**{**TINY_LLAMA, "rope_parameters": {**YARN, "attention_factor": 1.5}}),
            "a rotary embedding with attention_factor cannot be written as GGUF, only what follows from the factor",
        ),
    ],
)
def test_models_without_a_layout_are_refused(config, words):
    with pytest.raises(ModelError, match=words):
        check_writable(config)


def test_numbers_too_large_for_float16_are_refused(tmp_path):
    model = saved(tmp_path / "model", transformers.LlamaConfig(**TINY_LLAMA))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(RunFailed, match=r"output.weight holds numbers too large for float16 -> set export_gguf: bf16"):
        write_gguf(tmp_path / "model", tmp_path / "m.gguf", "f16")
