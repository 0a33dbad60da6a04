"""Log-probabilities of tokens in the two shapes of OpenAI's API."""

from collections.abc import Sequence
from typing import Any

from luthier.infer.types import Token
from luthier.serve.token_texts import TokenTexts

LEAST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


def chat_logprobs(tokens: Sequence[Token], texts: TokenTexts) -> dict[str, Any]:
    return {"content": [_entry(token, texts) for token in tokens], "refusal": None}


def completion_logprobs(tokens: Sequence[Token], texts: TokenTexts, offset: int = 0) -> dict[str, Any]:
    """`offset`: the number of characters before these tokens. `top_logprobs` includes the token itself."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(texts.of(token.id)[0])
    return {
        "tokens": [texts.of(token.id)[0] for token in tokens],
        "token_logprobs": [None if token.logprob is None else max(token.logprob, LEAST) for token in tokens],
        "top_logprobs": [_top(token, texts) for token in tokens],
        "text_offset": offsets,
    }


def _top(token: Token, texts: TokenTexts) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    best: dict[str, float] = {}
    for token_id, logprob in (*token.top, (token.id, token.logprob)):
        text = texts.of(token_id)[0]
        best[text] = max(logprob, best.get(text, LEAST))
    return best


def _entry(token: Token, texts: TokenTexts) -> dict[str, Any]:
    return {
        **_one(token.id, token.logprob, texts),
        "top_logprobs": [_one(token_id, logprob, texts) for token_id, logprob in token.top],
    }


def _one(token_id: int, logprob: float | None, texts: TokenTexts) -> dict[str, Any]:
    text, data = texts.of(token_id)
    return {"token": text, "logprob": LEAST if logprob is None else max(logprob, LEAST), "bytes": list(data)}
