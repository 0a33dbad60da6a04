"""From the datasets a run names to tokenised rows, with an account of every row on the way.

read -> align to one example type -> encode (ids and labels) -> mix datasets -> split off evaluation rows -> pack
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.core.errors import DataError, RowError
from luthier.core.kinds import FORMATS
from luthier.data.catalog import DatasetSpec, load_catalog
from luthier.data.encoding import Encoding, encode_last_turn
from luthier.data.labels import IGNORE_INDEX, Encoded
from luthier.data.ledger import DatasetAccount, Ledger
from luthier.data.mix import mix, split_validation
from luthier.data.read import read_rows
from luthier.data.types import Dialogue, Media

if TYPE_CHECKING:
    import datasets

    from luthier.config.runs import TrainRun
    from luthier.data.blocks import Blocks
    from luthier.stages import Stage

Encode = Callable[[Any, Encoding], list[Encoded]]
WRITE_BATCH_ROWS = 1000


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Rows ready for the trainer: each has `input_ids` and `labels` of equal length."""

    train: "datasets.Dataset | None"
    eval: "Mapping[str, datasets.Dataset]"
    """Evaluation rows by dataset name; the name is empty unless `eval_on_each_dataset`."""
    prompts: "Mapping[str, datasets.Dataset]"
    """For `predict_with_generate`: `input_ids` is the prompt, `labels` the given answer."""
    ledger: Ledger

    @property
    def fingerprint(self) -> str:
        """Of all token ids and labels, in order: two runs on the same rows have the same one."""
        digest = hashlib.sha256()
        for rows in (self.train, *self.eval.values()):
            if rows is not None:
                for batch in rows.with_format("arrow").iter(WRITE_BATCH_ROWS):
                    for column in batch.columns:
                        digest.update(repr(column.to_pylist()).encode())
        return digest.hexdigest()


def prepare(run: "TrainRun", stage: "Stage", encoding: Encoding) -> PreparedData:
    """Raises `DataError` if a dataset cannot be read, or if none of its rows can be used."""

    def packer() -> "Blocks | None":
        return stage.packer(run, encoding)

    def encode(example: Any, encoding: Encoding) -> list[Encoded]:
        return stage.encode(example, encoding, run.method)

    data, generates = run.data, run.training["predict_with_generate"]
    # Texts that are cut into blocks anyway are not cut to a length before.
    builder = _Builder(run, encoding if packer() is None else encoding.unlimited(), stage.examples, encode)
    train_rows, eval_tables = None, {}
    if data.dataset:
        mixed = builder.mixed(builder.tables(data.dataset, with_prompts=generates and data.val_size > 0))
        if data.val_size:
            train_index, eval_index = split_validation(len(mixed), data.val_size, run.training["seed"])
            eval_tables = {"": mixed.select(eval_index)}
            mixed = mixed.select(train_index)
        train_rows = builder.packed(mixed, packer())
        builder.ledger.samples["train"] = len(train_rows)
    if data.eval_dataset:
        tables = builder.tables(data.eval_dataset, with_prompts=generates)
        apart = dict(zip(data.eval_dataset, tables, strict=True))
        eval_tables = apart if data.eval_on_each_dataset else {"": builder.mixed(tables)}
    eval_rows = {name: builder.packed(table, packer()) for name, table in eval_tables.items()}
    prompts = builder.prompts_of(eval_tables) if generates else {}
    builder.ledger.samples.update({f"eval {name}".strip(): len(rows) for name, rows in eval_rows.items()})
    return PreparedData(train_rows, eval_rows, prompts, builder.ledger)


class _Builder:
    """What the steps of `prepare` share."""

    def __init__(self, run: "TrainRun", encoding: Encoding, takes: tuple[type, ...], encode: Encode) -> None:
        self.data, self.encoding, self.takes, self.encode = run.data, encoding, takes, encode
        self.seed: int = run.training["seed"]
        self.hub = {"cache_dir": run.model.cache_dir, "hf_hub_token": run.model.hf_hub_token}
        self.catalog = load_catalog(run.data.dataset_dir, run.data.media_dir, hf_hub_token=run.model.hf_hub_token)
        self.ledger = Ledger()
        self.prompts: list[Encoded] = []

    def tables(self, names: Sequence[str], *, with_prompts: bool) -> "list[datasets.Dataset]":
        """One table of encoded rows per dataset; `with_prompts` its column `example` is the place in `prompts`."""
        tables = []
        for name in names:
            account = DatasetAccount()
            examples: list[int] = []
            table = _table(self.encoded(self.catalog.get(name), account, examples if with_prompts else None))
            # A dataset may serve for training and for evaluation; it has one account.
            self.ledger.accounts.setdefault(name, account)
            if not len(table):
                lines = Ledger({name: account}).reasons() or ["it has no rows"]
                raise DataError("\n  ".join([f"dataset {name!r} has no usable row", *lines]))
            tables.append(table.add_column("example", examples) if with_prompts else table)
        return tables

    def encoded(self, spec: DatasetSpec, account: DatasetAccount, examples: list[int] | None) -> Iterator[Encoded]:
        """The rows; for each, `examples` (if given) receives the place of its prompt."""
        read = FORMATS.get(spec.formatting).read
        for row in read_rows(spec, seed=self.seed, max_samples=self.data.max_samples, **self.hub):
            account.rows_in += 1
            try:
                example = read(row.usable(), spec)
                if example.media != Media():
                    raise RowError("the row has pictures, films or sounds, and this version reads text only")
                if not isinstance(example, self.takes):
                    raise RowError(_not_taken(example, self.takes))
                written = self.encode(example, self.encoding)
                rows = self.fitted(written, example, account, row.place)
            except RowError as error:
                account.drop(row.place, str(error))
                continue
            account.kept += 1
            if len(written) > 1:
                account.rewritten += 1
                account.rewritten_into += len(written)
            for encoded in rows:
                account.tokens += len(encoded.input_ids)
                account.labelled_tokens += sum(label != IGNORE_INDEX for label in encoded.labels)
            if examples is not None:
                assert isinstance(example, Dialogue), "only stages that take dialogues generate answers"
                examples += [len(self.prompts)] * len(rows)
                self.prompts.append(encode_last_turn(example, self.encoding))
            yield from rows

    def prompts_of(self, tables: "Mapping[str, datasets.Dataset]") -> "dict[str, datasets.Dataset]":
        """The prompt of each example once, even if the example was cut into several rows."""
        return {
            name: _table(self.prompts[number] for number in dict.fromkeys(table["example"]))
            for name, table in tables.items()
        }

    def fitted(self, rows: list[Encoded], example: Any, account: DatasetAccount, place: str) -> list[Encoded]:
        """The rows of an example within `cutoff_len`, by the rule of `on_overlong`."""
        cutoff_len, rule = self.encoding.cutoff_len, self.data.on_overlong
        overlong = [row for row in rows if row.lost_tokens]
        if not overlong:
            return _with_labels(rows, "no token of it is learned")
        assert cutoff_len is not None, "a row cannot lose tokens to no limit"
        length = len(overlong[0].input_ids) + overlong[0].lost_tokens
        if rule == "error":
            raise DataError(
                f"{place}: {length} tokens, but cutoff_len is {cutoff_len} -> raise cutoff_len, or set on_overlong"
            )
        if rule == "drop":
            raise RowError(f"longer than cutoff_len {cutoff_len}")
        if rule == "split":
            whole = self.encode(example, self.encoding.unlimited())
            pieces = _with_labels([p for row in whole for p in _split(row, cutoff_len)], "no token of it is learned")
            account.split_into += len(pieces)
            return pieces
        kept = _with_labels(rows, f"no learned token is left after truncation to cutoff_len {cutoff_len}")
        account.truncated += 1
        account.lost_tokens += sum(row.lost_tokens for row in overlong)
        account.lost_labelled_tokens += sum(row.lost_labels for row in overlong)
        account.lost_terminators += sum(row.lost_terminator for row in overlong)
        return kept

    def mixed(self, tables: "list[datasets.Dataset]") -> "datasets.Dataset":
        """All datasets as one, in the order of `mix_strategy`."""
        import datasets

        whole = datasets.concatenate_datasets(tables)
        if len(tables) == 1 or self.data.mix_strategy == "concat":
            return whole
        order = mix([len(table) for table in tables], self.data.mix_strategy, self.data.interleave_probs, self.seed)
        offsets = [sum(len(table) for table in tables[:index]) for index in range(len(tables))]
        return whole.select([offsets[table] + row for table, row in order])

    def packed(self, rows: "datasets.Dataset", blocks: "Blocks | None") -> "datasets.Dataset":
        if blocks is None:
            return rows.select_columns(["input_ids", "labels"])
        texts = (Encoded(row["input_ids"], row["labels"]) for row in rows)
        table = _table(Encoded(block, block) for block in blocks.join(texts))
        self.ledger.leftover_tokens += blocks.num_leftover_tokens
        if not len(table):
            raise DataError(
                f"the texts have {blocks.num_leftover_tokens} tokens together, too few for one block of"
                f" {blocks.size_tokens} -> lower cutoff_len, add text, or set packing: false"
            )
        return table


def _table(rows: Iterable[Encoded]) -> "datasets.Dataset":
    """Rows as an Arrow table: no Python object per token is kept."""
    import datasets
    import pyarrow as pa

    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
    batches: list[pa.RecordBatch] = []
    ids: list[list[int]] = []
    labels: list[list[int]] = []

    def flush() -> None:
        batches.append(
            pa.record_batch([pa.array(ids, schema.field(0).type), pa.array(labels, schema.field(1).type)], schema)
        )
        ids.clear()
        labels.clear()

    for row in rows:
        ids.append(row.input_ids)
        labels.append(row.labels)
        if len(ids) == WRITE_BATCH_ROWS:
            flush()
    flush()
    return datasets.Dataset(pa.Table.from_batches(batches, schema))


def _split(encoded: Encoded, cutoff_len: int) -> Iterator[Encoded]:
    """Each piece begins with the last token of the one before, so that no learned token lacks one to follow."""
    for start in range(0, len(encoded.input_ids) - 1, max(cutoff_len - 1, 1)):
        part = slice(start, start + cutoff_len)
        ids, labels = encoded.input_ids[part], encoded.labels[part]
        yield Encoded(ids, labels if start == 0 else [IGNORE_INDEX, *labels[1:]])


def _with_labels(rows: Iterable[Encoded], otherwise: str) -> list[Encoded]:
    """The rows that have something to learn; if there is none, raises `RowError` with the reason."""
    # The first token of a row has no predecessor, so its label is never learned.
    kept = [row for row in rows if any(label != IGNORE_INDEX for label in row.labels[1:])]
    if not kept:
        raise RowError(otherwise)
    return kept


def _not_taken(example: Any, takes: tuple[type, ...]) -> str:
    if Dialogue in takes:
        return f"the row is a {type(example).__name__}, and this stage needs an answer to learn"
    return f"the row is a {type(example).__name__}, and this stage takes {' or '.join(t.__name__ for t in takes)}"
