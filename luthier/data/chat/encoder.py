"""From pieces of text to token ids. Each piece is tokenized separately, without added special tokens."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError, RowError
from luthier.data.chat.repeats import Repeats, Shortened
from luthier.data.templates import Piece, Special, Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TurnIds = tuple[list[int], list[int]]
"""The token ids of a prompt and of its answer."""

_CACHED_TEXTS = 2048
_CACHED_CHARS = 2000
"""Longer texts are rarely repeated; shorter ones, such as role marks and system texts, are repeated all the time."""
_BORDER_CHARS = 48
"""Of the text on either side of a border that decide whether a token spans it."""


@dataclass(frozen=True, slots=True)
class TextWithSpans:
    """A row that is tokenized as one text and then split: a token belongs to the part in which it begins.

    No token spans the end of a prompt: a server tokenizes the prompt by itself, and the model continues its tokens.
    Where one would, the text before and the text after it are tokenized separately.
    """

    text: str
    borders: tuple[int, ...]
    """The ends of the parts in characters: a prompt, its answer, the next prompt, ..."""

    @property
    def edges(self) -> list[int]:
        """The borders, with the beginning and the end of the text."""
        return _edges(self.text, self.borders)


class Encoder:
    """Encodes with one tokenizer.

    The backend of a fast tokenizer is called directly, since calls through `transformers` take several times as long.
    `split_special_tokens`: special tokens in a text are read as plain text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", split_special_tokens: bool = False) -> None:
        self.tokenizer = tokenizer
        self.split_special_tokens = split_special_tokens
        self._backend: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self._repeats = None if self._backend is None or split_special_tokens else Repeats(self._backend)
        self._cached = lru_cache(maxsize=_CACHED_TEXTS)(self._encode)
        self._tokens: dict[str, int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the tokenizer and the setting, without the caches."""
        return Encoder, (self.tokenizer, self.split_special_tokens)

    def text(self, text: str) -> list[int]:
        if not text:
            return []
        return list(self._cached(text)) if len(text) <= _CACHED_CHARS else self._encode(text)

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Many texts at once; with a fast tokenizer in parallel threads."""
        if self._backend is None:
            return [self.text(text) for text in texts]
        self.reset()
        shortened = [self._shortened(text) for text in texts]
        plain = [text for text, short in zip(texts, shortened, strict=True) if short is None]
        others = [TextWithSpans(text, ()) for text, short in zip(texts, shortened, strict=True) if short is not None]
        found = iter(self._backend.encode_batch_fast(plain, add_special_tokens=False))
        repeating = iter(self._whole_rows(others, [short for short in shortened if short is not None]))
        return [next(found).ids if short is None else next(repeating)[0] for short in shortened]

    def parts(self, text: str, borders: Sequence[int]) -> list[list[int]]:
        """The ids of a text that is tokenized once and split before the characters at `borders` (ascending).

        A token belongs to the part in which it begins. A tokenizer without offsets tokenizes each part separately.
        """
        if self._backend is None:
            return [self.text(text[start:end]) for start, end in pairwise(_edges(text, borders))]
        self.reset()
        return _cut(self._backend.encode(text, add_special_tokens=False), _edges(text, borders))

    def straddles(self, before: str, after: str) -> bool:
        """Whether a token spans the border between two parts of a text. False for a tokenizer without offsets.

        The surroundings of the border decide, so that the time does not depend on the length of the text.
        """
        if self._backend is None or not before or not after:
            return False
        before, after = before[-_BORDER_CHARS:], after[:_BORDER_CHARS]
        self.reset()
        begins = _begins(self._backend.encode(before + after, add_special_tokens=False))
        return len(before) not in begins

    def begins_of(self, row: TextWithSpans) -> list[list[int]]:
        """The character at which each token of each part begins, for the tokens of `encode_spans`.

        Raises `RowError` for a tokenizer without offsets.
        """
        self._require_offsets()
        self.reset()
        return [begins for _, begins in self._parts(row, self._encoding(row.text))]

    def begins(self, text: str) -> list[int]:
        """The character at which each token of a text begins. Raises `RowError` for a tokenizer without offsets."""
        self._require_offsets()
        self.reset()
        return _begins(self._backend.encode(text, add_special_tokens=False))

    def encode_spans(self, rows: "Sequence[TextWithSpans]") -> "list[list[TurnIds]]":
        """The turns of many rows; with a fast tokenizer in parallel threads."""
        if self._backend is None:
            parts = [self.parts(row.text, row.borders) for row in rows]
        else:
            self.reset()
            parts = self._whole_rows(rows, [self._shortened(row.text, row.borders) for row in rows])
        return [list(zip(row[::2], row[1::2], strict=True)) for row in parts]

    def pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """The ids of a rendered prompt or answer. Raises `ModelError` for a token that the tokenizer does not know."""
        ids: list[int] = []
        for piece in pieces:
            ids += self.text(piece) if isinstance(piece, str) else self._special(piece)
        return ids

    def known(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Text -> ids, each distinct text tokenized once."""
        distinct = list(dict.fromkeys(texts))
        return dict(zip(distinct, self.texts(distinct), strict=True))

    def encode_pieces(self, pieces: Iterable[Piece], known: Mapping[str, list[int]]) -> list[int]:
        """The same as `pieces`, with the known ids of texts."""
        ids: list[int] = []
        for piece in pieces:
            ids += known[piece] if isinstance(piece, str) else self._special(piece)
        return ids

    def reset(self) -> None:
        """Turns off padding and truncation. Earlier calls leave them on in the backend, and tokenizer.json may set
        them.

        Only what differs is set: setting it waits for other threads that are tokenizing.
        """
        if self._backend.padding is not None:
            self._backend.no_padding()
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.encode_special_tokens != self.split_special_tokens:
            self._backend.encode_special_tokens = self.split_special_tokens

    def _shortened(self, text: str, borders: Sequence[int] = ()) -> Shortened | None:
        return None if self._repeats is None else self._repeats.shortened(text, borders)

    def _whole_rows(
        self, rows: Sequence[TextWithSpans], shortened: Sequence[Shortened | None]
    ) -> list[list[list[int]]]:
        """The ids of each part of each row. `shortened`: those rows that repeat tokens."""
        given = [
            row if short is None else TextWithSpans(short.text, short.borders)
            for row, short in zip(rows, shortened, strict=True)
        ]
        wholes = self._backend.encode_batch([row.text for row in given], add_special_tokens=False)
        found: list[list[list[int]]] = []
        for row, own, short, whole in zip(rows, given, shortened, wholes, strict=True):
            parts = self._parts(own, whole)
            ids = [ids for ids, _ in parts] if short is None else short.lengthened(parts)
            found.append([ids for ids, _ in self._parts(row, self._encoding(row.text))] if ids is None else ids)
        return found

    def _encoding(self, text: str) -> Any:
        return self._backend.encode(text, add_special_tokens=False)

    def _require_offsets(self) -> None:
        if self._backend is None:
            raise RowError(
                "only a part of a message counts in the loss, and this tokenizer gives no offsets of its tokens"
            )

    def _parts(self, row: TextWithSpans, whole: Any) -> list[tuple[list[int], list[int]]]:
        """(ids, the character at which each begins) of each part. `whole`: the encoding of the text of the row."""
        ids, begins, edges = list(whole.ids), _begins(whole), row.edges
        cut = 0
        for edge in edges[1:-1:2]:  # the ends of prompts
            at = bisect_left(begins, edge)
            if edge < len(row.text) and (at == len(begins) or begins[at] > edge):
                before = self._backend.encode(row.text[cut:edge], add_special_tokens=False)
                continued, starts = self._continuing(row.text[edge:])
                first = bisect_left(begins, cut)
                ids[first:] = [*before.ids, *continued]
                begins[first:] = [*(cut + begin for begin in _begins(before)), *(edge + begin for begin in starts)]
                cut = edge
        cuts = [0, *(bisect_left(begins, edge) for edge in edges[1:-1]), len(begins)]
        return [(ids[start:end], begins[start:end]) for start, end in pairwise(cuts)]

    def _continuing(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text that continues other tokens, and where each begins.

        Some tokenizers put a blank before the first word of a text, but not after a line break.
        """
        plain = self._backend.encode(text, add_special_tokens=False)
        after = self._backend.encode("\n" + text, add_special_tokens=False)
        begins = _begins(after)
        at = bisect_left(begins, 1)
        if self._blank_before_text and at < len(begins) and begins[at] == 1:
            return after.ids[at:], [begin - 1 for begin in begins[at:]]
        return plain.ids, _begins(plain)

    @property
    def _blank_before_text(self) -> bool:
        alone = self._cached("a")
        return self._cached("\na")[-len(alone) :] != alone

    def _encode(self, text: str) -> list[int]:
        if self._backend is None:
            settings = {"split_special_tokens": True} if self.split_special_tokens else {}
            return list(self.tokenizer.encode(text, add_special_tokens=False, **settings))
        self.reset()
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


def _edges(text: str, borders: Sequence[int]) -> list[int]:
    return [0, *borders, len(text)] if not borders or borders[-1] < len(text) else [0, *borders]


def _begins(whole: Any) -> list[int]:
    """The character at which each token of a backend's encoding begins."""
    # A post-processor may have trimmed spaces off the offsets of a token; then it begins where the previous one ends.
    ends = accumulate((end for _, end in whole.offsets), max, initial=0)
    return [min(start, before) for (start, _), before in zip(whole.offsets, ends, strict=False)]


def _cut(whole: Any, edges: Sequence[int]) -> list[list[int]]:
    """The ids of a backend's encoding between each two edges."""
    begins = _begins(whole)
    cuts = [0, *(bisect_left(begins, edge) for edge in edges[1:-1]), len(begins)]
    ids = whole.ids
    return [ids[start:end] for start, end in pairwise(cuts)]
