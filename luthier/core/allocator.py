"""The memory of this process, and how the C library gives back what was freed.

glibc keeps freed blocks below a threshold that grows to 32 MB, and gives back the end of its heap; the next step asks
for the same memory, and the system clears its pages again. Of a step of LoRA on SmolLM2-135M that is a twentieth of the
CPU seconds, so `keep_freed_blocks` keeps all of it. The peak stays the same.

On the other hand its `posix_memalign` (glibc 2.36) seldom puts a block of the same size back into the hole that it
left, so that after a few steps a process holds up to 1.4 times what is in use. With a fixed low threshold each large
block is a mapping of its own, and freed memory is free, but a step takes 1.4 times as long in float32 and twice as long
in bfloat16. So `return_large_blocks` is for runs that would not fit otherwise.
"""

import ctypes
import resource
import sys
from pathlib import Path

LARGE_BLOCK_BYTES = 2**17
LARGEST = 2**31 - 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""From malloc.h."""


def keep_freed_blocks() -> None:
    """From now on freed memory stays with this process. Linux with glibc; elsewhere nothing happens."""
    library = _glibc()
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, LARGEST)
        library.mallopt(_M_TRIM_THRESHOLD, LARGEST)


def return_large_blocks() -> None:
    """From now on blocks of `LARGE_BLOCK_BYTES` and more go back to the system when they are freed. Linux with glibc;
    elsewhere nothing happens."""
    library = _glibc()
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, LARGE_BLOCK_BYTES)


def resident_bytes() -> int:
    """Memory that this process holds, after everything that was freed has been given back."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)
    return _held_bytes() or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak
    return max(peak * 1024, _held_bytes())  # Linux counts its peak less exactly than what is held now


def _held_bytes() -> int:
    """Zero where it is not known: only Linux has this file."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    try:
        library.mallopt, library.malloc_trim  # noqa: B018  # musl has neither
    except AttributeError:
        return None
    return library
