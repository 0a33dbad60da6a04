"""Trains each of the run files it is given, one after another: several runs for one start of processes.

`torchrun --nproc-per-node 2 -m tests.runs.each_of RUN...`
"""

import sys
from pathlib import Path

import yaml

import luthier

if __name__ == "__main__":
    for path in sys.argv[1:]:
        luthier.train(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
