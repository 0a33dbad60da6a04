"""`streaming: true`: rows are read and tokenized while training. Memory use does not depend on the size of the data.

read -> interleave (`mix_strategy`) -> take the share of this process and worker -> shuffle buffer -> encode -> pack

The stream is endless: after one pass comes the next, in another random order. The order of rows depends only on the
seed and the number of processes and workers, so a resumed run skips to its step and gets the same rows. Every row
carries the account of what was read for it, so the ledger covers exactly the steps that were trained.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.config.keys.hubs import NO_TOKENS, HubTokens
from luthier.core.errors import DataError, LuthierError
from luthier.core.log import warn
from luthier.data.interleave import interleaved, shuffled
from luthier.data.ledger import MAX_SHOWN_ROWS, Ledger
from luthier.data.mix import MixStrategy
from luthier.data.rows.account import DatasetAccount
from luthier.data.rows.arrow import flat, row_lengths, table_of
from luthier.data.rows.columns import IDS, LABELS, with_media
from luthier.data.rows.maker import Drawn, Parts, RowMaker
from luthier.data.sources.dataset_info import DatasetSpec
from luthier.data.sources.read import local_files, read_rows

if TYPE_CHECKING:
    from luthier.data.rows.row_plan import Packer
    from luthier.data.sources.readers import Row

MAX_WINDOW_TOKENS = 1 << 22
"""Most tokens in a window of rows that are packed together, even if it has few rows."""

Origin = tuple[int, int]
"""(dataset, row): identifies a row."""
Columns = tuple[Sequence[float], ...]
"""A row before it is packed: one list per column of the plan."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """One row for the trainer, or the error that ended the stream in a worker process."""

    row: dict[str, Any]
    account: Ledger
    """What has been read since the previous row."""
    fault: LuthierError | None = None


@dataclass(frozen=True, slots=True)
class Stream:
    """Which rows are read, and in which order."""

    specs: tuple[DatasetSpec, ...]
    open: Callable[[DatasetSpec], "Iterator[Row]"]
    """Opens a dataset for reading."""
    strategy: MixStrategy
    probabilities: tuple[float, ...]
    seed: int
    buffer_size: int
    """Size of the shuffle buffer in rows, over all processes and workers; 1 keeps the order."""
    shuffle_seed: int | None
    """Of the shuffle buffer; None is `seed`."""
    held_out: frozenset[Origin] = frozenset()
    """Rows for evaluation; training never sees them."""
    states: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Local file -> size and time stamp."""

    def one_pass(self, number: int, share: int = 0, num_shares: int = 1) -> "Iterator[tuple[Origin, Row]]":
        """The rows of one pass that belong to a share, in the order of training. Raises `DataError`.

        The shares rotate from pass to pass, so that each of them gets rows eventually.
        """
        self._require_unchanged()
        seed = self.seed if self.shuffle_seed is None else self.shuffle_seed
        generator = np.random.default_rng((seed, number, share))
        mine = islice(self.in_order(number), (share - number) % num_shares, None, num_shares)
        yield from shuffled(mine, max(1, -(-self.buffer_size // num_shares)), generator)
        self._require_unchanged()

    def in_order(self, number: int) -> "Iterator[tuple[Origin, Row]]":
        """The rows of one pass for training, before they are shuffled."""
        openers = [partial(self._numbered, spec) for spec in self.specs]
        for dataset, (place, row) in interleaved(openers, self.strategy, self.probabilities, self.seed + number):
            if (dataset, place) not in self.held_out:
                yield (dataset, place), row

    def in_dataset(self, dataset: int) -> "Iterator[tuple[Origin, Row]]":
        """The rows of one dataset for training."""
        for place, row in self._numbered(self.specs[dataset]):
            if (dataset, place) not in self.held_out:
                yield (dataset, place), row

    def _numbered(self, spec: DatasetSpec) -> "Iterator[tuple[int, Row]]":
        return enumerate(self.open(spec))

    def _require_unchanged(self) -> None:
        for spec in self.specs:
            for name, state in local_files(spec).items():
                if self.states.get(name) != state:
                    raise DataError(
                        f"dataset {spec.name!r}: {name} has changed since the run began to stream it"
                        " -> start over, or stream a copy that does not change"
                    )


def open_stream(
    specs: Sequence[DatasetSpec],
    *,
    strategy: MixStrategy,
    probabilities: Sequence[float],
    seed: int,
    buffer_size: int,
    shuffle_seed: int | None,
    cache_dir: str | None,
    tokens: HubTokens = NO_TOKENS,
) -> Stream:
    """`num_samples` of a dataset is ignored, since it would need all rows at once."""
    for spec in specs:
        if spec.num_samples is not None:
            warn(f"dataset {spec.name!r}: num_samples is ignored while streaming, since it needs all rows at once")
    return Stream(
        tuple(replace(spec, num_samples=None) for spec in specs),
        partial(read_rows, seed=seed, cache_dir=cache_dir, tokens=tokens, streams=True),
        strategy,
        tuple(probabilities),
        seed,
        buffer_size,
        shuffle_seed,
        states={name: state for spec in specs for name, state in local_files(spec).items()},
    )


def front(
    stream: Stream, maker: RowMaker, num_examples: int, ledger: Ledger
) -> Iterator[tuple[Origin, Any, list[Parts]]]:
    """The first usable examples of the first pass, for evaluation. Raises `DataError` if there are fewer."""
    drawn = (
        Drawn(row, stream.specs[origin[0]], ledger.account(stream.specs[origin[0]].name), origin)
        for origin, row in stream.one_pass(0)
    )
    number = 0
    for item, example, rows in islice(maker.made(drawn), num_examples):
        number += 1
        yield item.origin, example, rows
    ledger.accounts = {name: account for name, account in ledger.accounts.items() if account.rows_in}
    if number < num_examples:
        raise DataError(f"val_size: {num_examples} rows are requested, and the stream has only {number} usable ones")


def without(stream: Stream, held_out: Sequence[Origin], maker: RowMaker) -> Stream:
    """The stream for training, beside these rows for evaluation.

    Raises `DataError` if no usable row is left. Warns of a dataset of which none is left.
    """
    stream = replace(stream, held_out=frozenset(held_out))
    if not _has_usable_row(stream, maker, stream.in_order(0)):
        raise DataError(f"val_size takes all {len(held_out)} usable rows of the stream and leaves none to train on")
    for dataset in sorted({dataset for dataset, _ in stream.held_out}):
        if not _has_usable_row(stream, maker, stream.in_dataset(dataset)):
            warn(
                f"dataset {stream.specs[dataset].name!r}: val_size takes all its usable rows and leaves none to train"
                " on -> lower val_size, or give the rows for evaluation as eval_dataset"
            )
    return stream


def _has_usable_row(stream: Stream, maker: RowMaker, rows: "Iterable[tuple[Origin, Row]]") -> bool:
    drawn = (Drawn(row, stream.specs[origin[0]], DatasetAccount(), origin) for origin, row in rows)
    return any(True for _ in maker.made(drawn))


class StreamedRows(torch.utils.data.IterableDataset[Streamed]):
    """The rows of a stream for the data loader. Each process and worker gets its own share."""

    def __init__(self, stream: Stream, maker: RowMaker, packer: "Packer | None", window_rows: int) -> None:
        """`window_rows` rows are packed together, counted over all processes and workers."""
        self.stream, self.maker, self.packer, self.window_rows = stream, maker, packer, window_rows
        self.process, self.num_processes = 0, 1

    @property
    def column_names(self) -> tuple[str, ...]:
        columns = self.maker.plan.columns if self.packer is None else self.packer.columns
        return tuple(column.name for column in (with_media(columns) if self.maker.encoding.media else columns))

    @property
    def fingerprint(self) -> str:
        """A hash of the descriptions, the file sizes and what decides the order; no row is read for it."""
        return self._hash(self.order)

    @property
    def source_fingerprint(self) -> str:
        """The same without the order."""
        return self._hash()

    def _hash(self, *more: Any) -> str:
        sizes = sorted(size for size, _ in self.stream.states.values())
        described = [replace(spec, file="", line=None) for spec in self.stream.specs]
        return hashlib.sha256(repr((described, sizes, *more)).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def order(self) -> tuple[Any, ...]:
        """What decides the order, apart from the rows themselves and the share."""
        stream = self.stream
        shuffle_seed = stream.seed if stream.shuffle_seed is None else stream.shuffle_seed
        return (
            stream.strategy,
            stream.probabilities,
            stream.seed,
            stream.buffer_size,
            len(stream.held_out),
            self.window_rows,
            # Only where it differs, so that checkpoints of versions without it are recognized.
            *(() if shuffle_seed == stream.seed else (shuffle_seed,)),
        )

    def __iter__(self) -> Iterator[Streamed]:
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            return self._share(self.process, self.num_processes, None)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker has one core, and it is a forked process
        num_shares = self.num_processes * worker.num_workers
        return _passing_on(self._share(worker.id * self.num_processes + self.process, num_shares, None))

    def first(self, num_rows: int | None) -> tuple[list[dict[str, Any]], Ledger]:
        """The first rows of the first pass (None: all of them), and the account of what was read."""
        ledger = Ledger(is_streamed=True)
        rows = []
        for item in islice(self._share(0, 1, 1), num_rows):
            rows.append(item.row)
            ledger.add(item.account)
        return rows, ledger

    def _share(self, share: int, num_shares: int, num_passes: int | None) -> Iterator[Streamed]:
        ledger = Ledger(is_streamed=True)
        rows: Iterable[Columns] = self._rows(ledger, share, num_shares, num_passes)
        window = -(-self.window_rows // num_shares)
        joined = self._named(rows) if self.packer is None else self._packed(rows, self.packer, ledger, window)
        waiting: Streamed | None = None
        for row in joined:
            if waiting is not None:
                yield waiting
            ledger.samples["train"] = 1
            waiting = Streamed(row, ledger.taken())
        if waiting is not None:
            waiting.account.add(ledger.taken())  # later rows that could not be used
            yield waiting

    def _rows(self, ledger: Ledger, share: int, num_shares: int, num_passes: int | None) -> Iterator[Columns]:
        kept: list[bool] = []

        def drawn() -> Iterator[Drawn]:
            num_drawn = 0
            for number in count() if num_passes is None else range(num_passes):
                for origin, row in self.stream.one_pass(number, share, num_shares):
                    spec = self.stream.specs[origin[0]]
                    num_drawn += number < num_shares
                    yield Drawn(row, spec, ledger.account(spec.name), origin)
                # After as many passes as there are shares, each row has been drawn at least once.
                if not kept and number + 1 >= num_shares and ledger.rows_in >= num_drawn:
                    raise _no_usable_row(ledger)

        for _, example, rows in self.maker.made(drawn()):
            kept[:] = [True]
            for parts in rows:
                yield self.maker.values(example, parts)
        if not kept:
            raise _no_usable_row(ledger)

    def _named(self, rows: Iterable[Columns]) -> Iterator[dict[str, Any]]:
        for row in rows:
            yield dict(zip(self.column_names, row, strict=True))

    def _packed(
        self, rows: Iterable[Columns], packer: "Packer", ledger: Ledger, window: int
    ) -> Iterator[dict[str, Any]]:
        """Packs one window at a time. Tokens that do not fill the last block are carried over to the next window."""
        rest: list[Columns] = []
        for some in _windows(rows, window):
            table = table_of([*rest, *some], self.maker.columns)
            lengths = row_lengths(table)
            if packer.cuts_rows:
                ledger.leftover_tokens += int(lengths.sum()) - sum(len(row[0]) for row in rest)
            num_joined = 0
            for arrays in packer.join(table):
                for values in zip(*(array.to_pylist() for array in arrays), strict=True):
                    num_joined += len(values[0])
                    if packer.cuts_rows:
                        ledger.leftover_tokens -= len(values[0])
                    yield dict(zip(self.column_names, values, strict=True))
            if packer.cuts_rows:
                ids = flat(table.arrow().column(IDS.name))[0][num_joined:].tolist()
                rest = [tuple(ids if column.kind in (IDS, LABELS) else () for column in self.maker.plan.columns)]


def _passing_on(rows: Iterator[Streamed]) -> Iterator[Streamed]:
    """Passes an error on as a row, since the data loader would put the traceback of its worker into the message."""
    try:
        yield from rows
    except LuthierError as fault:
        while True:
            yield Streamed({}, Ledger(), fault)


def _windows(rows: Iterable[Columns], num_rows: int) -> Iterator[list[Columns]]:
    window: list[Columns] = []
    room = MAX_WINDOW_TOKENS
    for row in rows:
        window.append(row)
        room -= len(row[0])
        if len(window) >= num_rows or room < 0:
            yield window
            window, room = [], MAX_WINDOW_TOKENS
    if window:
        yield window


def _no_usable_row(ledger: Ledger) -> DataError:
    """Rows may have been read more than once, so the message does not give their number."""
    names = ", ".join(map(repr, ledger.accounts)) or "of this run"
    reasons = [
        f"{name}: {reason} ({'; '.join(list(dict.fromkeys(places))[:MAX_SHOWN_ROWS])})"
        for name, account in ledger.accounts.items()
        for reason, places in account.dropped_rows.items()
    ]
    return DataError("\n  ".join([f"dataset {names} has no usable row", *reasons]))
