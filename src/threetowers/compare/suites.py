"""A comparison's runs on the data sets and tasks of a suite."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from threetowers.compare.runs import Job
from threetowers.evaluate.paired import Paired, compare_seeds
from threetowers.evaluate.statistics import t_interval
from threetowers.evaluate.suite.differences import Place, compare_items, differences, leading
from threetowers.evaluate.suite.items import read_items
from threetowers.evaluate.suite.rows import Row
from threetowers.evaluate.suite.run import evaluate_suite
from threetowers.evaluate.suite.sets import read_suite
from threetowers.run.setup import pick_device


def suite_figures(jobs: Sequence[Job], suite: str | None, out: Path) -> dict[str, Any]:
    """`suite`: each method's main metric on every data set and task, with its 95 % interval; empty without a suite.

    The interval is Student's t over seeds; with one seed it is the bootstrap over images that the row has.
    `suite_differences`: of each data set and task a sentence on the best method and the next, from tests of all pairs.
    What is measured is kept in `out`/suite and not measured again. Raises DataError for a data set that cannot be used.
    """
    if suite is None:
        return {"suite": [], "suite_differences": []}
    sets, folder = read_suite(suite), out / "suite"
    device = pick_device(jobs[0].config.device)
    found: dict[Place, dict[tuple[str, str], dict[int, Row]]] = {}
    for job in jobs:
        print(f"suite: {job.name}", flush=True)
        for row in evaluate_suite(str(job.folder), sets, folder, device=device):
            by_method = found.setdefault(Place(row.data, row.task, row.metric), {})
            by_method.setdefault(job.key, {})[job.seed] = row
    rows = [
        {"method": method, "third": third, **_summary(list(by_seed.values()))}
        for by_method in found.values()
        for (method, third), by_seed in by_method.items()
    ]
    labels = {job.key: job.label for job in jobs}
    answers = {
        place: {labels[key]: by_seed for key, by_seed in by_method.items()}
        for place, by_method in found.items()
    }
    compared = leading(differences(answers, partial(_compare, folder)))
    return {"suite": rows, "suite_differences": [each.in_words() for each in compared]}


def _summary(rows: Sequence[Row]) -> dict[str, Any]:
    first = rows[0]
    described = {name: getattr(first, name) for name in ("data", "group", "task", "metric", "chance", "n")}
    return described | _interval(rows)


def _compare(folder: Path, a: Mapping[int, Row], b: Mapping[int, Row]) -> Paired | None:
    """By the seeds that both have; of one seed by the answers to each item. None where neither is possible."""
    seeds = sorted(a.keys() & b.keys())
    if len(seeds) > 1:
        return compare_seeds([a[seed].value for seed in seeds], [b[seed].value for seed in seeds])
    items = [read_items(folder, rows[seed]) for seed in seeds for rows in (a, b)]
    first, second = items or (None, None)
    return None if first is None or second is None else compare_items(first, second)


def _interval(rows: Sequence[Row]) -> dict[str, Any]:
    if len(rows) == 1:
        return {"mean": rows[0].value, "low": rows[0].low, "high": rows[0].high, "num_seeds": 1}
    mean, low, high = t_interval([row.value for row in rows])
    return {"mean": mean, "low": low, "high": high, "num_seeds": len(rows)}
