"""A comparison's runs on the data sets and tasks of a suite."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from threetowers.compare.runs import Job
from threetowers.evaluate.statistics import t_interval
from threetowers.evaluate.suite.rows import Row
from threetowers.evaluate.suite.run import evaluate_suite
from threetowers.evaluate.suite.sets import read_suite
from threetowers.run.setup import pick_device


def suite_figures(jobs: Sequence[Job], suite: str | None, out: Path) -> list[dict[str, Any]]:
    """Each method's main metric on every data set and task, with its 95 % interval; empty without a suite.

    The interval is Student's t over seeds; with one seed it is the bootstrap over images that the row has. What is
    measured is kept in `out`/suite and not measured again. Raises DataError for a data set that cannot be used.
    """
    if suite is None:
        return []
    sets = read_suite(suite)
    device = pick_device(jobs[0].config.device)
    by_cell: dict[tuple[str, str, str, str, str], list[Row]] = {}
    for job in jobs:
        print(f"suite: {job.name}", flush=True)
        for row in evaluate_suite(str(job.folder), sets, out / "suite", device=device):
            by_cell.setdefault((job.method, job.third, row.data, row.task, row.metric), []).append(row)
    return [
        {
            "method": method, "third": third, "data": data, "group": rows[0].group, "task": task, "metric": metric,
            "chance": rows[0].chance, "n": rows[0].n, **_interval(rows),
        }
        for (method, third, data, task, metric), rows in by_cell.items()
    ]  # fmt: skip


def _interval(rows: Sequence[Row]) -> dict[str, Any]:
    if len(rows) == 1:
        return {"mean": rows[0].value, "low": rows[0].low, "high": rows[0].high, "num_seeds": 1}
    mean, low, high = t_interval([row.value for row in rows])
    return {"mean": mean, "low": low, "high": high, "num_seeds": len(rows)}
