"""The rows of one dataset: read, aligned to an example, tokenized and labelled, with an account of every one."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from luthier.core.errors import DataError, RowError
from luthier.core.kinds import FORMATS
from luthier.data.chat.encoder import TurnIds
from luthier.data.ledger import DatasetAccount
from luthier.data.rows.encoding import Encoding
from luthier.data.rows.labels import IGNORE_INDEX, Encoded
from luthier.data.rows.loss_weights import carries_weights
from luthier.data.rows.row_plan import RowPlan
from luthier.data.rows.tokenize import Written, ahead, num_characters, turn_ids
from luthier.data.types import Media, Prompt

if TYPE_CHECKING:
    from luthier.data.sources.dataset_info import DatasetSpec
    from luthier.data.sources.readers import Row

MAX_BATCH_CHARACTERS = 1 << 23
"""A batch ends here even if it has few rows, so that long ones do not fill the memory."""


Parts = tuple[Encoded, ...]
"""A row: all its parts."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A row on its way."""

    row: "Row"
    spec: "DatasetSpec"
    account: DatasetAccount
    """Where it is counted."""
    origin: Any = None
    """What tells it apart from all other rows of the run, for those who need it."""


@dataclass(slots=True)
class _Draft:
    """A row that is read and written, but not tokenized."""

    drawn: Drawn
    example: Any = None
    written: "tuple[tuple[Written, ...], ...]" = ()
    """Row by row, each with its parts."""
    reason: str = ""
    """Why it cannot be used."""

    @property
    def place(self) -> str:
        return self.drawn.row.place


@dataclass(frozen=True, slots=True)
class RowMaker:
    """What becomes of a dataset's rows, whichever dataset it is."""

    plan: RowPlan
    config: Any
    """The own keys of the training method."""
    encoding: Encoding
    on_overlong: str
    batch_rows: int
    """So many rows are tokenized together; the rows do not depend on it."""

    def rows(
        self, source: "Iterable[Row]", spec: "DatasetSpec", account: DatasetAccount
    ) -> Iterator[tuple[Any, list[Parts]]]:
        """Each usable example with its rows; `account` is complete when the last one has been given."""
        for _, example, rows in self.made(Drawn(row, spec, account) for row in source):
            yield example, rows

    def made(self, source: Iterable[Drawn]) -> Iterator[tuple[Drawn, Any, list[Parts]]]:
        """The same for rows of several datasets, in any order: each usable one, its example, its rows."""
        for batch, ids in ahead(self._drafts(source), self._tokenized):
            turns = iter(ids)
            for draft in batch:
                account = draft.drawn.account
                account.rows_in += 1
                try:
                    rows = self._labelled([[next(turns) for _ in row] for row in draft.written], draft, account)
                except RowError as error:
                    account.drop(draft.place, str(error))
                    continue
                account.kept += 1
                if len(draft.written) > 1:
                    account.rewritten += 1
                    account.rewritten_into += len(draft.written)
                for part in chain.from_iterable(rows):
                    account.tokens += len(part.input_ids)
                    account.labelled_tokens += part.num_labels
                yield draft.drawn, draft.example, rows

    def _drafts(self, source: Iterable[Drawn]) -> Iterator[list[_Draft]]:
        batch: list[_Draft] = []
        room = MAX_BATCH_CHARACTERS
        for drawn in source:
            batch.append(self._draft(drawn))
            room -= sum(map(num_characters, chain.from_iterable(batch[-1].written)))
            if len(batch) == self.batch_rows or room < 0:
                yield batch
                batch, room = [], MAX_BATCH_CHARACTERS
        if batch:
            yield batch

    def _draft(self, drawn: Drawn) -> _Draft:
        try:
            example = FORMATS.get(drawn.spec.formatting).read(drawn.row.usable(), drawn.spec)
            if example.media != Media():
                raise RowError("the row has pictures, films or sounds, and this version reads text only")
            if not isinstance(example, self.plan.examples):
                raise RowError(not_taken(example, self.plan.examples))
            return _Draft(drawn, example, tuple(self.plan.write(example, self.encoding, self.config)))
        except RowError as error:
            return _Draft(drawn, reason=str(error))

    def _tokenized(self, batch: list[_Draft]) -> list[list[TurnIds]]:
        return turn_ids(self.encoding.encoder, [part for draft in batch for row in draft.written for part in row])

    def _labelled(self, turns: list[list[list[TurnIds]]], draft: _Draft, account: DatasetAccount) -> list[Parts]:
        """The rows of an example within `cutoff_len`, by the rule of `on_overlong`."""
        if draft.reason:
            raise RowError(draft.reason)
        rows = self._encoded(turns, draft, self.encoding)
        cutoff_len, rule = self.encoding.cutoff_len, self.on_overlong
        overlong = [part for row in rows for part in row if part.lost_tokens]
        if not self.plan.has_targets:
            return rows
        if not overlong:
            return _with_labels(rows, "no token of it is learned")
        assert cutoff_len is not None, "a row cannot lose tokens to no limit"
        length = len(overlong[0].input_ids) + overlong[0].lost_tokens
        if rule == "error":
            raise DataError(
                f"{draft.place}: {length} tokens, but cutoff_len is {cutoff_len}"
                " -> raise cutoff_len, or set on_overlong"
            )
        if rule == "drop":
            raise RowError(f"longer than cutoff_len {cutoff_len}")
        if rule == "split":
            whole = self._encoded(turns, draft, self.encoding.unlimited())
            pieces = _with_labels([p for row in whole for p in _split(row, cutoff_len)], "no token of it is learned")
            account.split_into += len(pieces)
            return pieces
        kept = _with_labels(rows, f"no learned token is left after truncation to cutoff_len {cutoff_len}")
        account.truncated += 1
        account.lost_tokens += sum(part.lost_tokens for part in overlong)
        account.lost_labelled_tokens += sum(part.lost_labels for part in overlong)
        account.lost_terminators += sum(part.lost_terminator for part in overlong)
        return kept

    def _encoded(self, turns: list[list[list[TurnIds]]], draft: _Draft, encoding: Encoding) -> list[Parts]:
        return encoded_rows(self.plan, draft.example, draft.written, turns, encoding, self.config)


def encoded_rows(
    plan: RowPlan,
    example: Any,
    written: "Sequence[tuple[Written, ...]]",
    turns: Sequence[list[list[TurnIds]]],
    encoding: Encoding,
    config: Any,
) -> list[Parts]:
    """The rows of an example, given the turns of each part of each row."""
    if plan.weigh is None or not carries_weights(example.messages):
        return [plan.label(row, encoding, config) for row in turns]
    only_parts = [part for (part,) in written], [part for (part,) in turns]
    return [(row,) for row in plan.weigh(example, *only_parts, encoding, config)]


def column_values(plan: RowPlan, example: Any, parts: Parts) -> tuple[Sequence[float], ...]:
    """The lists of a row, in the order of `RowPlan.columns`."""
    sequences = [ids for part in parts for ids in (part.input_ids, part.labels)]
    weights = [part.weights for part in parts] if plan.weigh is not None else []
    return (*sequences, *weights, *([tag(example)] for tag in plan.tags.values()))


def _split(row: Parts, cutoff_len: int) -> Iterator[Parts]:
    """Each piece begins with the last token of the one before, so that no learned token lacks one to follow."""
    (encoded,) = row  # what has two parts is refused: they could not be cut at the same place
    for start in range(0, len(encoded.input_ids) - 1, max(cutoff_len - 1, 1)):
        part = slice(start, start + cutoff_len)
        ids, labels = encoded.input_ids[part], encoded.labels[part]
        labels = labels if start == 0 else [IGNORE_INDEX, *labels[1:]]
        yield (Encoded(ids, labels, weights=encoded.weights[part]),)


def _with_labels(rows: Iterable[Parts], otherwise: str) -> list[Parts]:
    """The rows with something to learn in every part; if there is none, raises `RowError` with the reason."""
    kept = [row for row in rows if all(_has_labels(part.labels) for part in row)]
    if not kept:
        raise RowError(otherwise)
    return kept


def _has_labels(labels: list[int]) -> bool:
    """The first token of a row has no predecessor, so its label is never learned."""
    return any(label != IGNORE_INDEX for label in islice(reversed(labels), max(len(labels) - 1, 0)))


def not_taken(example: Any, takes: tuple[type, ...]) -> str:
    """Why an example of another type than the training method takes cannot be used."""
    if isinstance(example, Prompt):
        return "the row has no answer, and this stage needs one"
    return f"the row is a {type(example).__name__}, and this stage takes {' or '.join(t.__name__ for t in takes)}"
