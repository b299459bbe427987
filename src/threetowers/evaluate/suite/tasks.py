"""The tasks of a suite: each a function from a model's features and an open data set to figures. One list.

A new task is one function and one line in TASKS.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from threetowers.errors import DataError
from threetowers.evaluate.encode import Encoded
from threetowers.evaluate.retrieval import ranks_from_features, ranks_of, recalls
from threetowers.evaluate.statistics import Hits, Interval, bootstrap_interval
from threetowers.evaluate.suite.features import Features, Part, captioned
from threetowers.evaluate.suite.sets import OpenSet
from threetowers.evaluate.zero_shot import accuracy, label_ranks


@dataclass(frozen=True, eq=False)
class Measured:
    """What a task found.

    metrics: by name; shares in [0, 1] but for those whose name says otherwise. num: how many items the main metric is
    a mean of. chance: its level for a model that guesses. hits: by metric, one value per item whose mean the metric is,
    and `images`, of each item the image that it belongs to; None where items are independent. details: plain values.
    """

    metrics: Mapping[str, float]
    num: int
    chance: float | None = None
    hits: Mapping[str, Hits] = field(default_factory=dict)
    images: Hits | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def interval(self, metric: str) -> Interval | None:
        """The 95 % bootstrap interval of a metric; None where its items are not known, or are fewer than two."""
        hits = self.hits.get(metric)
        if hits is None or self.num < 2:
            return None
        return bootstrap_interval(hits, images=self.images)


@dataclass(frozen=True)
class Task:
    """One task. help: a line for people. metric: the main one. unfit: from a data set and the views of its images,
    why it cannot be measured, or ""."""

    help: str
    metric: str
    measure: Callable[[Features, OpenSet], Measured]
    unfit: Callable[[OpenSet, Sequence[str]], str]


def retrieval(features: Features, opened: OpenSet) -> Measured:
    """Recall of the captions by images and of the images by captions, on the test part."""
    encoded = captioned(features, opened.test)
    ranks = ranks_of(encoded)
    num = ranks.num_independent()
    # there an image's own captions alone are right
    own = ranks_from_features(*encoded.system("main"), encoded.text_image) if encoded.repeated() else ranks
    return Measured(
        recalls(ranks),
        len(encoded.index),
        chance_of_retrieval(encoded),
        {"mean_r@1": ranks.hits(1)} if num > 1 else {},
        ranks.images(),
        {
            "repeated_captions": encoded.repeated(),
            "bad_images": len(encoded.bad),
            "captions": len(encoded.captions),
            "clip_benchmark": recalls(own),
        },
    )


def chance_of_retrieval(encoded: Encoded) -> float:
    """`mean_r@1` of a model that ranks by chance: the mean share of right answers among the candidates."""
    image, group = encoded.text_image.numpy(), encoded.text_group.numpy()
    num_images, num_texts = len(encoded.index), len(image)
    pairs = np.unique(
        np.stack([image, group]), axis=1
    )  # each image with each of its different captions, once
    texts_of_group, images_of_group = np.bincount(group), np.bincount(pairs[1], minlength=group.max() + 1)
    right_texts = np.bincount(pairs[0], weights=texts_of_group[pairs[1]], minlength=num_images)
    i2t = right_texts[right_texts > 0].mean() / num_texts
    t2i = images_of_group[group].mean() / num_images
    return float(0.5 * (i2t + t2i))


@dataclass(frozen=True, eq=False)
class Labels:
    """A part's labelled images: features float32 [N, D] and labels int64 [N]."""

    features: Tensor
    labels: Tensor


def labelled(features: Features, part: Part, view: str = "img") -> Labels:
    """The images of a part that have a label; raises DataError where there are none."""
    rows = features.images(part, view)
    known = [part.source.record(sample).label for sample in rows.samples.tolist()]
    keep = torch.tensor([label is not None for label in known])
    if not keep.any():
        raise DataError(f"{part.name}: none of its images has a class")
    labels = torch.tensor([label for label in known if label is not None])
    return Labels(rows.features[keep], labels)


def zero_shot(features: Features, opened: OpenSet) -> Measured:
    """Classification by the cosine with the mean of each class's prompts."""
    test = labelled(features, opened.test)
    classes = features.classes(opened.test, opened.classes, opened.templates)
    ranks = label_ranks(test.features, classes, test.labels)
    metrics = accuracy(ranks, test.labels, len(classes))
    return classified(metrics, (ranks < 1).numpy(), test.labels)


def classified(
    metrics: Mapping[str, float], hits: np.ndarray[Any, Any], labels: Tensor, **details: Any
) -> Measured:
    """The figures of a classifier. hits: whether each image is right. `top1` and `mean_per_class` get an interval.

    The interval of `mean_per_class` holds the sizes of the classes fixed.
    """
    counts = torch.bincount(labels).numpy()
    weights = len(labels) / (np.count_nonzero(counts) * counts[labels.numpy()])
    return Measured(
        metrics, len(labels), 1 / max(1, int(np.count_nonzero(counts))),
        {"top1": hits.astype(float), "mean_per_class": hits * weights}, details=details,
    )  # fmt: skip


def _needs_captions(opened: OpenSet, views: Sequence[str]) -> str:
    source = opened.test.source
    some = any(source.record(index).captions for index in range(min(len(source), 1000)))
    return "" if some and not opened.classes else "its images have no captions"


def _needs_classes(opened: OpenSet, views: Sequence[str]) -> str:
    return "" if opened.classes else "its images have no classes"


def _needs_training(opened: OpenSet, views: Sequence[str]) -> str:
    if not opened.classes:
        return "its images have no classes"
    return "" if opened.train is not None else "it has no training part; name one by train = PATH"


TASKS: dict[str, Task] = {
    "retrieval": Task("captions by images and images by captions", "mean_r@1", retrieval, _needs_captions),
    "zero_shot": Task("classification by prompts", "top1", zero_shot, _needs_classes),
}
"""Every task of a suite by its name."""
