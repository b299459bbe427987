"""What training and test data share, so that a test measures less than it seems to: captions and images."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from threetowers.data.copies import QUIET_SECONDS, equal_images
from threetowers.data.decode import decode
from threetowers.data.source import Source
from threetowers.errors import BadSample
from threetowers.progress import Detail, Progress

SCANNED = 300_000
"""Training samples whose captions are looked at, evenly spread over larger data."""
THUMBNAIL = 16
"""Side in pixels of the thumbnails by which near-equal images are found."""
SIMILAR = 0.97
"""Correlation of two thumbnails from which images count as near-equal."""
_BLOCK = 1024


def normalised(caption: str) -> str:
    """The words of a caption in lower case, without punctuation; the caption itself when it has no word.

    >>> normalised("A red  Square.")
    'a red square'
    """
    return " ".join(re.findall(r"\w+", caption.casefold())) or caption


def shared_captions(train: Source, test: Source) -> float:
    """Share of the test captions that are, in their normalised form, training captions too; 0 without captions.

    Of more than SCANNED training samples some are looked at, so that the true share can be higher.
    """
    captions = [normalised(caption) for index in range(len(test)) for caption in test.record(index).captions]
    wanted = set(captions)
    found: set[str] = set()
    for index in range(0, len(train), -(-len(train) // SCANNED) or 1):
        found.update(wanted.intersection(map(normalised, train.record(index).captions)))
    return sum(caption in found for caption in captions) / max(len(captions), 1)


def shared_images(train: Source, test: Source) -> int:
    """The number of test samples whose image bytes are those of a training sample.

    Data that the product splits share none; parts that come with the data can.
    """
    return sum(copy == 1 and first == 0 for (copy, _), (first, _) in equal_images([train, test]).items())


class NearCopy(NamedTuple):
    """A test image and the training image that looks most like it, by id, with the correlation of their thumbnails."""

    test: str
    train: str
    correlation: float


def near_copies(train: Source, test: Source) -> list[NearCopy]:
    """The test images with a near-equal training image, such as the same picture at another size or quality.

    Every image is decoded. Crops, rotations and mirror images are not found; images of one colour are left out.
    """
    test_indices, tests = _thumbnails(test, "test")
    train_indices, trains = _thumbnails(train, "training")
    found: list[NearCopy] = []
    if not len(trains):
        return found
    for start in range(0, len(tests), _BLOCK):
        scores = tests[start : start + _BLOCK] @ trains.T
        for row, column in enumerate(scores.argmax(1).tolist()):
            if scores[row, column] >= SIMILAR:
                ids = test.record(test_indices[start + row]).id, train.record(train_indices[column]).id
                found.append(NearCopy(*ids, float(scores[row, column])))
    return found


def thumbnail(image: Image.Image) -> np.ndarray | None:
    """An RGB image as a centred unit vector, float32 [3 · THUMBNAIL²]; None when it has one colour."""
    row = np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), np.float32).ravel()
    row -= row.mean()
    norm = float(np.linalg.norm(row))
    return row / norm if norm > 1.0 else None


def _thumbnails(source: Source, name: str) -> tuple[list[int], np.ndarray]:
    """The samples whose images can be compared, and their thumbnails as centred unit rows, float32 [n, 3 · side²]."""
    indices: list[int] = []
    rows: list[np.ndarray] = []
    bar = Progress(f"thumbnails of {name} images", len(source), "images", quiet_seconds=QUIET_SECONDS)
    for index in range(len(source)):
        try:
            image = decode(source.image(index), str(index), shrink=lambda size: min(size) / THUMBNAIL)
        except BadSample:
            continue
        row = thumbnail(image)
        if row is not None:
            indices.append(index)
            rows.append(row)
        bar.update(index + 1)
    return indices, np.stack(rows) if rows else np.empty((0, 3 * THUMBNAIL**2), np.float32)


def describe_overlap(train: Source, test: Source) -> Iterator[str]:
    """Lines for people: the share of test captions and the number of test images that the training data has too.

    A line that reports none is a Detail.
    """
    if len(test) and test.record(0).captions:
        share = shared_captions(train, test)
        at_least = "at least " if len(train) > SCANNED else ""
        line = (
            f"test captions: {at_least}{share:.1%} are training captions too, apart from case and punctuation"
        )
        yield line if share else Detail(line)
    if images := shared_images(train, test):
        yield f"  note: {images:,} of {len(test):,} test samples have the image of a training sample"


def describe_near_copies(found: Sequence[NearCopy], num_test: int) -> Iterator[str]:
    """Lines for people: the number of near-equal images, and the first ten."""
    yield f"near-equal images: {len(found):,} of {num_test:,} test images look like a training image"
    yield from (f"  {pair.test} is like {pair.train} ({pair.correlation:.3f})" for pair in found[:10])
