"""The plots of an analysis of towers: figures by method, matrices, maps, curves over the steps, agreement of errors.

Whatever is told apart by colour is told apart by shape, dash or place too.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from threetowers.report.panels import GRID, INK, MUTED, PAPER, WIDTH, Plot, colour, finish, panel, short
from threetowers.report.tables import finite, percent

Analysis = dict[str, Any]
"""The contents of analysis.json."""
Row = dict[str, Any]

BLUE, ORANGE, GREEN = colour("3t"), colour("lit"), colour("3t-regression")
CLASSES = 8
"""Classes at either end that are shown, where there are too many to show all."""
PAIRS = {
    "img-txt": ("image and text towers", "o", BLUE),
    "img-reference": ("image and frozen towers", "s", ORANGE),
    "txt-reference": ("text and frozen towers", "^", GREEN),
}
"""What is compared with what: the name, the marker and its colour."""
ANSWERED = {
    "both": ("both right", MUTED),
    "first": ("only the main pair", BLUE),
    "second": ("only the frozen tower", ORANGE),
    "neither": ("neither", GRID),
}
"""The four counts of agreement."""
DIRECTIONS = {"i2t": "image → text", "t2i": "text → image"}
MEASURES = {
    "1 − κ": "1 − κ of their errors",
    "rescued": "share of misses that the frozen tower has right",
    "1 − CKA": "1 − CKA of their features",
}
"""How much the main pair and a frozen tower disagree."""
_CURVES = {
    "recall": "mean R@1 among these images, %",
    "img-txt": "CKA of image and text towers",
    "img-frozen": "CKA of image and frozen towers",
    "txt-frozen": "CKA of text and frozen towers",
    "gap": "modality gap",
    "rank-img": "effective rank of img",
    "rank-txt": "effective rank of txt",
}
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")  # by frozen tower
_LARGEST = 12  # side of a matrix whose values are written into its cells


def titles(analysis: Analysis) -> dict[str, str]:
    """What each run is called: its method, with the seed where that tells it from others, or else its folder."""
    runs = analysis["runs"]
    called: dict[str, str] = {}
    for run in runs:
        same = [other for other in runs if other["label"] == run["label"]]
        seeds = [other["seed"] for other in same]
        name = run["label"] if len(same) == 1 else f"{run['label']}, seed {run['seed']}"
        called[run["name"]] = name if seeds.count(run["seed"]) == 1 else run["name"]
    return called


def with_tower(name: str, run: Row, tower: str) -> str:
    """A run's name, with the frozen tower where it has several."""
    return f"{name}, {tower}" if len(run["towers"]) > 1 else name


def of_tower(rows: Iterable[Row], tower: str) -> list[Row]:
    """The rows about one frozen tower."""
    return [row for row in rows if row["tower"] == tower]


def disagreement(point: Row, measure: str) -> float | None:
    """How much the main pair and the frozen tower of a point disagree by a measure."""
    if measure == "rescued":
        return finite(point["rescued"])
    value = finite(point["kappa" if measure == "1 − κ" else "cka"])
    return None if value is None else 1 - value


# Pieces of the panels


def _frame(body: float, entries: int, *, left: float) -> tuple[Figure, Axes]:
    """A panel whose axes are `body` px high, with room for a title above and a legend of so many entries below."""
    bottom = 44 + (8 + 17 * -(-entries // 2) if entries else 0)
    return panel(32 + body + bottom, left=left, right=20, top=32, bottom=bottom)


def _legend(figure: Figure) -> None:
    """A legend in two columns at the lower edge, for which `_frame` leaves room."""
    figure.legend(loc="lower left", bbox_to_anchor=(0, 0), ncols=2)


def _title(ax: Axes, title: str) -> None:
    """A title that begins at the left edge of the panel."""
    place = ax.get_position()
    ax.set_title(title, x=-place.x0 / place.width)


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Names the rows of a panel left of its axes, from the top."""
    ax.set(ylim=(len(names) - 0.4, -0.6))
    ax.set_yticks(range(len(names)), [short(name) for name in names])
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.grid(visible=False, axis="y")


def _points(
    ax: Axes, x: Sequence[float], y: Iterable[float], marker: str, shade: str, name: str | None = None
) -> None:
    """Points with an edge in the colour of the paper, so that each of two that meet can be seen."""
    look: dict[str, Any] = {"color": shade, "markersize": 8, "markeredgecolor": PAPER, "linestyle": ""}
    ax.plot(x, list(y), marker, label=name, zorder=3, clip_on=False, **look)


# The plots


def similarity_of_methods(analysis: Analysis) -> list[Plot]:
    """For each frozen tower, the CKA of image, text and frozen towers by method; a line is the interval over runs."""
    rows = [row for row in analysis["methods"] if row["metric"] == "cka"]
    plots = []
    for number, reference in enumerate(dict.fromkeys(row["reference"] for row in rows)):
        own = [row for row in rows if row["reference"] == reference]
        labels = list(dict.fromkeys(row["label"] for row in own))
        figure, ax = _frame(14 + 27 * len(labels), len(PAIRS), left=172)
        for offset, (pair, (name, marker, shade)) in zip((-0.2, 0, 0.2), PAIRS.items(), strict=True):
            of_pair = [row for row in own if row["pair"] == pair]
            places = [labels.index(row["label"]) + offset for row in of_pair]
            for row, y in zip(of_pair, places, strict=True):
                if row["low"] is not None:
                    ax.plot([row["low"], row["high"]], [y, y], color=shade, linewidth=2)
            _points(ax, [row["mean"] for row in of_pair], places, marker, shade, name)
        ax.set(xlim=(min(0, ax.get_xlim()[0]), 1), xlabel="CKA")
        _name_rows(ax, labels)
        _title(ax, short(f"frozen tower: {reference}", 46) if reference else "CKA of the towers")
        _legend(figure)
        shown = ", ".join(f"{row['label']} {PAIRS[row['pair']][0]} {row['mean']:.2f}" for row in own)
        plots.append(finish(figure, f"towers-{number}", f"CKA with the frozen tower {reference}: {shown}"))
    return plots


def matrix(name: str, title: str, labels: Sequence[str], values: dict[tuple[int, int], float | None]) -> Plot:
    """A symmetric matrix of shares; a darker cell is a higher value. values: by two places, each pair once."""
    num = len(labels)
    left = 22 + 6.2 * max(len(short(label)) for label in labels)
    size = WIDTH - left - 4
    figure, ax = panel(size + 56, left=left, right=4, top=32, bottom=24)
    for y in range(num):
        for x in range(num):
            value = 1.0 if x == y else values.get((x, y), values.get((y, x)))
            if value is None:
                continue
            strength = 0.06 + 0.54 * min(max(value, 0.0), 1.0)
            cell: dict[str, Any] = {"facecolor": BLUE, "alpha": strength, "linewidth": 0}
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **cell))
            if num <= _LARGEST:
                digits = "1" if value > 0.995 else f"{value:.2f}".replace("0.", ".").replace("-", "−")
                ax.text(x, y, digits, ha="center", va="center", fontsize=10.5 if num < 9 else 8)
    ax.set(xlim=(-0.5, num - 0.5))
    _name_rows(ax, [f"{short(label, 24)}  {place}" for place, label in enumerate(labels, 1)])
    ax.set_ylim(num - 0.5, -0.5)
    ax.set_xticks(range(num), [str(place) for place in range(1, num + 1)])
    ax.tick_params(length=0, labelcolor=INK, labelsize=10.5)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    _title(ax, title)
    known = ", ".join(f"{labels[a]} and {labels[b]} {v:.2f}" for (a, b), v in values.items() if v is not None)
    return finish(figure, name, f"{title}: {known}")


def view_matrices(run: Row, number: int) -> list[Plot]:
    """The similarity of every two views of a run, by CKA and by shared neighbours."""
    names = [row["view"] for row in run["views"]]
    plots = []
    for metric, title in (("cka", "CKA of the views"), ("overlap", "shared neighbours of the views")):
        places = [(names.index(row["a"]), names.index(row["b"])) for row in run["similarity"]]
        values = (finite(row[metric]) for row in run["similarity"])
        plots.append(matrix(f"views-{number}-{metric}", title, names, dict(zip(places, values, strict=True))))
    return plots


def run_matrices(analysis: Analysis) -> list[Plot]:
    """The similarity of the image towers, of the text towers and of the errors of every two runs."""
    rows, called = analysis["between"], titles(analysis)
    names = [run["name"] for run in analysis["runs"]]
    places = [(names.index(row["a"]), names.index(row["b"])) for row in rows]
    found = {
        "CKA of the image towers": [finite(row["img"]["cka"]) for row in rows],
        "CKA of the text towers": [finite(row["txt"]["cka"]) for row in rows],
        "κ of the errors": [finite(row["kappa"]) for row in rows],
    }
    return [
        matrix(
            f"runs-{number}", title, [called[name] for name in names], dict(zip(places, values, strict=True))
        )
        for number, (title, values) in enumerate(found.items())
        if rows
    ]


def maps(run: Row, number: int) -> list[Plot]:
    """The two views of each row of the objective along the directions of largest variance; a line joins a pair."""
    plots = []
    for row, found in enumerate(run["maps"]):
        first, second = np.array(found["of_a"]), np.array(found["of_b"])
        figure, ax = panel(386, left=4, right=4, top=32, bottom=32)
        joined = np.stack([first, second, np.full_like(first, np.nan)], axis=1).reshape(-1, 2)
        ax.plot(*joined.T, color=GRID, linewidth=0.7, zorder=1)
        look = (("o", BLUE, found["a"]), ("^", ORANGE, found["b"]))
        for (marker, shade, name), points in zip(look, (first, second), strict=True):
            dots: dict[str, Any] = {"color": shade, "alpha": 0.75, "markersize": 4, "markeredgewidth": 0}
            ax.plot(*points.T, marker, linestyle="", label=name, **dots)
        ax.set(xticks=[], yticks=[])
        ax.margins(0.03)
        ax.set_title(f"{found['a']} and {found['b']}, {percent(sum(found['shares']))} % of the variance")
        _legend(figure)
        text = f"A map of {len(first)} pairs of {found['a']} and {found['b']}"
        plots.append(finish(figure, f"map-{number}-{row}", text))
    return plots


def curves(analysis: Analysis) -> list[Plot]:
    """What the main pair was like at the checkpoints, a line for each run and, where it has several, frozen tower."""
    called = titles(analysis)
    plots = []
    for kind, title in _CURVES.items():
        lines = [
            (run["method"], name, line)
            for run in analysis["runs"]
            for name, line in _lines(run, kind, called[run["name"]]).items()
        ]
        if not lines:
            continue
        figure, ax = _frame(180, len(lines), left=42)
        seen: list[str] = []
        for method, name, line in lines:
            dash = _DASHES[seen.count(method) % len(_DASHES)]
            ax.plot(*zip(*line, strict=True), dash, color=colour(method), linewidth=2, label=short(name))
            seen.append(method)
        ax.margins(x=0)
        ax.locator_params(nbins=5)
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
        ax.set(xlabel="step", title=title)
        _legend(figure)
        ends = ", ".join(f"{name} {line[-1][1]:.2f}" for _, name, line in lines)
        plots.append(finish(figure, f"steps-{kind}", f"{title}, by training step; at the last one: {ends}"))
    return plots


def _lines(run: Row, kind: str, name: str) -> dict[str, list[tuple[int, float]]]:
    """A figure of a run by step, by the name of its line."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for moment in run["checkpoints"]:
        if kind == "recall":
            values = [(name, 100 * moment["mean_r@1"])]
        elif kind == "gap":
            values = [(name, moment["gap"])]
        elif kind.startswith("rank-"):
            values = [(name, moment["effective_rank"][kind.removeprefix("rank-")])]
        else:
            a, b = kind.split("-")
            rows = [r for r in moment["similarity"] if r["a"] == a and (r["b"] == "txt") == (b == "txt")]
            values = [(name if b == "txt" else with_tower(name, run, row["b"]), row["cka"]) for row in rows]
        for line, value in values:
            if finite(value) is not None:
                lines.setdefault(line, []).append((moment["step"], value))
    return lines


def answers(analysis: Analysis) -> list[Plot]:
    """For each direction, the shares of queries that both, one and neither answer right, and the combination."""
    called = titles(analysis)
    plots = []
    for direction, title in DIRECTIONS.items():
        rows = [
            (with_tower(called[run["name"]], run, row["tower"]), row)
            for run in analysis["runs"]
            for row in run["agreement"]
            if row["direction"] == direction
        ]
        if not rows:
            continue
        figure, ax = _frame(14 + 27 * len(rows), len(ANSWERED) + 1, left=172)
        starts = np.zeros(len(rows))
        for answer, (label, shade) in ANSWERED.items():
            shares = np.array([100 * row[answer] / num_queries(row) for _, row in rows])
            ax.barh(range(len(rows)), shares, left=starts, height=0.62, color=shade, label=label)
            starts += shares
        combined = {y: 100 * row["accuracy"]["combined"] for y, (_, row) in enumerate(rows) if "kept" in row}
        if combined:
            _points(ax, list(combined.values()), combined, "D", INK, "right when combined")
        ax.set(xlim=(0, 100), xlabel="percent of the queries")
        _name_rows(ax, [name for name, _ in rows])
        _title(ax, title)
        _legend(figure)
        counts = (
            (name, ", ".join(f"{label} {row[a]}" for a, (label, _) in ANSWERED.items())) for name, row in rows
        )
        shown = "; ".join(f"{name}: {text}" for name, text in counts)
        plots.append(finish(figure, f"answers-{direction}", f"{title}, queries by who is right: {shown}"))
    return plots


def num_queries(row: Row) -> int:
    """The number of queries, or of images of a class."""
    return sum(int(row[answer]) for answer in ANSWERED)


def class_plot(run: Row, tower: str, number: int) -> Plot:
    """Accuracy of the main pair and of a frozen tower by class, in the order of the difference."""

    def difference(row: Row) -> float:
        return float(row["first"] - row["second"]) / num_queries(row)

    rows = sorted(of_tower(run["classes"], tower), key=difference, reverse=True)
    left_out = len(rows) > 2 * CLASSES
    shown = [*rows[:CLASSES], *rows[-CLASSES:]] if left_out else rows
    figure, ax = _frame(14 + 20 * len(shown), 2, left=150)
    main, side = (
        [100 * (row["both"] + row[system]) / num_queries(row) for row in shown]
        for system in ("first", "second")
    )
    places = range(len(shown))
    for y, ends in zip(places, zip(main, side, strict=True), strict=True):
        ax.plot(ends, [y, y], color=GRID, linewidth=3, zorder=1)
    _points(ax, main, places, "o", BLUE, "main pair")
    _points(ax, side, places, "s", ORANGE, "frozen tower")
    if left_out:
        ax.axhline(CLASSES - 0.5, color=MUTED, linewidth=1, linestyle="--")
    ax.set(xlim=(0, 100), xlabel="zero-shot accuracy, percent")
    _name_rows(ax, [str(row["class"]) for row in shown])
    _title(ax, "largest differences, main pair first" if left_out else "all classes")
    _legend(figure)
    text = ", ".join(
        f"{row['class']} {a:.0f} and {b:.0f}" for row, a, b in zip(shown, main, side, strict=True)
    )
    return finish(
        figure, f"classes-{number}-{tower}", f"Accuracy of the main pair and of {tower}, percent: {text}"
    )


def gains(analysis: Analysis) -> list[Plot]:
    """The gain of the combination against each measure of disagreement."""
    points = analysis["prediction"]["points"]
    plots = []
    for number, (measure, name) in enumerate(MEASURES.items()):
        rows = [(x, point) for point in points if (x := disagreement(point, measure)) is not None]
        labels = list(dict.fromkeys(point["label"] for _, point in rows))
        towers = list(dict.fromkeys(point["tower"] for _, point in rows))
        figure, ax = _frame(200, len(labels), left=42)
        for label in labels:
            own = [(x, point) for x, point in rows if point["label"] == label]
            shade, marker = (
                colour(own[0][1]["method"]),
                _MARKERS[towers.index(own[0][1]["tower"]) % len(_MARKERS)],
            )
            for x, point in own:
                ends = [100 * point["gain"][end] for end in ("low", "high")]
                ax.plot([x, x], ends, color=shade, linewidth=1.5)
            means = [100 * point["gain"]["mean"] for _, point in own]
            _points(ax, [x for x, _ in own], means, marker, shade, short(label))
        ax.axhline(0, color=MUTED, linewidth=1, linestyle="--", zorder=1)
        ax.margins(0.1)
        ax.locator_params(nbins=6)
        ax.set(xlabel=name, title="gain of the combination, points of R@1")
        _legend(figure)
        shown = ", ".join(
            f"{point['label']} {x:.2f} and {100 * point['gain']['mean']:.1f}" for x, point in rows
        )
        plots.append(finish(figure, f"gain-{number}", f"{name}, and the gain in points: {shown}"))
    return plots
