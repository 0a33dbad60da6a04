"""Freed memory goes back to the system, so that what a process holds is what it uses, or stays for the next step."""

import subprocess
import sys

import pytest

from luthier.core.allocator import peak_resident_bytes, resident_bytes

ALLOCATE = """
import os, sys
from luthier.core.allocator import keep_freed_blocks, return_large_blocks
import ctypes
for way in sys.argv[2:]:
    {"keep": keep_freed_blocks, "return": return_large_blocks}[way]()
statm = os.open("/proc/self/statm", os.O_RDONLY)  # open() would keep a buffer behind the blocks
status = lambda: int(os.pread(statm, 100, 0).split()[1]) * 4096
library = ctypes.CDLL(None)
library.malloc.restype = library.realloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
large = library.malloc(24 * 2**20)
library.free(large)  # glibc now keeps blocks up to this size
size = 2**20
blocks = [library.malloc(size) for _ in range(64)]
for block in blocks:
    ctypes.memset(ctypes.c_void_p(block), 1, size)
full = status()
for block in blocks[: int(sys.argv[1])]:
    library.free(block)
print((full - status()) / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
@pytest.mark.parametrize(
    ("ways", "num_freed", "fewest", "most"),
    [
        (["return"], 63, 60, 66),
        (["keep", "return"], 63, 60, 66),
        ([], 63, -1, 5),
        ([], 64, 60, 66),
        (["keep"], 64, -1, 5),
    ],
)
def test_large_blocks_are_given_back_or_kept(ways, num_freed, fewest, most):
    """By itself glibc keeps them until the last one, at the end of the heap, is freed."""
    words = [sys.executable, "-c", ALLOCATE, str(num_freed), *ways]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert fewest <= float(done.stdout) <= most


def test_the_peak_is_at_least_what_is_held_now():
    assert 10**6 < resident_bytes() <= peak_resident_bytes()
