"""Nearest neighbours: an image has the class of the training images whose features are most similar to its own.

Similarity is the cosine. The search is exact, and the matrix of all similarities never exists (`evaluate/search.py`).

Legend: N images, M training images, F width of the features, C classes, K neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from threetowers.errors import UsageError
from threetowers.evaluate.ridge import Samples, check_parts
from threetowers.evaluate.search import top_k
from threetowers.evaluate.zero_shot import per_class_accuracy
from threetowers.objective.losses import unit

KS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07
_VOTES = 2**22  # entries of [images, classes] at a time


class Nearest(NamedTuple):
    """The most similar training images of each image, most similar first.

    similarity: float32 [N, K]. rows: int64 [N, K], their rows in the training data.
    """

    similarity: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class Vote:
    """The result of one way of voting. k: the chosen number of neighbours. path: validation accuracy by number.

    hits [N] and the accuracies are of the test data; `mean_per_class` is over the classes that have a test image.
    """

    k: int
    path: dict[int, float]
    hits: Tensor = field(repr=False)
    accuracy: float
    mean_per_class: float

    def figures(self) -> dict[str, Any]:
        """The result in plain values."""
        return {
            "accuracy": self.accuracy,
            "mean_per_class": self.mean_per_class,
            "k": self.k,
            "path": [list(point) for point in self.path.items()],
        }


class Neighbours(NamedTuple):
    """majority: every neighbour has one vote. weighted: a neighbour's vote counts exp(similarity / 0.07)."""

    majority: Vote
    weighted: Vote


def neighbours(
    train: Samples, val: Samples, test: Samples, num_classes: int, ks: Sequence[int] = KS
) -> Neighbours:
    """Classifies by the neighbours in `train`; how many of them is chosen on `val` for each way of voting.

    The number with the highest validation accuracy is chosen, the smallest winning a tie. Numbers above that of the
    training images are not tried. The weighted vote is that of DINO (arXiv 2104.14294, `eval_knn.py`; after Wu et al.
    2018, arXiv 1805.01978). Ties: see `nearest` and `predict`. Raises DataError for features or labels that cannot be
    used, UsageError for a number of neighbours below 1 and when all are above that of the training images.

        result = neighbours(Samples(train, train_labels), Samples(val, val_labels), Samples(test, test_labels), 10)
        result.weighted.accuracy, result.weighted.k
    """
    check_parts({"training": train, "validation": val, "test": test}, num_classes)
    usable = sorted({k for k in ks if k <= len(train.labels)})
    if not usable or usable[0] < 1:
        raise UsageError(
            f"nearest neighbours: numbers from 1 to that of the training images ({len(train.labels)}) are needed, "
            f"got {list(ks)}"
        )
    of_val, of_test = (nearest(part.features, train.features, usable[-1]) for part in (val, test))
    votes = []
    for temperature in (None, TEMPERATURE):
        right = {
            k: int((predict(of_val, train.labels, num_classes, k, temperature) == val.labels).sum())
            for k in usable
        }
        k = max(usable, key=lambda number: right[number])
        hits = predict(of_test, train.labels, num_classes, k, temperature) == test.labels
        votes.append(
            Vote(
                k,
                {number: found / len(val.labels) for number, found in right.items()},
                hits,
                hits.double().mean().item(),
                per_class_accuracy((~hits).long(), test.labels, num_classes).nanmean().item(),
            )
        )
    return Neighbours(*votes)


@torch.no_grad()
def nearest(queries: Tensor, candidates: Tensor, k: int) -> Nearest:
    """The k candidates [M, F] with the highest cosine to each query [N, F]; k is at most M.

    A cosine is the product of unit vectors of float32, summed in float64 and rounded to float32, so that equal features
    are equally similar. Of equally similar candidates the one with the lower row comes first. A vector of zeros has the
    cosine 0 with every other.
    """
    return Nearest(*top_k(unit(queries), unit(candidates), k))


def predict(
    near: Nearest, labels: Tensor, num_classes: int, k: int, temperature: float | None = None
) -> Tensor:
    """The class with the most votes of the k nearest, int64 [N]; the lowest of classes with equally many.

    labels: of the training images, int64 [M]. temperature: a neighbour's vote counts exp(similarity / temperature);
    None: every vote counts 1.
    """
    parts = []
    size = max(1, _VOTES // num_classes)
    for similarity, rows in zip(near.similarity.split(size), near.rows.split(size), strict=True):
        own = similarity[:, :k].double()
        # relative to the nearest, which changes no order and overflows nowhere
        weights = torch.ones_like(own) if temperature is None else ((own - own[:, :1]) / temperature).exp()
        votes = torch.zeros(len(own), num_classes, dtype=torch.float64)
        parts.append(votes.scatter_add_(1, labels[rows[:, :k]], weights).argmax(1))
    return torch.cat(parts)
