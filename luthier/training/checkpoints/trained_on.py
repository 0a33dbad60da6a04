"""Which rows a checkpoint was trained on, so that no run continues with others unnoticed.

Every trainer_state.json holds the list `stateful_callbacks.trained_on`: one entry for each set of rows, with the step
from which on training used it. It has more than one entry only if a run was told to continue with other rows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from luthier.core.errors import OutputError
from luthier.core.log import warn
from luthier.training.checkpoints.foreign import OWN_ENTRY, TRAINER_STATE

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.data.prepare import PreparedData

KEY = OWN_ENTRY
OTHER_CONTENTS = "the same keys, other contents"
NAMED_KEYS = ("dataset", "template", "cutoff_len", "max_samples", "val_size", "packing", "neat_packing", "on_overlong",
              "mix_strategy", "train_on_prompt", "mask_history", "streaming")  # fmt: skip
"""Keys that a message about other rows compares."""

Entry = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TrainedOn:
    """The rows of this run beside those of the checkpoint that it resumes."""

    now: Entry
    earlier: Sequence[Entry] = ()
    """Empty without a checkpoint, or with one of an earlier version, which does not say."""
    checkpoint: Path | None = None
    is_named: bool = False
    """Whether `resume_from_checkpoint` names the checkpoint, so that other rows are meant."""
    is_dated: bool = False
    """Whether the chat format writes the date, so that the same data give other rows another day."""
    differences: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "differences", _differences(self.earlier[-1], self.now) if self.earlier else ())

    def require_same(self) -> None:
        """Raises `OutputError` if the checkpoint was trained on other rows, unless other rows are meant."""
        if not self.differences:
            return
        if not self.is_named and not (self.is_dated and self.differences == (OTHER_CONTENTS,)):
            raise self.refusal()
        warn(f"{self._what}: training continues with the rows of this run, and its manifest says so")

    def refusal(self) -> OutputError:
        others = (
            "" if self.is_named else f", or resume_from_checkpoint: {self.checkpoint} to continue with the new rows"
        )
        return OutputError(
            f"nothing was trained: {self._what} -> set overwrite_output_dir: true or another output_dir to train from"
            f" scratch{others}"
        )

    @property
    def _what(self) -> str:
        return f"{self.checkpoint} was trained on other data than this run names ({'; '.join(self.differences)})"

    def entries(self, step: int) -> list[dict[str, Any]]:
        """What the next checkpoint says, if training continues at `step` with the rows of this run."""
        earlier = [dict(entry) for entry in self.earlier]
        return [*earlier, {**self.now, "from_step": step}] if self.differences or not earlier else earlier


class NoteRows(TrainerCallback):
    """Refuses to continue with other rows, and writes into the state of the trainer which rows it uses."""

    def __init__(self, rows: TrainedOn) -> None:
        self.rows = rows

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps:
            self.rows.require_same()
            state.stateful_callbacks[KEY] = self.rows.entries(state.global_step)


def compare_rows(run: "TrainRun", data: "PreparedData", resume_from: Path | None, *, is_dated: bool) -> TrainedOn:
    """`is_dated`: the chat format writes the date."""
    if not run.trains:
        return TrainedOn({})
    named = {**run.given, "dataset": ",".join(run.data.dataset), "template": run.data.template}
    rows: Any = data.train
    now = {
        "rows": data.train_fingerprint,
        "num_rows": len(rows) if data.streamed is None else None,
        "keys": {name: named.get(name) for name in NAMED_KEYS},
    }
    requested = str(run.training["resume_from_checkpoint"] or "").lower()
    is_named = requested not in ("", "true", "false")
    earlier = [] if resume_from is None else trained_on(resume_from)
    return TrainedOn(json.loads(json.dumps(now, default=str)), earlier, resume_from, is_named, is_dated)


def trained_on(checkpoint: Path) -> list[dict[str, Any]]:
    """The entries of a checkpoint; empty if it does not say."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
        entries = state["stateful_callbacks"][KEY]
        return [dict(entry) for entry in entries if isinstance(entry["rows"], str) and isinstance(entry["keys"], dict)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _differences(there: Entry, here: Entry) -> tuple[str, ...]:
    if there["rows"] == here["rows"]:
        return ()
    keys = [
        f"{name}: {_shown(there['keys'].get(name))} there, {_shown(here['keys'].get(name))} here"
        for name in NAMED_KEYS
        if there["keys"].get(name) != here["keys"].get(name)
    ]
    if there.get("num_rows") != here.get("num_rows"):
        keys.append(f"{there.get('num_rows')} rows there, {here.get('num_rows')} here")
    return tuple(keys) or (OTHER_CONTENTS,)


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)
