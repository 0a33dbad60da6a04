"""In which order a run takes its rows, so that no resumed run leaves rows out and repeats others unnoticed.

A resumed run skips as many rows of its epoch as its own steps would have taken, in its own order. Every
trainer_state.json says what decides them, as `stateful_callbacks.row_order`. A stream says it in a file of its own.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from luthier.core.log import warn

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun

KEY = "row_order"


class NoteOrder(TrainerCallback):
    """Writes the order into the state of the trainer, and warns if that of the checkpoint is another one."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        self.order = dict(order)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            return
        before = state.stateful_callbacks.get(KEY)  # None for a checkpoint of an earlier version
        skips_rows = state.global_step > 0 and not args.ignore_data_skip
        if skips_rows and isinstance(before, Mapping) and before != self.order:
            changed = [
                f"{name}: {before.get(name)} there, {now} here"
                for name, now in self.order.items()
                if before.get(name) != now
            ]
            warn(
                f"the checkpoint of step {state.global_step} took its rows in other steps or in another order"
                f" ({'; '.join(changed)}), so training repeats some rows of this epoch and leaves others out"
            )
        state.stateful_callbacks[KEY] = self.order


def order_of(run: "TrainRun", world_size: int) -> dict[str, Any]:
    """What decides which rows come after a given number of steps, apart from the rows themselves."""
    keys, groups = run.training, world_size // (run.parallel.sp_size * run.parallel.tp_size)
    seed = keys["seed"] if keys["data_seed"] is None else keys["data_seed"]
    return {
        "num_generations": getattr(run.method, "num_generations", 1),
        "rows of a step": keys["per_device_train_batch_size"] * keys["gradient_accumulation_steps"] * groups,
        "seed": seed if run.shuffles else None,
        "train_sampling_strategy": str(keys["train_sampling_strategy"]) if run.shuffles else "sequential",
    }
