"""What became of the rows of one dataset: rows in = kept + dropped, and what truncation cost."""

from dataclasses import dataclass, field, fields

MAX_LISTED_ROWS = 20
"""Row numbers named per reason in the report; the count is always complete."""


@dataclass(slots=True)
class DatasetAccount:
    """What became of the rows of one dataset."""

    rows_in: int = 0
    kept: int = 0
    truncated: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    lost_tokens: int = 0
    lost_labelled_tokens: int = 0
    lost_terminators: int = 0
    rewritten: int = 0
    """Conversations that became several rows, since the model's own chat template rewrites history."""
    rewritten_into: int = 0
    """The rows that were made of them."""
    split_into: int = 0
    """Rows made by cutting overlong ones (`on_overlong: split`)."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> how many rows."""
    dropped_rows: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> the first rows it was given for."""

    def drop(self, place: str, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        rows = self.dropped_rows.setdefault(reason, [])
        if len(rows) < MAX_LISTED_ROWS:
            rows.append(place)

    @property
    def num_dropped(self) -> int:
        return sum(self.dropped.values())

    def add(self, other: "DatasetAccount") -> None:
        """Count what another account of the same dataset has counted, too."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, count in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
            rows = self.dropped_rows.setdefault(reason, [])
            rows += other.dropped_rows[reason][: MAX_LISTED_ROWS - len(rows)]

    def taken(self) -> "DatasetAccount":
        """What has been counted; this account begins anew."""
        found = DatasetAccount()
        found.add(self)
        for name in _COUNTS:
            setattr(self, name, 0)
        self.dropped, self.dropped_rows = {}, {}
        return found


_COUNTS = tuple(entry.name for entry in fields(DatasetAccount) if entry.default == 0)
