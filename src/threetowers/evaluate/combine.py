"""The convex combination of two systems: the main pair and the frozen tower read through the text tower's head.

In score space s_α(I, T) = (1−α) f(I)·g(T) + α h_g(I)·g_h(T) (arXiv 2305.16999, figure 5, which leaves the space open).
α = 0 is the main pair alone; α > 0 costs the frozen tower's forward pass at inference.
The same functions combine any two models, for example a baseline and a LiT, to tell the method from plain ensembling.

Legend: N images, M texts, D and E the widths of the two systems.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from threetowers.errors import DataError, UsageError
from threetowers.evaluate.retrieval import BLOCK, Ranks, System, combined_ranks, recalls

ALPHAS = tuple(step / 20 for step in range(21))


class Pair(NamedTuple):
    """Two systems on the same images and texts, and the image that each text describes, int64 [M]."""

    main: System
    side: System
    text_image: Tensor


@dataclass(frozen=True, eq=False)
class Sweep:
    """`mean_r@1` over a grid of α on validation and on test data, and the α that validation chose.

    alphas, val, test: one value per grid point. ranks: the test ranks of every grid point, for a bootstrap.
    """

    alphas: tuple[float, ...]
    val: tuple[float, ...]
    test: tuple[float, ...]
    ranks: tuple[Ranks, ...] = field(repr=False)

    @property
    def index(self) -> int:
        """Place of the chosen α in the grid: the first maximum on validation, so ties go to the smallest α."""
        return self.val.index(max(self.val))

    @property
    def alpha(self) -> float:
        return self.alphas[self.index]

    @property
    def chosen(self) -> float:
        """Test `mean_r@1` at the chosen α."""
        return self.test[self.index]

    @property
    def ends(self) -> tuple[float, float]:
        """Test `mean_r@1` of the main system (α = 0) and of the side system (α = 1), each alone."""
        return self.test[0], self.test[-1]


def concat(main: Tensor, side: Tensor, alpha: float) -> Tensor:
    """The one-index form [√(1−α) main ; √α side], unit vectors float32 [N, D + E] from [N, D] and [N, E].

    Applied to images and to texts alike, its dot products are the scores s_α, so one nearest-neighbour index serves.
    Raises UsageError for α outside [0, 1], DataError for differing row counts.
    """
    _check_alphas([alpha])
    if len(main) != len(side):
        raise DataError(f"concat: {len(main)} and {len(side)} rows; both systems must describe the same data")
    return torch.cat([math.sqrt(1 - alpha) * main.float(), math.sqrt(alpha) * side.float()], dim=-1)


def sweep(val: Pair, test: Pair, alphas: Sequence[float] = ALPHAS, block: int = BLOCK) -> Sweep:
    """Retrieval with s_α for every α of a rising grid from 0 to 1; α is chosen on `val` and reported on `test`.

    At the two ends the result equals the retrieval of each system alone, exactly. Raises UsageError for a grid that
    does not rise from 0 to 1, DataError as `retrieval.ranks_from_features` does.

        result = sweep(Pair(System(f, g), System(h, g_h), text_image), test)
        result.alpha, result.chosen, result.ends
    """
    grid = tuple(float(alpha) for alpha in alphas)
    _check_alphas(grid)
    if sorted(set(grid)) != list(grid) or grid[:1] != (0.0,) or grid[-1:] != (1.0,):
        raise UsageError(f"alphas: a grid that rises from 0 to 1 is needed, got {list(grid)}")
    ranks = combine(test, grid, block)
    return Sweep(grid, _mean_recalls(combine(val, grid, block)), _mean_recalls(ranks), tuple(ranks))


def combine(pair: Pair, alphas: Sequence[float], block: int = BLOCK) -> list[Ranks]:
    """Ranks with s_α for every α; both systems' scores are computed once for all of them."""
    _check_alphas(alphas)
    weightings = [(1 - alpha, alpha) for alpha in alphas]
    return combined_ranks([pair.main, pair.side], weightings, pair.text_image, block)


class Moments(NamedTuple):
    """Mean and population standard deviation of each feature over a training set, float32 [D] each."""

    mean: Tensor
    std: Tensor


def moments(features: Tensor) -> Moments:
    """Moments of features [N, D] over their rows, summed in fp64."""
    exact = features.double()
    return Moments(exact.mean(dim=0).float(), exact.std(dim=0, correction=0).float())


def weighted_features(a: Tensor, b: Tensor, alpha: float, a_moments: Moments, b_moments: Moments) -> Tensor:
    """Features for image-only tasks (few-shot, probe), float32 [N, D + E]: each standardised, then √(1−α) and √α.

    The moments are those of the training images, for training and test features alike. The weights follow the
    standardising, which would cancel them. A standardised feature's squared norm is about its width, so the wider
    feature weighs more at the same α. Raises UsageError for α outside [0, 1].
    """
    return concat(
        (a.float() - a_moments.mean) / (a_moments.std + 1e-5),
        (b.float() - b_moments.mean) / (b_moments.std + 1e-5),
        alpha,
    )


def _mean_recalls(ranks: Sequence[Ranks]) -> tuple[float, ...]:
    return tuple(recalls(each, ks=(1,))["mean_r@1"] for each in ranks)


def _check_alphas(alphas: Sequence[float]) -> None:
    outside = [alpha for alpha in alphas if not 0 <= alpha <= 1]
    if outside:
        raise UsageError(f"alpha: a weight from 0 to 1 is needed, got {outside[0]}")
