"""The memory of this process, and how the C library gives back what was freed.

glibc keeps freed blocks below a threshold that grows to 32 MB, and its `posix_memalign` (glibc 2.36) seldom puts a
block of the same size back into the hole that it left. The activations of a step are such blocks: after a few steps a
process held up to 1.4 times what was in use. With a fixed threshold each large block is a mapping of its own, and freed
memory is free. The price is that the system clears its pages each time: a step then takes 1.4 times as long in float32
and twice as long in bfloat16 (SmolLM2-135M, LoRA, two cores). So this is for runs that would not fit otherwise.
"""

import ctypes
import resource
import sys
from pathlib import Path

LARGE_BLOCK_BYTES = 2**17
_M_MMAP_THRESHOLD = -3
"""From malloc.h."""


def return_large_blocks() -> None:
    """From now on blocks of `LARGE_BLOCK_BYTES` and more go back to the system when they are freed. Linux with glibc;
    elsewhere nothing happens."""
    library = _glibc()
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def resident_bytes() -> int:
    """Memory that this process holds, after everything that was freed has been given back."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # only Linux has this file
        return peak_resident_bytes()
    return pages * resource.getpagesize()


def peak_resident_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    try:
        library.mallopt, library.malloc_trim  # noqa: B018  # musl has neither
    except AttributeError:
        return None
    return library
