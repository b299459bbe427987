"""Labelled features, their standardisation, and ridge regression on them: how much of a label a linear map can read.

Legend: N images, F width of the features, C classes.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from threetowers.errors import DataError
from threetowers.evaluate.retrieval import check_features

PENALTY = 2.0**10
BIAS = 100.0


class Samples(NamedTuple):
    """Features [N, F] of images, and the class of each image, int64 [N]."""

    features: Tensor
    labels: Tensor


def check_parts(parts: Mapping[str, Samples], num_classes: int) -> None:
    """Raises DataError unless the parts, by name, have finite features of one width and a right label for each."""
    width = None
    for name, part in parts.items():
        check_features(part.features, f"{name} features")
        check_labels(part.labels, len(part.features), num_classes, name)
        width = width or part.features.shape[1]
        if part.features.shape[1] != width:
            raise DataError(
                f"{name} features are {part.features.shape[1]} wide, the {next(iter(parts))} features {width}: "
                "take both from one tower"
            )


def check_labels(labels: Tensor, num: int, num_classes: int, what: str) -> None:
    """Raises DataError unless there is one label for each of `num` images, int64 from 0 to num_classes − 1."""
    if labels.dtype != torch.int64 or labels.shape != (num,):
        raise DataError(
            f"{what} labels: one class index per image is needed, int64 [{num}], "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{what} labels: row {row} has class {int(labels[row])}, labels must be from 0 to {num_classes - 1}; "
            "leave out images without a label"
        )


class Standardiser(NamedTuple):
    """What makes every feature of the rows it was fitted on have mean 0 and standard deviation 1. mean, std: [F]."""

    mean: Tensor
    std: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Float64 [N, F] of features [N, F]."""
        return (features.double() - self.mean) / self.std


def standardiser(features: Tensor) -> Standardiser:
    """Fitted on features [N, F], float64. The 1e-5 on every standard deviation is big_vision's (`fewshot_lsr`)."""
    x = features.double()
    return Standardiser(x.mean(0), x.std(0, correction=0) + 1e-5)


def unchanged(width: int) -> Standardiser:
    """Leaves features of this width as they are: for features that are standardised already."""
    return Standardiser(torch.zeros(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64))


def ridge(
    features: Tensor, labels: Tensor, num_classes: int, penalty: float = PENALTY, *, standardise: bool = True
) -> "RidgeClassifier":
    """A classifier by least squares in closed form, float64.

    features [N, F] are standardised by their own mean and standard deviation, and a constant feature of 100 is the
    bias; the targets are 1 for the class and -1 for the others. labels: int64 [N]. Convention: big_vision's
    `fewshot_lsr`, which few-shot figures of LiT and 3T are measured with. standardise: False for features whose scales
    are meant, such as those of `few_shot.joined`. Raises DataError for no samples and labels out of range.

        ridge(train, train_labels, 10).accuracy(test, test_labels)
    """
    if not len(features) or len(features) != len(labels):
        raise DataError(f"ridge regression: {len(features)} features and {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(f"ridge regression: labels must be from 0 to {num_classes - 1}")
    scale = standardiser(features) if standardise else unchanged(features.shape[1])
    x = _with_bias(scale(features))
    y = 2 * torch.nn.functional.one_hot(labels, num_classes).double() - 1
    if len(x) >= x.shape[1]:
        weights = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    else:  # the same map through the N × N system, which is the smaller one
        weights = x.T @ torch.linalg.solve(x @ x.T + penalty * torch.eye(len(x), dtype=x.dtype), y)
    return RidgeClassifier(scale, weights)


class RidgeClassifier:
    """What `ridge` fitted. scale: applied to features first. weights: [F + 1, C], the last row that of the bias."""

    def __init__(self, scale: Standardiser, weights: Tensor) -> None:
        self.scale, self.weights = scale, weights

    def scores(self, features: Tensor) -> Tensor:
        """Float64 [N, C] of features [N, F]."""
        return _with_bias(self.scale(features)) @ self.weights

    def hits(self, features: Tensor, labels: Tensor) -> Tensor:
        """Whether the highest score of each image is that of its label, bool [N]; the lower class wins a tie."""
        return self.scores(features).argmax(1) == labels

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of features [N, F] whose highest score is that of their label, int64 [N]."""
        return self.hits(features, labels).double().mean().item()


def _with_bias(x: Tensor) -> Tensor:
    return torch.cat([x, torch.full((len(x), 1), BIAS, dtype=x.dtype)], dim=1)
