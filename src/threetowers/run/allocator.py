"""A setting of the C library's allocator: keep memory that is freed.

A training step frees and allocates the same large blocks again and again. By default glibc returns blocks of more than
32 MB to the system, and the kernel clears every page when it hands them out again. `benchmarks/allocator.py` measures
what keeping them gains for a small convolutional tower. What is kept goes back to the system between phases.
"""

import ctypes
import sys
from typing import Any

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Stops glibc from returning memory to the system by itself; False where there is no glibc."""
    mallopt = _of_glibc("mallopt")
    if mallopt is None:
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**28))
    return all(mallopt(option, value) == 1 for option, value in settings)


def return_freed_memory() -> None:
    """Returns freed memory to the system once, when a phase such as embedding ends."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Any:
    """A function of the C library; None where that is not glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
