"""What a run's evaluation found on its test data, with intervals, as a model card shows it.

The figures are those of evaluation.json. Their intervals come from the vectors in features.safetensors, by a bootstrap
over test images. Nothing is measured that the evaluation has not encoded.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from threetowers.errors import DataError
from threetowers.evaluate.evaluation import SCHEMA
from threetowers.evaluate.retrieval import DIRECTIONS, Ranks, System, combined_ranks, recalls
from threetowers.evaluate.statistics import Hits, Interval, bootstrap_interval
from threetowers.towers.weights import read_safetensors

NEAR = 1e-6
"""Figures that differ by more are not of the same evaluation."""
CLASSES = {"top1": "accuracy", "top5": "accuracy at 5", "mean_per_class": "accuracy, mean of the classes"}


@dataclass(frozen=True)
class Figure:
    """One figure on the test data: a share in [0, 1], with the ends of its 95 % interval where there is one."""

    task: Literal["retrieval", "zero-shot"]
    metric: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def words(self) -> str:
        """The metric in words.

        >>> Figure("retrieval", "i2t_r@5", 0.5).words
        'image → text, recall at 5'
        """
        if self.task == "zero-shot":
            return CLASSES.get(self.metric, self.metric)
        side, _, k = self.metric.partition("_r@")
        return f"{DIRECTIONS.get(side, side)}, recall at {k}"


@dataclass(frozen=True)
class Results:
    """The figures of one evaluation; without any, `missing` says why.

    data: name of the test data, which is no path. num_test: its captioned images.
    """

    figures: tuple[Figure, ...] = ()
    data: str = ""
    num_test: int = 0
    missing: str = ""


def read_results(run: Path, thirds: Mapping[str, str], alpha: float = 0.0) -> Results:
    """The figures of a run's own test data.

    thirds: what each third tower reads, `images` or `texts`, by its view. alpha: above 0, those of the convex
    combination with the third tower of images, whose ranks are computed of the stored vectors.
    """
    try:
        found = json.loads((run / "evaluation.json").read_bytes())
        found = found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return Results(missing="this run was not evaluated")
    except (OSError, ValueError):
        return Results(missing="its evaluation.json cannot be read")
    if found.get("schema") != SCHEMA:
        return Results(missing="its evaluation is of another version of threetowers")
    path = run / "features.safetensors"
    tensors = read_safetensors(path) if path.is_file() else {}
    figures: list[Figure] = []
    ranks = _ranks(tensors, thirds, alpha)
    if alpha:
        if ranks is None:
            return Results(
                missing="the vectors of its evaluation are not there, and the combination needs them"
            )
        figures += _retrieval(recalls(ranks), ranks)
    else:
        figures += _retrieval(found.get("test") or {}, ranks)
        figures += _zero_shot(found.get("zero_shot") or {}, tensors.get("classes/rank"))
    if not figures:
        return Results(missing="there were no test data")
    return Results(tuple(figures), str(found.get("data", "")), int(found.get("num_test", 0)))


def _ranks(tensors: Mapping[str, Tensor], thirds: Mapping[str, str], alpha: float) -> Ranks | None:
    """The test ranks of the main pair, or of its combination with the third tower; None where vectors are missing."""
    views, weights = [("img", "txt")], [1.0]
    if alpha:
        pairs = [(f"{view}@txt", f"txt@{view}") for view, reads in thirds.items() if reads == "images"]
        views += [pair for pair in pairs if f"test/{pair[0]}" in tensors]
        weights = [1 - alpha, alpha]
    names = [f"test/{name}" for name in ("text_image", "text_group", *sum(views, ()))]
    if len(views) != len(weights) or any(name not in tensors for name in names):
        return None
    systems = [System(*(tensors[f"test/{view}"] for view in pair)) for pair in views]
    (ranks,) = combined_ranks(systems, [weights], tensors[names[0]], tensors[names[1]])
    return ranks


def _retrieval(values: Mapping[str, float], ranks: Ranks | None) -> list[Figure]:
    figures = []
    for metric, value in values.items():
        interval = None
        if ranks is not None:
            side, _, k = metric.partition("_r@")
            hits, images = ranks.hits(int(k)), ranks.images()
            place = {"i2t": 0, "t2i": 1}.get(side)
            interval = _interval(hits, images) if place is None else _interval(hits[place], images[place])
        figures.append(_figure("retrieval", metric, value, interval))
    return figures


def _zero_shot(values: Mapping[str, float], ranks: Tensor | None) -> list[Figure]:
    """Each image is one answer; the mean over classes has no interval."""
    at = {"top1": 1, "top5": 5}
    return [
        _figure(
            "zero-shot",
            metric,
            value,
            _interval((ranks < at[metric]).numpy()) if ranks is not None and metric in at else None,
        )
        for metric, value in values.items()
    ]


def _interval(hits: Hits, images: Hits | None = None) -> Interval | None:
    try:
        return bootstrap_interval(hits, images=images)
    except DataError:  # of a single image
        return None


def _figure(task: Any, metric: str, value: float, interval: Interval | None) -> Figure:
    """A figure with its interval, unless the two are not of the same evaluation."""
    if interval is None or abs(interval.mean - value) > NEAR:
        return Figure(task, metric, value)
    return Figure(task, metric, value, interval.low, interval.high)
