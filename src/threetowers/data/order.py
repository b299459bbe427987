"""Which sample comes at which position: a pure function of (seed, epoch, position).

There is no state, so a run that continues at position p, with any number of workers or processes, sees the samples that
the uninterrupted run would have seen. All random choices about a sample come from `hash64` of what identifies them.

Up to GROUP_SAMPLES samples, an epoch is one permutation. Above that, blocks of BLOCK_SAMPLES neighbours are permuted,
and the samples of GROUP_BLOCKS blocks at a time are shuffled. Reads then stay within a few regions of the disk, and
memory does not grow with the data.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from threetowers.errors import UsageError

BLOCK_SAMPLES = 4_096
GROUP_BLOCKS = 16
GROUP_SAMPLES = BLOCK_SAMPLES * GROUP_BLOCKS


def hash64(*parts: int | str) -> int:
    """A uniform 64-bit number that depends on the parts only and is the same in every process and on every machine."""
    return int.from_bytes(_digest(parts, 8), "little")


def uniforms(num: int, *parts: int | str) -> list[float]:
    """Up to eight uniform numbers in [0, 1) that depend on the parts only, all from one hash."""
    digest = _digest(parts, 8 * num)
    return [int.from_bytes(digest[at : at + 8], "little") / 2**64 for at in range(0, 8 * num, 8)]


def _digest(parts: tuple[int | str, ...], size: int) -> bytes:
    text = "\x1f".join([f"{type(part).__name__}{part}" for part in parts])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()


def _shuffled(num: int, *key: int | str) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=hash64(*key))).permutation(num)


@lru_cache(maxsize=2)
def _blocks(seed: int, epoch: int, num_samples: int) -> tuple[np.ndarray, int]:
    """The epoch's order of blocks, and the group that the last block, which can be shorter, falls into."""
    blocks = _shuffled(-(-num_samples // BLOCK_SAMPLES), "order", seed, epoch)
    return blocks, int(blocks.argmax()) // GROUP_BLOCKS


@lru_cache(maxsize=2)  # a batch may lie across two groups
def _group(seed: int, epoch: int, num_samples: int, group: int) -> np.ndarray:
    """The indices of a group's samples in the epoch's order; int64 [at most GROUP_SAMPLES]."""
    if num_samples <= GROUP_SAMPLES:
        return _shuffled(num_samples, "order", seed, epoch)
    blocks = _blocks(seed, epoch, num_samples)[0][group * GROUP_BLOCKS : (group + 1) * GROUP_BLOCKS]
    samples = (blocks[:, None] * BLOCK_SAMPLES + np.arange(BLOCK_SAMPLES)).ravel()
    samples = samples[samples < num_samples]
    shuffled: np.ndarray = samples[_shuffled(len(samples), "order", seed, epoch, group)]
    return shuffled


def _place(seed: int, epoch: int, num_samples: int, offset: int) -> tuple[int, int]:
    """The group of the sample at an offset in the epoch, and its place in the group.

    All groups are full except the last and the one with the shorter block; the groups after that one start earlier.
    """
    if num_samples <= GROUP_SAMPLES:
        return 0, offset
    missing = -num_samples % BLOCK_SAMPLES
    short = _blocks(seed, epoch, num_samples)[1]
    behind = offset >= (short + 1) * GROUP_SAMPLES - missing
    return divmod(offset + missing if behind else offset, GROUP_SAMPLES)


class Order:
    """The endless sequence of samples of a training run; each epoch is a new permutation without its incomplete batch.

    Raises UsageError when there are fewer samples than one batch has.
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
        group, place = _place(self.seed, epoch, self.num_samples, offset)
        return int(_group(self.seed, epoch, self.num_samples, group)[place])

    def replacement(self, position: int, attempt: int) -> int:
        """Index of the sample that replaces an unusable one; the samples at other positions stay the same."""
        return hash64("replacement", self.seed, self.epoch(position), position, attempt) % self.num_samples

    def batches(self, first_step: int, last_step: int) -> Iterator[range]:
        """The positions of each step's batch, for the steps from `first_step` up to, not including, `last_step`."""
        for step in range(first_step, last_step):
            yield range(step * self.batch_size, (step + 1) * self.batch_size)
