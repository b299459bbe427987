"""The plots and the tables of a study, of which `study` makes the page and the Markdown."""

import html
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from threetowers.objective.pairs import METHODS, method_label
from threetowers.report.claims import certainty, evidence, title
from threetowers.report.panels import (
    INK,
    MUTED,
    PALETTE,
    PAPER,
    Plot,
    colour,
    drawing,
    finish,
    label_ends,
    legend,
    panel,
    short,
)
from threetowers.report.tables import Html, html_table, join, percent, tag

Study = dict[str, Any]
"""The contents of study.json."""
Row = dict[str, Any]
"""An entry of one of its lists, or the statistics of a metric: mean, low, high and num."""

SCORE = "retrieval/mean_r@1"
MAIN_THIRDS = ("matched", "mismatched")
"""The third towers that every method is trained with."""
TWICE = "-twice"
"""Ends the label of methods that were trained for twice the steps."""
_RANKED = {
    SCORE: "mean R@1", "retrieval/i2t_r@1": "image → text R@1", "retrieval/t2i_r@1": "text → image R@1",
    "zero_shot/top1": "zero-shot top-1", "combination/mean_r@1": "combined, mean R@1",
}  # fmt: skip
COLUMNS = _RANKED | {
    "third/mean_r@1": "third tower alone, mean R@1", "control/mean_r@1": "control, mean R@1",
}  # fmt: skip


def rows_of(study: Study, name: str, third: str = "third") -> list[Row]:
    """A list of study.json in the order of third towers, methods and steps; empty where it is missing.

    third: the key of the third tower in its rows.
    """
    places = {
        name: place for place, name in enumerate(["", *(study.get("protocol") or {}).get("thirds", ())])
    }
    methods = {str(method): place for place, method in enumerate(METHODS)}

    def place(row: Row) -> tuple[int, int, int]:
        tower, method = row.get(third) or "", method_of(row.get("label", ""))
        return places.get(tower, len(places)), methods.get(method, len(methods)), row.get("steps", 0)

    return sorted(study.get(name) or (), key=place)


def method_of(label: str) -> str:
    """The method of a label: `3t-twice` and `3t 1000` → `3t`."""
    return label.split(" ")[0].removesuffix(TWICE)


def ends(stats: Row) -> tuple[float, ...]:
    """The two ends of an interval; empty with one seed, which has none."""
    low, high = stats.get("low"), stats.get("high")
    return () if low is None or high is None else (low, high)


# Plots


def draw_study(study: Study) -> dict[str, list[Plot]]:
    """The plots by section; those of third towers beside the main two are in `other methods`, `other combination`."""
    found = [row["third"] for name in ("methods", "growth") for row in rows_of(study, name)]
    others = [third for third in dict.fromkeys(found) if third and third not in MAIN_THIRDS]

    def each(draw: Callable[[Study, str], Plot | None], thirds: Iterable[str]) -> list[Plot]:
        return [plot for third in thirds if (plot := draw(study, third))]

    with drawing():
        return {
            "methods": each(_methods, MAIN_THIRDS),
            "other methods": each(_methods, others),
            "combination": each(_combination, MAIN_THIRDS),
            "other combination": each(_combination, others),
            "growth": each(_growth, [*MAIN_THIRDS, *others]),
            "budgets": _budgets(study),
        }


def _methods(study: Study, third: str) -> Plot | None:
    """The score of each method with a third tower, on one scale for all third towers; the line is the baseline's."""
    every = [row for row in rows_of(study, "methods") if SCORE in row["metrics"]]
    rows = [row for row in every if row["third"] in ("", third)]
    if all(not row["third"] for row in rows):
        return None
    figure, ax = panel(74 + 27 * len(rows), left=172, right=52, top=32, bottom=42)
    for place, row in enumerate(rows):
        stats, shade = row["metrics"][SCORE], colour(method_of(row["label"]))
        if row["label"] == "baseline":
            ax.axvline(100 * stats["mean"], color=MUTED, linewidth=1.2, linestyle="--", zorder=1)
        if span := ends(stats):
            ax.plot([100 * end for end in span], [place, place], color=shade, linewidth=2)
        face = PAPER if row["label"].endswith(TWICE) else shade
        look: dict[str, Any] = {
            "color": shade,
            "markerfacecolor": face,
            "markersize": 8,
            "markeredgewidth": 1.8,
        }
        ax.plot(100 * stats["mean"], place, "o", zorder=3, **look)
        text: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center"}
        ax.text(-0.04, place, short(row["name"], 26), ha="right", **text)
        ax.text(1.04, place, percent(stats["mean"]), **text)
    values = [
        100 * end for row in every for end in (row["metrics"][SCORE]["mean"], *ends(row["metrics"][SCORE]))
    ]
    margin = 0.04 * (max(values) - min(values)) or 1
    ax.set(xlim=(min(values) - margin, max(values) + margin), ylim=(len(rows) - 0.4, -0.6), yticks=[])
    ax.set(xlabel="mean R@1, percent", title=short(third, 40))
    figures = ", ".join(f"{row['name']} {percent(row['metrics'][SCORE]['mean'])}" for row in rows)
    return finish(figure, f"methods-{third}", f"Mean R@1 with the third tower {third}, percent: {figures}")


def _combination(study: Study, third: str) -> Plot | None:
    """Test score by α, mean over seeds, of every form of 3T and of the control; the dots are the chosen α."""
    curves = [row for row in rows_of(study, "sweeps") if row["third"] == third]
    if not curves:
        return None
    figure, ax = panel(330, left=42, right=16, top=32, bottom=102)
    chosen: list[tuple[float, float]] = []
    for row in curves:
        control, test = row["label"] == "control", [100 * value for value in row["test"]]
        name = "control: baseline + LiT" if control else f"{method_label(row['label'])} combined"
        look: dict[str, Any] = {"color": MUTED if control else colour(row["label"]), "label": short(name)}
        ax.plot(row["alphas"], test, "--" if control else "-", linewidth=1.8 if control else 2.4, **look)
        chosen += [(alpha, float(np.interp(alpha, row["alphas"], test))) for alpha in row["chosen"]]
    ax.plot(
        *zip(*chosen, strict=True), "o", color=INK, markersize=5, label="α chosen on validation", zorder=4
    )
    ax.set(xlim=(0, 1), xlabel="α", title=short(f"test mean R@1, % · {third}", 46))
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    below: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "fontsize": 10.5, "va": "top"}
    ax.text(0, -0.12, "main pair alone", ha="left", **below)
    ax.text(1, -0.12, "third tower alone", ha="right", **below)
    legend(ax)
    return finish(figure, f"combination-{third}", f"Test mean R@1 in percent by α, third tower {third}")


Lines = Mapping[str, tuple[str, Sequence[tuple[float, Row]]]]
"""By label, the colour of a line and its points: x, and the statistics of y."""


def _growth(study: Study, third: str) -> Plot | None:
    """The gap 3T − LiT by number of training images, a line for each size of the main towers."""
    cells = [row for row in study.get("growth") or () if row["third"] == third]
    lines = {
        f"{size / 1000:,.0f} k parameters": (
            PALETTE[f"phase-{place % 8}"][0],
            [(row["num_train"], row["gap"]) for row in cells if row["num_main"] == size],
        )
        for place, size in enumerate(dict.fromkeys(row["num_main"] for row in cells))
    }
    heading = f"3T − LiT, points of mean R@1 · {third}"
    return _over(f"growth-{third}", heading, "training images", lines, zero=True) if cells else None


def _budgets(study: Study) -> list[Plot]:
    """The score by number of steps, a line for each method."""
    rows = rows_of(study, "budgets")
    lines = {
        method_label(method): (
            colour(method),
            [(row["steps"], row["score"]) for row in rows if method_of(row["label"]) == method],
        )
        for method in dict.fromkeys(method_of(row["label"]) for row in rows)
    }
    return [_over("budgets", "mean R@1, %", "training steps", lines)] if rows else []


def _over(name: str, heading: str, axis: str, lines: Lines, *, zero: bool = False) -> Plot:
    """Lines over a logarithmic axis, each point with its interval. zero: whether a line marks 0."""
    figure, ax = panel(270, left=42, right=124, top=32, bottom=42)
    if zero:
        ax.axhline(0, color=MUTED, linewidth=1.2)
    for shade, points in lines.values():
        for x, stats in points:
            ax.plot([x] * len(ends(stats)), [100 * end for end in ends(stats)], color=shade, linewidth=1)
        ax.plot(
            [x for x, _ in points],
            [100 * stats["mean"] for _, stats in points],
            "o-",
            color=shade,
            linewidth=2,
        )
    ticks = sorted({x for _, points in lines.values() for x, _ in points})
    ax.set(xscale="log", xlabel=axis, title=short(heading, 50))
    ax.set_xticks(ticks, [f"{x:,}" for x in ticks])
    ax.set_xticks([], minor=True)
    label_ends(ax, [(100 * points[-1][1]["mean"], label, shade) for label, (shade, points) in lines.items()])
    return finish(figure, name, f"{heading}, by {axis}")


# Tables


class Figure(NamedTuple):
    """A figure of a table, its interval, and whether it stands out, for example as the best of its column."""

    text: str
    interval: str = ""
    bold: bool = False

    def html(self) -> Html:
        """The contents of a cell of the page."""
        star = (
            tag("span", "★", class_="star", role="img", aria_label="best of this column")
            if self.bold
            else None
        )
        text = tag("span", self.text, class_="best" if self.bold else "mean")
        return join(star, text, tag("small", self.interval) if self.interval else None)

    def markdown(self) -> str:
        """The contents of a cell of the Markdown."""
        return (f"**{self.text}**" if self.bold else self.text) + (
            f" ({self.interval})" if self.interval else ""
        )


class Table(NamedTuple):
    """Headings, and rows whose first cell is their name."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Figure]]

    def html(self) -> Html:
        """The table for the page."""
        rows = ([cell.html() if isinstance(cell, Figure) else cell for cell in row] for row in self.rows)
        return html_table(self.head, rows)

    def markdown(self) -> str:
        """The table as Markdown."""
        rows = ([c.markdown() if isinstance(c, Figure) else escaped(c) for c in row] for row in self.rows)
        first, *lines = (f"| {' | '.join(cells)} |\n" for cells in (map(escaped, self.head), *rows))
        return "".join((first, "|---" * len(self.head) + "|\n", *lines))


def escaped(text: str) -> str:
    """Text for Markdown, on one line, in which no character begins a tag or ends a cell."""
    line = " ".join(text.split()).replace("|", "\\|")
    return re.sub(r"[&<](?=[\w/!?#])", lambda found: html.escape(found[0]), line)


def plain(value: Any) -> str:
    """A value of the protocol, or of a machine, as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
    )


def _score(stats: Row | None, best: float | None = None) -> Figure:
    if stats is None:
        return Figure("–")
    interval = "–".join(map(percent, ends(stats))).replace("-", "−")
    return Figure(percent(stats["mean"]), interval, stats["mean"] == best)


def _gap(stats: Row | None) -> Figure:
    if stats is None:
        return Figure("–")
    interval = " to ".join(map(percent, ends(stats))).replace("-", "−")
    return Figure(f"{100 * stats['mean']:+.1f}".replace("-", "−"), interval)


Scored = tuple[str, Mapping[str, Row], Collection[str]]
"""A row of a table of means: its name, its statistics, and the columns whose best it may be."""


def _scores(first: str, columns: Mapping[str, str], rows: Sequence[Scored]) -> Table:
    """Means by row and column; columns that no row has are left out."""
    shown = [key for key in columns if any(key in stats for _, stats, _ in rows)]
    best = {
        key: max(
            (stats[key]["mean"] for _, stats, ranked in rows if key in stats and key in ranked), default=None
        )
        for key in shown
    }
    body: list[list[str | Figure]] = [
        [name, *(_score(stats.get(key), best[key] if key in ranked else None) for key in shown)]
        for name, stats, ranked in rows
    ]
    return Table([first, *(columns[key] for key in shown)], body)


def methods_table(study: Study) -> Table:
    """Every metric of every method; those with twice the steps are not ranked."""
    rows: list[Scored] = [
        (_named(row), row["metrics"], () if row["label"].endswith(TWICE) else _RANKED)
        for row in rows_of(study, "methods")
    ]
    return _scores("method", COLUMNS, rows)


def _named(row: Row) -> str:
    return f"{row['name']} ({row['third']})" if row["third"] else str(row["name"])


def attributes_table(study: Study, task: str) -> Table:
    """Accuracy by attribute. task: `attribute` is zero-shot; `probe` has the frozen towers as well."""
    rows = rows_of(study, "attributes")
    names = {name: name for row in rows for name in row[task]}
    found: list[Scored] = [(_named(row), row[task], names) for row in rows]
    if task == "probe" and rows:
        towers = (row for row in rows_of(study, "towers", "name") if row.get("probes"))
        found += [(f"frozen tower ({row['name']})", row["probes"], ()) for row in towers]
    return _scores("method", names, found)


def towers_table(study: Study) -> Table:
    """The accuracy of each third tower on its own labels, and its probes."""
    rows = [row for row in rows_of(study, "towers", "name") if "own" in row]
    probes = {name: f"probe: {name}" for row in rows for name in row.get("probes") or ()}
    found: list[Scored] = [
        (row["name"], {"own": row["own"], **(row.get("probes") or {})}, ()) for row in rows
    ]
    return _scores("third tower", {"own": "own labels"} | probes, found)


def growth_table(study: Study) -> Table:
    """The gap 3T − LiT by size, third tower and number of training images."""
    gaps = {
        (row["third"], row["num_main"], row["num_train"]): row["gap"] for row in study.get("growth") or ()
    }
    images = sorted({key[2] for key in gaps})
    rows: list[list[str | Figure]] = [
        [f"{size:,} ({third})", *(_gap(gaps.get((third, size, number))) for number in images)]
        for third, size in dict.fromkeys(key[:2] for key in gaps)
    ]
    return Table(["parameters of the main towers", *(f"{number:,} images" for number in images)], rows)


def differences_table(study: Study, name: str, reference: str, heading: str) -> Table:
    """The scores of a list of study.json, and their differences to a method of it.

    heading: of the column of the differences.
    """
    rows: list[list[str | Figure]] = []
    for row in sorted(rows_of(study, name), key=lambda row: row.get("steps", 0)):
        steps, gap = row.get("steps"), None if method_of(row["label"]) == reference else row.get("difference")
        called = f"{row['name'].replace(f' {steps}', '')}, {steps:,} steps" if steps else row["name"]
        rows.append([called, _score(row["score"]), _gap(gap)])
    return Table(["method", "mean R@1", heading], rows)


def rates_table(study: Study) -> Table:
    """The learning rates that were tried, and the one that was chosen."""
    rows = []
    for row in rows_of(study, "learning_rates"):
        method, _, size = row["label"].partition(" ")
        name = method_label(f"{method_label(method)} {size}".strip(), row["third"])
        tried = ", ".join(f"{lr}: {percent(value)}" for lr, value in row["tried"].items())
        rows.append([name, f"{row['lr']:g}", "yes" if row["on_edge"] else "no", tried])
    return Table(["method", "learning rate", "on the edge of the grid", "rates tried"], rows)


def claims_table(study: Study) -> Table:
    """The claims with verdict, differences and test, for the Markdown."""
    rows: list[list[str | Figure]] = []
    for claim in study.get("claims") or ():
        verdict = Figure(claim["verdict"], bold=claim["verdict"] == "not held")
        found = "; ".join(f"{what}: {words}" for what, words in evidence(claim))
        rows.append(
            [title(claim), verdict, found, "; ".join(filter(None, (certainty(claim), claim["note"])))]
        )
    return Table(["claim", "verdict", "difference, 95 % interval", "test"], rows)


def machines_table(study: Study) -> Table:
    """The machines that the runs were made on, for the Markdown."""
    machines = study.get("machines") or ()
    keys = list(dict.fromkeys(key for machine in machines for key in machine))
    return Table(keys, [[plain(machine.get(key, "–")) for key in keys] for machine in machines])
