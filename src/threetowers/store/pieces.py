"""Runs a frozen tower over a batch in pieces, of the size that is fastest on this machine.

On a CPU the activations of a large batch do not fit into the cache. Which size is fastest depends on the network and on
the machine, so that each size is tried, on images that have to be embedded anyway. `benchmarks/pieces.py` measures it.
"""

import time

import torch
from torch import Tensor

from threetowers.towers.frozen.base import FrozenTower

SIZES = (8, 4, 16, 32, 64)
"""Images in a piece. The first is used when there are too few images to try them all."""
TRIES = 3
"""Of each size; the first prepares the network for it and is not counted."""


class Pieces:
    """Features of images, computed in pieces on a CPU and in whole batches on other devices.

    Every piece has a power of two of images, whatever size is chosen, because kernels sum in the same order for all of
    these from 2 on: `benchmarks/pieces.py` compares the bits. The last image of an odd number is a piece of its own.
    """

    def __init__(self, tower: FrozenTower, device: torch.device) -> None:
        self._tower, self._device = tower, device
        self._seconds: dict[int, list[float]] = {size: [] for size in SIZES}

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features float32 [B, P] of pixels uint8 [B, 3, H, W], on the CPU."""
        if self._device.type != "cpu":
            return self._tower(pixels.to(self._device)).cpu()
        parts = []
        start = 0
        while start < len(pixels):
            left = len(pixels) - start
            size = self._size()
            number = size if size <= left else 1 << (left.bit_length() - 1)
            begin = time.perf_counter()
            parts.append(self._tower(pixels[start : start + number]))
            if number == size and len(self._seconds[size]) < TRIES:
                self._seconds[size].append((time.perf_counter() - begin) / number)
            start += number
        return torch.cat(parts)

    def _size(self) -> int:
        """The next size to try, or the fastest once all have been tried."""
        for size, seconds in self._seconds.items():
            if len(seconds) < TRIES:
                return size
        return min(self._seconds, key=lambda size: min(self._seconds[size][1:]))
