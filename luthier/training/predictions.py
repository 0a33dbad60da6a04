"""Predictions of a stage for every evaluation row, for generated_predictions.jsonl, and how far such a pass is."""

from collections.abc import Callable, Sequence, Sized
from typing import TYPE_CHECKING, Any

from luthier.data.rows.table import Table
from luthier.model.types import Models
from luthier.training.distributed.sums import for_every_row

if TYPE_CHECKING:
    from luthier.training.trainer import StageTrainer


def row_predictions(trainer: "StageTrainer", rows: Table) -> list[dict[str, Any]]:
    """One line per row, in order; each process takes its share of the rows."""
    args, parts, predict = trainer.args, trainer.parts, trainer.stage.reporting.predict
    assert predict is not None, "only called for stages that predict"
    models = Models(trainer.policy.eval(), parts.models.head)
    batch_is_done = follow(trainer, range(0, len(rows), args.eval_batch_size * args.world_size))

    def predicted(batch: dict[str, Any]) -> Sequence[Any]:
        found = predict(models, batch, parts.config)
        batch_is_done()
        return found

    return for_every_row(rows, args, parts.collate, predicted)


def follow(trainer: "StageTrainer", items: Sized) -> Callable[[], None]:
    """Call what it returns after each of the items. It is `on_prediction_step` of the callbacks, as after the batches
    of an evaluation, so the log and the board show how far a pass is that does not go through a loader."""

    def one_is_done() -> None:
        trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)

    trainer.callback_handler.eval_dataloader = items
    return one_is_done
