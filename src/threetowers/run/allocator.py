"""The C library's allocator, told to keep what is freed.

A training step frees and takes the same large blocks again and again. glibc hands blocks of more than 32 MB back to the
system each time, and the kernel clears them page by page when they come again. `benchmarks/allocator.py` measures what
keeping them brings to a small convolutional tower.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Stops glibc from returning memory to the system for the life of this process; False where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**28))
    return all(mallopt(option, value) == 1 for option, value in settings)
