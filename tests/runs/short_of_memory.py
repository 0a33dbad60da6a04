"""As `tests.runs.each_of`, but one process has too little memory for a pass over more than so many rows.

`torchrun --nproc-per-node 2 -m tests.runs.short_of_memory RUN...`, where the name of an output folder ends with where
memory runs out, the rank of that process and its number of rows: `.../sft-backward-1-1`.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from luthier.training.cut_batches import num_rows
from luthier.training.trainer import StageTrainer
from tests.runs.each_of import leave, train_each

loss = StageTrainer.compute_loss


def refuse(*_: Any) -> None:
    raise torch.OutOfMemoryError("out of memory: tried to allocate 2.00 GiB")


def limited(trainer: StageTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    _, where, rank, most = Path(trainer.output_dir).name.split("-")
    is_too_much = os.environ["RANK"] == rank and num_rows(inputs) > int(most)
    if is_too_much and where == "forward":
        refuse()
    first = next(weight for weight in model.parameters() if weight.requires_grad)
    first._backward_hooks = None
    if is_too_much:  # the gradients of the layers behind it are there already
        first.register_hook(refuse)
    return loss(trainer, model, inputs, *args, **kwargs)


if __name__ == "__main__":
    StageTrainer.compute_loss = limited
    train_each(map(Path, sys.argv[1:]))
    leave()
