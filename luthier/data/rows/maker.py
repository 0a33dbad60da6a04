"""The rows of datasets: read, aligned to an example, tokenized and labeled, with an account of every one.

Training, streaming and the doctor make rows here. `labeled` makes the rows of an example, whatever is wrong with it;
`made` gives those that training uses.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from luthier.core.errors import DataError, RowError
from luthier.core.kinds import FORMATS
from luthier.data.chat.completeness import learned_answers, num_left_out
from luthier.data.chat.encoder import TurnIds
from luthier.data.chat.parts import has_place
from luthier.data.media.ahead import measured_ahead
from luthier.data.media.expand import Seen
from luthier.data.media.items import placed, require_usable
from luthier.data.media.kinds import Examined, by_kind, media_kind
from luthier.data.media.tokens import num_block_tokens
from luthier.data.rows.account import DatasetAccount
from luthier.data.rows.columns import Column, with_media
from luthier.data.rows.encoding import Encoding
from luthier.data.rows.labels import IGNORE_INDEX, Encoded, with_blocks_apart
from luthier.data.rows.loss_weights import carries_weights
from luthier.data.rows.row_plan import RowPlan, RowSettings
from luthier.data.rows.tokenize import Written, ahead, num_begun_empty, num_characters, text_of, turn_ids
from luthier.data.types import Dialogue, Example, Preference, Prompt

if TYPE_CHECKING:
    from luthier.data.sources.dataset_info import DatasetSpec
    from luthier.data.sources.readers import Row

MAX_BATCH_CHARACTERS = 1 << 23
"""The maximum size of a batch, so that long rows do not fill the memory."""
FIRST_BATCH_ROWS = 32
"""Each batch is twice the one before: the first rows come early, and a short stream is not read again and again."""

_LIMITS = {"image": "image_max_pixels", "video": "video_maxlen"}
"""Kind of media -> the key that makes its blocks shorter."""

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
    """The parts of each row before tokenization, with one character for each item."""
    seen: Seen | None = None
    """Its media; None for an example without any."""
    turns: list[list[list[TurnIds]]] = field(default_factory=list)
    """The token ids of `written`."""


def read_example(row: "Row", spec: "DatasetSpec") -> Example:
    """The canonical example in a row of a dataset. Raises `RowError` for a row that its format cannot read."""
    return placed(FORMATS.get(spec.formatting).read(row.usable(), spec), spec)


def require_taken(
    example: Example, spec: "DatasetSpec", takes: tuple[type, ...], *, media: Collection[str] = ()
) -> None:
    """Raises `RowError` for an example that the training method cannot use: of another type, or with media that are
    missing or that the model cannot take. `media`: the kinds that it takes."""
    require_usable(example.media, spec, takes=media)
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

    @property
    def columns(self) -> tuple[Column, ...]:
        """Of a row; those of media only where the run has some."""
        return with_media(self.plan.columns) if self.encoding.media is not None else self.plan.columns

    def values(self, example: Any, parts: Parts) -> tuple[Sequence[Any], ...]:
        """The lists of a row, in the order of `columns`."""
        plan = self.plan
        sequences = [ids for part in parts for ids in (part.input_ids, part.labels)]
        weights = [part.weights for part in parts] if plan.weigh is not None else []
        values: tuple[Sequence[Any], ...] = (*sequences, *weights, *([tag(example)] for tag in plan.tags.values()))
        if self.encoding.media is None:
            return values
        return (*values, *(part.blocks for part in parts), items_of(example, parts[0]))

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
            self._count_thoughts(item, account)
            if item.seen is not None:
                account.count_media(item.seen.items, list(chain.from_iterable(rows)), num_cut=len(item.seen.left))
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
                        if item.seen is not None:
                            item.turns = self._with_blocks(item, item.seen)
                        item.rows = self._encoded(item, self.encoding)
                    except RowError as error:
                        item.refusal = error
                yield item

    def _batches(self, source: Iterable[Drawn]) -> Iterator[list[Labeled]]:
        batch: list[Labeled] = []
        room, num_rows = MAX_BATCH_CHARACTERS, min(FIRST_BATCH_ROWS, self.batch_rows)
        read, media = map(self._read, source), self.encoding.media
        nothing: Sequence[Examined | RowError] = ()
        found = (
            ((item, nothing) for item in read)
            if media is None
            else measured_ahead(read, _items_of, media.processor.examined)
        )
        for item, examined in found:
            self._write(item, examined)
            batch.append(item)
            room -= sum(map(num_characters, chain.from_iterable(batch[-1].written)))
            if len(batch) == num_rows or room < 0:
                yield batch
                batch, room, num_rows = [], MAX_BATCH_CHARACTERS, min(2 * num_rows, self.batch_rows)
        if batch:
            yield batch

    def _read(self, drawn: Drawn) -> Labeled:
        item = Labeled(drawn)
        try:
            item.example = read_example(drawn.row, drawn.spec)
            media = self.encoding.media
            takes = () if media is None else tuple(media.processor.marks)
            require_taken(item.example, drawn.spec, self.plan.examples, media=takes)
        except RowError as error:
            item.refusal = error
        return item

    def _write(self, item: Labeled, examined: Sequence[Examined | RowError]) -> None:
        if item.refusal is not None:
            return
        example = item.example
        assert example is not None, "a row that is not refused has been read"
        try:
            if self.encoding.media is not None:
                _require_no_mark(example, self.encoding.media.processor.reserved)
                if example.media.items:
                    item.seen = self.encoding.media.seen(example.media.items, examined)
                if not self.plan.has_targets and has_place(_answer_of(example)):
                    raise RowError("media stand in the answer, which this stage takes as plain text")
            item.written = tuple(self.plan.write(example, self.encoding, self.settings))
        except RowError as error:
            item.refusal = error

    def _tokenized(self, batch: list[Labeled]) -> list[list[TurnIds]]:
        return turn_ids(self.encoding.encoder, [part for item in batch for part in self._with_texts(item)])

    def _with_texts(self, item: Labeled) -> "Iterator[Written]":
        """The parts of all rows, with the text that stands for each item."""
        for part in chain.from_iterable(item.written):
            if item.seen is not None:
                try:
                    part = item.seen.expanded(part)
                except RowError as error:
                    item.refusal = error
            yield part

    def _with_blocks(self, item: Labeled, seen: Seen) -> list[list[list[TurnIds]]]:
        """The turns of each part, with the tokens of media as such. Raises `RowError`."""
        encoder = self.encoding.encoder
        return [
            [seen.marked(turns, part, encoder) for turns, part in zip(*row, strict=True)]
            for row in zip(item.turns, item.written, strict=True)
        ]

    def _require_whole_media(self, item: Labeled) -> None:
        """Applies `on_overlong` to an item of which the model takes a part only."""
        left = item.seen.left if item.seen is not None else []
        if left and self.on_overlong == "error":
            raise DataError(f"{item.drawn.row.place}: {left[0]} -> cut the file, or set on_overlong")
        if left and self.on_overlong == "drop":
            raise left[0]

    def _kept(self, item: Labeled, account: DatasetAccount) -> list[Parts]:
        """The rows of an example within `cutoff_len`, after applying `on_overlong`."""
        if item.refusal is not None:
            raise item.refusal
        self._require_whole_media(item)
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
        kept = _with_targets(item.rows, *_no_target(item, cutoff_len))
        account.truncated += 1
        account.lost_tokens += sum(part.lost_tokens for part in overlong)
        account.lost_labeled_tokens += sum(part.lost_labels for part in overlong)
        account.lost_terminators += sum(part.lost_terminator for part in overlong)
        account.shortened_prompts += sum(part.shortened_prompts for part in overlong)
        return kept

    def _count_thoughts(self, item: Labeled, account: DatasetAccount) -> None:
        if self.encoding.enable_thinking is None or not (self.plan.reads_chat and self.plan.has_targets):
            return
        assert item.example is not None, "a row that is kept has been read"
        only_last = self.settings.mask_history or self.settings.own_answers
        template, parts = self.encoding.template, list(chain.from_iterable(item.written))
        if self.encoding.enable_thinking:
            account.empty_thoughts += sum(num_begun_empty(part, template, only_last=only_last) for part in parts)
            return
        text = "".join(map(text_of, parts))
        answers = learned_answers(item.example, only_last)
        account.thoughts_left_out += num_left_out(answers, text, template.thinking_tags)

    def _encoded(self, item: Labeled, encoding: Encoding) -> list[Parts]:
        rows = encoded_rows(self.plan, item.example, item.written, item.turns, encoding, self.settings, item.seen)
        if item.seen is None:
            return rows
        apart = [tuple(map(with_blocks_apart, row)) for row in rows]
        for row, parts in zip(apart, item.written, strict=True):
            for part, written in zip(row, parts, strict=True):
                item.seen.require_all(written, len(part.items))
        if encoding.cutoff_len is None or not any(part.lost_tokens for row in rows for part in row):
            return apart
        whole = self._encoded(item, encoding.unlimited())
        return [tuple(map(_shortened, *pair)) for pair in zip(apart, whole, strict=True)]


def encoded_rows(
    plan: RowPlan,
    example: Any,
    written: "Sequence[tuple[Written, ...]]",
    turns: Sequence[list[list[TurnIds]]],
    encoding: Encoding,
    settings: RowSettings,
    seen: Seen | None = None,
) -> list[Parts]:
    """The rows of an example, given the token ids of each part of each row. `seen`: its media."""
    if plan.weigh is None or not carries_weights(example.messages):
        return [plan.label(row, encoding, settings) for row in turns]
    only_parts = [part for (part,) in written], [part for (part,) in turns]
    return [(row,) for row in plan.weigh(example, *only_parts, encoding, settings, seen)]


def items_of(example: Example, part: Encoded) -> list[str]:
    """The items of a row. All its parts show the same ones."""
    return [example.media.items[item] for item in part.items]


def _items_of(item: Labeled) -> Sequence[str]:
    return item.example.media.items if item.example is not None and item.refusal is None else ()


def _answer_of(example: Example) -> str:
    return example.messages[-1].content if isinstance(example, Dialogue) else ""


def _require_no_mark(example: Example, reserved: Mapping[str, str]) -> None:
    """Raises `RowError` for a text that the model would take for an item. `reserved`: such texts -> the kind."""
    answers = (example.chosen, example.rejected) if isinstance(example, Preference) else ()
    messages = (*(example.prompt if isinstance(example, Preference) else example.messages), *answers)
    for text in (example.system or "", *(text for message in messages for text in (message.content, message.thought))):
        for word, name in reserved.items():
            if word in text:
                kind = media_kind(name)
                remedy = (
                    f"name its column of {kind.plural} in the description of the data"
                    if word == kind.written_tag
                    else f"remove it; {kind.noun} is written as {kind.written_tag}"
                )
                raise RowError(f"the text holds {word}, which the model takes for {kind.noun} -> {remedy}")


def _shortened(row: Encoded, whole: Encoded) -> Encoded:
    """A truncated row with media, which lost those targets that the whole row has more."""
    return replace(row, lost_labels=max(whole.num_labels - row.num_labels, 0))


def _no_target(item: Labeled, cutoff_len: int) -> tuple[str, ...]:
    """The reason for a row of which truncation leaves nothing to learn, and what it quotes."""
    otherwise = f"no learned token is left after truncation to cutoff_len {cutoff_len}"
    if item.seen is None:
        return (otherwise,)
    num_tokens = max(
        sum(num_block_tokens(side) for turn in part for side in turn) for row in item.turns for part in row
    )
    count = f"{_counted(item.seen.items)} {'are' if len(item.seen.items) > 1 else 'is'} {num_tokens:,} tokens"
    if 2 * num_tokens < cutoff_len:
        return (otherwise,)
    names = {kind.name for kind in by_kind(item.seen.items)}
    remedies = [f", or lower {key}" for name, key in _LIMITS.items() if name in names]
    return (
        f"its {count}, which leaves too little of cutoff_len {cutoff_len} for the answer -> raise cutoff_len"
        f"{''.join(remedies)}",
        count,
    )


def _counted(items: Sequence[str]) -> str:
    """2 images and 1 video"""
    return " and ".join(kind.named(len(own)) for kind, own in by_kind(items).items())


def _split(row: Parts, cutoff_len: int) -> Iterator[Parts]:
    """Each piece begins with the last token of the previous one, so that every target has a predecessor."""
    (encoded,) = row  # rows with two parts are refused by the rules of their stages: no position would fit both
    for start in range(0, len(encoded.input_ids) - 1, max(cutoff_len - 1, 1)):
        part = slice(start, start + cutoff_len)
        ids, labels = encoded.input_ids[part], encoded.labels[part]
        labels = labels if start == 0 else [IGNORE_INDEX, *labels[1:]]
        yield (Encoded(ids, labels, weights=encoded.weights[part]),)


def _with_targets(rows: Iterable[Parts], otherwise: str, *quoted: str) -> list[Parts]:
    """The rows with a target in every part; if there is none, raises `RowError` with the reason and what it quotes."""
    kept = [row for row in rows if all(part.has_target for part in row)]
    if not kept:
        raise RowError(otherwise, *quoted)
    return kept
