"""A setting of the C library's allocator: keep memory that is freed.

A training step frees and allocates the same large blocks again and again. By default glibc returns blocks of more than
32 MB to the system, and the kernel clears every page when it hands them out again. `benchmarks/allocator.py` measures
what keeping them gains for a small convolutional tower.
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
