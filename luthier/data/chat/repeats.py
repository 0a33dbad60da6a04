"""Texts that repeat a token, as the block of an item of media does, are tokenized with two of it and then lengthened.

    "Audio: <|AUDIO|><|AUDIO|><|AUDIO|><|AUDIO|>" -> "Audio: <|AUDIO|><|AUDIO|>" -> [9, 7, 7] -> [9, 7, 7, 7, 7]

The time no longer depends on how long the audio is, or how large the image. Tokenizers take added tokens out of a text
before they look at the text between them, so its neighbours are the same in both.
"""

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

_RUN = re.compile(r"(<[^<>]{1,64}>|\[[^\[\]]{1,64}\])\1{2,}")
"""A word in brackets, as the tokens of media are, three times or more."""


class _Run(NamedTuple):
    place: int
    """The character at which the second token begins."""
    token: int
    num_copies: int


@dataclass(frozen=True, slots=True)
class Shortened:
    """A text with two of each token that it repeats."""

    text: str
    borders: tuple[int, ...]
    """Where the borders of the whole text are now."""
    runs: tuple[_Run, ...]

    def lengthened(self, parts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[int]] | None:
        """The ids of each part of the whole text. `parts`: the ids of each part, and where each token begins.

        None if a token is not where it has to be.
        """
        found = [list(ids) for ids, _ in parts]
        num_found = 0
        for run in reversed(self.runs):
            for ids, (_, begins) in zip(found, parts, strict=True):
                at = bisect_left(begins, run.place)
                if at < len(begins) and (begins[at], ids[at]) == (run.place, run.token):
                    ids[at : at + 1] = [run.token] * (run.num_copies - 1)
                    num_found += 1
        return found if num_found == len(self.runs) else None


class Repeats:
    """Finds the tokens that texts repeat, for one tokenizer. `backend`: a `tokenizers.Tokenizer`."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._added: Mapping[str, Any] = {}
        self._ids: dict[str, int | None] = {}

    def shortened(self, text: str, borders: Sequence[int] = ()) -> Shortened | None:
        """None for a text that repeats no token."""
        if _RUN.search(text) is None:
            return None
        runs: list[_Run] = []
        cuts: list[tuple[int, int]] = []
        num_cut = 0
        for match in _RUN.finditer(text):
            token, size = self._id(match[1]), len(match[1])
            if token is None or any(match.start() < border < match.end() for border in borders):
                continue
            runs.append(_Run(match.start() + size - num_cut, token, len(match[0]) // size))
            cuts.append((match.start() + 2 * size, match.end()))
            num_cut += match.end() - match.start() - 2 * size
        if not runs:
            return None
        starts, ends = [0, *(end for _, end in cuts)], [*(start for start, _ in cuts), len(text)]
        kept = "".join(text[start:end] for start, end in zip(starts, ends, strict=True))
        moved = (border - sum(end - start for start, end in cuts if end <= border) for border in borders)
        return Shortened(kept, tuple(moved), tuple(runs))

    def _id(self, word: str) -> int | None:
        """The id of a token that stands for itself wherever it is; None for other words."""
        if word not in self._ids:
            if not self._ids:
                self._added = {token.content: (number, token) for number, token in self._tokens().items()}
            number, token = self._added.get(word, (None, None))
            joins = token is None or token.lstrip or token.rstrip or token.single_word or token.normalized
            is_part = any(word in other and word != other for other in self._added)
            self._ids[word] = None if joins or is_part else number
        return self._ids[word]

    def _tokens(self) -> Mapping[int, Any]:
        found: Mapping[int, Any] = self._backend.get_added_tokens_decoder()
        return found
