"""The account of one dataset: rows in = kept + dropped, and what truncation removed."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from luthier.core.errors import RowError
from luthier.data.media.kinds import MediaKind, kind_of

if TYPE_CHECKING:
    from luthier.data.rows.labels import Encoded

MAX_LISTED_ROWS = 20
"""Rows named per reason in the report; the count is always complete."""
MAX_QUOTED_CHARS = 120
"""Of each piece of data that a reason quotes."""


@dataclass(slots=True)
class DatasetAccount:
    """How many rows of a dataset were used, and why others were not."""

    rows_in: int = 0
    kept: int = 0
    truncated: int = 0
    tokens: int = 0
    labeled_tokens: int = 0
    lost_tokens: int = 0
    lost_labeled_tokens: int = 0
    lost_terminators: int = 0
    shortened_prompts: int = 0
    """Prompts that lost text before the marks that open the answer."""
    rewritten: int = 0
    """Conversations that became several rows, because the model's own chat template rewrites history."""
    rewritten_into: int = 0
    """The number of these rows."""
    rewritten_tokens: int = 0
    """The tokens of these rows, each of which holds the history of its answers."""
    rewritten_labeled_tokens: int = 0
    split_into: int = 0
    """Rows that overlong ones were split into (`on_overlong: split`)."""
    thoughts_left_out: int = 0
    """Thoughts of answers that are not learned, since `enable_thinking` is false."""
    empty_thoughts: int = 0
    """Answers without a thought that learn to begin with an empty one, since `enable_thinking` is true."""
    images: int = 0
    """Images in the rows that are kept."""
    image_tokens: int = 0
    """Their tokens, which are among `tokens`."""
    images_left_out: int = 0
    """Images of kept rows that truncation left out."""
    videos: int = 0
    video_tokens: int = 0
    videos_left_out: int = 0
    audios: int = 0
    audio_tokens: int = 0
    audios_left_out: int = 0
    media_cut: int = 0
    """Items of kept rows of which the model takes a part only, such as audio longer than its window."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Kind of reason -> number of rows."""
    dropped_rows: dict[str, list[str]] = field(default_factory=dict)
    """Kind of reason -> the first rows that were dropped for it, each with the data that its reason quotes."""

    def drop(self, place: str, refusal: RowError) -> None:
        kind = refusal.kind
        self.dropped[kind] = self.dropped.get(kind, 0) + 1
        rows = self.dropped_rows.setdefault(kind, [])
        if len(rows) < MAX_LISTED_ROWS:
            quoted = ", ".join(part[:MAX_QUOTED_CHARS] for part in refusal.quoted)
            rows.append(f"{place}: {quoted}" if quoted else place)

    def count_media(self, items: Sequence[str], parts: "Sequence[Encoded]", *, num_cut: int) -> None:
        """Count the items of an example in the parts of its rows. `num_cut`: those that the model takes a part of."""
        shown = {item for part in parts for item in part.items}
        for number, item in enumerate(items):
            kind = kind_of(item)
            self._add(kind.column if number in shown else f"{kind.column}_left_out", 1)
        for part in parts:
            for number, start, stop in zip(part.items, part.blocks[::2], part.blocks[1::2], strict=True):
                self._add(f"{kind_of(items[number]).name}_tokens", stop - start)
        self.media_cut += num_cut

    def _add(self, name: str, count: int) -> None:
        setattr(self, name, getattr(self, name) + count)

    def of_kind(self, kind: MediaKind) -> tuple[int, int, int]:
        """(items, their tokens, items left out) of a kind."""
        names = (kind.column, f"{kind.name}_tokens", f"{kind.column}_left_out")
        count, tokens, left_out = (getattr(self, name) for name in names)
        return count, tokens, left_out

    @property
    def num_dropped(self) -> int:
        return sum(self.dropped.values())

    def add(self, other: "DatasetAccount") -> None:
        """Add the counts of another account of the same dataset."""
        for name in _COUNTS:
            self._add(name, getattr(other, name))
        for reason, count in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
            rows = self.dropped_rows.setdefault(reason, [])
            rows += other.dropped_rows[reason][: MAX_LISTED_ROWS - len(rows)]

    def taken(self) -> "DatasetAccount":
        """The counts so far; this account is reset."""
        found = DatasetAccount()
        found.add(self)
        for name in _COUNTS:
            setattr(self, name, 0)
        self.dropped, self.dropped_rows = {}, {}
        return found


_COUNTS = tuple(entry.name for entry in fields(DatasetAccount) if entry.default == 0)
