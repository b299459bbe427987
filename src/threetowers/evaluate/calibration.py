"""Calibration: whether a classifier is right as often as its probabilities say, before and after one temperature.

Legend: N images, C classes, B bins.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from scipy import optimize
from torch import Tensor

from threetowers.errors import DataError
from threetowers.evaluate.ridge import check_labels

BINS = 15
COLDEST, HOTTEST = 1e-3, 1e3
"""Bounds of the temperature."""


class Reliability(NamedTuple):
    """What a reliability diagram shows, by bin of the highest probability; bin b of B is (b / B, (b + 1) / B].

    num_images: int64 [B]. confidence, accuracy: float64 [B], the mean highest probability and the share of images that
    are right; NaN in bins without images.
    """

    num_images: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def error(self) -> float:
        """Expected calibration error: the mean over images of how far accuracy and confidence of their bin differ."""
        gaps = (self.accuracy - self.confidence).abs().nan_to_num()
        return ((gaps * self.num_images).sum() / self.num_images.sum()).item()

    def figures(self) -> list[dict[str, Any]]:
        """One row for each bin in plain values; None where a bin has no images."""
        rows = zip(*(column.tolist() for column in self), strict=True)
        return [
            {
                "num_images": num,
                "confidence": confidence if num else None,
                "accuracy": accuracy if num else None,
            }
            for num, confidence, accuracy in rows
        ]


@dataclass(frozen=True, eq=False)
class Scores:
    """How good probabilities are; lower is better.

    ece: expected calibration error. nll: negative log-likelihood of the labels in nats, a mean over images. brier: the
    squared distance of the probabilities to the label's, summed over classes, a mean over images from 0 to 2.
    """

    ece: float
    nll: float
    brier: float
    table: Reliability

    def figures(self) -> dict[str, Any]:
        """The scores in plain values."""
        return {"ece": self.ece, "nll": self.nll, "brier": self.brier, "bins": self.table.figures()}


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores on test data before and after the temperature that was fitted on validation data.

    at_limit: whether the temperature is the lowest or the highest that may be found, because the validation data has no
    best one: every image is right there, or the logits say nothing about the labels.
    """

    temperature: float
    at_limit: bool
    before: Scores
    after: Scores

    def figures(self) -> dict[str, Any]:
        """The result in plain values."""
        return {
            "temperature": self.temperature,
            "at_limit": self.at_limit,
            "before": self.before.figures(),
            "after": self.after.figures(),
        }


def calibration(val: Tensor, val_labels: Tensor, test: Tensor, test_labels: Tensor) -> Calibration:
    """Fits a temperature on the logits `val` and scores the logits `test` without and with it.

    val, test: logits [N, C] of one classifier, whose scale is meant: cosines must have been multiplied by the model's
    scale. A class that cannot occur has −inf. labels: int64 [N]. Convention: Guo et al. 2017 (arXiv 1706.04599). Raises
    DataError for logits or labels that cannot be used.

        result = calibration(val_logits, val_labels, test_logits, test_labels)
        result.temperature, result.before.ece, result.after.ece
    """
    found = temperature(val, val_labels)
    return Calibration(
        found,
        found in (COLDEST, HOTTEST),
        scores(test, test_labels),
        scores(test.double() / found, test_labels),
    )


def scores(logits: Tensor, labels: Tensor) -> Scores:
    """Scores of softmax(logits), float64, with 15 bins; logits [N, C], labels int64 [N]."""
    _check(logits, labels)
    log_probabilities = logits.double().log_softmax(1)
    own = log_probabilities.gather(1, labels[:, None])[:, 0]
    probabilities = log_probabilities.exp()
    confidence, predicted = probabilities.max(1)
    table = reliability(confidence, predicted == labels)
    # Σ_j (p_j − y_j)² = Σ_j p_j² − 2 p_label + 1
    brier = (probabilities.square().sum(1) - 2 * own.exp() + 1).mean().item()
    return Scores(table.error, -own.mean().item(), brier, table)


def reliability(confidence: Tensor, hits: Tensor, bins: int = BINS) -> Reliability:
    """The reliability table of highest probabilities [N] and whether each image is right, bool [N].

    Bins have the same width and are closed on the right (Guo et al. 2017, section 2): a probability on the border
    between two bins belongs to the lower one.
    """
    edges = torch.arange(1, bins, dtype=torch.float64) / bins
    place = torch.bucketize(confidence.double(), edges)
    num_images = torch.bincount(place, minlength=bins)
    sums = [torch.bincount(place, weights=each.double(), minlength=bins) for each in (confidence, hits)]
    return Reliability(num_images, sums[0] / num_images, sums[1] / num_images)


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The T from 0.001 to 1000 for which softmax(logits / T) has the lowest negative log-likelihood of the labels.

    In 1 / T the likelihood is convex, and its slope, Σ_j p_j z_j − z_label, rises: T is where the slope is 0, and a
    bound where it has one sign throughout. logits z: [N, C]; labels: int64 [N].

        probabilities = (test_logits / temperature(val_logits, val_labels)).softmax(1)
    """
    _check(logits, labels)
    z = logits.double()
    right = z.gather(1, labels[:, None])[:, 0].mean()
    finite = z.nan_to_num(neginf=0.0)  # where the probability is 0

    def slope(log_temperature: float) -> float:
        probabilities = (z / math.exp(log_temperature)).softmax(1)
        return ((probabilities * finite).sum(1).mean() - right).item()

    low, high = math.log(COLDEST), math.log(HOTTEST)
    if slope(high) >= 0:
        return HOTTEST
    if slope(low) <= 0:
        return COLDEST
    return math.exp(optimize.brentq(slope, low, high, xtol=1e-12))


def _check(logits: Tensor, labels: Tensor) -> None:
    """Raises DataError unless every row has numbers or −inf, and a number for its label."""
    if logits.ndim != 2 or logits.numel() == 0:
        raise DataError(f"calibration: logits [images, classes] are needed, got {list(logits.shape)}")
    check_labels(labels, len(logits), logits.shape[1], "calibration")
    bad = (logits.isnan() | logits.isposinf()).any(1) | ~logits.gather(1, labels[:, None])[:, 0].isfinite()
    rows = bad.nonzero().flatten()
    if len(rows):
        row = int(rows[0])
        raise DataError(
            f"calibration: the logits of {len(rows)} of {len(logits)} images cannot be used, the first is row {row}: "
            f"one is not a number, or that of its label, class {int(labels[row])}, is not finite, as for a class that "
            "had no training image"
        )
