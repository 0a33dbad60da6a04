"""Trains a run whose C library gives back at once what is freed, so that its peak is what was in use.

`torchrun --nproc-per-node 2 -m tests.runs.gives_back RUN`
"""

import sys

from luthier.cli import main
from luthier.core.allocator import return_large_blocks
from luthier.workflow.plan import foresight
from tests.runs.each_of import leave

if __name__ == "__main__":
    foresight.keep_freed_blocks = return_large_blocks
    leave(main(["train", *sys.argv[1:]]))
