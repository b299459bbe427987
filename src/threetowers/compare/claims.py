"""The claims of the paper as tests of a comparison's figures: held, not held, not shown or not tested.

A claim puts differences between methods, paired by seed, on a side of a bound: above 0 (superiority), above minus a
margin (non-inferiority) or below minus a margin. It is held when the t test of each difference says so, corrected by
Holm for all tests of the comparison. It is not held when the 95 % interval of a difference lies on the other side
of its bound, and otherwise it is not shown. With one seed there is no test, and the interval is a bootstrap over the
test queries. The claims are those of arXiv 2305.16999, numbered as in docs/method.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from threetowers.evaluate.retrieval import Ranks
from threetowers.evaluate.statistics import (
    EQUAL,
    Interval,
    Side,
    bootstrap_difference,
    doubling_slopes,
    holm,
    p_value,
    paired_difference,
    t_interval,
)
from threetowers.objective.pairs import METHODS, method_label

Key = tuple[str, str]
"""Method and third tower; the latter is empty for the baseline."""
Verdict = Literal["held", "not held", "not shown", "not tested"]
MISMATCHED = "mismatched"
LEVEL = 0.95
"""Of the intervals; a corrected p below 1 − LEVEL is significant."""
_WARM: frozenset[str] = frozenset(
    name for name, entry in METHODS.items() if entry.third_beside and entry.image == "start"
)
TWICE = "-twice"
"""Ends the method name of runs that were trained at twice the cost of the others, for example `3t-twice`."""


@dataclass(frozen=True)
class Measured:
    """The figures of one finished run: metrics by `task/metric`, and the per-item results behind them.

    ranks: of the retrieval queries, by system. alpha: the α that validation chose. class_hits: whether each labelled
    image was classified correctly.
    """

    metrics: Mapping[str, float]
    ranks: Mapping[str, Ranks]
    alpha: float | None = None
    class_hits: np.ndarray[Any, Any] | None = None


Runs = Mapping[Key, Mapping[int, Measured]]
"""Finished runs by method and third tower, then by seed."""


class Exact(NamedTuple):
    """Checks without chance, one value per run that has a third tower in its objective.

    ends: the combination's two ends reproduce the two systems exactly. identical: the main pair gives the same bits
    without the third tower. untouched: no gradient reached the third tower, and its weights are those before training.
    """

    ends: Sequence[bool] = ()
    identical: Sequence[bool] = ()
    untouched: Sequence[bool] = ()


class GridCell(NamedTuple):
    """3T − LiT in a metric, as a share, of one seed at one model size and one number of training images."""

    size: float
    data: float
    seed: int
    gap: float


@dataclass(frozen=True)
class Tested:
    """A difference, and the side of a bound on which a claim puts it.

    what: its name among the differences of the claim. values: the differences of the single seeds.
    """

    what: str
    values: tuple[float, ...]
    interval: Interval
    bound: float = 0.0
    side: Side = "above"
    unit: str = "points"

    @property
    def p(self) -> float | None:
        """p of the claimed side; None with one seed, which is no test."""
        return p_value(self.values, self.bound, self.side) if len(self.values) > 1 else None

    @property
    def contradicted(self) -> bool:
        """Whether the interval over seeds lies on the other side of the bound."""
        other: Side = "below" if self.side == "above" else "above"
        return len(self.values) > 1 and p_value(self.values, self.bound, other) < 1 - LEVEL

    @property
    def alike(self) -> bool:
        """Whether several seeds give one and the same difference."""
        return len(self.values) > 1 and max(self.values) - min(self.values) < EQUAL

    def as_dict(self) -> dict[str, Any]:
        """The entry in compare.json; an end of the interval is None when it is not known."""
        low, high = (end if np.isfinite(end) else None for end in self.interval[1:3])
        over = "seeds" if len(self.values) > 1 else "queries"
        return {
            "what": self.what, "mean": self.interval.mean, "low": low, "high": high, "num": self.interval.num,
            "over": over, "bound": self.bound, "side": self.side, "unit": self.unit, "p": self.p,
        }  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A claim before its verdict.

    exact: whether a claim without chance is true; None for one that is tested by differences. barred: why it cannot be
    held whatever the differences are.
    """

    id: str
    text: str
    third: str = ""
    tests: tuple[Tested, ...] = ()
    exact: bool | None = None
    barred: str = ""
    note: str = ""
    details: Mapping[str, str] = field(default_factory=dict)

    @property
    def p(self) -> float | None:
        """The largest p of the differences, which tests that all of them are as claimed (Berger, 1982)."""
        known = [p for test in self.tests if (p := test.p) is not None]
        return max(known) if known and len(known) == len(self.tests) else None

    def verdict(self, adjusted: float | None) -> Verdict:
        """adjusted: the corrected p; None where there is no test."""
        if self.exact is not None:
            return "held" if self.exact else "not held"
        if not self.tests:
            return "not tested"
        if any(test.contradicted for test in self.tests):
            return "not held"
        significant = adjusted is not None and adjusted < 1 - LEVEL
        return "held" if significant and not self.barred else "not shown"

    def remarks(self) -> str:
        """The notes on the verdict."""
        one = "one seed: not a test" if self.tests and self.p is None else ""
        equal = "all seeds give the same difference: not a test" if any(t.alike for t in self.tests) else ""
        return "; ".join(filter(None, (self.note, self.barred, one, equal)))


def judged(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """The claims as rows of compare.json, corrected by Holm for the tests among them."""
    raw = [claim.p for claim in claims]
    corrected = iter(holm([p for p in raw if p is not None]))
    rows = []
    for claim, p in zip(claims, raw, strict=True):
        adjusted = None if p is None else next(corrected)
        rows.append({
            "id": claim.id, "third": claim.third, "text": claim.text, "verdict": claim.verdict(adjusted), "p": p,
            "p_adjusted": adjusted, "tests": [test.as_dict() for test in claim.tests],
            "details": dict(claim.details), "note": claim.remarks(),
        })  # fmt: skip
    return rows


def claims(
    runs: Runs,
    thirds: Sequence[str],
    forms: Sequence[str],
    exact: Exact,
    margin: float = 0.02,
    grids: Mapping[str, Sequence[GridCell]] | None = None,
) -> list[dict[str, Any]]:
    """Every claim as a row of compare.json.

    forms: the compared methods that are a form of 3T; each is tested. margin: the share of R@1 up to which a method
    counts as not worse. grids: by third tower, the gap 3T − LiT over model sizes and data sizes.
    """
    found: list[Claim] = []
    for third in thirds:
        if MISMATCHED in third:
            found.append(_mismatched_lit(runs, third, margin))
        found += _warm(runs, third)
        for form in forms or ("3t",):
            if MISMATCHED in third:
                found.append(_mismatched(runs, form, third, margin))
            else:
                found += _matched(runs, form, third)
            found += _combination(runs, form, third, margin)
    found.append(
        _exact("C4", "The combination's ends, α = 0 and α = 1, are exactly the two systems", exact.ends)
    )
    for third, cells in (grids or {}).items():
        found += growth(cells, third)
    if not grids:
        text = "The gap 3T − LiT grows with model size and with data"
        found.append(Claim("C5", text, note="it takes runs of several model sizes and data sizes"))
    text = "Without the third tower the main pair's outputs are the same to the bit"
    found.append(_exact("C6", text, exact.identical))
    text = "No gradient reaches the third tower, and training leaves its weights as they were"
    found.append(_exact("C6", text, exact.untouched))
    return judged(sorted(found, key=lambda claim: claim.id))


def growth(cells: Sequence[GridCell], third: str = "") -> list[Claim]:
    """C5: whether the gap 3T − LiT grows with model size, and whether it grows with data.

    For each seed one linear fit over the logarithms of both; the slopes of the seeds are tested against 0. Raises
    DataError as `doubling_slopes` does, for example where size and data vary only together.
    """
    slopes: dict[str, list[float]] = {"size": [], "data": []}
    for seed in sorted({cell.seed for cell in cells}):
        own = [cell for cell in cells if cell.seed == seed]
        factors = {"size": [cell.size for cell in own], "data": [cell.data for cell in own]}
        for name, slope in doubling_slopes(factors, [cell.gap for cell in own]).items():
            slopes[name].append(slope)
    found = []
    for name, words in (("size", "model size"), ("data", "data")):
        text, values = f"The gap 3T − LiT grows with {words}", tuple(slopes[name])
        if not values:
            found.append(Claim("C5", text, third, note=f"every run has the same {words}"))
            continue
        interval = Interval(values[0], -np.inf, np.inf, 1)
        if len(values) > 1:
            interval = Interval(*t_interval(values), num=len(values))
        tested = Tested("3T − LiT", values, interval, unit="points per doubling")
        found.append(Claim("C5", text, third, (tested,)))
    return found


class Compared(NamedTuple):
    """A difference a − b of a metric `task/metric`, each of a system of its method, and its name in the claim."""

    what: str
    a: Key
    b: Key
    metric: str = "retrieval/mean_r@1"
    systems: tuple[str, str] = ("main", "main")


def difference(
    runs: Runs, a: Key, b: Key, metric: str, systems: tuple[str, str] = ("main", "main")
) -> Interval:
    """Interval of a metric of `a` minus that of `b`: t over the common seeds; with one seed, a bootstrap over queries.

    metric: `task/metric`. systems: the systems of a and b that a retrieval metric belongs to, for example
    `combination`.
    """
    values = _paired(runs, a, b, metric, systems)
    if len(values[0]) > 1:
        return paired_difference(*values)
    seed = min(runs[a].keys() & runs[b].keys())
    first, second = runs[a][seed], runs[b][seed]
    if metric == "zero_shot/top1" and first.class_hits is not None and second.class_hits is not None:
        return bootstrap_difference(first.class_hits, second.class_hits)
    no_interval = Interval(values[0][0] - values[1][0], float("-inf"), float("inf"), 1)
    if metric.split("/")[0] != "retrieval" or not metric.endswith("_r@1"):
        return no_interval  # one run has no spread, and there are no queries
    ranks_a, ranks_b = first.ranks[systems[0]], second.ranks[systems[1]]
    if ranks_a.num_independent() < 2:
        return no_interval
    place = {"i2t_r@1": 0, "t2i_r@1": 1}.get(metric.split("/")[1])
    images = ranks_a.images()
    if place is None:
        return bootstrap_difference(ranks_a.hits(), ranks_b.hits(), images=images)
    return bootstrap_difference(ranks_a.hits()[place], ranks_b.hits()[place], images=images[place])


def _paired(
    runs: Runs, a: Key, b: Key, metric: str, systems: tuple[str, str]
) -> tuple[list[float], list[float]]:
    """The metric of `a` and that of `b`, one value for each seed that both have."""
    first, second = (_metric_of(metric, system) for system in systems)
    seeds = sorted(runs[a].keys() & runs[b].keys())
    return [runs[a][seed].metrics[first] for seed in seeds], [runs[b][seed].metrics[second] for seed in seeds]


def _metric_of(metric: str, system: str) -> str:
    """The path of a system's metric: `retrieval/mean_r@1` of the main pair, `third/mean_r@1` of the third tower, …"""
    return metric if system == "main" else f"{system}/{metric.split('/')[1]}"


def _lacking(runs: Runs, compared: Compared) -> str:
    """What is missing for a difference; empty when nothing is."""
    for key, system in zip((compared.a, compared.b), compared.systems, strict=True):
        if key not in runs:
            return f"{method_label(key[0])} was not compared"
        path = _metric_of(compared.metric, system)
        if any(path not in run.metrics for run in runs[key].values()):
            return f"{path} of {method_label(key[0])} was not measured"
    return "" if runs[compared.a].keys() & runs[compared.b].keys() else "the runs have no seed in common"


def _claim(runs: Runs, claim: Claim, *compared: Compared, bound: float = 0.0, side: Side = "above") -> Claim:
    """The claim with its differences; without them, and with the reason, when one cannot be had."""
    if lacking := next(filter(None, (_lacking(runs, each) for each in compared)), ""):
        return Claim(claim.id, claim.text, claim.third, note=lacking)
    tests = []
    for what, a, b, metric, systems in compared:
        values = tuple(x - y for x, y in zip(*_paired(runs, a, b, metric, systems), strict=True))
        tests.append(Tested(what, values, difference(runs, a, b, metric, systems), bound, side))
    return replace(claim, tests=tuple(tests))


def _exact(id: str, text: str, passed: Sequence[bool]) -> Claim:
    if not passed:
        return Claim(id, text, note="there is no run to check")
    return Claim(id, text, exact=all(passed), details={"runs": f"{sum(passed)} of {len(passed)}"})


def _matched(runs: Runs, form: str, third: str) -> list[Claim]:
    key, base, lit, name = (form, third), ("baseline", ""), ("lit", third), method_label(form)
    directions = {"image → text": "retrieval/i2t_r@1", "text → image": "retrieval/t2i_r@1"}
    found = [
        _claim(
            runs, Claim("C1", f"{name} is above {words} in both directions of retrieval", third),
            *(Compared(way, key, other, metric) for way, metric in directions.items()),
        )
        for other, words in ((base, "the baseline"), (lit, "LiT"))
    ]  # fmt: skip
    text = f"{name} is above the baseline in zero-shot classification"
    return [
        *found,
        _claim(runs, Claim("C2", text, third), Compared("zero-shot top-1", key, base, "zero_shot/top1")),
    ]


def _warm(runs: Runs, third: str) -> list[Claim]:
    """W: 3T with a warm start against the two other uses of the same weights. It is a question of ours, not the
    paper's, and is asked where both are compared."""
    warm = [key for key in runs if key[1] == third and key[0] in _WARM]
    others = [(other, third) for other in ("lit-unlocked", "lit") if (other, third) in runs]
    return [
        _claim(
            runs,
            Claim("W", f"{method_label(key[0])} is above {method_label(other[0])} in mean R@1", third),
            Compared("mean R@1", key, other),
        )
        for key in warm
        for other in others
    ]


def _mismatched_lit(runs: Runs, third: str, margin: float) -> Claim:
    claim = Claim("C3", f"LiT is below the baseline by more than {100 * margin:g} points", third)
    compared = Compared("mean R@1", ("lit", third), ("baseline", ""))
    return _claim(runs, claim, compared, bound=-margin, side="below")


def _mismatched(runs: Runs, form: str, third: str, margin: float) -> Claim:
    text = f"{method_label(form)} is not worse than the baseline by more than {100 * margin:g} points"
    return _claim(
        runs, Claim("C3", text, third), Compared("mean R@1", (form, third), ("baseline", "")), bound=-margin
    )


def _combination(runs: Runs, form: str, third: str, margin: float) -> list[Claim]:
    """C4: the combination at the α that validation chose, against its ends and against two controls."""
    key, twice, name = (form, third), (form + TWICE, third), method_label(form)
    alphas = [run.alpha for _, run in sorted(runs.get(key, {}).items()) if run.alpha is not None]
    ends = sum(alpha in (0, 1) for alpha in alphas)
    barred = f"validation chose an end, α = 0 or 1, in {ends} of {len(alphas)} seeds" if ends else ""
    details = {"α chosen on validation": ", ".join(f"{alpha:g}" for alpha in alphas)} if alphas else {}

    def against(what: str, system: str, other: Key = key) -> Compared:
        return Compared(what, key, other, systems=("combination", system))

    def claim(text: str, barred: str = "") -> Claim:
        return Claim(
            "C4", f"{name} combined with the third tower is {text}", third, barred=barred, details=details
        )

    both = against("over the main pair", "main"), against("over the third tower alone", "third")
    as_good = f"not worse than either of the two alone by more than {100 * margin:g} points"
    return [
        _claim(runs, claim(as_good, barred), *both, bound=-margin),
        _claim(runs, claim("better than either of the two alone", barred), *both),
        _claim(
            runs, claim("better than the score average of an independent baseline and LiT"),
            against("over the score average", "control"),
        ),
        _claim(
            runs, claim(f"better than {name} trained at twice the cost"),
            against("over twice the training", "main", twice),
        ),
    ]  # fmt: skip
