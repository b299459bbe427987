"""Detection of images of no known class (out of distribution) by how sure a classifier is of its answer.

Legend: N images of known classes, M images of no known class, C classes.
"""

import math

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from threetowers.errors import DataError

TRUE_POSITIVE_RATE = 0.95


def detection(inside: Tensor, outside: Tensor) -> dict[str, dict[str, float]]:
    """How well two scores tell known from unknown images: `auroc` and `fpr_at_95` of `max_softmax` and `max_logit`.

    inside [N, C], outside [M, C]: logits of a classifier for images of its classes and for other images. A higher score
    means that an image is taken for a known one. Convention: Hendrycks & Gimpel 2017 (arXiv 1610.02136) for the highest
    probability, Hendrycks et al. 2022 (arXiv 1911.11132) for the highest logit. Raises DataError for logits that cannot
    be used.

        detection(test_logits, other_logits)["max_softmax"]["auroc"]
    """
    _check(inside, "known images")
    _check(outside, "unknown images")
    found = {}
    for name, score in (("max_softmax", max_softmax), ("max_logit", max_logit)):
        known, unknown = score(inside), score(outside)
        found[name] = {"auroc": auroc(known, unknown), "fpr_at_95": false_positive_rate(known, unknown)}
    return found


def max_softmax(logits: Tensor) -> Tensor:
    """log(p / (1 − p)) of the highest probability p, float64 [N]; logits [N, C].

    It has the order of p, and does not round many sure answers to an equal 1.
    """
    z = logits.double()
    best, place = z.max(1, keepdim=True)
    others = (z - best).scatter(1, place, -torch.inf)
    return -others.logsumexp(1)


def max_logit(logits: Tensor) -> Tensor:
    """The highest logit, float64 [N]; logits [N, C]."""
    return logits.double().amax(1)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """The probability that a random known image scores higher than a random unknown one; equal scores count half.

    inside [N], outside [M]: scores. It is the area under the curve of true against false positive rates, by the sum of
    ranks (Mann & Whitney 1947).
    """
    ranks = stats.rankdata(np.concatenate([inside.numpy(), outside.numpy()]))
    num, other = len(inside), len(outside)
    return float((ranks[:num].sum() - num * (num + 1) / 2) / (num * other))


def false_positive_rate(inside: Tensor, outside: Tensor) -> float:
    """Share of unknown images that are taken for known ones where at least 95 % of the known ones are.

    inside [N], outside [M]: scores. An image is taken for a known one at or above a threshold, the highest that takes
    enough of the known ones. An unknown image that scores as the threshold is therefore an error.
    """
    kept = math.ceil(TRUE_POSITIVE_RATE * len(inside))
    threshold = inside.sort(descending=True).values[kept - 1]
    return (outside >= threshold).double().mean().item()


def _check(logits: Tensor, what: str) -> None:
    """Raises DataError unless there are rows, at least two classes, and in every row a number and no NaN."""
    if logits.ndim != 2 or len(logits) == 0 or logits.shape[1] < 2:
        raise DataError(
            f"{what}: logits [images, classes] of at least two classes are needed, got {list(logits.shape)}"
        )
    bad = (~logits.amax(1).isfinite()).nonzero().flatten()
    if len(bad):
        raise DataError(
            f"{what}: {len(bad)} of {len(logits)} rows of logits are not finite, the first is row {int(bad[0])}"
        )
