"""Pixels that are kept from one visit of an image to the next, in memory that loader workers share.

    memory = KeptMemory(2**30)
    kept = KeptImages(memory, num=len(source))
    pixels = kept.get_or_put(index, lambda: decode_array(source.image(index), id))

The memory belongs to no file and to no folder, and the system takes it back when the last process that uses it ends.
"""

import fcntl
import mmap
import os
import sys
from collections.abc import Callable

import numpy as np

from threetowers.system import free_memory

SHARE_OF_FREE = 4
"""Memory is kept for pixels up to one part in so many of what is free."""
_HEADER = 16


class SharedBytes:
    """Anonymous memory of a size in bytes, zero at first, which forked processes and unpickled copies share.

    Pages take memory when they are first written. Raises OSError where the system has no such memory.
    """

    def __init__(self, size: int) -> None:
        self._open(os.memfd_create("threetowers"), size)

    def _open(self, file: int, size: int | None = None) -> None:
        self.file = file
        if size is not None:
            os.ftruncate(file, size)
        self.bytes = mmap.mmap(file, 0)

    def __reduce__(self) -> tuple[Callable[[str], "SharedBytes"], tuple[str]]:
        return _shared_again, (f"/proc/{os.getpid()}/fd/{self.file}",)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)


def _shared_again(path: str) -> SharedBytes:
    memory = SharedBytes.__new__(SharedBytes)
    memory._open(os.open(path, os.O_RDWR))
    return memory


class KeptMemory:
    """Room for the pixels of several sources. capacity: in bytes."""

    def __init__(self, capacity: int) -> None:
        self._shared = SharedBytes(_HEADER + capacity)
        self.capacity = capacity

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return int(self._header()[0])

    def take(self, size: int) -> int | None:
        """The offset of so many bytes that nobody else is given; None when they do not fit."""
        file, header = self._shared.file, self._header()
        fcntl.lockf(file, fcntl.LOCK_EX)
        try:
            start = int(header[0])
            if start + size > self.capacity:
                return None
            header[0] = start + size
            return start
        finally:
            fcntl.lockf(file, fcntl.LOCK_UN)

    def array(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        """The bytes at an offset as uint8 of a shape."""
        size = int(np.prod(shape))
        return np.frombuffer(self._shared.bytes, np.uint8, size, _HEADER + offset).reshape(shape)

    def _header(self) -> np.ndarray:
        return np.frombuffer(self._shared.bytes, np.int64, 1)


class KeptImages:
    """The pixels of a source's images, by index: uint8 arrays of three dimensions, each kept once it was put.

    Several processes may read and put at the same time; in each of them, one thread.
    """

    def __init__(self, memory: KeptMemory, num: int) -> None:
        self._memory, self._num = memory, num
        self._shared = SharedBytes(max(num, 1) * 32)

    def get(self, index: int) -> np.ndarray | None:
        """The pixels, which cannot be written; None when they are not kept."""
        offset, *shape = self._slots()[index].tolist()
        if not shape[0]:
            return None
        pixels = self._memory.array(offset, tuple(shape))
        pixels.flags.writeable = False
        return pixels

    def put(self, index: int, pixels: np.ndarray) -> None:
        """Keeps pixels if there is room."""
        offset = self._memory.take(pixels.size)
        if offset is None:
            return
        self._memory.array(offset, pixels.shape)[...] = pixels
        slot = self._slots()[index]
        slot[[0, 2, 3]] = offset, *pixels.shape[1:]
        slot[1] = pixels.shape[0]  # last, since it says that the pixels are there

    def get_or_put(self, index: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The pixels as they are kept, else as they are made now; raises what `make` raises."""
        pixels = self.get(index)
        if pixels is None:
            pixels = make()
            self.put(index, pixels)
        return pixels

    def holds(self, indices: list[int]) -> bool:
        """Whether the pixels of all these images are kept."""
        return bool(self._slots()[indices, 1].all())

    def _slots(self) -> np.ndarray:
        return np.frombuffer(self._shared.bytes, np.int64, self._num * 4).reshape(self._num, 4)


def new_memory(processes: int = 1) -> KeptMemory | None:
    """Room for pixels in a share of the free memory; None where memory cannot be shared in this way.

    processes: how many take such room.
    """
    free = free_memory()
    if free is None or not sys.platform.startswith("linux"):
        return None
    try:
        return KeptMemory(free // SHARE_OF_FREE // processes)
    except OSError:
        return None
