"""Predictions of a stage for every evaluation row, for generated_predictions.jsonl."""

from typing import TYPE_CHECKING, Any

from luthier.data.rows.table import Table
from luthier.model.types import Models
from luthier.training.distributed import for_every_row

if TYPE_CHECKING:
    from luthier.training.trainer import StageTrainer


def row_predictions(trainer: "StageTrainer", rows: Table) -> list[dict[str, Any]]:
    """One line per row, in order; each process takes its share of the rows."""
    parts, predict = trainer.parts, trainer.stage.reporting.predict
    assert predict is not None, "only called for stages that predict"
    models = Models(trainer.policy.eval(), parts.models.head)
    return for_every_row(rows, trainer.args, parts.collate, lambda batch: predict(models, batch, parts.config))
