"""Choice tasks: how often a model prefers what is right to what differs from it in a word or in the order of words.

    answers = answer(choices, image, text)
    answers.metrics()                                                             # {"accuracy": 0.71}
    bootstrap_interval(answers.hits["accuracy"], images=answers.groups)

A score is the dot product of two unit vectors, rounded to fp32. What is right must score strictly higher than what is
wrong, so that a model that gives everything the same vector scores 0.

Legend: N images, M texts, D width, K choices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from threetowers.data.choices import UNREADABLE, Choice, ChoiceSet, Task
from threetowers.data.source import Source
from threetowers.errors import BadSample, DataError
from threetowers.evaluate.retrieval import check_features, exact, first_linked

CHANCE: Mapping[Task, Mapping[str, float]] = {
    "one_caption": {"accuracy": 1 / 2},
    "two_captions": {"image_text": 1 / 3, "text_only": 1 / 3},
    "matching": {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6},
}
"""The metrics of each task, and what scores that are independent and alike in distribution reach in them.

one_caption: of two scores either is the higher one. two_captions: of three scores each is equally often the extreme
one, and the wrong caption must be the lowest (`image_text`) or the pair of right captions the most similar
(`text_only`). matching: two comparisons of four different scores (`text`, `image`); the two right scores must be the
highest of four (`group`), which is one of six pairs.
"""

BLOCK = 4_096
"""Choices scored at a time."""


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers of a model to K choices.

    hits: for each metric whether the model is right, bool [K]. groups: int64 [K], the same number for choices that
    share an image, directly or through others: a bootstrap draws them together. categories: of each choice.
    problems: those of the data, and the choices that are left out because an image could not be read.
    """

    task: Task
    ids: Sequence[str]
    categories: Sequence[str]
    hits: Mapping[str, NDArray[np.bool_]]
    groups: NDArray[np.int64]
    problems: Sequence[BadSample]

    def metrics(self) -> dict[str, float]:
        """Share of the choices that are right, by metric."""
        return {name: float(hits.mean()) for name, hits in self.hits.items()}

    def by_category(self) -> dict[str, dict[str, float]]:
        """The metrics of each category, in the order of their names."""
        names = np.array(self.categories)
        return {
            category: {name: float(hits[names == category].mean()) for name, hits in self.hits.items()}
            for category in sorted(set(self.categories))
        }

    def category_mean(self) -> dict[str, float]:
        """The mean of each metric over categories, whatever their sizes."""
        rows = list(self.by_category().values())
        return {name: float(np.mean([row[name] for row in rows])) for name in self.hits}


def answer(choices: ChoiceSet, image: Tensor, text: Tensor, index: Tensor | None = None) -> Answers:
    """The answers that a pair of encoders gives.

    image [N, D] and text [M, D] are unit vectors, text of all `choices.texts`. index: int64 [N], of which image in
    `choices.images` each row is, as `Encoded.index` says; None: of all images in their order. Choices with an image
    that has no row are left out and listed in `problems`.

    one_caption (SugarCrepe, arXiv 2306.14610): the right caption scores higher with the image than the wrong one.
    two_captions (SugarCrepe++, arXiv 2406.11171): `image_text`, both right captions score higher with the image than
    the wrong one; `text_only`, they are more similar to each other than either is to the wrong one.
    matching (Winoground, arXiv 2204.03162): `text`, each image's caption scores higher with it than the other caption;
    `image`, each caption's image scores higher with it than the other image; `group`, both.

    Raises DataError for features that do not fit the choices or cannot be scored, and when no choice is left.
    """
    rows = _rows_of_images(choices, image, text, index)
    kept = [choice for choice in choices.choices if all(i in rows for i in choice.images)]
    unread = [
        BadSample(choice.id, UNREADABLE, choices.images.record(i).id)
        for choice in choices.choices
        if (i := next((i for i in choice.images if i not in rows), None)) is not None
    ]
    if not kept:
        raise DataError(
            f"{choices.name}: none of its {len(choices)} choices has all its images among the features"
        )
    images = torch.tensor([[rows[i] for i in choice.images] for choice in kept])
    texts = torch.tensor([choice.texts for choice in kept])
    parts = [
        _hits(choices.task, image, text, images[start : start + BLOCK], texts[start : start + BLOCK])
        for start in range(0, len(kept), BLOCK)
    ]
    hits = {name: torch.cat([part[name] for part in parts]).numpy() for name in CHANCE[choices.task]}
    return Answers(
        choices.task,
        [choice.id for choice in kept],
        [choice.category for choice in kept],
        hits,
        _groups(kept, choices.images),
        [*choices.problems, *unread],
    )


def _hits(task: Task, image: Tensor, text: Tensor, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """Whether each choice is answered right, by metric; images and texts: the rows of each choice's features."""

    def seen(i: int, t: int) -> Tensor:
        return _scores(image[images[:, i]], text[texts[:, t]])

    def read(t: int, u: int) -> Tensor:
        return _scores(text[texts[:, t]], text[texts[:, u]])

    if task == "one_caption":
        hits = {"accuracy": seen(0, 0) > seen(0, 1)}
    elif task == "two_captions":
        wrong, alike = seen(0, 2), read(0, 1)
        hits = {
            "image_text": (seen(0, 0) > wrong) & (seen(0, 1) > wrong),
            "text_only": (alike > read(0, 2)) & (alike > read(1, 2)),
        }
    else:
        first, second = seen(0, 0), seen(1, 1)
        hits = {
            "text": (first > seen(0, 1)) & (second > seen(1, 0)),
            "image": (first > seen(1, 0)) & (second > seen(0, 1)),
        }
        hits["group"] = hits["text"] & hits["image"]
    return {name: each.cpu() for name, each in hits.items()}


def _scores(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of the rows of two matrices, summed in fp64 and rounded once to fp32, as in retrieval."""
    return (exact(a) * exact(b)).sum(dim=1).float()


def _rows_of_images(choices: ChoiceSet, image: Tensor, text: Tensor, index: Tensor | None) -> dict[int, int]:
    """The row of each image that has one, its own or that of an equal image, by its index in `choices.images`."""
    check_features(image, f"{choices.name}: image features")
    check_features(text, f"{choices.name}: text features")
    if image.shape[1] != text.shape[1]:
        raise DataError(
            f"{choices.name}: image features are {image.shape[1]} wide and text features {text.shape[1]}; both must "
            "come from the same pair of views"
        )
    if len(text) != len(choices.texts):
        raise DataError(f"{choices.name}: {len(choices.texts)} texts have {len(text)} rows of features")
    num_images = len(choices.images)
    sources = list(range(num_images)) if index is None else index.tolist()
    if len(image) != len(sources):
        said = f"{num_images} images" if index is None else f"{len(sources)} entries of `index`"
        raise DataError(f"{choices.name}: {said} have {len(image)} rows of features")
    if len(set(sources)) < len(sources) or not set(sources) <= set(range(num_images)):
        raise DataError(
            f"{choices.name}: `index` must name different images, each from 0 to {num_images - 1}"
        )
    rows = {source: row for row, source in enumerate(sources)}
    ids = [_image_id(choices.images, i) for i in range(num_images)]
    of_id = {ids[source]: row for source, row in rows.items()}
    return {i: rows.get(i, of_id[id]) for i, id in enumerate(ids) if id in of_id}


def _image_id(source: Source, index: int) -> str:
    """The same for samples of equal images."""
    record = source.record(index)
    return record.image_id or record.id


def _groups(choices: Sequence[Choice], source: Source) -> NDArray[np.int64]:
    """The first of the choices that each choice shares images with; samples of equal images are one image."""
    numbers: dict[str, int] = {}
    uses = [
        (place, _image_id(source, image)) for place, choice in enumerate(choices) for image in choice.images
    ]
    edges = [(place, numbers.setdefault(id, len(numbers))) for place, id in uses]
    place, image = np.array(edges).T
    return first_linked(place, image, len(choices))
