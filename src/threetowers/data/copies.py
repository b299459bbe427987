"""Finds samples whose images have equal bytes: they are one image for the split and for evaluation.

Images of different sizes cannot be equal. Of those with equal sizes a few bytes from the middle are compared, and only
where these agree the whole files are read.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from threetowers.data.source import Source
from threetowers.errors import BadSample
from threetowers.progress import Progress

MIDDLE_BYTES = 512
"""Of an image, by which most images of equal size differ: at the ends there are headers and padding."""
FINGERPRINTED = 64
"""Images of a folder or a shard whose middles are part of its fingerprint. Names and sizes do not tell data apart whose
files are all of one size, as uncompressed images are."""
QUIET_SECONDS = 2.0
"""Work that takes less time shows no progress."""
Place = tuple[int, int]
"""The number of a source in a list, and of a sample in it."""
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd, so that different sizes stay different


def middle_key(data: bytes | memoryview) -> int:
    """A checksum of the middle of an image's bytes.

    It only says which images to compare, so that CRC-32 is enough: a hash takes longer than reading the bytes.
    """
    start, length = _middle(len(data))
    return zlib.crc32(data[start : start + length])


def middle_key_at(file: int, offset: int, size: int) -> int:
    """The `middle_key` of an image of `size` bytes at an offset in an open file, of which nothing else is read."""
    start, length = _middle(size)
    return zlib.crc32(os.pread(file, length, offset + start))


def _middle(size: int) -> tuple[int, int]:
    """Offset and number of the bytes in the middle of an image of `size` bytes."""
    return max(size - MIDDLE_BYTES, 0) // 2, min(size, MIDDLE_BYTES)


def some_of(count: int) -> list[int]:
    """The numbers of up to FINGERPRINTED of so many images, at equal distances."""
    return sorted(set(np.linspace(0, count - 1, min(count, FINGERPRINTED)).astype(int).tolist()))


def of_equal_size(sizes: np.ndarray) -> np.ndarray:
    """The samples whose images have the size of another's, ascending; int64."""
    _, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    return np.flatnonzero(counts[inverse] > 1)


def find_copies(
    sizes: np.ndarray,
    middles: Callable[[np.ndarray], np.ndarray],
    read: Callable[[int], bytes | memoryview],
) -> tuple[np.ndarray, np.ndarray]:
    """The samples with the image of an earlier sample, ascending, and the first sample with that image; both int64 [m].

    sizes: of the images in bytes, [n]. middles: the `middle_key` of the images of some samples, uint64. read: the bytes
    of an image. An image for which it raises BadSample or OSError is nobody's copy.

        images = [b"abc", b"abc", b"other"]
        find_copies(np.array([3, 3, 5]), lambda some: np.zeros(len(some), np.uint64), images.__getitem__)
        # (array([1]), array([0]))
    """
    samples = of_equal_size(sizes)
    mixed = middles(samples) ^ (sizes[samples].astype(np.uint64) * _SPREAD)
    _, inverse, counts = np.unique(mixed, return_inverse=True, return_counts=True)
    samples = samples[counts[inverse] > 1]
    copies: list[int] = []
    firsts: list[int] = []
    seen: dict[bytes, int] = {}
    bar = Progress("comparing images of equal size", len(samples), "images", quiet_seconds=QUIET_SECONDS)
    for done, index in enumerate(samples.tolist(), 1):
        bar.update(done)
        try:
            digest = hashlib.blake2b(read(index), digest_size=16).digest()
        except (BadSample, OSError):
            continue
        first = seen.setdefault(digest, index)
        if first != index:
            copies.append(index)
            firsts.append(first)
    return np.array(copies, np.int64), np.array(firsts, np.int64)


def equal_images(sources: Sequence[Source]) -> dict[Place, Place]:
    """Where the image of an earlier sample is, for every sample whose image comes before in these sources."""
    sizes = [source.image_sizes() for source in sources]
    ends = np.cumsum(list(map(len, sizes)))
    starts = ends - list(map(len, sizes))

    def places(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        numbers = ends.searchsorted(samples, "right")
        return numbers, samples - starts[numbers]

    def read(sample: int) -> bytes:
        number, index = places(np.array(sample))
        return sources[int(number)].image(int(index))

    found = find_copies(np.concatenate(sizes), lambda some: middles_of(sources, *places(some)), read)
    copies, firsts = (zip(*map(np.ndarray.tolist, places(samples)), strict=True) for samples in found)
    return dict(zip(copies, firsts, strict=True))


def middles_of(sources: Sequence[Source], numbers: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """The `middle_key` of the images at these places, uint64."""
    middles = np.zeros(len(numbers), np.uint64)
    for number, source in enumerate(sources):
        own = numbers == number
        if own.any():
            middles[own] = source.image_middles(indices[own])
    return middles


def image_ids_of(
    equal: Mapping[Place, Place], sources: Sequence[Source], prefixes: Sequence[str], first: int = 0
) -> dict[Place, str]:
    """The id of the first sample with the same image, `prefix/id`, for samples whose image comes before.

    first: the number of a source; the result has samples of this one and of as many as there are prefixes, counted from
    there. Source number n has prefix n modulo their number.
    """

    def id_of(place: Place) -> str:
        number, index = place
        return f"{prefixes[number % len(prefixes)]}/{sources[number].record(index).id}"

    within = range(first, first + len(prefixes))
    return {
        (number - first, index): id_of(origin)
        for (number, index), origin in equal.items()
        if number in within
    }


def describe_copies(num_copies: int) -> str:
    """What `layout` says about copies; empty when there are none."""
    if not num_copies:
        return ""
    samples = "1 sample repeats" if num_copies == 1 else f"{num_copies:,} samples repeat"
    what = "equal images count once in evaluation, and parts that are drawn keep them together"
    return f"; {samples} the image of another ({what})"
