"""Confidence intervals and tests: Student's t over seeds and, where there is one seed, a bootstrap over queries.

A bootstrap over queries shows the variation over test images. It does not include the variation between training runs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from threetowers.errors import DataError

Hits = ArrayLike | tuple[ArrayLike, ArrayLike]
"""One value per query, or a tuple of two such arrays, image→text and text→image."""

Side = Literal["above", "below"]
"""The side of a bound on which a claim puts a mean."""

EQUAL = 1e-9
"""Values that are nearer to each other than this are equal, and differ by rounding alone."""
_BATCH_VALUES = 2**22  # resampled values in memory at a time: 32 MB


class Interval(NamedTuple):
    """A mean, its confidence interval and the number of independent values behind it (seeds, images or queries)."""

    mean: float
    low: float
    high: float
    num: int


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Student's two-sided confidence interval for the mean of independent values: mean, low end, high end.

    Equal values give an interval of width 0. Raises DataError for fewer than two values and for one that is not finite.

        mean, low, high = t_interval([0.31, 0.33, 0.32])
    """
    array = _vector(values, "values")
    if len(array) < 2:
        raise DataError(
            f"a t-interval needs at least 2 values, got {len(array)}: add seeds, or take a bootstrap over queries"
        )
    offsets = (
        array - array[0]
    )  # exact zeros for equal values, where a plain mean would leave a rounding error
    mean = float(array[0] + offsets.mean())
    spread = float(offsets.std(ddof=1))
    half = float(stats.t.ppf(0.5 + level / 2, len(array) - 1)) * spread / len(array) ** 0.5
    return mean, mean - half, mean + half


def paired_difference(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """t-interval of a − b, where a[i] and b[i] share the seed, the data and the steps, and differ in the method.

    Raises DataError for lists of different lengths, and as `t_interval` does.
    """
    first, second = _vector(a, "a"), _vector(b, "b")
    if len(first) != len(second):
        raise DataError(
            f"a paired difference needs one value of each per seed, got {len(first)} and {len(second)}"
        )
    difference = first - second
    return Interval(*t_interval(difference.tolist(), level), num=len(difference))


def bootstrap_interval(
    hits: Hits,
    *,
    images: Hits | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of the mean of `hits`; of two directions, of the mean of both means.

    images: the image of each query, in the shapes of `hits`. Images are then resampled with all their queries in both
    directions. Without it queries are treated as independent, and the interval is too narrow where an image has several
    captions or both directions are averaged. Raises DataError for shapes that do not fit, and for fewer than two
    queries or images.

        bootstrap_interval(ranks.hits(), images=ranks.images())
    """
    directions = directions_of(hits, "hits")
    if images is None:
        data, statistic = directions, _mean_of_means
        num = sum(len(values) for values in directions)
    else:
        data, statistic = _per_image(directions, directions_of(images, "images")), _mean_of_ratios
        num = len(data[0])
    if min(len(values) for values in data) < 2:
        raise DataError("a bootstrap needs at least 2 queries (or images) to draw from")
    interval = stats.bootstrap(
        data,
        statistic,
        paired=images is not None,
        n_resamples=num_resamples,
        batch=max(1, _BATCH_VALUES // max(len(values) for values in data)),
        confidence_level=level,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(statistic(*data)), float(interval.low), float(interval.high), num)


def bootstrap_difference(
    hits_a: Hits,
    hits_b: Hits,
    *,
    images: Hits | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Bootstrap interval of a − b over the same queries; each resample holds the answers of both systems to a query.

    Arguments and errors as in `bootstrap_interval`. The hits of both systems have the same shapes.
    """
    a, b = directions_of(hits_a, "hits_a"), directions_of(hits_b, "hits_b")
    if [len(values) for values in a] != [len(values) for values in b]:
        raise DataError(
            f"hits_a and hits_b must answer the same queries, got {[len(values) for values in a]} and "
            f"{[len(values) for values in b]}"
        )
    differences = [first - second for first, second in zip(a, b, strict=True)]
    paired = differences[0] if len(differences) == 1 else (differences[0], differences[1])
    return bootstrap_interval(paired, images=images, num_resamples=num_resamples, seed=seed, level=level)


def p_value(values: Sequence[float], bound: float = 0.0, side: Side = "above") -> float:
    """p of the t test that the mean of independent values lies on a side of a bound.

    It is twice the one-sided p, at most 1, and so below 0.05 exactly when the 95 % `t_interval` lies on that side. With
    a bound of minus a margin it is a test of non-inferiority (ICH E9, 1998, section 3.3.2). Equal values have no spread
    to compare the mean with, and give 1. Raises DataError for fewer than two values and for one that is not finite.

        p_value([0.01, -0.005, 0.02], bound=-0.02)  # the differences are not worse than −2 points
    """
    array = _vector(values, "values")
    if len(array) < 2:
        raise DataError(f"a t test needs at least 2 values, got {len(array)}: add seeds")
    if np.ptp(array) < EQUAL:
        return 1.0
    t = float((array.mean() - bound) / array.std(ddof=1)) * len(array) ** 0.5
    return min(1.0, 2 * float(special.stdtr(len(array) - 1, -t if side == "above" else t)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the order given; the chance of any wrong rejection stays below the level.

    The smallest of m is multiplied by m, the next by m − 1, and so on; none is below one that was smaller (Holm, 1979,
    Scandinavian Journal of Statistics 6). Raises DataError for a value outside 0 to 1.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise DataError(f"p-values from 0 to 1 are needed, got {list(p_values)}")
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def doubling_slopes(factors: Mapping[str, Sequence[float]], values: Sequence[float]) -> dict[str, float]:
    """How much the values grow with each doubling of each factor: one least-squares fit over all factors' logarithms.

    A factor that has the same value everywhere has no slope. Raises DataError for factors that are not above 0, for
    lists of different lengths, and for factors that vary only together, whose slopes cannot be told apart.

        doubling_slopes({"size": [1, 2, 1, 2], "data": [1, 1, 2, 2]}, gaps)["size"]
    """
    response = _vector(values, "values")
    columns = {name: _vector(factor, name) for name, factor in factors.items()}
    for name, column in columns.items():
        if len(column) != len(response) or not (column > 0).all():
            raise DataError(f"{name}: {len(response)} numbers above 0 are needed, one for each value")
    varied = {name: np.log2(column) for name, column in columns.items() if np.ptp(column) > 0}
    design = np.column_stack([np.ones(len(response)), *varied.values()])
    solution, _, rank, _ = np.linalg.lstsq(design, response, rcond=None)
    if rank < design.shape[1]:
        raise DataError(f"{' and '.join(varied)} vary only together: vary one while the other stays")
    return dict(zip(varied, solution[1:].tolist(), strict=True))


def directions_of(hits: Hits, name: str) -> list[NDArray[np.float64]]:
    """The values of each direction as an array; raises DataError for what is no list of finite numbers."""
    return [_vector(values, name) for values in (hits if isinstance(hits, tuple) else (hits,))]


def _vector(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise DataError(f"{name}: a non-empty list of numbers is needed, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise DataError(
            f"{name}: row {int(np.argmin(np.isfinite(array)))} is not finite; a run may have diverged"
        )
    return array


def _per_image(
    directions: list[NDArray[np.float64]], images: list[NDArray[np.float64]]
) -> list[NDArray[Any]]:
    """[sums, counts, sums, counts] of the queries' values, by direction; every array is [number of images]."""
    if [len(values) for values in directions] != [len(ids) for ids in images]:
        raise DataError(
            f"images: one index per query is needed, {[len(values) for values in directions]} queries have "
            f"{[len(ids) for ids in images]}"
        )
    known = np.unique(images[0])
    data: list[NDArray[Any]] = []
    for values, ids in zip(directions, images, strict=True):
        if not np.array_equal(np.unique(ids), known):
            raise DataError("images: both directions must have queries of the same images")
        place = np.searchsorted(known, ids)
        data += [np.bincount(place, weights=values), np.bincount(place)]
    return data


def _mean_of_means(*directions: NDArray[np.float64], axis: int = -1) -> Any:
    return sum(values.mean(axis=axis) for values in directions) / len(directions)


def _mean_of_ratios(*sums_and_counts: NDArray[np.float64], axis: int = -1) -> Any:
    sums, counts = sums_and_counts[0::2], sums_and_counts[1::2]
    ratios = [total.sum(axis=axis) / count.sum(axis=axis) for total, count in zip(sums, counts, strict=True)]
    return sum(ratios) / len(ratios)
