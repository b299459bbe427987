"""Captions that count as equal, and how many of them another image of the same part has too."""

from collections.abc import Iterable, Iterator

import numpy as np

from threetowers.data.source import Source
from threetowers.data.tokenize import clean
from threetowers.progress import Detail


def caption_key(caption: str) -> str:
    """The same text for captions that count as equal in evaluation: those that differ in case and white space alone.

    Wrongly decoded characters and HTML entities are corrected first, as for training. The whole caption counts, however
    much of it a model reads, so that the right answers are the same for every model.

    >>> caption_key("A red  Square &amp; a dot.")
    'aredsquare&adot.'
    """
    return "".join(clean(caption).casefold().split())


def text_groups(captions: Iterable[str]) -> np.ndarray:
    """int64 [number of captions], the same number for equal captions, counted in the order of their first."""
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(caption_key(caption), len(numbers)) for caption in captions]
    return np.array(groups, dtype=np.int64)


def repeated_share(text_image: np.ndarray, text_group: np.ndarray) -> float:
    """Share of the captions that are equal to a caption of another image; int64 [M] both, 0 without captions.

    >>> repeated_share(np.array([0, 0, 1, 2]), np.array([0, 0, 1, 1]))
    0.5
    """
    if not len(text_group):
        return 0.0
    pairs = np.unique(
        np.stack([text_group, text_image]), axis=1
    )  # an image that repeats its own caption has it once
    num_images = np.bincount(pairs[0], minlength=int(text_group.max()) + 1)
    return float((num_images[text_group] > 1).mean())


def repeated_captions(source: Source) -> float:
    """`repeated_share` of a source, in which samples with equal images are one image."""
    images: dict[str, int] = {}
    captions: list[str] = []
    text_image: list[int] = []
    for index in range(len(source)):
        record = source.record(index)
        image = images.setdefault(record.image_id or record.id, len(images))
        captions += record.captions
        text_image += [image] * len(record.captions)
    return repeated_share(np.array(text_image, dtype=np.int64), text_groups(captions))


def describe_repeats(name: str, part: Source) -> Iterator[str]:
    """A line for people about a part to validate or test on, a Detail when no caption is repeated; none without any."""
    if len(part) and part.record(0).captions:
        share = repeated_captions(part)
        line = (
            f"{name} captions: {share:.1%} are equal to one of another image, and each of the images is right"
        )
        yield line if share else Detail(line)
