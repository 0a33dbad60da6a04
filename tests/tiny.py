"""Tiny stand-ins for a tokenizer and models, built on the spot: nothing is downloaded, everything is deterministic."""

from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>")
"""Ids 256..260, after the 256 bytes."""

TINY_LLAMA = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 259,
    "eos_token_id": 260,
    "pad_token_id": 256,
    "tie_word_embeddings": False,
}


def byte_tokenizer(**special: Any):
    """One token per UTF-8 byte, plus `SPECIAL_TOKENS`. `eos_token=None` and the like leave a role empty."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|endoftext|>", "padding_side": "right"} | special
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{k: v for k, v in roles.items() if v is not None},
    )


def save_tiny(folder: Path, config: Any, *, seed: int = 0, tokenizer: Any = None) -> Path:
    """A random causal model of the given transformers config, saved with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return Path(folder)


def tiny_llama(folder: Path, *, seed: int = 0, tokenizer: Any = None, **changes: Any) -> Path:
    """A random two-layer Llama of hidden size 64 in `folder`; `changes` go into its config."""
    from transformers import LlamaConfig

    return save_tiny(folder, LlamaConfig(**{**TINY_LLAMA, **changes}), seed=seed, tokenizer=tokenizer)
