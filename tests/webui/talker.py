"""A real model whose answers are known: each token follows from the one before it, as in a table.

It thinks, answers, calls a function and then sings until it is stopped. If the word ARR stands anywhere before, it
answers like a pirate: so a test sees whether a system text or an earlier message has reached the model.

Each token has a dimension of its own in the residual stream (its embedding is a unit vector). Attention, which looks at
all tokens alike, moves the share of ARR into one more dimension; the head reads the last token and that dimension.
"""

from itertools import pairwise
from pathlib import Path

from tests.tiny import byte_tokenizer

THOUGHT, ANSWER, PIRATE, SONG = "I ponder.", "It is four.", "Four, matey!", " la"
CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
WORDS = ("<think>", THOUGHT, "</think>", ANSWER, PIRATE, "<tool_call>", CALL, "</tool_call>", SONG, "ARR")
TOOLS = '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]'
HIDDEN = 512


def save_talker(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer(eos_token="<|im_end|>")
    tokenizer.add_tokens(list(WORDS))
    ids = dict(zip(WORDS, tokenizer.convert_tokens_to_ids(list(WORDS)), strict=True))
    (line_break,) = tokenizer.encode("\n", add_special_tokens=False)
    follows = {line_break: ids["<think>"], ids[PIRATE]: ids["<tool_call>"], ids[SONG]: ids[SONG]}
    said = ("<think>", THOUGHT, "</think>", ANSWER, "<tool_call>", CALL, "</tool_call>", SONG)
    follows |= {ids[word]: ids[after] for word, after in pairwise(said)}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=100_000,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    layer = model.model.layers[0]
    with torch.no_grad():
        for weight in (*layer.self_attn.parameters(), *layer.mlp.parameters(), model.lm_head.weight):
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), HIDDEN))
        layer.self_attn.v_proj.weight[0, ids["ARR"]] = 1
        layer.self_attn.o_proj.weight[HIDDEN - 1, 0] = 4
        for token, after in follows.items():
            model.lm_head.weight[after, token] = 10
        model.lm_head.weight[ids[PIRATE], ids["</think>"]] = 9.9
        model.lm_head.weight[ids[PIRATE], HIDDEN - 1] = 1.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
