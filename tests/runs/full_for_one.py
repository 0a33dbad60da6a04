"""As `tests.runs.each_of`, but while step 2 is saved, no file of one process may grow beyond a limit, as under a quota.

`torchrun --nproc-per-node 2 -m tests.runs.full_for_one RUN...`, where the name of an output folder ends with the rank
of that process and its limit in bytes: `.../fsdp2-0-600000`.
"""

import os
import sys
from pathlib import Path
from typing import Any

from luthier.training.checkpointed import CheckpointedTrainer
from tests.runs.bad_input.test_disk import largest_file
from tests.runs.each_of import leave, train_each

STEP = 2
write = CheckpointedTrainer._write_checkpoint


def write_limited(trainer: CheckpointedTrainer, *arguments: Any) -> None:
    _, rank, num_bytes = Path(trainer.output_dir).name.split("-")
    if trainer.state.global_step != STEP or os.environ["RANK"] != rank:
        write(trainer, *arguments)
        return
    with largest_file(int(num_bytes)):
        write(trainer, *arguments)


if __name__ == "__main__":
    CheckpointedTrainer._write_checkpoint = write_limited
    train_each(map(Path, sys.argv[1:]))
    leave()
