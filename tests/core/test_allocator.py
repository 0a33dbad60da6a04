"""Freed memory goes back to the system, so that what a process holds is what it uses."""

import subprocess
import sys

import pytest

from luthier.core.allocator import peak_resident_bytes, resident_bytes

ALLOCATE = """
import sys
from luthier.core.allocator import resident_bytes, return_large_blocks
import ctypes
if sys.argv[1] == "returns":
    return_large_blocks()
library = ctypes.CDLL(None)
library.malloc.restype = library.realloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
large = library.malloc(24 * 2**20)
library.free(large)  # glibc now keeps blocks up to this size
size = 2**20
blocks = [library.malloc(size) for _ in range(64)]
for block in blocks:
    ctypes.memset(ctypes.c_void_p(block), 1, size)
status = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
full = status()
for block in blocks[:-1]:
    library.free(block)
print((full - status()) / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
@pytest.mark.parametrize(("how", "fewest", "most"), [("returns", 60, 66), ("as it is", -1, 5)])
def test_large_blocks_are_given_back(how, fewest, most):
    done = subprocess.run([sys.executable, "-c", ALLOCATE, how], capture_output=True, text=True, check=True)
    assert fewest <= float(done.stdout) <= most


def test_the_peak_is_at_least_what_is_held_now():
    assert 10**6 < resident_bytes() <= peak_resident_bytes()
