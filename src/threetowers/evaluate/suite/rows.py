"""The results of suites: one row for each model, data set and task, as JSON lines, and the tables made of them."""

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from threetowers.errors import DataError
from threetowers.evaluate.clip_benchmark import Task, clip_benchmark_result
from threetowers.files import write_whole
from threetowers.progress import warn

SCHEMA = 1
TABLE, CSV, CLIP_BENCHMARK = "table.md", "table.csv", "clip_benchmark"
"""What `write_tables` writes: two files and a folder."""


@dataclass(frozen=True)
class Row:
    """What one task found of one model on one data set.

    model_digest, data_digest: of what the value depends on. metric, value: the main metric. n: how many images or
    queries it is a mean of; 0 where it is no mean. low, high: its 95 % interval by a bootstrap over images; None where
    there is none. chance: the metric's level for a model that guesses; None where that is not known. templates: digest
    of the class names and prompts, None where there are none. preprocessing: of images, in words. seconds: spent on the
    task, features included. metrics: all of them by name. details: curves and tables, as plain values.
    """

    model: str
    model_digest: str
    data: str
    data_digest: str
    task: str
    metric: str
    value: float
    n: int
    low: float | None
    high: float | None
    chance: float | None
    templates: str | None
    preprocessing: str
    seconds: float
    metrics: dict[str, float]
    group: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def key(self) -> tuple[str, ...]:
        """What a row is the answer to; two rows with this key would be equal but for the time they took."""
        return self.model_digest, self.data, self.data_digest, self.task, self.templates or "", self.metric


def append_row(path: Path, row: Row) -> None:
    """Adds a row to a file of them, and waits until it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(folder: Path) -> list[Row]:
    """All rows in the `rows*.jsonl` of a folder, each once; a line that was cut short is named and left out.

    Raises DataError for a line of another version.
    """
    found: dict[tuple[str, ...], Row] = {}
    for path in sorted(folder.glob("rows*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                warn(f"{path}: line {number} was cut short, and its task is done again")
                continue
            if values.get("schema") != SCHEMA:
                raise DataError(
                    f"{path}: line {number} has schema {values.get('schema')!r}, this version reads {SCHEMA}; give "
                    "another --out"
                )
            row = Row(**values)
            found[row.key()] = row
    return list(found.values())


def write_tables(folder: Path, rows: Sequence[Row]) -> None:
    """Writes the rows as Markdown, as CSV, and as CLIP_benchmark's JSON files."""
    write_whole(folder / TABLE, markdown(rows))
    lines = io.StringIO()
    writer = csv.writer(lines)
    names = ("model", "data", "group", "task", "metric", "value", "low", "high", "n", "chance", "seconds")
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in rows)
    write_whole(folder / CSV, lines.getvalue())
    (folder / CLIP_BENCHMARK).mkdir(exist_ok=True)
    tasks: dict[str, Task] = {"retrieval": "zeroshot_retrieval", "zero_shot": "zeroshot_classification"}
    for row in rows:
        if row.task in tasks:
            known = row.details.get(CLIP_BENCHMARK, row.metrics)
            result = clip_benchmark_result(row.data, row.model, "", tasks[row.task], known)
            name = "_".join((row.data.replace("/", "-"), row.task, row.model_digest[:8]))
            write_whole(folder / CLIP_BENCHMARK / f"{name}.json", json.dumps(result, indent=2))


def averages(rows: Iterable[Row]) -> list[tuple[str, str, str, float, int]]:
    """Mean of the main metric over data sets: (model, group, task, mean, number of data sets), and over all groups.

    The mean over all groups is called `all`; it is left out where there is one group only. A metric other than the
    task's usual one, such as the mean per class instead of top-1, is averaged with the others, as is usual.
    """
    values: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        for group in dict.fromkeys((row.group or "all", "all")):
            values.setdefault((row.model, group, row.task), []).append(row.value)
    groups = {group for _, group, _ in values} - {"all"}
    return [
        (model, group, task, sum(each) / len(each), len(each))
        for (model, group, task), each in values.items()
        if group != "all" or len(groups) != 1
    ]


def markdown(rows: Sequence[Row]) -> str:
    """The rows and their averages as two Markdown tables."""
    models = list(dict.fromkeys(row.model for row in rows))
    head = ["data", "task", "metric", "n", "chance", *models]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for data, task, metric in dict.fromkeys((row.data, row.task, row.metric) for row in rows):
        same = {row.model: row for row in rows if (row.data, row.task, row.metric) == (data, task, metric)}
        first = next(iter(same.values()))
        cells = [_value(same[model]) if model in same else "" for model in models]
        chance = "" if first.chance is None else f"{100 * first.chance:.1f}"
        lines.append(
            "| " + " | ".join([data, task, metric, f"{first.n:,}" if first.n else "", chance, *cells]) + " |"
        )
    lines += ["", "Values in %, with the 95 % interval of a bootstrap over images.", ""]
    lines += [
        "| group | task | data sets | " + " | ".join(models) + " |",
        "|---|---|" + "---|" * (len(models) + 1),
    ]
    means = {(model, group, task): (mean, num) for model, group, task, mean, num in averages(rows)}
    for group, task in dict.fromkeys((group, task) for _, group, task in means):
        found = {model: means[model, group, task] for model in models if (model, group, task) in means}
        num = max(num for _, num in found.values())
        cells = [
            f"{100 * found[model][0]:.1f}" + (f" ({found[model][1]})" if found[model][1] != num else "")
            if model in found
            else ""
            for model in models
        ]
        lines.append(f"| {group} | {task} | {num} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _value(row: Row) -> str:
    if row.low is None or row.high is None:
        return f"{100 * row.value:.1f}"
    return f"{100 * row.value:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f})"
