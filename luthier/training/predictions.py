"""What a stage says of every evaluation row, for generated_predictions.jsonl."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from luthier.model.types import Models

if TYPE_CHECKING:
    import datasets

    from luthier.training.trainer import StageTrainer


def row_predictions(trainer: "StageTrainer", rows: "datasets.Dataset") -> list[dict[str, Any]]:
    """One line for each row, in order; each process looks at its share of the rows."""
    stage, accelerator, size = trainer.stage, trainer.accelerator, trainer.args.eval_batch_size
    assert stage.predict is not None, "only such a stage is asked"
    models = Models(trainer.policy.eval(), trainer.head)
    mine = range(accelerator.process_index, len(rows), accelerator.num_processes)
    lines: list[tuple[int, dict[str, Any]]] = []
    for start in range(0, len(mine), size):
        indices = mine[start : start + size]
        batch = trainer._prepare_inputs(trainer.collate([rows[index] for index in indices]))
        with torch.no_grad(), trainer.compute_loss_context_manager():
            lines += zip(indices, stage.predict(models, batch, trainer.stage_config), strict=True)
    return [line for _, line in sorted(gather_object(lines), key=lambda pair: pair[0])]
