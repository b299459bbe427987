"""Linear probe: multinomial logistic regression on frozen features, by L-BFGS in float64.

The strength of the regularisation is chosen on validation data, along a logarithmic grid that grows at an end as long
as its best value lies there.

Legend: N images, F width of the features, C classes, K classes that have training images.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from torch import Tensor

from threetowers.evaluate.ridge import Samples, Standardiser, check_parts, standardiser, unchanged
from threetowers.evaluate.zero_shot import per_class_accuracy
from threetowers.progress import warn

_STEPS = 2  # of the grid, for each power of ten
_FIRST = range(-4 * _STEPS, -1 * _STEPS + 1)
_LOWEST, _HIGHEST = -6 * _STEPS, 6 * _STEPS
_TOLERANCE = 1e-10
_ROUGH_TOLERANCE = 1e-6  # while the regularisation is chosen, by whole images and not by probabilities
_MOST_STEPS = 10_000


@dataclass(frozen=True, eq=False)
class Logistic:
    """A fitted logistic regression. scale: applied to features first. weights: [F + 1, C], the last row the biases."""

    scale: Standardiser
    weights: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Float64 [N, C] of features [N, F]; −inf for classes that had no training image."""
        return torch.addmm(self.weights[-1], self.scale(features), self.weights[:-1])

    def hits(self, samples: Samples) -> Tensor:
        """Whether the highest logit of each image is that of its label, bool [N]; the lower class wins a tie."""
        return self.logits(samples.features).argmax(1) == samples.labels


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear probe and its test result.

    inverse_penalty: the chosen value, scikit-learn's `C`. path: validation accuracy by value, rising. at_limit: whether
    the chosen value is the lowest or the highest that may be tried, so that a better one may lie beyond it. chosen:
    fitted with it on the training data alone; a temperature for its logits can be fitted on validation data. final:
    fitted with it on training and validation data together. logits [N, C], hits [N] and the accuracies are those of
    `final` on test data; `mean_per_class` is over the classes that have a test image.
    """

    inverse_penalty: float
    path: Mapping[float, float]
    at_limit: bool
    chosen: Logistic = field(repr=False)
    final: Logistic = field(repr=False)
    logits: Tensor = field(repr=False)
    hits: Tensor = field(repr=False)
    accuracy: float
    mean_per_class: float

    def figures(self) -> dict[str, Any]:
        """The result in plain values."""
        return {
            "accuracy": self.accuracy,
            "mean_per_class": self.mean_per_class,
            "inverse_penalty": self.inverse_penalty,
            "at_limit": self.at_limit,
            "path": [list(point) for point in self.path.items()],
        }


def linear_probe(
    train: Samples, val: Samples, test: Samples, num_classes: int, *, standardise: bool = True
) -> LinearProbe:
    """Chooses the regularisation on `val`, fits again on `train` and `val` together, and tests on `test`.

    The value with the highest validation accuracy is chosen, the strongest regularisation winning a tie. The grid has
    two values for each power of ten, from 1e-4 to 1e-1 at first and within 1e-6 and 1e6 at last. Each fit starts from
    its neighbour's. Convention: CLIP (arXiv 2103.00020, appendix A.3) and CLIP_benchmark, which choose by accuracy
    within about these bounds and fit the last time on both parts; they do not standardise features. standardise: False
    for features whose scales are meant, such as those of `few_shot.joined`. Raises DataError for features or labels
    that cannot be used.

        result = linear_probe(Samples(train, train_labels), Samples(val, val_labels), Samples(test, test_labels), 10)
        result.accuracy, result.inverse_penalty
    """
    check_parts({"training": train, "validation": val, "test": test}, num_classes)
    fitted: dict[int, Logistic] = {}
    right: dict[int, int] = {}
    pending = list(_FIRST)
    while pending:
        for step in pending:
            start = fitted[min(fitted, key=lambda done: abs(done - step))] if fitted else None
            fitted[step] = fit_logistic(
                train, num_classes, _value(step), start, _ROUGH_TOLERANCE, standardise=standardise
            )
            right[step] = int(fitted[step].hits(val).sum())
        best = max(sorted(right), key=lambda step: right[step])
        pending = [step for step in (best - 1, best + 1) if _LOWEST <= step <= _HIGHEST and step not in right]
    chosen = fit_logistic(train, num_classes, _value(best), fitted[best], standardise=standardise)
    both = Samples(torch.cat([train.features, val.features]), torch.cat([train.labels, val.labels]))
    final = fit_logistic(both, num_classes, _value(best), chosen, standardise=standardise)
    logits = final.logits(test.features)
    hits = logits.argmax(1) == test.labels
    return LinearProbe(
        _value(best),
        {_value(step): right[step] / len(val.labels) for step in sorted(right)},
        best in (_LOWEST, _HIGHEST),
        chosen,
        final,
        logits,
        hits,
        hits.double().mean().item(),
        per_class_accuracy((~hits).long(), test.labels, num_classes).nanmean().item(),
    )


def fit_logistic(
    samples: Samples,
    num_classes: int,
    inverse_penalty: float,
    start: Logistic | None = None,
    tolerance: float = _TOLERANCE,
    *,
    standardise: bool = True,
) -> Logistic:
    """Minimises inverse_penalty · Σ_i −log softmax(x_i W + b)[y_i] + ½ ‖W‖², x_i the standardised features of image i.

    The biases b are not regularised. This is the objective of scikit-learn's `LogisticRegression(C=inverse_penalty)`;
    for two classes it has one vector of weights, the difference of ours, and ‖W‖² is doubled to give its probabilities.
    start: what the search starts from. tolerance: of the largest entry of the gradient of the objective divided by
    inverse_penalty · N. Samples must have been checked by `ridge.check_parts`.
    """
    scale = standardiser(samples.features) if standardise else unchanged(samples.features.shape[1])
    x = scale(samples.features)
    present, target = samples.labels.unique(return_inverse=True)
    strength = (2.0 if len(present) == 2 else 1.0) / (inverse_penalty * len(x))
    shape = (x.shape[1] + 1, len(present))
    rows = torch.arange(len(x))
    # The search is for U = Lᵀ W, with L Lᵀ about the curvature of the loss, which takes half as many steps as for W.
    curvature = x.T @ x / (4 * len(x)) + strength * torch.eye(x.shape[1], dtype=x.dtype)
    factor = torch.linalg.cholesky(curvature)

    def loss_and_gradient(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        point = torch.from_numpy(flat).view(shape)
        weights = torch.linalg.solve_triangular(factor.T, point[:-1], upper=True)
        log_probabilities = torch.addmm(point[-1], x, weights).log_softmax(1)
        loss = 0.5 * strength * weights.square().sum() - log_probabilities[rows, target].mean()
        # the gradient of the mean loss with respect to the logits
        residual = log_probabilities.exp_()
        residual[rows, target] -= 1
        residual /= len(x)
        by_weights = torch.addmm(strength * weights, x.T, residual)
        gradient = torch.linalg.solve_triangular(factor, by_weights, upper=False)
        return loss.item(), torch.cat([gradient, residual.sum(0)[None]]).flatten().numpy()

    first = torch.zeros(shape, dtype=x.dtype)
    if start is not None:  # a class that it had no image of has the bias −inf there
        known = start.weights[:, present].nan_to_num(neginf=0.0)
        first = torch.cat([factor.T @ known[:-1], known[-1:]])
    found = optimize.minimize(
        loss_and_gradient,
        first.flatten().numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"gtol": tolerance, "ftol": 0.0, "maxiter": _MOST_STEPS, "maxfun": 2 * _MOST_STEPS},
    )
    if found.nit >= _MOST_STEPS or found.nfev >= 2 * _MOST_STEPS:
        warn(f"linear probe: no convergence at inverse penalty {inverse_penalty:g} in {found.nit} steps")
    point = torch.from_numpy(found.x).view(shape)
    weights = torch.zeros(shape[0], num_classes, dtype=x.dtype)
    weights[-1] = -torch.inf
    weights[:-1, present] = torch.linalg.solve_triangular(factor.T, point[:-1], upper=True)
    weights[-1, present] = point[-1]
    return Logistic(scale, weights)


def _value(step: int) -> float:
    return float(10 ** (step / _STEPS))
