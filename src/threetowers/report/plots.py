"""A comparison's plots, each drawn once and given as SVG for the page and as PNG beside it.

Every plot is one panel about 400 px wide, so that the page can set panels side by side or below each other.
Colours in the SVG are CSS variables named after PALETTE: the page decides what they are in the light and the dark.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO, StringIO
from statistics import mean
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from threetowers.objective.pairs import METHODS, method_label
from threetowers.report.tables import (
    Compare,
    Curves,
    Key,
    Line,
    cells,
    finite,
    label,
    metric_name,
    percent,
    primary,
    ranking,
    row_key,
)

# Colour in the light theme, colour in the dark theme. The methods take theirs in the order of their list, from Okabe
# and Ito's colour-blind-safe set; a method beyond the last takes "other".
_METHOD_COLOURS = (
    ("#4d5560", "#b4bcc6"),
    ("#d55e00", "#f0803c"),
    ("#e69f00", "#f3bb45"),
    ("#0072b2", "#58aee8"),
    ("#009e73", "#35c79a"),
)
# The light colours must be distinct: `inline_svg` recognises them by value.
PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#1c2024", "#e8eaed"),
    "muted": ("#5f6977", "#a0a9b4"),
    "line": ("#d9dde2", "#3a4048"),
    "paper": ("#ffffff", "#14171a"),
    "soft": ("#f4f5f7", "#1e2227"),
    **dict(zip(METHODS, _METHOD_COLOURS, strict=False)),
    "other": ("#cc79a7", "#e39ac3"),
}
INK, MUTED, GRID, PAPER = (PALETTE[name][0] for name in ("ink", "muted", "line", "paper"))
WIDTH = 400  # px, of every plot
MAX_POINTS = 250  # of one line
CLASSES = 8  # at either end, where there are too many to show all
_VARIANTS = (("o", "-"), ("D", "--"), ("^", ":"), ("s", "-."))  # marker and line by third tower
# fmt: off
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "threetowers", "text.parse_math": False, "axes.titlepad": 10,
    "font.size": 11, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "text.color": INK, "axes.titlecolor": INK, "axes.labelcolor": MUTED, "axes.edgecolor": GRID,
    "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": GRID, "grid.linewidth": 0.6, "lines.solid_capstyle": "round",
    "legend.frameon": False, "legend.fontsize": 10.5, "legend.handlelength": 1.8, "legend.columnspacing": 1.4,
    "legend.labelspacing": 0.45, "legend.borderpad": 0, "legend.borderaxespad": 0,
}
# fmt: on


@dataclass(frozen=True, slots=True)
class Plot:
    """One finished plot. name: its file's stem. svg: markup for an HTML page. png: the image file's bytes."""

    name: str
    svg: str
    png: bytes


def draw_plots(compare: Compare, curves: Curves) -> dict[str, list[Plot]]:
    """Every plot that the figures allow, by section: primary, validation, loss, combination, classes, cost."""
    with style.context(_STYLE, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph"
        )  # a script that the PNG's font lacks; the page's font has it
        return {
            "primary": _primary(compare),
            "validation": _validation(compare, curves),
            "loss": _losses(compare, curves),
            "combination": _combinations(compare),
            "classes": _classes(compare),
            "cost": _costs(compare),
        }


def colour(method: str) -> str:
    """A method's colour in the light theme."""
    known = method in METHODS and method in PALETTE
    return PALETTE[method if known else "other"][0]


def average(lines: Sequence[Line]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps that all lines share, and there the mean, the lowest and the highest value; at most MAX_POINTS points."""
    tables = [dict(line) for line in lines]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    if not steps:
        return [], [], [], []
    values = np.array([[table[step] for step in steps] for table in tables])
    groups = np.array_split(np.arange(len(steps)), min(len(steps), MAX_POINTS))
    x = [float(np.mean([steps[i] for i in group])) for group in groups]
    y = np.stack([values[:, group].mean(axis=1) for group in groups], axis=1)
    return x, y.mean(axis=0).tolist(), y.min(axis=0).tolist(), y.max(axis=0).tolist()


def _thirds(compare: Compare) -> list[str]:
    return list(dict.fromkeys(m["third"] for m in compare["methods"] if m.get("third")))


def _variant(compare: Compare, third: str) -> tuple[str, str]:
    thirds = _thirds(compare)
    return _VARIANTS[thirds.index(third) % len(_VARIANTS)] if third in thirds else _VARIANTS[0]


def _marker(compare: Compare, key: Key, size: float = 8) -> dict[str, Any]:
    """How a row's points look: colour by method, shape by third tower, hollow from the second third tower on."""
    shape, shade = _variant(compare, key[1])[0], colour(key[0])
    return {
        "marker": shape,
        "markersize": size,
        "markeredgewidth": 1.8,
        "color": shade,
        "markerfacecolor": shade if shape == "o" else PAPER,
        "zorder": 3,
    }


def _short(text: str, width: int = 27) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _panel(height: float, *, left: float, right: float, top: float, bottom: float) -> tuple[Figure, Axes]:
    """A figure of WIDTH × height px with one pair of axes inside the margins."""
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    size = ((WIDTH - left - right) / WIDTH, (height - top - bottom) / height)
    return figure, figure.add_axes((left / WIDTH, bottom / height, *size))


def _height(ax: Axes) -> float:
    """The height of the axes in px."""
    return float(ax.bbox.height * 72 / ax.figure.dpi)


def _legend(ax: Axes) -> None:
    """A legend in two columns under the axes and their label, where it can cover nothing."""
    ax.legend(loc="upper left", bbox_to_anchor=(-0.1, -40 / _height(ax)), ncols=2)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """The nearest heights, none above 1, that are `gap` apart and in the same order; heights: ascending."""
    steps = gap * np.arange(len(heights))
    placed = isotonic_regression(np.array(heights) - steps).x + steps
    return list(placed - max(0.0, placed[-1] - 1))


def _label_ends(ax: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes (height in data units, text, colour) beside the axes, moved apart where they would touch."""
    low, high = ax.get_ylim()
    ends = sorted(ends)
    heights = [(y - low) / (high - low) for y, _, _ in ends]
    for (_, text, shade), start, end in zip(ends, heights, spread(heights, 14 / _height(ax)), strict=True):
        ax.plot([1.01, 1.05], [start, end], color=shade, linewidth=2, transform=ax.transAxes, clip_on=False)
        ax.text(1.07, end, text, transform=ax.transAxes, va="center", fontsize=10.5)


def _finish(figure: Figure, name: str, description: str) -> Plot:
    svg, png = StringIO(), BytesIO()
    figure.savefig(svg, format="svg", transparent=True)
    figure.savefig(png, format="png", dpi=144, facecolor=PAPER, metadata={"Software": None})
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", name)
    return Plot(name, inline_svg(svg.getvalue(), name, description), png.getvalue())


def inline_svg(svg: str, prefix: str, description: str) -> str:
    """matplotlib's SVG document as an element for an HTML page.

    Colours become CSS variables, the font the page's own, ids unique by `prefix`; the header, the metadata and
    the style sheet, which would all reach beyond the element, are left out.
    """
    body = svg[svg.index("<svg") : svg.index("</svg>")]
    for removed in (r"<metadata>.*?</metadata>", r"<defs>\s*<style.*?</style>\s*</defs>", r"<!--.*?-->"):
        body = re.sub(removed, "", body, flags=re.DOTALL)
    view = re.search(r'viewBox="([^"]+)"', body)
    assert view
    body = body[body.index(">") + 1 :].replace("xlink:href", "href")
    names = {value[0]: f"var(--{name})" for name, value in PALETTE.items()}
    body = re.sub(
        r"(fill|stroke): (#[0-9a-f]{6})", lambda m: f"{m[1]}: {names.get(m[2], m[2])}", body
    )  # text carries its colour in `fill` too
    body = re.sub(r"font: (?:(\w+) )?([\d.]+)px [^;\"]+", _font, body)
    body = re.sub(r"(\d\.\d\d)\d+", r"\1", body)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", body)
    body = re.sub(r">\s+<", "><", body)
    return f'<svg class="plot" viewBox="{view[1]}" role="img" aria-label="{escape(description)}">{body}</svg>'


def _font(match: re.Match[str]) -> str:
    weight = f"; font-weight: {match[1]}" if match[1] else ""
    return f"font-size: {match[2]}px{weight}"


def _primary(compare: Compare) -> list[Plot]:
    table, path = cells(compare), primary(compare)
    keys = [key for key in ranking(compare) if path in table[key]]
    if not keys:
        return []
    figure, ax = _panel(58 + 27 * len(keys), left=168, right=58, top=10, bottom=48)
    for place, key in enumerate(keys):
        cell, shade = table[key][path], colour(key[0])
        if cell.low is not None and cell.high is not None:
            ax.plot([100 * cell.low, 100 * cell.high], [place, place], color=shade, linewidth=2)
        ax.plot(100 * cell.mean, place, **_marker(compare, key))
        weight = "bold" if place == 0 else "normal"
        text: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center", "fontweight": weight}
        ax.text(-0.04, place, _short(label(compare, key)), ha="right", **text)
        ax.text(1.04, place, percent(cell.mean) + (" ★" if place == 0 else ""), **text)
    ax.set(ylim=(len(keys) - 0.4, -0.6), yticks=[], xlabel=f"{metric_name(path)}, percent")
    figures = ", ".join(f"{label(compare, key)} {percent(table[key][path].mean)}" for key in keys)
    return [_finish(figure, "primary", f"{metric_name(path)} in percent: {figures}")]


def _curve_panel(
    compare: Compare, curves: Curves, metric: str, third: str, name: str, unit: str
) -> list[Plot]:
    """One metric over the steps: a line for the baseline and for each method with this third tower, if any has it."""
    keys = [key for key in curves if key[1] in ("", third) and metric in curves[key]]
    drawn = {key: line for key in keys if (line := average(curves[key][metric]))[0]}
    if not drawn:
        return []
    scale = 100 if unit else 1
    title = name + unit + (f" · {third}" if third else "")
    figure, ax = _panel(250, left=42, right=104, top=32, bottom=42)
    for key, (x, y, low, high) in drawn.items():
        look: dict[str, Any] = {"color": colour(key[0]), "marker": "o" if len(x) == 1 else ""}
        ax.plot(x, scale * np.array(y), _variant(compare, key[1])[1], linewidth=2, **look)
        if len(curves[key][metric]) > 1:
            band = (scale * np.array(low), scale * np.array(high))
            ax.fill_between(x, *band, color=colour(key[0]), alpha=0.15, linewidth=0)
    ax.margins(x=0)
    ax.locator_params(nbins=5)
    ax.set(xlabel="step", title=_short(title, 46))
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    _label_ends(
        ax,
        [(scale * y[-1], method_label(key[0]), colour(key[0])) for key, (_, y, *_) in drawn.items()],
    )
    return [_finish(figure, f"{metric}-{third or 'all'}", f"{title}, by training step")]


def _validation(compare: Compare, curves: Curves) -> list[Plot]:
    wanted = "val/" + primary(compare).split("/")[-1]
    logged = dict.fromkeys(name for row in curves.values() for name in row if name.startswith("val/"))
    metric = wanted if wanted in logged or not logged else next(iter(logged))
    name = "validation " + metric_name(metric.removeprefix("val/"))
    return [
        plot
        for third in _thirds(compare) or [""]
        for plot in _curve_panel(compare, curves, metric, third, name, ", %")
    ]


def _losses(compare: Compare, curves: Curves) -> list[Plot]:
    logged = dict.fromkeys(name for row in curves.values() for name in row if name.startswith("train/loss/"))
    return [
        plot
        for metric in logged
        for third in _thirds(compare) or [""]
        for plot in _curve_panel(
            compare, curves, metric, third, "loss " + metric.removeprefix("train/loss/"), ""
        )
    ]


def _combinations(compare: Compare) -> list[Plot]:
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in compare.get("combination", []):
        panels.setdefault((row.get("third") or "", row["metric"]), []).append(row)
    return [_combination(compare, third, metric, rows) for (third, metric), rows in panels.items()]


def _combination(compare: Compare, third: str, metric: str, rows: list[dict[str, Any]]) -> Plot:
    """Test score by α: the mean strong, each seed thin, the control dashed, baseline and LiT at the ends."""
    figure, ax = _panel(330, left=42, right=16, top=32, bottom=102)
    alphas, shade = rows[0]["alphas"], colour("3t")
    if controls := [100 * np.array(row["control"]["test"]) for row in rows if row.get("control")]:
        name = "control: baseline + LiT"
        ax.plot(alphas, np.mean(controls, axis=0), "--", color=MUTED, linewidth=1.8, label=name)
    tests = [100 * np.array(row["test"]) for row in rows]
    for test in tests:
        ax.plot(alphas, test, color=shade, linewidth=0.8, alpha=0.45)
    ax.plot(alphas, np.mean(tests, axis=0), color=shade, linewidth=2.4, label="3T combined")
    best = [row["alpha"] for row in rows]
    span = "–".join(dict.fromkeys(f"{alpha:.2f}" for alpha in (min(best), max(best))))
    points = [float(np.interp(alpha, alphas, test)) for alpha, test in zip(best, tests, strict=True)]
    ax.plot(best, points, "o", color=INK, markersize=6, label=f"α chosen on val: {span}", zorder=4)
    for method, end in (("baseline", 0), ("lit", 1)):
        values = [v for row in rows if (v := finite((row.get("references") or {}).get(method))) is not None]
        if values:
            look = _marker(compare, (method, "")) | {"marker": "s", "markerfacecolor": PAPER, "zorder": 5}
            name = f"{method_label(method)} alone"
            ax.plot(end, 100 * mean(values), linestyle="", label=name, clip_on=False, **look)
    ax.set(xlim=(0, 1), xlabel="α")
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    below: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "fontsize": 10.5, "va": "top"}
    ax.text(0, -0.12, "main pair alone", ha="left", **below)
    ax.text(1, -0.12, "third tower alone", ha="right", **below)
    title = f"test {metric_name(metric)}, %" + (f" · {third}" if third else "")
    ax.set_title(_short(title, 46))
    _legend(ax)
    return _finish(
        figure, f"combination-{metric}-{third or 'all'}", f"{title}, by α; chosen on validation: {span}"
    )


def _classes(compare: Compare) -> list[Plot]:
    """The leader's accuracy per class as bars, the baseline's and the runner-up's as points on them."""
    rows: dict[Key, dict[str, float]] = {}
    for row in compare.get("per_class", []):
        rows.setdefault(row_key(row), {})[str(row["class"])] = 100 * row["value"]
    if not rows:
        return []
    ranked = sorted(rows, key=lambda key: -mean(rows[key].values()))
    leader = rows[ranked[0]]
    names = sorted(leader, key=lambda name: (-leader[name], name))
    parts = {"classes": names} if len(names) <= 2 * CLASSES else {
        "best-classes": names[:CLASSES], "worst-classes": names[-CLASSES:],
    }  # fmt: skip
    others = list(dict.fromkeys([*(key for key in ranked[1:] if key[0] == "baseline"), *ranked[1:2]]))
    return [_class_bars(compare, rows, ranked[0], others, part, shown) for part, shown in parts.items()]


def _class_bars(
    compare: Compare,
    rows: dict[Key, dict[str, float]],
    leader: Key,
    others: list[Key],
    part: str,
    names: list[str],
) -> Plot:
    figure, ax = _panel(124 + 20 * len(names), left=132, right=16, top=32, bottom=92)
    places = np.arange(len(names))
    values = [rows[leader][name] for name in names]
    ax.barh(
        places, values, height=0.62, color=colour(leader[0]), alpha=0.55, label=_short(label(compare, leader))
    )
    for key in others:
        points = [(rows[key][name], place) for place, name in enumerate(names) if name in rows[key]]
        look = _marker(compare, key, 6.5)
        ax.plot(
            *zip(*points, strict=True), linestyle="", label=_short(label(compare, key)), clip_on=False, **look
        )
    ax.set(xlim=(0, 100), ylim=(len(names) - 0.4, -0.6), xlabel="zero-shot accuracy, percent")
    ax.set_yticks(places, [_short(name, 20) for name in names])
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.grid(visible=False, axis="y")
    ax.set_title({"best-classes": "best classes", "worst-classes": "worst classes"}.get(part, "all classes"))
    _legend(ax)
    shown = ", ".join(f"{name} {value:.0f}" for name, value in zip(names, values, strict=True))
    return _finish(figure, part, f"Zero-shot accuracy of {label(compare, leader)} by class, percent: {shown}")


def _costs(compare: Compare) -> list[Plot]:
    panels = {
        "train_seconds": ("training time, minutes", 1 / 60),
        "inference_params": ("parameters at inference, millions", 1e-6),
    }
    return [plot for field, (axis, scale) in panels.items() for plot in _cost(compare, field, axis, scale)]


def _cost(compare: Compare, field: str, axis: str, scale: float) -> list[Plot]:
    table, path = cells(compare), primary(compare)
    costs = {row_key(m): finite(m.get(field)) for m in compare["methods"]}
    points = [
        (key, x * scale)
        for key in ranking(compare)
        if (x := costs.get(key)) is not None and path in table[key]
    ]
    if not points:
        return []
    figure, ax = _panel(286 + 9 * len(points), left=42, right=16, top=32, bottom=64 + 9 * len(points))
    for key, x in points:
        name = _short(label(compare, key))
        ax.plot(x, 100 * table[key][path].mean, linestyle="", label=name, **_marker(compare, key))
    ax.set(xlabel=axis, title=f"{metric_name(path)}, %")
    ax.margins(0.12)
    ax.set_xlim(left=0)
    _legend(ax)
    return [_finish(figure, f"cost-{field}", f"{metric_name(path)} against {axis}")]
