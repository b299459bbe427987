"""Ridge regression on frozen features: how much of a label can be read from them by a linear map.

Legend: N images, F width of the features, C classes.
"""

import torch
from torch import Tensor

from threetowers.errors import DataError

PENALTY = 2.0**10
BIAS = 100.0


def ridge(features: Tensor, labels: Tensor, num_classes: int, penalty: float = PENALTY) -> "RidgeClassifier":
    """A classifier by least squares in closed form, float64.

    features [N, F] are whitened by their own mean and standard deviation, and a constant feature of 100 is the bias;
    the targets are 1 for the class and -1 for the others. labels: int64 [N]. Convention: big_vision's `fewshot_lsr`,
    which few-shot figures of LiT and 3T are measured with. Raises DataError for no samples and labels out of range.

        ridge(train, train_labels, 10).accuracy(test, test_labels)
    """
    if not len(features) or len(features) != len(labels):
        raise DataError(f"ridge regression: {len(features)} features and {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(f"ridge regression: labels must be from 0 to {num_classes - 1}")
    x = features.double()
    mean, std = x.mean(0), x.std(0, correction=0) + 1e-5
    x = _with_bias((x - mean) / std)
    y = 2 * torch.nn.functional.one_hot(labels, num_classes).double() - 1
    if len(x) >= x.shape[1]:
        weights = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    else:  # the same map through the N × N system, which is the smaller one
        weights = x.T @ torch.linalg.solve(x @ x.T + penalty * torch.eye(len(x), dtype=x.dtype), y)
    return RidgeClassifier(mean, std, weights)


class RidgeClassifier:
    """What `ridge` fitted. mean, std: [F]. weights: [F + 1, C], the last row that of the bias."""

    def __init__(self, mean: Tensor, std: Tensor, weights: Tensor) -> None:
        self.mean, self.std, self.weights = mean, std, weights

    def scores(self, features: Tensor) -> Tensor:
        """Float64 [N, C] of features [N, F]."""
        return _with_bias((features.double() - self.mean) / self.std) @ self.weights

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of features [N, F] whose highest score is that of their label, int64 [N]."""
        return (self.scores(features).argmax(1) == labels).double().mean().item()


def _with_bias(x: Tensor) -> Tensor:
    return torch.cat([x, torch.full((len(x), 1), BIAS, dtype=x.dtype)], dim=1)
