"""Which sample comes at which position: a pure function of (seed, epoch, position).

Nothing here keeps state, so a run that continues at position p, on any number of workers or processes, sees what
the uninterrupted run would have seen. All random choices about a sample come from `hash64` of what identifies them.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from threetowers.errors import UsageError


def hash64(*parts: int | str) -> int:
    """A uniform 64-bit number that depends on the parts alone, the same in every process and on every machine."""
    return int.from_bytes(_digest(parts, 8), "little")


def uniforms(num: int, *parts: int | str) -> list[float]:
    """At most eight numbers in [0, 1) that depend on the parts alone; one hash for all of them."""
    digest = _digest(parts, 8 * num)
    return [int.from_bytes(digest[at : at + 8], "little") / 2**64 for at in range(0, 8 * num, 8)]


def _digest(parts: tuple[int | str, ...], size: int) -> bytes:
    text = "\x1f".join([f"{type(part).__name__}{part}" for part in parts])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=hash64("order", seed, epoch)))
    return generator.permutation(num_samples)


class Order:
    """The endless sequence of samples of a training run; each epoch is a fresh permutation, its tail dropped.

    Raises UsageError when the data is smaller than one batch.
    """

    def __init__(self, seed: int, num_samples: int, batch_size: int) -> None:
        if num_samples < batch_size:
            raise UsageError(
                f"batch_size is {batch_size}, but the training data has {num_samples} samples. "
                f"Give --batch-size {max(num_samples, 1)} or less, or more data."
            )
        self.seed, self.num_samples, self.batch_size = seed, num_samples, batch_size
        self.epoch_samples = num_samples // batch_size * batch_size

    def epoch(self, position: int) -> int:
        return position // self.epoch_samples

    def index(self, position: int) -> int:
        """Index in the source of the sample at this position, counted from the start of the run."""
        epoch, offset = divmod(position, self.epoch_samples)
        return int(_permutation(self.seed, epoch, self.num_samples)[offset])

    def replacement(self, position: int, attempt: int) -> int:
        """Index of the sample that stands in for an unusable one, so that nothing after it shifts."""
        return hash64("replacement", self.seed, self.epoch(position), position, attempt) % self.num_samples

    def batches(self, first_step: int, last_step: int) -> Iterator[range]:
        """The positions of each step's batch; steps count from 0, `last_step` excluded."""
        for step in range(first_step, last_step):
            yield range(step * self.batch_size, (step + 1) * self.batch_size)
