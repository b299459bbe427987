"""What a task is, what it finds, and the labelled features that several tasks start from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from threetowers.errors import DataError
from threetowers.evaluate.ridge import Samples
from threetowers.evaluate.statistics import Hits, Interval, bootstrap_interval
from threetowers.evaluate.suite.features import Features, Part
from threetowers.evaluate.suite.sets import OpenSet


@dataclass(frozen=True, eq=False)
class Measured:
    """What a task found.

    metrics: by name; shares in [0, 1] but for those whose name says otherwise. num: how many items the main metric is
    about. chance: its level for a model that guesses; None where that means nothing. hits: by metric, one value for
    each item whose mean the metric is. images: of each item the image that it belongs to; None where items are
    independent. details: curves and tables as plain values.
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
    """One task.

    help: a line for people. metric: the name of the main one. unfit: from a data set and the views of its images, why
    it cannot be measured, or "". asked: whether it is measured only where it is named, because it takes long.
    """

    help: str
    metric: str
    measure: Callable[[Features, OpenSet], Measured]
    unfit: Callable[[OpenSet, Sequence[str]], str]
    asked: bool = False


def needs_captions(opened: OpenSet, views: Sequence[str]) -> str:
    source = opened.test.source
    some = any(source.record(index).captions for index in range(min(len(source), 1000)))
    return "" if some and not opened.classes and opened.choices is None else "its images have no captions"


def needs_classes(opened: OpenSet, views: Sequence[str]) -> str:
    return "" if opened.classes else "its images have no classes"


def needs_training(opened: OpenSet, views: Sequence[str]) -> str:
    if not opened.classes:
        return "its images have no classes"
    return "" if opened.train is not None else "it has no training part; name one with train = PATH"


def labelled(features: Features, part: Part, view: str = "img") -> Samples:
    """The images of a part that have a label; raises DataError where there are none."""
    rows = features.images(part, view)
    known = [part.source.record(sample).label for sample in rows.samples.tolist()]
    keep = torch.tensor([label is not None for label in known])
    if not keep.any():
        raise DataError(f"{part.name}: none of its images has a class")
    labels = torch.tensor([label for label in known if label is not None])
    return Samples(rows.features[keep], labels)


def classified(
    hits: Tensor | NDArray[Any], labels: Tensor, metrics: Mapping[str, float] | None = None, **details: Any
) -> Measured:
    """The figures of a classifier. hits: whether each image is right. metrics: beside `top1` and `mean_per_class`.

    The interval of `mean_per_class` holds the sizes of the classes fixed.
    """
    right = np.asarray(hits, dtype=float)
    counts = torch.bincount(labels).numpy()
    present = int(np.count_nonzero(counts))
    by_class = right * len(labels) / (present * counts[labels.numpy()])
    own = {"top1": float(right.mean()), "mean_per_class": float(by_class.mean())}
    return Measured(
        {**own, **(metrics or {})}, len(labels), 1 / present, {"top1": right, "mean_per_class": by_class},
        details=details,
    )  # fmt: skip
