"""The rows of datasets: read, aligned to an example, tokenized and labeled, with an account of every one.

Training, streaming and the doctor make rows here. `labeled` makes the rows of an example, whatever is wrong with it;
`made` gives those that training uses.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from luthier.core.errors import DataError, RowError
from luthier.core.kinds import FORMATS
from luthier.data.chat.completeness import learned_answers, num_left_out
from luthier.data.chat.encoder import TurnIds
from luthier.data.media import require_usable
from luthier.data.rows.account import DatasetAccount
from luthier.data.rows.encoding import Encoding
from luthier.data.rows.labels import IGNORE_INDEX, Encoded
from luthier.data.rows.loss_weights import carries_weights
from luthier.data.rows.row_plan import RowPlan, RowSettings
from luthier.data.rows.tokenize import Written, ahead, num_characters, text_of, turn_ids
from luthier.data.types import Example, Prompt

if TYPE_CHECKING:
    from luthier.data.sources.dataset_info import DatasetSpec
    from luthier.data.sources.readers import Row

MAX_BATCH_CHARACTERS = 1 << 23
"""The maximum size of a batch, so that long rows do not fill the memory."""

Parts = tuple[Encoded, ...]
"""A row: all its parts."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A row of a dataset as it was read."""

    row: "Row"
    spec: "DatasetSpec"
    account: DatasetAccount
    """Counts the row."""
    origin: Any = None
    """Identifies the row within the run, for callers that need it."""


@dataclass(slots=True)
class Labeled:
    """The rows of an example, before `on_overlong` is applied."""

    drawn: Drawn
    example: Example | None = None
    """None if the row could not be read."""
    refusal: RowError | None = None
    """Why the example cannot be used. If it is set, there are no rows."""
    rows: list[Parts] = field(default_factory=list)
    """Truncated to `cutoff_len`."""
    written: "tuple[tuple[Written, ...], ...]" = ()
    """The parts of each row before tokenization."""
    turns: list[list[list[TurnIds]]] = field(default_factory=list)
    """The token ids of `written`."""


def read_example(row: "Row", spec: "DatasetSpec") -> Example:
    """The canonical example in a row of a dataset. Raises `RowError` for a row that its format cannot read."""
    return FORMATS.get(spec.formatting).read(row.usable(), spec)


def require_taken(example: Example, spec: "DatasetSpec", takes: tuple[type, ...]) -> None:
    """Raises `RowError` for an example that the training method cannot use: with media, or of another type."""
    require_usable(example.media, spec)
    if isinstance(example, takes):
        return
    if isinstance(example, Prompt):
        raise RowError("the row has no answer, and this stage needs one")
    names = " or ".join(kind.__name__ for kind in takes)
    raise RowError(f"the row is a {type(example).__name__}, and this stage takes {names}")


@dataclass(frozen=True, slots=True)
class RowMaker:
    """Turns rows of datasets into rows for the trainer."""

    plan: RowPlan
    settings: RowSettings
    encoding: Encoding
    on_overlong: str
    batch_rows: int
    """How many rows are tokenized together. The result does not depend on it."""

    def rows(
        self, source: "Iterable[Row]", spec: "DatasetSpec", account: DatasetAccount
    ) -> Iterator[tuple[Any, list[Parts]]]:
        """Each usable example with its rows. `account` is complete after the last one."""
        for _, example, rows in self.made(Drawn(row, spec, account) for row in source):
            yield example, rows

    def made(self, source: Iterable[Drawn]) -> Iterator[tuple[Drawn, Any, list[Parts]]]:
        """The same for rows of several datasets in any order: (source row, example, rows) of each usable one."""
        for item in self.labeled(source):
            account = item.drawn.account
            account.rows_in += 1
            try:
                rows = self._kept(item, account)
            except RowError as error:
                account.drop(item.drawn.row.place, error)
                continue
            account.kept += 1
            account.thoughts_left_out += self._num_thoughts_left_out(item)
            parts = list(chain.from_iterable(rows))
            num_tokens, num_labels = sum(len(p.input_ids) for p in parts), sum(p.num_labels for p in parts)
            account.tokens += num_tokens
            account.labeled_tokens += num_labels
            if len(item.written) > 1:
                account.rewritten += 1
                account.rewritten_into += len(item.written)
                account.rewritten_tokens += num_tokens
                account.rewritten_labeled_tokens += num_labels
            yield item.drawn, item.example, rows

    def labeled(self, source: Iterable[Drawn]) -> Iterator[Labeled]:
        """Every row of the source in order, usable or not."""
        for batch, ids in ahead(self._batches(source), self._tokenized):
            turns = iter(ids)
            for item in batch:
                item.turns = [[next(turns) for _ in row] for row in item.written]
                if item.refusal is None:
                    try:
                        item.rows = self._encoded(item, self.encoding)
                    except RowError as error:
                        item.refusal = error
                yield item

    def _batches(self, source: Iterable[Drawn]) -> Iterator[list[Labeled]]:
        batch: list[Labeled] = []
        room = MAX_BATCH_CHARACTERS
        for drawn in source:
            batch.append(self._written(drawn))
            room -= sum(map(num_characters, chain.from_iterable(batch[-1].written)))
            if len(batch) == self.batch_rows or room < 0:
                yield batch
                batch, room = [], MAX_BATCH_CHARACTERS
        if batch:
            yield batch

    def _written(self, drawn: Drawn) -> Labeled:
        item = Labeled(drawn)
        try:
            item.example = read_example(drawn.row, drawn.spec)
            require_taken(item.example, drawn.spec, self.plan.examples)
            item.written = tuple(self.plan.write(item.example, self.encoding, self.settings))
        except RowError as error:
            item.refusal = error
        return item

    def _tokenized(self, batch: list[Labeled]) -> list[list[TurnIds]]:
        return turn_ids(self.encoding.encoder, [part for item in batch for row in item.written for part in row])

    def _kept(self, item: Labeled, account: DatasetAccount) -> list[Parts]:
        """The rows of an example within `cutoff_len`, after applying `on_overlong`."""
        if item.refusal is not None:
            raise item.refusal
        cutoff_len, rule = self.encoding.cutoff_len, self.on_overlong
        overlong = [part for row in item.rows for part in row if part.lost_tokens]
        if not self.plan.has_targets:
            return item.rows
        if not overlong:
            return _with_targets(item.rows, "no token of it is learned")
        assert cutoff_len is not None, "without a limit no token is lost"
        if rule == "error":
            raise DataError(
                f"{item.drawn.row.place}: {overlong[0].num_tokens} tokens, but cutoff_len is {cutoff_len}"
                " -> raise cutoff_len, or set on_overlong"
            )
        if rule == "drop":
            raise RowError(f"longer than cutoff_len {cutoff_len}")
        if rule == "split":
            whole = self._encoded(item, self.encoding.unlimited())
            pieces = _with_targets([p for row in whole for p in _split(row, cutoff_len)], "no token of it is learned")
            account.split_into += len(pieces)
            return pieces
        kept = _with_targets(item.rows, f"no learned token is left after truncation to cutoff_len {cutoff_len}")
        account.truncated += 1
        account.lost_tokens += sum(part.lost_tokens for part in overlong)
        account.lost_labeled_tokens += sum(part.lost_labels for part in overlong)
        account.lost_terminators += sum(part.lost_terminator for part in overlong)
        account.shortened_prompts += sum(part.shortened_prompts for part in overlong)
        return kept

    def _num_thoughts_left_out(self, item: Labeled) -> int:
        if self.encoding.enable_thinking is not False or not (self.plan.reads_chat and self.plan.has_targets):
            return 0
        assert item.example is not None, "a row that is kept has been read"
        only_last = self.settings.mask_history or self.settings.own_answers
        text = "".join(map(text_of, chain.from_iterable(item.written)))
        return num_left_out(learned_answers(item.example, only_last), text, self.encoding.template.thinking_tags)

    def _encoded(self, item: Labeled, encoding: Encoding) -> list[Parts]:
        return encoded_rows(self.plan, item.example, item.written, item.turns, encoding, self.settings)


def encoded_rows(
    plan: RowPlan,
    example: Any,
    written: "Sequence[tuple[Written, ...]]",
    turns: Sequence[list[list[TurnIds]]],
    encoding: Encoding,
    settings: RowSettings,
) -> list[Parts]:
    """The rows of an example, given the token ids of each part of each row."""
    if plan.weigh is None or not carries_weights(example.messages):
        return [plan.label(row, encoding, settings) for row in turns]
    only_parts = [part for (part,) in written], [part for (part,) in turns]
    return [(row,) for row in plan.weigh(example, *only_parts, encoding, settings)]


def column_values(plan: RowPlan, example: Any, parts: Parts) -> tuple[Sequence[float], ...]:
    """The lists of a row, in the order of `RowPlan.columns`."""
    sequences = [ids for part in parts for ids in (part.input_ids, part.labels)]
    weights = [part.weights for part in parts] if plan.weigh is not None else []
    return (*sequences, *weights, *([tag(example)] for tag in plan.tags.values()))


def _split(row: Parts, cutoff_len: int) -> Iterator[Parts]:
    """Each piece begins with the last token of the previous one, so that every target has a predecessor."""
    (encoded,) = row  # rows with two parts are refused by the rules of their stages: no position would fit both
    for start in range(0, len(encoded.input_ids) - 1, max(cutoff_len - 1, 1)):
        part = slice(start, start + cutoff_len)
        ids, labels = encoded.input_ids[part], encoded.labels[part]
        labels = labels if start == 0 else [IGNORE_INDEX, *labels[1:]]
        yield (Encoded(ids, labels, weights=encoded.weights[part]),)


def _with_targets(rows: Iterable[Parts], otherwise: str) -> list[Parts]:
    """The rows with a target in every part; if there is none, raises `RowError` with the reason."""
    kept = [row for row in rows if all(part.has_target for part in row)]
    if not kept:
        raise RowError(otherwise)
    return kept
