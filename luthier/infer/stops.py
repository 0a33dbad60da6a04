"""Where an answer ends: at a stop token, or at the first character of a stop string, however its tokens cut it."""

from collections.abc import Collection, Sequence
from itertools import takewhile


def before_stop(ids: Sequence[int], stop_ids: Collection[int]) -> list[int]:
    """The answer of a row as the model would generate it: without the first stop token and what follows it."""
    return list(takewhile(lambda token: token not in stop_ids, ids))


class StopStrings:
    """Lets the text of an answer through, but for what may still become a stop string.

    `push` and `finish` return pieces that add up to the text before the first stop string.
    """

    def __init__(self, words: Sequence[str]) -> None:
        """`words`: none of them empty."""
        assert all(words), "an empty stop string would end every answer at once"
        self._words = tuple(words)
        self._held = ""
        self.found = False
        """Whether a stop string has been found; then `push` must not be called any more."""

    def push(self, text: str) -> str:
        """The text that certainly belongs to the answer, now that `text` has been added."""
        assert not self.found, "the answer has ended"
        text = self._held + text
        places = [place for place in map(text.find, self._words) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        kept = len(text) - self._num_open(text)
        self._held = text[kept:]
        return text[:kept]

    def finish(self) -> str:
        """The text that was held back, if the answer ends without a stop string."""
        rest, self._held = self._held, ""
        return rest

    def _num_open(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        longest = max((len(word) - 1 for word in self._words), default=0)
        return next(
            (
                length
                for length in range(min(longest, len(text)), 0, -1)
                if any(word.startswith(text[-length:]) for word in self._words)
            ),
            0,
        )
