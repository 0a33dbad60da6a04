"""Answers held to a grammar: only tokens that can still lead to a valid text may be chosen. Needs llguidance.

V vocabulary, as wide as the logits of the model.
"""

import importlib.util
import json
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from luthier.infer.types import GrammarFault

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from transformers import PreTrainedTokenizerBase

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
"""The schema of every JSON object."""


def require_llguidance() -> None:
    """Raises `GrammarFault` with the remedy where the package is missing."""
    if importlib.util.find_spec("llguidance") is None:
        raise GrammarFault(
            "an answer that follows a schema or must call a tool needs the package llguidance"
            " -> pip install 'luthier[grammar]'"
        )


def json_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of the JSON texts that a JSON Schema describes. Raises `GrammarFault` for a faulty schema."""
    require_llguidance()
    from llguidance import LLMatcher

    return _checked(LLMatcher.grammar_from_json_schema(json.dumps(schema)), "the schema")


def lark_grammar(text: str) -> str:
    """The grammar of a text in Lark's notation, which may contain `%json {schema}`. Raises `GrammarFault`."""
    require_llguidance()
    from llguidance import LLMatcher

    return _checked(LLMatcher.grammar_from_lark(text), "the grammar")


def schema_of(grammar: str) -> Mapping[str, Any] | None:
    """The schema of a grammar from `json_grammar`; None for one in Lark's notation."""
    try:
        return json.loads(grammar)["grammars"][0]["json_schema"]
    except ValueError:
        return None


def _checked(grammar: str, what: str) -> str:
    from llguidance import LLMatcher

    fault = LLMatcher.validate_grammar(grammar)
    if fault:
        raise GrammarFault(f"{what} cannot be used: {fault}")
    return grammar


class Grammars:
    """Makes the matchers of one model. The tokenizer is read once, which takes up to a second."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop_ids: Collection[int]) -> None:
        self._tokenizer, self._stop_ids = tokenizer, sorted(stop_ids)
        self._read = lru_cache(maxsize=1)(self._read_tokenizer)

    def matcher(self, grammar: str, vocab_size: int) -> "Matcher":
        """For one answer. `vocab_size`: V. Raises `GrammarFault` for a grammar that does not fit the tokenizer."""
        require_llguidance()
        from llguidance import LLMatcher

        matcher = LLMatcher(self._read(vocab_size), grammar)
        if matcher.is_error():
            raise GrammarFault(f"the grammar cannot be used: {matcher.get_error()}")
        return Matcher(matcher)

    def _read_tokenizer(self, vocab_size: int) -> "LLTokenizer":
        from llguidance.hf import from_tokenizer

        if not self._tokenizer.is_fast:
            raise GrammarFault("an answer can follow a grammar only with a fast tokenizer (tokenizer.json)")
        return from_tokenizer(self._tokenizer, n_vocab=vocab_size, eos_token=self._stop_ids)  # type: ignore[arg-type]


class Matcher:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def mask(self, scores: Tensor) -> Tensor:
        """The (V,) logits with minus infinity at each token that cannot come next."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        allowed = torch.from_numpy(bits[: len(scores)].astype(bool)).to(scores.device)
        if not bool(allowed.any()):
            raise GrammarFault(
                f"no token can continue the answer: {self._matcher.get_error() or 'the grammar has ended'}"
            )
        return scores.masked_fill(~allowed, -torch.inf)

    def advance(self, token_id: int) -> None:
        """Add a token of the answer."""
        if not self._matcher.consume_token(token_id):
            raise GrammarFault(f"the answer has left its grammar: {self._matcher.get_error()}")
