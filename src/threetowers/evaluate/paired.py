"""Whether one of two models is better on the same items: an exact test of their answers, an effect size, and words.

Under the hypothesis that the models are equally good, what they answered to an item may be exchanged. So each item's
difference has either sign with the same probability. The queries of an image are exchanged together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from threetowers.errors import DataError
from threetowers.evaluate.statistics import (
    EQUAL,
    Hits,
    bootstrap_difference,
    directions_of,
    p_value,
    paired_difference,
)

RESAMPLES = 9999
"""Random exchanges where all of them are too many; p is then at least 2 / (RESAMPLES + 1)."""
_BATCH_VALUES = 2**22  # exchanged values in memory at a time: 32 MB


@dataclass(frozen=True)
class Paired:
    """Model a beside model b.

    difference, low, high: of the means, a − b, with its 95 % interval of a bootstrap over images. p: two-sided, that of
    the test, corrected where many were made. wins, losses: items on which a is better than b, and worse. num: items.
    unit: what the items are called.
    """

    difference: float
    low: float
    high: float
    p: float
    wins: int
    losses: int
    num: int
    unit: str = "items"

    def corrected(self, p: float) -> "Paired":
        """The same with a corrected p."""
        return replace(self, p=p)

    def shown(self, level: float = 0.05) -> bool:
        """Whether the models differ at a level of significance."""
        return self.p < level

    def in_words(self, a: str, b: str, tests: int = 1) -> str:
        """The comparison as a sentence. a, b: what the models are called. tests: for how many p is corrected.

        'lit is better than baseline by 3.1 points (95 % 1.2 to 5.0): of the 53 items on which they differ it wins 42
        (p = 0.0003)'
        """
        if not self.wins + self.losses:
            return f"{a} and {b} are equal on each of {self.num:,} {self.unit}"
        ahead = self.difference > 0 or (self.difference == 0 and self.wins >= self.losses)
        first, second = (a, b) if ahead else (b, a)
        wins = self.wins if ahead else self.losses
        low, high = (self.low, self.high) if ahead else (-self.high, -self.low)
        between = f"95 % {100 * low:.1f} to {100 * high:.1f}"
        verdict = (
            f"{first} is better than {second} by {100 * abs(self.difference):.1f} points ({between})"
            if self.shown()
            else f"no difference between {first} and {second} is shown: {first} is {100 * abs(self.difference):.1f} "
            f"points ahead ({between})"
        )
        decided = self.wins + self.losses
        unit = self.unit.removesuffix("s") if decided == 1 else self.unit
        many = f", corrected for {tests} tests" if tests > 1 else ""
        return f"{verdict}; {first} wins {wins:,} of the {decided:,} {unit} on which they differ ({_p(self.p)}{many})"


def compare_paired(a: Hits, b: Hits, *, images: Hits | None = None) -> Paired:
    """Compares two models by their answers to the same items.

    a, b: of each item 1 for a right answer and 0 for a wrong one, or any values whose mean is the metric. images: as in
    `statistics.bootstrap_interval`; None: items are independent. With one right or wrong answer an image the test is
    McNemar's exact one (Psychometrika 12, 1947). Otherwise signs are exchanged by image, in all ways where these are
    few and in 9,999 random ways where they are many. Raises DataError for answers to different items and for fewer than
    two images.

        compare_paired(a.hits(1), b.hits(1), images=a.images()).p
    """
    interval = bootstrap_difference(a, b, images=images)
    sides = [
        first - second for first, second in zip(directions_of(a, "a"), directions_of(b, "b"), strict=True)
    ]
    wins, losses = (sum(int((sign * side > 0).sum()) for side in sides) for sign in (1, -1))
    num = sum(len(side) for side in sides)
    groups = None if images is None else directions_of(images, "images")
    p = sign_test(_by_image(sides, groups))
    return Paired(interval.mean, interval.low, interval.high, p, wins, losses, num)


def compare_seeds(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Compares two methods by their values over seeds, of which each has one of both.

    The test and the interval are Student's t of the differences. Raises DataError for fewer than two seeds, and for
    lists of different lengths.
    """
    interval = paired_difference(a, b)
    each = (np.asarray(a) - np.asarray(b)).tolist()
    p = min(p_value(each, side="above"), p_value(each, side="below"))
    wins, losses = (sum(sign * value > EQUAL for value in each) for sign in (1, -1))
    return Paired(interval.mean, interval.low, interval.high, p, wins, losses, len(each), "seeds")


def sign_test(differences: NDArray[np.float64]) -> float:
    """Two-sided p of the hypothesis that each difference has either sign with the same probability.

    differences: one of each independent item. Where those that are not 0 have one size it is the binomial test of their
    signs. Raises DataError for values that are not finite.
    """
    if not np.isfinite(differences).all():
        raise DataError("differences: finite numbers are needed")
    sizes = np.abs(differences)
    moved = differences[sizes > EQUAL * sizes.max(initial=0.0)]
    if not len(moved):
        return 1.0
    sizes = np.abs(moved)
    if np.ptp(sizes) < EQUAL * sizes[0]:
        return float(stats.binomtest(int((moved > 0).sum()), len(moved)).pvalue)
    result = stats.permutation_test(
        (moved,),
        _total,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=max(1, _BATCH_VALUES // len(moved)),
        random_state=np.random.default_rng(0),
    )
    return float(result.pvalue)


def _total(values: NDArray[np.float64], axis: int = -1) -> Any:
    return values.sum(axis=axis)


def _by_image(
    sides: list[NDArray[np.float64]], images: list[NDArray[np.float64]] | None
) -> NDArray[np.float64]:
    """What each image adds to the mean of the directions' mean differences."""
    shares = [side / (len(side) * len(sides)) for side in sides]
    if images is None:
        return np.concatenate(shares)
    _, place = np.unique(np.concatenate(images), return_inverse=True)
    return np.bincount(place, weights=np.concatenate(shares)).astype(np.float64)


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
