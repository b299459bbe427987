"""The claims of the paper as tests of a comparison's figures: held, not held, or not tested.

A claim is held when the 95 % interval of the seed-paired differences excludes 0. With one seed the interval is a
bootstrap over the test queries, and the claim has a note. The claims are those of arXiv 2305.16999, numbered as in
docs/method.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from threetowers.evaluate.retrieval import Ranks
from threetowers.evaluate.statistics import Interval, bootstrap_difference, held, paired_difference
from threetowers.objective.pairs import METHODS, method_label

Key = tuple[str, str]
"""Method and third tower; the latter is empty for the baseline."""
MISMATCHED = "mismatched"


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


def difference(
    runs: Runs, a: Key, b: Key, metric: str, systems: tuple[str, str] = ("main", "main")
) -> Interval:
    """Interval of a metric of `a` minus that of `b`: t over the common seeds; with one seed, a bootstrap over queries.

    metric: `task/metric`. systems: the systems of a and b that a retrieval metric belongs to, for example
    `combination`.
    """
    seeds = sorted(runs[a].keys() & runs[b].keys())
    names = [_metric_of(metric, system) for system in systems]
    if len(seeds) > 1:
        return paired_difference(
            [runs[a][seed].metrics[names[0]] for seed in seeds],
            [runs[b][seed].metrics[names[1]] for seed in seeds],
        )
    first, second = runs[a][seeds[0]], runs[b][seeds[0]]
    value = first.metrics[names[0]] - second.metrics[names[1]]
    if metric == "zero_shot/top1" and first.class_hits is not None and second.class_hits is not None:
        return bootstrap_difference(first.class_hits, second.class_hits)
    no_interval = Interval(value, float("-inf"), float("inf"), 1)
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


def _metric_of(metric: str, system: str) -> str:
    """The path of a system's metric: `retrieval/mean_r@1` of the main pair, `third/mean_r@1` of the third tower, …"""
    return metric if system == "main" else f"{system}/{metric.split('/')[1]}"


def points(interval: Interval) -> str:
    """A difference of shares in percentage points: +9.8 [8.1, 11.5]."""
    mean, low, high = (100 * value for value in interval[:3])
    if low == float("-inf"):
        return f"{mean:+.1f} (no interval from one run)"
    return f"{mean:+.1f} [{low:.1f}, {high:.1f}]"


def claims(runs: Runs, thirds: list[str], ends_equal: bool, identical: bool | None) -> list[dict[str, Any]]:
    """Every claim as a row of compare.json: id, held (None: not tested), text, figures, note.

    Those about 3T are tested with each of its forms that was compared. ends_equal: whether α = 0 and α = 1 reproduced
    the two systems exactly. identical: whether the main pair gives the same bits without its third tower; None when
    there is no 3T run.
    """
    forms = [name for name, method in METHODS.items() if method.is_3t]
    compared = {method for method, _ in runs}
    forms = [name for name in forms if name in compared] or forms[:1]
    rows: list[dict[str, Any]] = []
    for third in thirds:
        if MISMATCHED in third:
            rows.append(_mismatched_lit(runs, third))
        for form in forms:
            rows += _mismatched(runs, form, third) if MISMATCHED in third else _matched(runs, form, third)
            rows += _combination(runs, form, third, ends_equal)
    rows.append(
        _row("C5", None, "The gap 3T − LiT grows with model size and with data.", {}, "not tested here")
    )
    text = "Without the third tower the main pair's outputs are identical to the bit."
    rows.append(_row("C6", identical, text, {} if identical is None else {"identical": str(identical)}, ""))
    return rows


def _row(id: str, is_held: bool | None, text: str, figures: dict[str, str], note: str) -> dict[str, Any]:
    return {"id": id, "held": is_held, "text": text, "figures": figures, "note": note}


def _note(runs: Runs, key: Key) -> str:
    return "one seed" if len(runs.get(key, {})) == 1 else ""


def _compared(
    runs: Runs, id: str, text: str, pairs: list[tuple[Key, Key, str]], judge: Callable[[Interval], bool]
) -> dict[str, Any]:
    """A claim that is held when `judge` accepts the interval of every pair; not tested when a figure is missing.

    pairs: (a, b, metric), the difference being a − b.
    """
    if any(key not in runs for a, b, _ in pairs for key in (a, b)):
        return _row(id, None, text, {}, "a method that it needs was not compared")
    if any(metric not in next(iter(runs[key].values())).metrics for a, b, metric in pairs for key in (a, b)):
        return _row(id, None, text, {}, "the data has nothing to measure it with")
    intervals = {
        f"{method_label(a[0])} − {method_label(b[0])}, {metric}": difference(runs, a, b, metric)
        for a, b, metric in pairs
    }
    figures = {name: points(interval) for name, interval in intervals.items()}
    return _row(id, all(judge(i) for i in intervals.values()), text, figures, _note(runs, pairs[0][0]))


BOTH_DIRECTIONS = ("retrieval/i2t_r@1", "retrieval/t2i_r@1")


def _matched(runs: Runs, form: str, third: str) -> list[dict[str, Any]]:
    three, base, lit, name = (form, third), ("baseline", ""), ("lit", third), method_label(form)
    return [
        _compared(
            runs, "C1", f"Retrieval in both directions: {name} is above the baseline (third tower: {third}).",
            [(three, base, metric) for metric in BOTH_DIRECTIONS], held,
        ),
        _compared(
            runs, "C1", f"Retrieval in both directions: {name} is above LiT (third tower: {third}).",
            [(three, lit, metric) for metric in BOTH_DIRECTIONS], held,
        ),
        _compared(
            runs, "C2", f"Zero-shot classification: {name} is above the baseline (third tower: {third}).",
            [(three, base, "zero_shot/top1")], held,
        ),
    ]  # fmt: skip


def _mismatched_lit(runs: Runs, third: str) -> dict[str, Any]:
    return _compared(
        runs, "C3", f"With the mismatched third tower ({third}) LiT falls below the baseline.",
        [(("lit", third), ("baseline", ""), "retrieval/mean_r@1")], lambda interval: held(interval, "less"),
    )  # fmt: skip


def _mismatched(runs: Runs, form: str, third: str) -> list[dict[str, Any]]:
    return [
        _compared(
            runs, "C3", f"With the mismatched third tower ({third}) {method_label(form)} does not fall below the "
            "baseline: its mean is at least the baseline's.",
            [((form, third), ("baseline", ""), "retrieval/mean_r@1")], lambda interval: interval.mean >= 0,
        ),
    ]  # fmt: skip


def _combination(runs: Runs, form: str, third: str, ends_equal: bool) -> list[dict[str, Any]]:
    key, name = (form, third), method_label(form)
    text = (
        f"Some α strictly inside (0, 1) makes the combination of {name} better than both of its ends (third tower: "
        f"{third})."
    )
    if key not in runs or any("combination/mean_r@1" not in run.metrics for run in runs[key].values()):
        return [_row("C4", None, text, {}, "no combination was measured")]
    metric = "retrieval/mean_r@1"
    over_main = difference(runs, key, key, metric, ("combination", "main"))
    over_third = difference(runs, key, key, metric, ("combination", "third"))
    alphas = [run.alpha for _, run in sorted(runs[key].items())]
    inside = all(alpha is not None and 0 < alpha < 1 for alpha in alphas)
    figures = {
        "combination − main pair": points(over_main),
        "combination − third tower alone": points(over_third),
        "α chosen on validation": ", ".join(f"{alpha:g}" for alpha in alphas),
        "ends equal the two systems": str(ends_equal),
    }
    is_held = inside and ends_equal and held(over_main) and held(over_third)
    rows = [_row("C4", is_held, text, figures, _note(runs, key))]
    if all("control/mean_r@1" in run.metrics for run in runs[key].values()):
        over_control = difference(runs, key, key, metric, ("combination", "control"))
        rows.append(_row(
            "C4", held(over_control),
            f"The combination of {name} is more than ensembling: above the score average of an independently trained "
            f"baseline and LiT, its α chosen in the same way (third tower: {third}).",
            {"combination − control": points(over_control)}, _note(runs, key),
        ))  # fmt: skip
    return rows
