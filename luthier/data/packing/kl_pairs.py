"""Mismatched pairs: each prompt with the answer to another prompt (kto).

KTO estimates the KL divergence of policy and reference on such pairs (https://arxiv.org/abs/2402.01306, section 4.1).
Each prompt gets the answer of the nearest earlier row with another prompt; the first rows look at the last ones. The
pairs do not depend on the batch size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from luthier.core.errors import DataError
from luthier.data.media.tokens import with_blocks
from luthier.data.rows.arrow import from_lists
from luthier.data.rows.closing_marks import Marks, num_closing_marks
from luthier.data.rows.columns import BLOCKS, IDS, IMAGES, LABELS, NUMBER, SEQUENCE, Column, columns_of_part
from luthier.data.rows.labels import IGNORE_INDEX, Encoded, label_answers, with_blocks_apart
from luthier.data.rows.table import Table

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1000


@dataclass(frozen=True, slots=True)
class MismatchedPairs:
    """Adds to every row the part `kl_`."""

    size_tokens: int
    marks: Marks = ()
    """The closing marks that a prompt keeps when it is cut."""
    columns: ClassVar[tuple[Column, ...]] = (
        *SEQUENCE,
        *columns_of_part("kl_", IDS, LABELS),
        Column("kto_tags", NUMBER),
    )
    cuts_rows: ClassVar[bool] = False
    is_optional: ClassVar[bool] = False

    def join(self, rows: Table) -> "Iterator[Sequence[pa.ListArray]]":
        earlier = _PromptRing(rows)
        for start in range(0, len(rows), BATCH_ROWS):
            batch = rows[start : start + BATCH_ROWS]
            sees = IMAGES.name in batch
            mismatched = [self._mismatched(*found, earlier) for found in _taken_apart(batch)]
            if sees:  # all images stand in the prompt, which both parts share
                mismatched = [with_blocks_apart(row) for row in mismatched]
            yield [
                from_lists(column)
                for column in (
                    batch["input_ids"],
                    batch["labels"],
                    [row.input_ids for row in mismatched],
                    [row.labels for row in mismatched],
                    batch["kto_tags"],
                    *((batch[BLOCKS.name], [row.blocks for row in mismatched]) if sees else ()),
                )
            ] + ([from_lists(batch[IMAGES.name], IMAGES.dtype)] if sees else [])

    def _mismatched(self, prompt: "_Prompt", answer: list[int], earlier: "_PromptRing") -> Encoded:
        (row,) = label_answers(
            [(prompt[0], earlier.answer_before(prompt, answer))],
            cutoff_len=self.size_tokens,
            num_marks=partial(num_closing_marks, marks=self.marks),
        )
        return row


class _PromptRing:
    """Iterates over the rows, keeping the last two distinct prompts with their latest answers."""

    def __init__(self, rows: Table) -> None:
        self._last: tuple[_Prompt, list[int]] | None = None
        self._before: tuple[_Prompt, list[int]] | None = None
        """The latest row whose prompt is not that of `_last`."""
        for index in range(len(rows) - 1, -1, -1):
            (row,) = _taken_apart(rows[index : index + 1])
            if self._last is None:
                self._last = row
            elif row[0] != self._last[0]:
                self._before = row
                break
        else:
            raise DataError(
                f"kto: all {len(rows)} rows have the same prompt, and the KL term needs answers to other prompts"
                " -> add rows with other prompts, to the evaluation rows as well"
            )

    def answer_before(self, prompt: "_Prompt", answer: list[int]) -> list[int]:
        """The answer of the nearest earlier row with another prompt; then the given row becomes the latest one."""
        assert self._last is not None and self._before is not None, "the rows have at least two prompts"
        is_same = prompt == self._last[0]
        found = self._before if is_same else self._last
        if not is_same:
            self._before = self._last
        self._last = (prompt, answer)
        return found[1]


_Prompt = tuple[list[int], list[str]]
"""The ids of a prompt, and its images: those of equal size have equal ids."""


def _taken_apart(rows: Mapping[str, list[Any]]) -> Iterator[tuple[_Prompt, list[int]]]:
    """(prompt, answer) of each row: the answer begins at the first target."""
    without: list[list[Any]] = [[]] * len(rows["labels"])
    blocks, images = rows.get(BLOCKS.name, without), rows.get(IMAGES.name, without)
    for input_ids, labels, own, paths in zip(rows["input_ids"], rows["labels"], blocks, images, strict=True):
        start = next((index for index, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
        ids = with_blocks(input_ids, own) if own else input_ids
        yield (ids[:start], paths), ids[start:]
