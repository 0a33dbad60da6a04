"""Trains each of the run files it is given, one after another: several runs for one start of processes.

`torchrun --nproc-per-node 2 -m tests.runs.each_of RUN...`

The error of a run is written beside its run file, and the next one follows.
"""

import atexit
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

import yaml

import luthier
from luthier.core.ending import end_now

OF_ENGINES = ("ACCELERATE_", "FSDP_", "PARALLELISM_")
"""How the variables begin by which accelerate's launcher chooses an engine, and transformers tells accelerate."""


def forget_engine(kept: set[str]) -> None:
    """What transformers and accelerate remember of the engine of the last run, which has a process of its own."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    for name in [name for name in os.environ if name.startswith(OF_ENGINES) and name not in kept]:
        del os.environ[name]
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()


def train_each(paths: Iterable[Path]) -> None:
    given = set(os.environ)
    for path in paths:
        try:
            luthier.train(yaml.safe_load(path.read_text(encoding="utf-8")))
        except Exception:
            path.with_suffix(f".error{os.environ['RANK']}").write_text(traceback.format_exc(), encoding="utf-8")
        forget_engine(given)


def leave(status: int = 0) -> None:
    """End the process as `luthier train` does where it is one of several, since threads of PyTorch might abort it."""
    atexit._run_exitfuncs()
    end_now(status)


if __name__ == "__main__":
    train_each(map(Path, sys.argv[1:]))
    leave()
