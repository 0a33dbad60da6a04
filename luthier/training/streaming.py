"""A streamed dataset in training: its loader, and the record of what has been read so far."""

import json
from collections.abc import MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from luthier.core.errors import LuthierError
from luthier.core.log import info, warn
from luthier.data.ledger import Ledger, ledger_of
from luthier.data.stream import Streamed, StreamedRows
from luthier.training.distributed.sums import Collate
from luthier.training.loader_workers import serve

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments
    from transformers.trainer_pt_utils import AcceleratorConfig


STREAM_FILE = "stream_state.json"
"""In a checkpoint: what has been read, and by which processes and workers."""
ACCOUNT = "account"
"""The batch key of the ledger of its rows, or of the error that ended the stream."""


class StreamReading:
    """How training reads a stream, and how far it has got."""

    def __init__(self, rows: StreamedRows, before: Ledger, args: "Seq2SeqTrainingArguments") -> None:
        """`before`: the ledger of the evaluation rows, which are read before training."""
        self.rows, self.before, self.args = rows, before, args
        self.read = Ledger(is_streamed=True)
        """Read by this process; the first process also has what was read up to the checkpoint that was resumed."""
        self._of_step: list[Ledger] = []
        """Read for the present step, and not in `read` yet."""

    def loader(self, batch_size: int, collate: Collate) -> Any:
        """Every process reads its own share of the stream, so accelerate must not shard it again."""
        args, config = self.args, cast("AcceleratorConfig", self.args.accelerator_config)
        self.rows.process, self.rows.num_processes = args.process_index, args.world_size
        loader = DataLoader(
            self.rows,
            batch_size=batch_size,
            collate_fn=partial(_with_account, collate=collate),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )
        serve(loader)
        return prepare_data_loader(
            loader,
            args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=config.non_blocking,
        )

    def take(self, batches: Sequence[MutableMapping[str, Any]]) -> None:
        """Count the rows that were read for these batches. Raises the error that ended the stream, if any."""
        self._add_step()
        for batch in batches:
            account = batch.pop(ACCOUNT)
            if isinstance(account, LuthierError):
                raise account
            self._of_step.append(account)

    def give_back(self) -> None:
        """The rows of the present step were not trained on."""
        self._of_step = []

    def _add_step(self) -> None:
        for account in self._of_step:
            self.read.add(account)
        self._of_step = []

    def ledger(self) -> Ledger:
        """The ledger of all processes; all of them must call this together."""
        self._add_step()
        whole = Ledger()
        for part in (self.before, *gather_object([self.read])):
            whole.add(part)
        return whole

    def save(self, checkpoint: Path, *, writes: bool) -> Ledger:
        """All processes must call this together; those with `writes` write the file. Returns the ledger of all."""
        self._add_step()
        read, whole = Ledger(), Ledger()
        for part in gather_object([self.read]):
            read.add(part)
        for part in (self.before, read):
            whole.add(part)
        state = {"read": read.to_json(), "shares": self._shares(), "order": repr(self.rows.order), "rows": self._rows()}
        if writes:
            (checkpoint / STREAM_FILE).write_text(json.dumps(state), encoding="utf-8")
        return whole

    def restore(self, checkpoint: Path) -> None:
        """Load the state of a checkpoint, and warn if settings changed that decide which rows come next."""
        path = checkpoint / STREAM_FILE
        if not path.is_file():
            warn(
                f"streaming: {checkpoint} is of a run that did not stream, so some rows may be repeated and others"
                " skipped"
            )
            return
        state = json.loads(path.read_text(encoding="utf-8"))
        if self.args.process_index == 0:
            self.read = ledger_of(state["read"])
        now = {"shares": self._shares(), "order": repr(self.rows.order), "rows": self._rows()}
        words = {
            "shares": "another number of processes or workers",
            "order": "another row order (seed, data_seed, buffer_size, mix_strategy or val_size)",
            "rows": "other data files",
        }
        changed = [words[name] for name, value in now.items() if state[name] != value]
        if changed:
            warn(f"streaming: resuming with {' and '.join(changed)}, so some rows may be repeated and others skipped")
        info("streaming: skipping the rows that were read before the checkpoint")

    def _shares(self) -> list[int]:
        return [self.args.world_size, self.args.dataloader_num_workers]

    def _rows(self) -> str:
        return self.rows.fingerprint


def _with_account(items: Sequence[Streamed], collate: Collate) -> dict[str, Any]:
    whole = Ledger()
    for item in items:
        if item.fault is not None:
            return {ACCOUNT: item.fault}
        whole.add(item.account)
    return {**collate([item.row for item in items]), ACCOUNT: whole}
