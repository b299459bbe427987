"""A comparison read from its folder, and its figures as HTML and CSV.

Values in compare.json are fractions; they are shown in percent with one decimal.
"""

import csv
import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from threetowers.errors import DataError
from threetowers.objective.pairs import method_label

Compare = dict[str, Any]
Line = list[tuple[float, float]]
"""(step, value) pairs, in the order of the steps."""
Key = tuple[str, str]
"""Method and third tower: what a row of a table or a line of a plot stands for."""
Curves = dict[Key, dict[str, list[Line]]]
"""By method and third tower, then by metric: one line per seed."""

SCHEMA = 2
COLUMNS = (
    *("retrieval/mean_r@1", "retrieval/i2t_r@1", "retrieval/t2i_r@1"),
    *("retrieval/mean_r@5", "retrieval/i2t_r@5", "retrieval/t2i_r@5"),
    *("zero_shot/top1", "combination/mean_r@1"),
)
_METRICS = {"i2t_r": "image → text", "t2i_r": "text → image", "mean_r": "mean"}
_TASKS = {"retrieval": "", "zero_shot": "zero-shot ", "combination": "combined, "}
_VOID = frozenset({"img", "meta", "br"})


class Html(str):
    """Markup that goes into the page unchanged; every other string is text and is escaped."""

    __slots__ = ()


def join(*children: str | None) -> Html:
    """Concatenates the children: markup unchanged, text escaped, None left out."""
    return Html("".join(c if isinstance(c, Html) else html.escape(c) for c in children if c is not None))


def tag(name: str, /, *children: str | None, **attributes: str) -> Html:
    """One element: `tag("td", "a < b", class_="best")` → `<td class="best">a &lt; b</td>`."""
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{pairs}>" if name in _VOID else f"<{name}{pairs}>{join(*children)}</{name}>")


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of the summary, as fractions.

    low, high: the 95 % interval, None when it is not known. best: whether the mean is the highest of its column.
    """

    mean: float
    low: float | None
    high: float | None
    num_seeds: int
    best: bool

    @property
    def interval(self) -> str:
        """The interval as `59.8 to 62.8`, within 0 and 100; empty when it is not known."""
        span = self.span
        return f"{percent(span[0])} to {percent(span[1])}" if span else ""

    @property
    def span(self) -> tuple[float, float] | None:
        """The part of the interval that a share can have, from 0 to 1; None when the interval is not known."""
        return None if self.low is None or self.high is None else (max(0.0, self.low), min(1.0, self.high))


def read_json(path: Path, schema: int, again: str, renew: str = "") -> dict[str, Any]:
    """A file's object of this schema; raises DataError when it is missing, damaged or of another schema.

    again: what to do then. renew: the same for another schema, where it is something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). {again}") from error
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error}). {again}") from error
    found = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(content, dict) or found != schema:
        raise DataError(f"{path}: schema is {found!r}, this version reads schema {schema}. {renew or again}")
    return content


def read_compare(folder: Path) -> Compare:
    """The contents of a folder's compare.json; raises DataError when it is missing, damaged or of another schema."""
    path = folder / "compare.json"
    again = "Run `threetowers compare` again, or name the folder that it wrote"
    compare = read_json(path, SCHEMA, again, f"{again}; finished runs are not repeated")
    for key in ("methods", "summary"):
        if key not in compare:
            raise DataError(f"{path}: has no {key!r}. {again}")
    # captions may contain lone surrogates, which cannot be encoded as UTF-8
    clean: Compare = json.loads(json.dumps(compare, ensure_ascii=False).encode("utf-8", "replace"))
    return clean


def read_curves(folder: Path, compare: Compare) -> tuple[Curves, list[str]]:
    """The metrics that the compared runs logged by step, and a message for each log that cannot be read in full.

    Trials of other learning rates are left out. An incomplete last line, which an unfinished run can have, is ignored.
    """
    curves: Curves = {}
    problems = []
    chosen = {row_key(m): m.get("lr") for m in compare["methods"]}
    for run in compare.get("runs", []):
        key = row_key(run)
        if key in chosen and chosen[key] in (None, run.get("lr")):
            try:
                lines = (folder / run["path"] / "metrics.jsonl").read_bytes().splitlines()
            except OSError as error:
                problems.append(f"{run['path']}/metrics.jsonl: {error.strerror}")
                continue
            rows = [_metrics_row(line) for line in lines]
            if unread := rows[:-1].count(None):
                problems.append(
                    f"{run['path']}/metrics.jsonl: {unread} of {len(rows)} lines are not JSON objects with a step"
                )
            _add_run(curves.setdefault(key, {}), [row for row in rows if row])
    return curves, problems


def _metrics_row(line: bytes) -> dict[str, float] | None:
    try:
        row = json.loads(line)
        return {
            k: number for k, v in {**row, "step": row["step"]}.items() if (number := finite(v)) is not None
        }
    except (ValueError, KeyError, TypeError):
        return None


def _add_run(metrics: dict[str, list[Line]], rows: list[dict[str, float]]) -> None:
    names = dict.fromkeys(n for row in rows for n in row if n.startswith(("val/", "train/loss/")))
    for name in names:
        metrics.setdefault(name, []).append([(row["step"], row[name]) for row in rows if name in row])


def row_key(row: dict[str, Any]) -> Key:
    """Method and third tower of an entry of compare.json; a method without a third tower has an empty name there."""
    return row["method"], row.get("third") or ""


def finite(value: Any) -> float | None:
    """The value as a float, or None when it is missing or not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def percent(value: float | None) -> str:
    """A fraction in percent: 0.6132 → 61.3; an unknown value → –."""
    return "–" if value is None else f"{100 * value:.1f}"


def primary(compare: Compare) -> str:
    """The metric that ranks the methods, as task/metric."""
    return str(compare.get("settings", {}).get("primary", COLUMNS[0]))


def metric_name(path: str) -> str:
    """A metric's name for people: `retrieval/i2t_r@1` → image → text R@1. The task may be missing."""
    *task, metric = path.split("/")
    stem, at, k = metric.partition("@")
    name = f"{_METRICS.get(stem, stem)} R@{k}" if at else metric.replace("top", "top-").replace("_", " ")
    return "".join(_TASKS.get(part, f"{part} ") for part in task) + name


def label(compare: Compare, key: Key) -> str:
    """A row's name: the label in compare.json, or the method with its third tower."""
    for row in compare["methods"]:
        if row_key(row) == key:
            return " ".join(str(row.get("label") or key[0]).split())
    return method_label(*key)


def cells(compare: Compare) -> dict[Key, dict[str, Cell]]:
    """The summary by row, then by task/metric; rows are in the order of compare.json's methods."""
    table: dict[Key, dict[str, Cell]] = {row_key(m): {} for m in compare["methods"]}
    for row in compare["summary"]:
        mean = finite(row["mean"])
        if mean is not None:
            low, high = finite(row.get("low")), finite(row.get("high"))
            cell = Cell(mean, low, high, int(row.get("num_seeds", 1)), bool(row.get("best")))
            table.setdefault(row_key(row), {})[f"{row['task']}/{row['metric']}"] = cell
    return table


def ranking(compare: Compare) -> list[Key]:
    """The rows in the order of the primary metric, best first; rows without it come last."""
    table, path = cells(compare), primary(compare)
    return sorted(table, key=lambda key: -table[key][path].mean if path in table[key] else math.inf)


def num_seeds(compare: Compare) -> int:
    """How many seeds each method's primary metric is the mean of; the smallest number where they differ."""
    path = primary(compare)
    return min((row[path].num_seeds for row in cells(compare).values() if path in row), default=0)


def interval_note(compare: Compare) -> str:
    """What the figures and their intervals are."""
    count = num_seeds(compare)
    if count > 1:
        return f"mean over {count} seeds with the 95 % t-interval"
    return "one seed, with a 95 % bootstrap interval over test queries" if count else "no results yet"


def definitions(pairs: Iterable[tuple[str, str]]) -> Html:
    """A list of names, each with its value."""
    return tag("dl", *(join(tag("dt", name), tag("dd", value)) for name, value in pairs), class_="rows")


def html_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table that scrolls sideways in its own container; the first column holds the names of the rows.

    A cell is markup (Html), or text, which is escaped.
    """

    def line(name: str, values: Sequence[str]) -> Html:
        return tag("tr", tag("th", values[0], class_="text"), *(tag(name, value) for value in values[1:]))

    body = tag("tbody", *(line("td", row) for row in rows))
    table = tag("table", tag("thead", line("th", headings)), body)
    # a narrow screen has no room for more columns than this
    hint = "Scroll the table sideways for the other columns →" if len(headings) > 4 else ""
    return join(
        tag("p", hint, class_="hint muted") if hint else None,
        tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=f"Table by {headings[0]}"),
    )


def result_table(compare: Compare) -> Html:
    """One row per method, best first, and one column per metric; the best of a column is bold and has a star."""
    table = cells(compare)
    first = primary(compare)
    paths = [first, *(path for path in COLUMNS if path != first)]
    paths = [path for path in paths if any(path in row for row in table.values())]
    rows = [
        [_method_name(compare, key), *(_result_cell(table[key].get(path)) for path in paths)]
        for key in ranking(compare)
    ]
    return html_table(["method", *(metric_name(path) for path in paths)], rows)


def _method_name(compare: Compare, key: Key) -> Html:
    """A method's label and below it, where they differ, the name that the command line has for it."""
    shown = label(compare, key)
    name = tag("small", tag("code", key[0])) if shown != key[0] else None
    return join(shown, name)


def _result_cell(cell: Cell | None) -> Html:
    if cell is None:
        return tag("span", "–", class_="muted")
    mean = tag("span", percent(cell.mean), class_="best" if cell.best else "mean")
    star = (
        tag("span", "★", class_="star", role="img", aria_label="best of this column") if cell.best else None
    )
    return join(star, mean, tag("small", cell.interval))


def csv_tables(compare: Compare) -> dict[str, str]:
    """Every table of compare.json as CSV, by file name; values are unrounded fractions."""

    def rows_of(name: str) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in row.items() if not isinstance(v, dict | list)} for row in compare.get(name, [])
        ]

    tables = {name: rows_of(name) for name in ("summary", "results", "methods", "claims", "per_class")}
    tables["combination"] = [row for curve in compare.get("combination", []) for row in _curve_rows(curve)]
    return {f"{name}.csv": csv_text(rows) for name, rows in tables.items() if rows}


def _curve_rows(curve: dict[str, Any]) -> list[dict[str, Any]]:
    control = curve.get("control") or {}
    columns = {name: curve[f"{name}s" if name == "alpha" else name] for name in ("alpha", "val", "test")}
    columns |= {f"control_{name}": control[name] for name in ("val", "test") if name in control}
    return [
        {
            "method": curve.get("method", "3t"),
            "third": curve.get("third"),
            "seed": curve["seed"],
            "metric": curve["metric"],
        }
        | {name: values[i] for name, values in columns.items()}
        for i in range(len(curve["alphas"]))
    ]


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV. The columns are all keys of the rows, in the order of their first appearance."""
    text = StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
