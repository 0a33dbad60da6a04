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
