"""A model that says what the test wants: a tiny Llama whose next token is always the next one of a script."""

from collections.abc import Sequence

SILENCE = 256
"""The pad token of the byte tokenizer: what the model says when its script is over."""


def scripted_model(script: Sequence[int], num_prompt_tokens: int):
    """Says `script` after any prompts of `num_prompt_tokens` tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import TINY_LLAMA

    class Scripted(LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            # Since transformers 5.24 the cache is called so; before, past_key_values.
            cache = kwargs["cache"] if "cache" in kwargs else kwargs["past_key_values"]
            position = cache.get_seq_length() + input_ids.shape[1] - num_prompt_tokens
            output = super().forward(input_ids=input_ids, **kwargs)
            output.logits = torch.full_like(output.logits, -50.0)
            output.logits[:, -1, script[position] if position < len(script) else SILENCE] = 50.0
            return output

    return Scripted(LlamaConfig(**{**TINY_LLAMA, "num_hidden_layers": 1})).eval()


def say(text: str) -> list[int]:
    """The ids of `text` for the byte tokenizer."""
    from tests.tiny import byte_tokenizer

    return byte_tokenizer().encode(text, add_special_tokens=False)
