"""Log-probabilities in the shapes of chat and completions."""

import json

from luthier.infer.types import Token
from luthier.serve.logprobs import chat_logprobs, completion_logprobs
from luthier.serve.token_texts import TokenTexts


def test_chat(tokenizer):
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    found = chat_logprobs([Token(a, -0.5, ((a, -0.5), (b, -1.0)))], TokenTexts(tokenizer))
    one, other = {"token": "a", "logprob": -0.5, "bytes": [97]}, {"token": "b", "logprob": -1.0, "bytes": [98]}
    assert found == {"content": [{**one, "top_logprobs": [one, other]}], "refusal": None}


def test_completions(tokenizer):
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    found = completion_logprobs([Token(a), Token(b, -2.0, ((a, -0.5),))], TokenTexts(tokenizer), offset=3)
    assert found == {
        "tokens": ["a", "b"],
        "token_logprobs": [None, -2.0],
        "top_logprobs": [None, {"a": -0.5, "b": -2.0}],
        "text_offset": [3, 4],
    }


def test_impossible_tokens_are_still_json(tokenizer):
    token = Token(97, float("-inf"), ((98, float("-inf")),))
    texts = TokenTexts(tokenizer)
    for found in (chat_logprobs([token], texts), completion_logprobs([token], texts)):
        json.dumps(found, allow_nan=False)


def test_the_offset_of_a_token_is_that_of_its_text(tokenizer):
    """A special token has a text of several characters, and a byte of a character counts as it is shown."""
    first = tokenizer.encode("\u20ac", add_special_tokens=False)[0]
    ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("a"), first, tokenizer.convert_tokens_to_ids("b")]
    found = completion_logprobs([Token(i) for i in ids], TokenTexts(tokenizer))
    at = 0
    for text, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert offset == at
        at += len(text)
    assert len(found["tokens"][0]) > 1
