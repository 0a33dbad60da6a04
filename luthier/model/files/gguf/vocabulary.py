"""A fast tokenizer in the words of GGUF: its tokens, their kinds, the merges, and how text is cut before merging.

Two families can be written: byte-level BPE (`gpt2`) and SentencePiece BPE with bytes as a last resort (`llama`).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.core.log import warn
from luthier.model.compat.gguf_tokens import SCHEMES, SPACE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_CUTS = (
    ("Digits", "smollm"),
    ("p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*", "llama-bpe"),
    ("\\p{N}| ?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*", "qwen35"),
    ("\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*", "qwen2"),
    ("\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*", "tekken"),
    ("p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*", "gpt-4o"),
)
"""A part of the pre-tokenizer that tells it from others, and the name that llama.cpp has for it."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    kind: str
    """`gpt2` or `llama`."""
    cut: str
    """Name of the pre-tokenizer."""
    tokens: list[str]
    """One for each row of the embedding."""
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    """Of `llama` only: what is merged first has the highest."""
    adds_space: bool
    scheme: str | None = None
    """One of `SCHEMES` of a tokenizer that puts its blanks in another way than llama.cpp."""


def read_vocabulary(tokenizer: "PreTrainedTokenizerBase", num_rows: int) -> Vocabulary:
    """`num_rows`: of the embedding; rows without a token get a filler. Raises `ModelError` for other families."""
    if not tokenizer.is_fast:
        raise _cannot("it is written in Python")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise _cannot(f"its model is {model['type']}")
    by_bytes = _has(parts["pre_tokenizer"], "ByteLevel") or _has(parts["decoder"], "ByteLevel")
    if not by_bytes and not model.get("byte_fallback"):
        raise _cannot("its BPE is neither on bytes nor falls back on them")
    _warn_of_flags(parts["added_tokens"])
    tokens, kinds = _tokens(parts, num_rows, is_sentencepiece=not by_bytes)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    scores = [] if by_bytes else _scores(tokens, kinds, merges)
    scheme = None if by_bytes else _scheme(parts["pre_tokenizer"])
    if scheme == "first":
        warn(
            "export_gguf: this tokenizer puts a blank before the first text only, and llama.cpp puts one behind special"
            " tokens too, so other programs may tokenize the texts of a chat differently"
        )
    return Vocabulary(
        kind="gpt2" if by_bytes else "llama",
        cut=_cut(parts["pre_tokenizer"]) if by_bytes else "default",
        tokens=tokens,
        kinds=kinds,
        merges=merges,
        scores=scores,
        adds_space=not by_bytes and (_has(parts["normalizer"], "Prepend") or scheme is not None),
        scheme=scheme,
    )


def _cannot(reason: str) -> ModelError:
    return ModelError(
        f"export_gguf: this tokenizer cannot be written into a GGUF file ({reason}) -> leave export_gguf out and "
        "convert the exported folder with a program that knows the model"
    )


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """A part of a tokenizer and the parts it is made of."""
    if isinstance(part, dict):
        yield part
        for inner in (*part.get("pretokenizers", ()), *part.get("normalizers", ()), *part.get("decoders", ())):
            yield from _parts(inner)


def _has(part: Any, kind: str) -> bool:
    return any(inner["type"] == kind for inner in _parts(part))


def _scheme(part: Any) -> str | None:
    """When a `Metaspace` puts a blank before a text; None if it never does, or if there is none."""
    schemes = (inner.get("prepend_scheme", "always") for inner in _parts(part) if inner["type"] == "Metaspace")
    return next((scheme for scheme in schemes if scheme in SCHEMES), None)


def _cut(pre_tokenizer: Any) -> str:
    text = json.dumps(pre_tokenizer, ensure_ascii=False).replace("\\\\", "\\")
    for sign, name in _CUTS:
        if sign in text:
            return name
    if [inner.get("use_regex", True) for inner in _parts(pre_tokenizer) if inner["type"] == "ByteLevel"] != [True]:
        warn(
            "export_gguf: GGUF has no known name for how this tokenizer cuts text, so that of GPT-2 is written; other "
            "programs may split numbers and punctuation differently"
        )
    return "gpt-2"


def _warn_of_flags(added: list[dict[str, Any]]) -> None:
    flagged = [one["content"] for one in added if one["lstrip"] or one["rstrip"] or one["single_word"]]
    if flagged:
        warn(
            f"export_gguf: {', '.join(map(repr, flagged[:8]))}{', ...' if flagged[8:] else ''}: these tokens take in"
            " the blanks beside them, or stand for whole words only, which GGUF cannot say; other programs may tokenize"
            " text around them differently"
        )


def _tokens(parts: dict[str, Any], num_rows: int, *, is_sentencepiece: bool) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{index}]" for index in range(num_rows)]
    kinds = [_UNUSED] * num_rows
    for token, index in parts["model"]["vocab"].items():
        if index < num_rows:
            is_byte = is_sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            tokens[index], kinds[index] = token, _BYTE if is_byte else _NORMAL
    for added in parts["added_tokens"]:
        index, token = added["id"], added["content"]
        if index >= num_rows:
            continue
        if added["special"]:
            is_unknown = is_sentencepiece and token == parts["model"].get("unk_token")
            tokens[index], kinds[index] = token, _UNKNOWN if is_unknown else _CONTROL
        else:  # found in the text as it is written, before blanks become marks
            tokens[index], kinds[index] = token.replace(SPACE, " ") if is_sentencepiece else token, _USER_DEFINED
    return tokens, kinds


def _scores(tokens: list[str], kinds: list[int], merges: list[str]) -> list[float]:
    """SentencePiece joins the pair with the highest score first, so the first merge scores -1, the next one -2."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges, start=1):
        ranks.setdefault(merge.replace(" ", ""), rank)
    last = len(merges) + 1
    return [
        -float(ranks.get(token, last)) if kind == _NORMAL else 0.0 for token, kind in zip(tokens, kinds, strict=True)
    ]
