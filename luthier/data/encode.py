"""Pieces of text to token ids. Every piece is tokenised by itself, without the tokens a tokenizer would add."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.data.templates import Piece, Special, Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CACHED_TEXTS = 2048
_CACHED_CHARS = 2000
"""Longer texts are hardly met twice; shorter ones (what stands around the contents, system texts) all the time."""


class Encoder:
    """Encodes with one tokenizer.

    A fast tokenizer's backend is asked directly: the way through `transformers` costs several times the work itself.
    `split_special_tokens` reads special tokens that appear in a text as plain text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", split_special_tokens: bool = False) -> None:
        self.tokenizer = tokenizer
        self.split_special_tokens = split_special_tokens
        self._backend: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self._cached = lru_cache(maxsize=_CACHED_TEXTS)(self._encode)
        self._tokens: dict[str, int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers and fingerprints see the tokenizer and the setting, not what has been cached."""
        return Encoder, (self.tokenizer, self.split_special_tokens)

    def text(self, text: str) -> list[int]:
        if not text:
            return []
        return list(self._cached(text)) if len(text) <= _CACHED_CHARS else self._encode(text)

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Many texts at once; with a fast tokenizer in parallel threads."""
        if self._backend is None:
            return [self.text(text) for text in texts]
        self._reset()
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def parts(self, text: str, borders: Sequence[int]) -> list[list[int]]:
        """The ids of a text that is tokenised once, cut before the characters at `borders` (ascending).

        A token belongs to the part in which it begins. A tokenizer that does not tell where that is gets each part by
        itself.
        """
        edges = [0, *borders, len(text)] if not borders or borders[-1] < len(text) else [0, *borders]
        if self._backend is None:
            return [self.text(text[start:end]) for start, end in pairwise(edges)]
        self._reset()
        whole = self._backend.encode(text, add_special_tokens=False)
        # A post-processor may have trimmed blanks off a token's offsets; then the token before tells where it begins.
        ends = accumulate((end for _, end in whole.offsets), max, initial=0)
        begins = [min(start, before) for (start, _), before in zip(whole.offsets, ends, strict=False)]
        cuts = [0, *(bisect_left(begins, edge) for edge in edges[1:-1]), len(begins)]
        return [whole.ids[start:end] for start, end in pairwise(cuts)]

    def pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """The ids of a rendered prompt or answer. Raises `ModelError` for a token that the tokenizer does not know."""
        ids: list[int] = []
        for piece in pieces:
            ids += self.text(piece) if isinstance(piece, str) else self._special(piece)
        return ids

    def batch(self, rows: Sequence[Sequence[Piece]]) -> list[list[int]]:
        """`pieces` of many rows, each distinct text tokenised once."""
        distinct = list(dict.fromkeys(piece for row in rows for piece in row if isinstance(piece, str)))
        known = dict(zip(distinct, self.texts(distinct), strict=True))
        return [
            [i for piece in row for i in (known[piece] if isinstance(piece, str) else self._special(piece))]
            for row in rows
        ]

    def _reset(self) -> None:
        """A call with padding or truncation leaves both on in the backend, and tokenizer.json may hold them."""
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = self.split_special_tokens

    def _encode(self, text: str) -> list[int]:
        if self._backend is None:
            settings = {"split_special_tokens": True} if self.split_special_tokens else {}
            return list(self.tokenizer.encode(text, add_special_tokens=False, **settings))
        self._reset()
        return self._backend.encode(text, add_special_tokens=False).ids

    def _special(self, piece: Special | Token) -> list[int]:
        if isinstance(piece, Special):
            own = self.tokenizer.bos_token_id if piece.kind == "bos" else self.tokenizer.eos_token_id
            return [] if own is None else [own]
        if piece.text not in self._tokens:
            known = self.tokenizer.convert_tokens_to_ids(piece.text)
            if known is None or (known == self.tokenizer.unk_token_id and piece.text != self.tokenizer.unk_token):
                raise ModelError(
                    f"the chat format needs the token {piece.text!r}, which this tokenizer lacks: "
                    "choose the format that belongs to the model"
                )
            assert isinstance(known, int)
            self._tokens[piece.text] = known
        return [self._tokens[piece.text]]
