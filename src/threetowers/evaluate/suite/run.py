"""Runs a suite: every task of every data set that is not done, and the tables of all that are.

    evaluate_suite("runs/mine", read_suite("suite.toml"), Path("results"))

What is finished is in `rows.jsonl` of the folder, and is not computed again for the same weights, data and prompts.
Several processes share the work, each with its own part (i, n), and may write into one folder.
"""

import time
from collections.abc import Sequence, Set
from pathlib import Path

import torch

from threetowers.errors import DataError, ThreeTowersError, UsageError
from threetowers.evaluate.ranked import Rankings
from threetowers.evaluate.suite.features import Features, captioned, open_features
from threetowers.evaluate.suite.items import write_items
from threetowers.evaluate.suite.measured import Task
from threetowers.evaluate.suite.rows import Row, append_row, read_rows, write_tables
from threetowers.evaluate.suite.sets import DataSet, OpenSet, open_set
from threetowers.evaluate.suite.tasks import TASKS
from threetowers.progress import duration, warn
from threetowers.settings import did_you_mean
from threetowers.towers.frozen.base import digest_of


def evaluate_suite(
    target: str,
    sets: Sequence[DataSet],
    out: Path,
    *,
    part: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
    workers: int = 0,
    ranked: Rankings | None = None,
) -> list[Row]:
    """Evaluates a model on data sets; returns its rows on those of this part, whether measured now or before.

    part: (i, n), this process takes every n-th data set from the i-th. Features are kept in `out`/features. ranked:
    where to write the ranked ids of each data set on which retrieval is measured, or None. A data set or a task that
    cannot be measured does not end the others. Raises DataError, after the rest is done, that counts these; UsageError
    for a task or a target that means nothing.
    """
    for each in sets:
        check_tasks(each)
    index, count = part
    features = open_features(target, out / "features", device, workers)
    path = out / ("rows.jsonl" if count == 1 else f"rows-{index}-of-{count}.jsonl")
    out.mkdir(parents=True, exist_ok=True)
    done = {row.key() for row in read_rows(out)}
    wanted: list[tuple[str, ...]] = []
    failed: list[str] = []
    for described in sets[index::count]:
        try:
            opened = open_set(described)
            keys, reasons = _evaluate_set(features, opened, path, done)
            wanted, failed = wanted + keys, failed + reasons
            if ranked and "retrieval" in fitting_tasks(opened, features.views):
                name = f"{described.name}_{features.digest[:8]}"
                ranked.write(name, captioned(features, opened.test), opened.test.source)
        except ThreeTowersError as error:
            failed.append(_failure(described.name, error))
    rows = read_rows(out)
    write_tables(out, rows)
    if failed:
        raise DataError(
            f"{len(failed)} data sets or tasks could not be measured; the others are in {out}. The first: {failed[0]}"
        )
    return [row for row in rows if row.key() in wanted]


def _failure(name: str, error: ThreeTowersError) -> str:
    """Says at once what failed; returns it for the end."""
    text = str(error) if name in str(error) else f"{name}: {error}"
    warn(text)
    return text


def check_tasks(described: DataSet) -> None:
    """Raises UsageError for a task that does not exist, and for a metric without the task that it belongs to."""
    for task in described.tasks:
        if task not in TASKS:
            raise UsageError(f"{described.name}: no task {task!r}{did_you_mean(task, TASKS)}")
    if described.metric is not None and len(described.tasks) != 1:
        raise UsageError(
            f"{described.name}: metric = {described.metric!r} is that of one task; name it alone in tasks"
        )


def _evaluate_set(
    features: Features, opened: OpenSet, path: Path, done: Set[tuple[str, ...]]
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Measures the tasks whose rows are not among those done, and adds theirs to the file.

    Returns the keys of the rows of all its tasks, and what failed.
    """
    described = opened.described
    keys: list[tuple[str, ...]] = []
    failed: list[str] = []
    prompts = digest_of([list(opened.classes), list(opened.templates)]) if opened.classes else None
    parts = (opened.test, opened.train, opened.val, opened.outside)
    fingerprints = [None if each is None else each.source.fingerprint for each in parts]
    data = digest_of([*fingerprints, None if opened.choices is None else opened.choices.fingerprint])
    for name, task in fitting_tasks(opened, features.views).items():
        metric = described.metric or task.metric
        key = (features.digest, described.name, data, name, prompts or "", metric)
        keys.append(key)
        if key in done:
            continue
        start = time.monotonic()
        try:
            found = task.measure(features, opened)
            if metric not in found.metrics:
                raise UsageError(f"{name} has no metric {metric!r}{did_you_mean(metric, found.metrics)}")
        except ThreeTowersError as error:
            failed.append(_failure(f"{described.name}, {name}", error))
            continue
        own = metric == task.metric
        interval = found.interval(metric)
        row = Row(
            model=features.name,
            model_digest=features.digest,
            data=described.name,
            data_digest=data,
            task=name,
            metric=metric,
            value=found.metrics[metric],
            n=found.num,
            low=None if interval is None else interval.low,
            high=None if interval is None else interval.high,
            chance=described.chance if described.chance is not None else found.chance if own else None,
            templates=prompts,
            preprocessing=features.preprocessing,
            seconds=round(time.monotonic() - start, 2),
            metrics=dict(found.metrics),
            group=described.group,
            details=dict(found.details),
        )
        write_items(path.parent, row, found)
        append_row(path, row)
        print(_line(row), flush=True)
    return keys, failed


def fitting_tasks(opened: OpenSet, views: Sequence[str]) -> dict[str, Task]:
    """The tasks to measure on a data set. views: of images, as `Features` names them.

    Raises UsageError for a task that was asked for and does not fit.
    """
    asked = opened.described.tasks
    fitting = {}
    for name, task in TASKS.items():
        if name not in asked and (asked or task.asked):
            continue
        reason = task.unfit(opened, views)
        if not reason:
            fitting[name] = task
        elif asked:
            raise UsageError(f"{opened.described.name}: {name} cannot be measured: {reason}")
    if not fitting:
        raise DataError(f"{opened.described.name}: no task fits: it has neither captions nor classes")
    return fitting


def _line(row: Row) -> str:
    between = "" if row.low is None or row.high is None else f" ({row.low:.1%} to {row.high:.1%})"
    chance = "" if row.chance is None else f", chance {row.chance:.1%}"
    value = f"{row.data}: {row.task} {row.metric} {row.value:.1%}{between}{chance}"
    return f"{value}, {row.n:,} items, {duration(row.seconds)}"
