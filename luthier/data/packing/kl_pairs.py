"""For each answer the prompt of its row has not asked for: pairs of a prompt and the answer to another one (kto).

Kto measures how far the policy has moved from the reference by how likely it finds answers that do not belong to their
prompt (https://arxiv.org/abs/2402.01306, section 4.1). Each prompt gets the answer of the nearest row before it with
another prompt; the rows lie in a circle, so the first one looks at the last. So the pairs do not depend on batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from luthier.core.errors import DataError
from luthier.data.rows.arrow import from_lists
from luthier.data.rows.columns import IDS, LABELS, NUMBER, SEQUENCE, Column, columns_of_part
from luthier.data.rows.labels import IGNORE_INDEX, Encoded, label_answers

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

BATCH_ROWS = 1000


@dataclass(frozen=True, slots=True)
class MismatchedPairs:
    """Adds to every row the part `kl_`."""

    size_tokens: int
    columns: ClassVar[tuple[Column, ...]] = (
        *SEQUENCE,
        *columns_of_part("kl_", IDS, LABELS),
        Column("kto_tags", NUMBER),
    )
    cuts_rows: ClassVar[bool] = False
    is_optional: ClassVar[bool] = False

    def join(self, rows: "datasets.Dataset") -> "Iterator[Sequence[pa.ListArray]]":
        earlier = _PromptRing(rows)
        for start in range(0, len(rows), BATCH_ROWS):
            batch = rows[start : start + BATCH_ROWS]
            mismatched = [
                self._mismatched(*_taken_apart(ids, labels), earlier)
                for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
            ]
            yield [
                from_lists(column)
                for column in (
                    batch["input_ids"],
                    batch["labels"],
                    [row.input_ids for row in mismatched],
                    [row.labels for row in mismatched],
                    batch["kto_tags"],
                )
            ]

    def _mismatched(self, prompt: list[int], answer: list[int], earlier: "_PromptRing") -> Encoded:
        (row,) = label_answers([(prompt, earlier.answer_before(prompt, answer))], cutoff_len=self.size_tokens)
        return row


class _PromptRing:
    """Goes through the rows in order, remembering the last two distinct prompts with their latest answers."""

    def __init__(self, rows: "datasets.Dataset") -> None:
        self._last: tuple[list[int], list[int]] | None = None
        self._before: tuple[list[int], list[int]] | None = None
        """The latest row whose prompt is not that of `_last`."""
        for index in range(len(rows) - 1, -1, -1):
            row = _taken_apart(rows[index]["input_ids"], rows[index]["labels"])
            if self._last is None:
                self._last = row
            elif row[0] != self._last[0]:
                self._before = row
                break
        else:
            raise DataError(
                f"kto: the prompt of all {len(rows)} rows is the same, and how far the model has moved is measured by"
                " answers to another prompt -> add rows with other prompts; rows to evaluate on need them, too"
            )

    def answer_before(self, prompt: list[int], answer: list[int]) -> list[int]:
        """The answer of the nearest earlier row with another prompt; the given row is the next earlier one."""
        assert self._last is not None and self._before is not None, "the rows have at least two prompts"
        is_same = prompt == self._last[0]
        found = self._before if is_same else self._last
        if not is_same:
            self._before = self._last
        self._last = (prompt, answer)
        return found[1]


def _taken_apart(input_ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """(prompt, answer) of a row of one answer, which is what is learned of it."""
    start = next((index for index, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    return input_ids[:start], input_ids[start:]
