"""From the datasets a run names to tokenized rows, with an account of every row on the way.

read -> convert to the canonical example -> encode (ids and labels) -> mix datasets -> split off evaluation rows -> pack

Tokenized and packed rows are cached; a run on unchanged data reuses them.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.keys.data import holds_tokenized_rows
from luthier.config.keys.hubs import HubTokens
from luthier.core.errors import DataError
from luthier.core.files import require_no_file
from luthier.core.log import info, is_main_process
from luthier.data.cache.fingerprint import encoding_digest, joint_key, source_digest
from luthier.data.cache.kept_images import IMAGES_FILE
from luthier.data.cache.provenance import (
    check_unrecorded,
    file_hashes,
    made_by,
    read_record,
    require_same_maker,
    warn_of_kept_keys,
)
from luthier.data.cache.saved import load_tokenized, save_tokenized
from luthier.data.cache.store import Cache, open_cache
from luthier.data.ledger import Ledger
from luthier.data.media.kinds import states_of
from luthier.data.mix import mix, split_validation
from luthier.data.rows.account import DatasetAccount
from luthier.data.rows.arrow import TableWriter, batches_of, row_lengths, table_at
from luthier.data.rows.columns import IMAGES, LENGTHS, NUMBER, SEQUENCE, Column, kind_of, with_media
from luthier.data.rows.encoding import Encoding, encode_last_turns
from luthier.data.rows.listing import media_items
from luthier.data.rows.maker import Parts, RowMaker, items_of
from luthier.data.rows.table import Table, joined
from luthier.data.rows.tags import warn_of_tags
from luthier.data.sources.catalog import DatasetSpec, load_catalog
from luthier.data.sources.read import read_rows
from luthier.data.types import Dialogue

if TYPE_CHECKING:
    import numpy as np

    from luthier.config.keys.data import DataConfig
    from luthier.config.runs import TrainRun
    from luthier.data.rows.row_plan import Packer, RowPlan
    from luthier.data.stream import StreamedRows

ROWS_FILE, PROMPTS_FILE, ACCOUNT_FILE = "rows.arrow", "prompts.arrow", "account.json"
EXAMPLE = Column("example", NUMBER)
"""The number of the example that a row comes from."""


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Rows for the trainer. Each part has `input_ids` and `labels` of equal length.

    Packed rows of sft also have `sample_lengths`, the number of tokens of each sample.
    """

    train: "Table | StreamedRows | None"
    eval: Mapping[str, Table]
    """Dataset name -> evaluation rows; the name is empty unless `eval_on_each_dataset`."""
    prompts: Mapping[str, Table]
    """For `predict_with_generate`: `input_ids` is the prompt, `labels` the reference answer."""
    ledger: Ledger

    @property
    def is_packed(self) -> bool:
        """Whether rows consist of several samples."""
        return any(LENGTHS.name in rows.column_names for rows in (self.train, *self.eval.values()) if rows)

    @property
    def fingerprint(self) -> str:
        """A hash of all token ids and labels, in order."""
        if self.streamed is not None:
            return f"{self.streamed.fingerprint} {rows_digest(*self.eval.values())}"
        return rows_digest(*([] if self.table is None else [self.table]), *self.eval.values())

    @property
    def train_fingerprint(self) -> str:
        """The same of the training rows alone; of a stream, a hash of its files and their descriptions."""
        if self.streamed is not None:
            return self.streamed.source_fingerprint
        return rows_digest(*([] if self.table is None else [self.table]))

    @property
    def streamed(self) -> "StreamedRows | None":
        """The training rows, if they are read while training."""
        return None if isinstance(self.train, Table) else self.train

    @property
    def table(self) -> Table | None:
        """The training rows, if they are made before training."""
        return self.train if isinstance(self.train, Table) else None


def rows_digest(*tables: Table) -> str:
    """A hash of every number in these rows, in order, and of the paths of images."""
    digest = hashlib.sha256()
    for rows in tables:
        for column in rows.column_names:
            if kind_of(column) is IMAGES:
                digest.update(repr(rows[column]).encode("utf-8", "surrogatepass"))
                continue
            for values, lengths in batches_of(rows, column):
                digest.update(values.tobytes() + lengths.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Table:
    rows: Table
    examples: "np.ndarray"
    """(rows,) the number of the example that each row comes from, counted over all datasets of the run."""
    key: str | None
    """Hash of everything that the rows depend on; None if that is unknown."""

    def chosen(self, index: "np.ndarray", key: str | None) -> "_Table":
        return _Table(self.rows.select(index), self.examples[index], key)


def prepare(run: "TrainRun", plan: "RowPlan", encoding: Encoding) -> PreparedData:
    """Raises `DataError` if a dataset cannot be read, or if none of its rows can be used."""
    if holds_tokenized_rows(run.data):
        assert run.data.tokenized_path is not None, "the rows are read from there"
        info(f"data: using the tokenized rows in {run.data.tokenized_path}; other data keys are ignored")
        data = _saved(run, plan, encoding, Path(run.data.tokenized_path))
        warn_of_tags(plan, data.table)
        return data
    if run.data.tokenized_path is not None:
        require_no_file("tokenized_path", Path(run.data.tokenized_path))
    tell_machines(run.data)
    data = _prepared(run, plan, encoding)
    warn_of_tags(plan, data.table)
    if run.data.tokenized_path is not None and _makes(run.data.data_shared_file_system):
        record = {**made_by(run, plan, encoding), "files": file_hashes(run, cache_of(run.data).folder)}
        save_tokenized(Path(run.data.tokenized_path), data.table, data.eval, data.prompts, data.ledger, record)
        info(f"data: tokenized rows saved to {run.data.tokenized_path}; the next run reads them from there")
    return data


def _saved(run: "TrainRun", plan: "RowPlan", encoding: Encoding, folder: Path) -> PreparedData:
    """The rows in a folder `tokenized_path`.

    Raises `DataError` if another tokenizer, chat format or stage made them.
    """
    record = read_record(folder)
    if record is not None:
        require_same_maker(folder, record, made_by(run, plan, encoding))
    packer = plan.packer(run, encoding)
    columns = plan.columns if packer is None or packer.is_optional else packer.columns
    train, evals, prompts, ledger = load_tokenized(folder, columns, sees=encoding.media is not None)
    if record is None:
        check_unrecorded(folder, [*([] if train is None else [train]), *evals.values(), *prompts.values()], encoding)
    else:
        warn_of_kept_keys(folder, record, run, cache_of(run.data).folder)
    return PreparedData(train, evals, prompts, ledger)


def _prepared(run: "TrainRun", plan: "RowPlan", encoding: Encoding) -> PreparedData:
    data, generates = run.data, run.training["predict_with_generate"]
    packer = plan.packer(run, encoding)
    # Texts that are cut into blocks later are not truncated first.
    limited = encoding.unlimited() if packer is not None and packer.cuts_rows else encoding
    builder = _Builder(run, plan, limited, packer)
    with builder.ledger.explaining_errors():
        return _built(builder, data, generates=generates)


def _built(builder: "_Builder", data: "DataConfig", *, generates: bool) -> PreparedData:
    train: Table | StreamedRows | None = None
    evals: dict[str, _Table] = {}
    if data.dataset and data.streaming:
        train = builder.streamed(with_prompts=generates, evals=evals)
    elif data.dataset:
        mixed = builder.mixed(builder.tables(data.dataset, with_prompts=generates and data.val_size > 0))
        if data.val_size:
            mixed, evals[""] = builder.split(mixed)
        table = builder.packed(mixed)
        builder.ledger.samples["train"] = len(table)
        train = table
    if data.eval_dataset:
        tables = builder.tables(data.eval_dataset, with_prompts=generates)
        apart = dict(zip(data.eval_dataset, tables, strict=True))
        evals = apart if data.eval_on_each_dataset else {"": builder.mixed(tables)}
    eval_rows = {name: builder.packed(table) for name, table in evals.items()}
    prompts = builder.prompts_of(evals) if generates else {}
    builder.ledger.samples.update({f"eval {name}".strip(): len(rows) for name, rows in eval_rows.items()})
    return PreparedData(train, eval_rows, prompts, builder.ledger)


class _Builder:
    """The state that the steps of `prepare` share."""

    def __init__(self, run: "TrainRun", plan: "RowPlan", encoding: Encoding, packer: "Packer | None") -> None:
        self.data, self.plan, self.encoding, self.packer = run.data, plan, encoding, packer
        self.seed: int = run.training["seed"]
        self.shuffle_seed: int | None = run.training["data_seed"]
        self.hub: dict[str, Any] = {"cache_dir": run.model.cache_dir, "tokens": HubTokens.of(run.model)}
        self.catalog = load_catalog(
            run.data.dataset_dir, run.data.media_dir, hf_hub_token=run.model.hf_hub_token, cache_dir=run.model.cache_dir
        )
        self.maker = RowMaker(
            plan, plan.settings(run.method), encoding, run.data.on_overlong, run.data.preprocessing_batch_size
        )
        self.sees = encoding.media is not None
        self.made_by = joint_key(plan.name, self.maker.settings, encoding_digest(encoding), run.data.on_overlong)
        self.cache = cache_of(run.data)
        self.buffer_size = run.data.buffer_size if run.shuffles else 1
        self.ledger = Ledger()
        self.num_examples = 0
        """In the datasets read so far."""
        self.prompts: dict[int, Table] = {}
        """Number of the first example of a dataset -> the prompts of that dataset, if they are needed."""

    def tables(self, names: Sequence[str], *, with_prompts: bool) -> list[_Table]:
        """One table of rows per dataset. `with_prompts`: also the prompts of its examples."""
        return [self._table(self.catalog.get(name), with_prompts) for name in names]

    def _table(self, spec: DatasetSpec, with_prompts: bool) -> _Table:
        key = None
        if self.made_by is not None:
            source = source_digest(spec, self.cache.folder, **self.hub)
            chosen = (self.data.max_samples or "all", self.seed if spec.num_samples else "in order")
            key = joint_key(self.made_by, source, chosen, with_prompts)
            if self.sees and spec.columns.media:
                key = joint_key(key, self._images_digest(spec, joint_key("images", source, chosen)))
        entry = self.cache.entry(key, lambda folder: self._write(spec, folder, with_prompts))
        # A dataset may be used for both training and evaluation; it has one account.
        account = DatasetAccount(**json.loads((entry / ACCOUNT_FILE).read_text()))
        self.ledger.accounts.setdefault(spec.name, account)
        return self._table_in(entry, key, with_prompts, num_examples=account.kept)

    def _images_digest(self, spec: DatasetSpec, key: str | None) -> str:
        """A hash of the paths, sizes and times of change of the media of a dataset. Their names are remembered under
        `key`, so that unchanged data are not read again."""

        def write(folder: Path) -> None:
            source = read_rows(spec, seed=self.seed, max_samples=self.data.max_samples, **self.hub)
            (folder / IMAGES_FILE).write_text(json.dumps(list(media_items(source, spec))), encoding="utf-8")

        items = json.loads((self.cache.entry(key, write) / IMAGES_FILE).read_text(encoding="utf-8"))
        return hashlib.sha256(
            repr([(item, states_of(item)) for item in items]).encode("utf-8", "surrogatepass")
        ).hexdigest()

    def _table_in(self, entry: Path, key: str | None, with_prompts: bool, *, num_examples: int) -> _Table:
        import numpy as np

        rows = table_at(entry / ROWS_FILE)
        examples = np.concatenate([np.zeros(0, np.int64), *(values for values, _ in batches_of(rows, EXAMPLE.name))])
        if with_prompts:
            self.prompts[self.num_examples] = table_at(entry / PROMPTS_FILE)
        table = _Table(
            rows.select_columns([column.name for column in self.maker.columns]), examples + self.num_examples, key
        )
        self.num_examples += num_examples
        return table

    def _write(self, spec: DatasetSpec, folder: Path, with_prompts: bool) -> None:
        """Writes the rows of a dataset, its prompts if requested, and its account."""
        account = DatasetAccount()
        source = read_rows(spec, seed=self.seed, max_samples=self.data.max_samples, **self.hub)
        with Ledger({spec.name: account}).explaining_errors():
            self._write_rows(self.maker.rows(source, spec, account), folder, with_prompts)
        if not account.kept:
            lines = Ledger({spec.name: account}).reasons() or ["it has no rows"]
            raise DataError("\n  ".join([f"dataset {spec.name!r} has no usable row", *lines]))
        (folder / ACCOUNT_FILE).write_text(json.dumps(asdict(account)))

    def _write_rows(self, examples: "Iterable[tuple[Any, list[Parts]]]", folder: Path, with_prompts: bool) -> None:
        columns = (*self.maker.columns, EXAMPLE)
        with (
            TableWriter(folder / ROWS_FILE, columns) as rows,
            TableWriter(folder / PROMPTS_FILE, with_media(SEQUENCE) if self.sees else SEQUENCE) as prompts,
        ):
            waiting: list[Dialogue] = []
            for number, (example, encoded_rows) in enumerate(examples):
                for parts in encoded_rows:
                    rows.add((*self.maker.values(example, parts), [number]))
                if with_prompts:
                    assert isinstance(example, Dialogue), "only stages that take dialogues generate answers"
                    waiting.append(example)
                    if len(waiting) == self.data.preprocessing_batch_size:
                        self._write_prompts(waiting, prompts)
                        waiting = []
            self._write_prompts(waiting, prompts)

    def _write_prompts(self, dialogues: Sequence[Dialogue], prompts: TableWriter) -> None:
        for dialogue, prompt in zip(dialogues, encode_last_turns(dialogues, self.encoding), strict=True):
            media = (prompt.blocks, items_of(dialogue, prompt)) if self.sees else ()
            prompts.add((prompt.input_ids, prompt.labels, *media))

    def streamed(self, *, with_prompts: bool, evals: dict[str, _Table]) -> "StreamedRows":
        """The datasets as a stream. The first `val_size` examples become the evaluation rows and go into `evals`."""
        from luthier.data.stream import StreamedRows, front, open_stream, without

        data = self.data
        stream = open_stream(
            [self.catalog.get(name) for name in data.dataset],
            strategy=data.mix_strategy,
            probabilities=data.interleave_probs,
            seed=self.seed,
            buffer_size=self.buffer_size,
            shuffle_seed=self.shuffle_seed,
            **self.hub,
        )
        if data.val_size:
            held_out = []

            def examples() -> "Iterator[tuple[Any, list[Parts]]]":
                for origin, example, rows in front(stream, self.maker, int(data.val_size), self.ledger):
                    held_out.append(origin)
                    yield example, rows

            entry = self.cache.entry(None, lambda folder: self._write_rows(examples(), folder, with_prompts))
            evals[""] = self._table_in(entry, None, with_prompts, num_examples=len(held_out))
            stream = without(stream, held_out, self.maker)
        return StreamedRows(stream, self.maker, self.packer, data.buffer_size)

    def mixed(self, tables: list[_Table]) -> _Table:
        """One table of all datasets, in the order of `mix_strategy`."""
        import numpy as np

        strategy, shares = self.data.mix_strategy, self.data.interleave_probs
        key = joint_key(*(table.key for table in tables), strategy, shares, self.seed)
        rows = joined([table.rows for table in tables])
        whole = _Table(rows, np.concatenate([table.examples for table in tables]), key)
        if len(tables) == 1 or strategy == "concat":
            return whole
        lengths = [len(table.rows) for table in tables]
        order = mix(lengths, strategy, shares, self.seed)
        offsets = np.cumsum([0, *lengths[:-1]])
        return whole.chosen(offsets[order[:, 0]] + order[:, 1], key)

    def split(self, table: _Table) -> tuple[_Table, _Table]:
        """(train, eval) by `val_size`. All rows of an example go to the same side."""
        indices = split_validation(table.examples, self.data.val_size, self.seed)
        train, eval_ = (
            table.chosen(index, joint_key(table.key, part, self.data.val_size, self.seed))
            for part, index in zip(("train", "eval"), indices, strict=True)
        )
        return train, eval_

    def prompts_of(self, tables: Mapping[str, _Table]) -> dict[str, Table]:
        """The prompt of each example once, even if the example was split into several rows."""
        import numpy as np

        prompts = joined(list(self.prompts.values()))
        numbers = np.concatenate([first + np.arange(len(rows)) for first, rows in self.prompts.items()])
        place = {number: index for index, number in enumerate(numbers.tolist())}
        chosen = {name: dict.fromkeys(table.examples.tolist()) for name, table in tables.items()}
        return {name: prompts.select([place[number] for number in examples]) for name, examples in chosen.items()}

    def packed(self, table: _Table) -> Table:
        packer, rows = self.packer, table.rows
        if packer is None:
            return rows

        def write(folder: Path) -> None:
            columns = with_media(packer.columns) if self.sees else packer.columns
            with TableWriter(folder / ROWS_FILE, columns) as writer:
                for batch in packer.join(rows):
                    writer.add_arrays(batch)

        packed = table_at(self.cache.entry(joint_key(table.key, packer), write) / ROWS_FILE)
        if not packer.cuts_rows:
            return packed
        num_leftover = int(row_lengths(rows).sum() - row_lengths(packed).sum())
        self.ledger.leftover_tokens += num_leftover
        if not len(packed):
            raise DataError(
                f"the texts have {num_leftover} tokens together, too few for one block of"
                f" {packer.size_tokens} -> lower cutoff_len, add text, or set packing: false"
            )
        return packed


def tell_machines(data: "DataConfig") -> None:
    """Log how the machines of a run come to their rows, if there are several."""
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 and not data.data_shared_file_system:
        info("data: every machine of the run makes its own rows; data_shared_file_system: true lets one of them do it")


def cache_of(data: "DataConfig") -> Cache:
    """The cache as configured by the run."""
    return open_cache(overwrites=data.overwrite_cache, makes=_makes(data.data_shared_file_system))


def _makes(shared_file_system: bool) -> bool:
    """Whether this process writes what the others read: the first process of each machine, or of all machines."""
    return int(os.environ.get("RANK", "0")) <= 0 if shared_file_system else is_main_process()
