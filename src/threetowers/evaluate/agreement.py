"""Where two systems are right and wrong on the same queries, and what can be gained by having both.

Two systems can have the same accuracy and make different mistakes. Then each can help the other, and a combination can
be better than both. Where their mistakes are the same, nothing can be gained.

Legend: Q queries, C classes. Right and wrong are bool [Q]; the first system is the one that would be used alone.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from threetowers.errors import DataError
from threetowers.evaluate.statistics import Interval, bootstrap_difference, bootstrap_interval

LEAST_RUNS = 3
"""Runs below which nothing is said about a correlation over runs."""
_RESAMPLES = 2000


class Counts(NamedTuple):
    """How many queries both systems answer right, only the first, only the second, and neither."""

    both: int
    first: int
    second: int
    neither: int

    @property
    def num(self) -> int:
        return sum(self)

    def kappa(self) -> float | None:
        """Error consistency; see `error_consistency`."""
        value = float(error_consistency(*(np.array(count) for count in self)))
        return None if np.isnan(value) else value

    def rescued(self) -> float | None:
        """Share of the first system's misses that the second answers right; None where the first misses nothing."""
        misses = self.second + self.neither
        return self.second / misses if misses else None

    def either(self) -> float:
        """Accuracy of who always picked the system that is right, if one is: a bound on choosing between the two."""
        return (self.num - self.neither) / self.num


class Correlation(NamedTuple):
    """Pearson's r over `num` pairs of values, with its 95 % interval, which fewer than 4 pairs do not have."""

    r: float
    low: float | None
    high: float | None
    num: int


def count(first: ArrayLike, second: ArrayLike) -> Counts:
    """Counts right and wrong answers of two systems to the same queries, bool [Q] each.

    Raises DataError for no queries, for shapes that differ, and for values that are not bool.

        count(main.hits()[0], frozen.hits()[0]).kappa()
    """
    a, b = _answers(first, second)
    return Counts(*(int(cell.sum()) for cell in (a & b, a & ~b, ~a & b, ~a & ~b)))


def error_consistency(
    both: NDArray[Any], first: NDArray[Any], second: NDArray[Any], neither: NDArray[Any]
) -> NDArray[np.float64]:
    """How much more often two systems are right and wrong together than two independent ones of their accuracies.

    κ = (c_obs − c_exp) / (1 − c_exp), where c_obs is the share of queries that both answer right or both wrong, and
    c_exp = p₁p₂ + (1 − p₁)(1 − p₂) with the accuracies p₁ and p₂ (Geirhos et al. 2020, arXiv 2006.16736).
    It is Cohen's κ of right and wrong. 1: the same mistakes. 0: as independent systems. Below 0: each is right where
    the other is wrong. NaN where both are right, or both wrong, everywhere. The counts may have any shape.
    """
    num = both + first + second + neither
    p, q = (both + first) / num, (both + second) / num
    observed, expected = (both + neither) / num, p * q + (1 - p) * (1 - q)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected < 1, (observed - expected) / (1 - expected), np.nan)


def agreement(
    first: ArrayLike,
    second: ArrayLike,
    *,
    combined: ArrayLike | None = None,
    images: ArrayLike | None = None,
) -> dict[str, Any]:
    """The agreement of two systems as analysis.json holds it.

    first, second, combined: bool [Q], which queries each system and their combination answer right. images: int [Q],
    the image of each query; all queries of an image are resampled together. Intervals are 95 % bootstraps over images,
    and None where there is one image only or where a share has nothing below its line. Raises as `count` does.

    Keys: the four counts · `accuracy` of first, second, either and combined · `kappa`, `rescued` and `either` with
    mean, low, high and num · of a combination `gain` (combined − first, with its interval), `gain_over_better`
    (combined − the better one) and `kept`, its right answers among the four counts. A sum of scores can find what
    neither system finds alone, so that `either` is no strict bound on it.
    """
    a, b = _answers(first, second)
    groups = np.arange(len(a)) if images is None else np.asarray(images)
    if groups.shape != a.shape:
        raise DataError(f"images: one image per query is needed, got {groups.shape} for {len(a)} queries")
    counts = count(a, b)
    figures: dict[str, Any] = counts._asdict() | {
        "accuracy": {"first": float(a.mean()), "second": float(b.mean()), "either": counts.either()},
        "kappa": _kappa(a, b, groups),
        "rescued": _interval(b[~a], groups[~a]) if not a.all() else None,
        "either": _interval(a | b, groups),
    }
    if combined is not None:
        c = _answers(combined, a)[0]
        figures["accuracy"]["combined"] = float(c.mean())
        figures["gain_over_better"] = float(c.mean() - max(a.mean(), b.mean()))
        figures["gain"] = _interval(c, groups, minus=a)
        cells = {"both": a & b, "first": a & ~b, "second": ~a & b, "neither": ~a & ~b}
        figures["kept"] = {name: int((c & cell).sum()) for name, cell in cells.items()}
    return figures


def by_class(
    first: ArrayLike, second: ArrayLike, labels: ArrayLike, class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """The four counts of every class that has a query, in the order of the classes: `class` and the counts.

    labels: int [Q], the class of each query. Raises DataError for labels that name no class, and as `count` does.
    """
    a, b = _answers(first, second)
    classes = np.asarray(labels)
    if classes.shape != a.shape or classes.min() < 0 or classes.max() >= len(class_names):
        raise DataError(
            f"labels: one class from 0 to {len(class_names) - 1} is needed for each of {len(a)} queries"
        )
    return [
        {"class": class_names[label], **count(a[classes == label], b[classes == label])._asdict()}
        for label in np.unique(classes).tolist()
    ]


def telling(right: ArrayLike, wrong: ArrayLike, images: ArrayLike, num: int) -> list[int]:
    """The queries that tell two systems apart most: one system answers right, and the other is furthest from it.

    right, wrong: int [Q], the ranks of the two systems; 0 is a right answer. images: int [Q], of which each is taken
    once. Returns at most `num` queries, the highest rank of the other system first.
    """
    ranks, other, groups = (np.asarray(values) for values in (right, wrong, images))
    candidates = np.flatnonzero((ranks == 0) & (other > 0))
    found: dict[int, int] = {}
    for query in candidates[np.argsort(-other[candidates], kind="stable")].tolist():
        found.setdefault(int(groups[query]), query)
    return list(found.values())[:num]


def correlation(x: Sequence[float], y: Sequence[float]) -> Correlation | None:
    """Pearson's correlation of x and y, values of runs; None for fewer than 3 runs, and where one of them is constant.

    The interval is Fisher's. Raises DataError for lists of different lengths.
    """
    if len(x) != len(y):
        raise DataError(f"a correlation needs pairs, got {len(x)} and {len(y)} values")
    if len(x) < LEAST_RUNS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    result = stats.pearsonr(x, y)
    if len(x) == LEAST_RUNS:
        return Correlation(float(result.statistic), None, None, len(x))
    interval = result.confidence_interval()
    return Correlation(float(result.statistic), float(interval.low), float(interval.high), len(x))


def _answers(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    a, b = np.asarray(first), np.asarray(second)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise DataError(f"two systems must answer the same queries, got shapes {a.shape} and {b.shape}")
    if a.dtype != bool or b.dtype != bool:
        raise DataError(
            f"right and wrong must be bool, got {a.dtype} and {b.dtype}; compare ranks with a k first"
        )
    return a, b


def _interval(
    hits: NDArray[Any], images: NDArray[Any], minus: NDArray[Any] | None = None
) -> dict[str, float | int | None]:
    """The mean of the hits, or of their difference to others, with its interval where there are several images."""
    values = hits.astype(float) - (0.0 if minus is None else minus.astype(float))
    if len(np.unique(images)) < 2:
        return {"mean": float(values.mean()), "low": None, "high": None, "num": len(np.unique(images))}
    if minus is None:
        return _plain(bootstrap_interval(hits, images=images, num_resamples=_RESAMPLES))
    return _plain(bootstrap_difference(hits, minus, images=images, num_resamples=_RESAMPLES))


def _plain(interval: Interval) -> dict[str, float | int | None]:
    return dict(interval._asdict())


def _kappa(a: NDArray[Any], b: NDArray[Any], images: NDArray[Any]) -> dict[str, float | int | None] | None:
    """Error consistency with its bootstrap interval over images; None where it is not defined."""
    known, place = np.unique(images, return_inverse=True)
    cells = [np.bincount(place, weights=cell) for cell in (a & b, a & ~b, ~a & b, ~a & ~b)]
    mean = count(a, b).kappa()
    if mean is None:
        return None
    found: dict[str, float | int | None] = {"mean": mean, "low": None, "high": None, "num": len(known)}
    if len(known) < 2:
        return found

    def statistic(*counts: NDArray[Any], axis: int = -1) -> Any:
        return error_consistency(*(each.sum(axis=axis) for each in counts))

    # a resample in which κ is not defined leaves no interval
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        interval = stats.bootstrap(
            cells,
            statistic,
            paired=True,
            n_resamples=_RESAMPLES,
            batch=max(1, 2**22 // len(known)),
            method="percentile",
            random_state=np.random.default_rng(0),
        ).confidence_interval
    if np.isfinite([interval.low, interval.high]).all():
        found |= {"low": float(interval.low), "high": float(interval.high)}
    return found
