"""A comparison's plots, each as an SVG for the page and a PNG file."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np

from threetowers.objective.pairs import method_label
from threetowers.report.panels import (
    INK,
    MUTED,
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

MAX_POINTS = 250  # of one line
CLASSES = 8  # best and worst ones shown, where there are too many to show all
_VARIANTS = (("o", "-"), ("D", "--"), ("^", ":"), ("s", "-."))  # marker and line by third tower


def draw_plots(compare: Compare, curves: Curves) -> dict[str, list[Plot]]:
    """The plots by section (primary, validation, loss, combination, classes, cost); sections without data are empty."""
    with drawing():
        return {
            "primary": _primary(compare),
            "validation": _validation(compare, curves),
            "loss": _losses(compare, curves),
            "combination": _combinations(compare),
            "classes": _classes(compare),
            "cost": _costs(compare),
        }


def average(lines: Sequence[Line]) -> tuple[list[float], list[float], list[float], list[float]]:
    """The steps that all lines share, with the mean, lowest and highest value at each; at most MAX_POINTS points.

    Beyond MAX_POINTS, neighbouring steps are averaged.
    """
    tables = [dict(line) for line in lines]
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
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
    """The look of a row's points: colour by method, shape by third tower, filled for the first third tower only."""
    shape, shade = _variant(compare, key[1])[0], colour(key[0])
    return {
        "marker": shape,
        "markersize": size,
        "markeredgewidth": 1.8,
        "color": shade,
        "markerfacecolor": shade if shape == "o" else PAPER,
        "zorder": 3,
    }


def _primary(compare: Compare) -> list[Plot]:
    table, path = cells(compare), primary(compare)
    keys = [key for key in ranking(compare) if path in table[key]]
    if not keys:
        return []
    figure, ax = panel(58 + 27 * len(keys), left=168, right=58, top=10, bottom=48)
    for place, key in enumerate(keys):
        cell, shade = table[key][path], colour(key[0])
        if cell.span:
            ax.plot([100 * end for end in cell.span], [place, place], color=shade, linewidth=2)
        ax.plot(100 * cell.mean, place, **_marker(compare, key))
        weight = "bold" if place == 0 else "normal"
        text: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center", "fontweight": weight}
        ax.text(-0.04, place, short(label(compare, key)), ha="right", **text)
        ax.text(1.04, place, percent(cell.mean) + (" ★" if place == 0 else ""), **text)
    ax.set(ylim=(len(keys) - 0.4, -0.6), yticks=[], xlabel=f"{metric_name(path)}, percent")
    figures = ", ".join(f"{label(compare, key)} {percent(table[key][path].mean)}" for key in keys)
    return [finish(figure, "primary", f"{metric_name(path)} in percent: {figures}")]


def _curvepanel(
    compare: Compare, curves: Curves, metric: str, third: str, name: str, unit: str
) -> list[Plot]:
    """One metric over the steps: a line for the baseline and for every method with this third tower.

    An empty list when none of them logged the metric at two steps.
    """
    keys = [key for key in curves if key[1] in ("", third) and metric in curves[key]]
    drawn = {key: line for key in keys if (line := average(curves[key][metric]))[0]}
    if all(len(x) < 2 for x, *_ in drawn.values()):
        return []
    scale = 100 if unit else 1
    title = name + unit + (f" · {third}" if third else "")
    figure, ax = panel(250, left=42, right=104, top=32, bottom=42)
    for key, (x, y, low, high) in drawn.items():
        look: dict[str, Any] = {"color": colour(key[0]), "marker": "o" if len(x) == 1 else ""}
        ax.plot(x, scale * np.array(y), _variant(compare, key[1])[1], linewidth=2, **look)
        if len(curves[key][metric]) > 1:
            band = (scale * np.array(low), scale * np.array(high))
            ax.fill_between(x, *band, color=colour(key[0]), alpha=0.15, linewidth=0)
    ax.margins(x=0)
    ax.locator_params(nbins=5)
    ax.set(xlabel="step", title=short(title, 46))
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    label_ends(
        ax,
        [(scale * y[-1], method_label(key[0]), colour(key[0])) for key, (_, y, *_) in drawn.items()],
    )
    return [finish(figure, f"{metric}-{third or 'all'}", f"{title}, by training step")]


def _validated(compare: Compare, curves: Curves) -> str:
    """The validation metric that is shown: the primary one, or else the first that was logged."""
    wanted = "val/" + primary(compare).split("/")[-1]
    logged = dict.fromkeys(name for row in curves.values() for name in row if name.startswith("val/"))
    return wanted if wanted in logged or not logged else next(iter(logged))


def measured_once(compare: Compare, curves: Curves) -> str:
    """The validation and the losses in sentences, where they have one step alone, of which no curve is drawn."""
    sentences = [_once(compare, curves, metric) for metric in (_validated(compare, curves), *_logged(curves))]
    return " ".join(filter(None, sentences))


def _once(compare: Compare, curves: Curves, metric: str) -> str:
    """A metric in a sentence where it was measured at one step alone; otherwise empty."""
    found = {key: line for key in curves if (line := average(curves[key].get(metric, [])))[0]}
    if not found or any(len(x) > 1 for x, *_ in found.values()):
        return ""
    steps = {x[0] for x, *_ in found.values()}
    after = f", after step {steps.pop():,.0f}" if len(steps) == 1 else ""
    ordered = sorted(found, key=lambda key: -found[key][1][0])
    if metric.startswith("val/"):
        figures = ", ".join(f"{label(compare, key)} {percent(found[key][1][0])} %" for key in ordered)
        name = metric_name(metric.removeprefix("val/"))
        return f"Validation ran once{after}: {figures} {name}. --eval-every-steps N makes a curve of it."
    figures = ", ".join(f"{label(compare, key)} {found[key][1][0]:.3g}" for key in ordered)
    return f"Logged once{after}: {_loss_name(metric)}, {figures}."


def _logged(curves: Curves) -> list[str]:
    """The losses that were logged."""
    names = (name for row in curves.values() for name in row if name.startswith("train/loss/"))
    return list(dict.fromkeys(names))


def _loss_name(metric: str) -> str:
    return "loss " + metric.removeprefix("train/loss/")


def _validation(compare: Compare, curves: Curves) -> list[Plot]:
    metric = _validated(compare, curves)
    name = "validation " + metric_name(metric.removeprefix("val/"))
    return [
        plot
        for third in _thirds(compare) or [""]
        for plot in _curvepanel(compare, curves, metric, third, name, ", %")
    ]


def _losses(compare: Compare, curves: Curves) -> list[Plot]:
    return [
        plot
        for metric in _logged(curves)
        for third in _thirds(compare) or [""]
        for plot in _curvepanel(compare, curves, metric, third, _loss_name(metric), "")
    ]


def _combinations(compare: Compare) -> list[Plot]:
    panels: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in compare.get("combination", []):
        key = (
            row.get("method", "3t"),
            row.get("third") or "",
            row["metric"],
        )  # an older file names none
        panels.setdefault(key, []).append(row)
    return [_combination(compare, *key, rows) for key, rows in panels.items()]


def _combination(compare: Compare, method: str, third: str, metric: str, rows: list[dict[str, Any]]) -> Plot:
    """Test score by α: the mean thick, each seed thin, the control dashed, baseline and LiT at the ends."""
    figure, ax = panel(330, left=42, right=16, top=32, bottom=102)
    alphas, shade = rows[0]["alphas"], colour(method)
    if controls := [100 * np.array(row["control"]["test"]) for row in rows if row.get("control")]:
        name = "control: baseline + LiT"
        ax.plot(alphas, np.mean(controls, axis=0), "--", color=MUTED, linewidth=1.8, label=name)
    tests = [100 * np.array(row["test"]) for row in rows]
    for test in tests:
        ax.plot(alphas, test, color=shade, linewidth=0.8, alpha=0.45)
    ax.plot(
        alphas, np.mean(tests, axis=0), color=shade, linewidth=2.4, label=f"{method_label(method)} combined"
    )
    best = [row["alpha"] for row in rows]
    span = " to ".join(dict.fromkeys(f"{alpha:.2f}" for alpha in (min(best), max(best))))
    points = [float(np.interp(alpha, alphas, test)) for alpha, test in zip(best, tests, strict=True)]
    ax.plot(best, points, "o", color=INK, markersize=6, label=f"α chosen on val: {span}", zorder=4)
    for alone, end in (("baseline", 0), ("lit", 1)):
        values = [v for row in rows if (v := finite((row.get("references") or {}).get(alone))) is not None]
        if values:
            look = _marker(compare, (alone, "")) | {"marker": "s", "markerfacecolor": PAPER, "zorder": 5}
            name = f"{method_label(alone)} alone"
            ax.plot(end, 100 * mean(values), linestyle="", label=name, clip_on=False, **look)
    ax.set(xlim=(0, 1), xlabel="α")
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    below: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "fontsize": 10.5, "va": "top"}
    ax.text(0, -0.12, "main pair alone", ha="left", **below)
    ax.text(1, -0.12, "third tower alone", ha="right", **below)
    title = f"{method_label(method, third)}: test {metric_name(metric)}, %"
    ax.set_title(short(title, 50))
    legend(ax)
    stem = "combination" if method == "3t" else f"combination-{method}"
    text = f"{title}, by α; chosen on validation: {span}"
    return finish(figure, f"{stem}-{metric}-{third or 'all'}", text)


def _classes(compare: Compare) -> list[Plot]:
    """Accuracy by class: the best method as bars, the baseline and the second-best method as points."""
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
    figure, ax = panel(124 + 20 * len(names), left=132, right=16, top=32, bottom=92)
    places = np.arange(len(names))
    values = [rows[leader][name] for name in names]
    ax.barh(
        places, values, height=0.62, color=colour(leader[0]), alpha=0.55, label=short(label(compare, leader))
    )
    for key in others:
        points = [(rows[key][name], place) for place, name in enumerate(names) if name in rows[key]]
        look = _marker(compare, key, 6.5)
        ax.plot(
            *zip(*points, strict=True), linestyle="", label=short(label(compare, key)), clip_on=False, **look
        )
    ax.set(xlim=(0, 100), ylim=(len(names) - 0.4, -0.6), xlabel="zero-shot accuracy, percent")
    ax.set_yticks(places, [short(name, 20) for name in names])
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.grid(visible=False, axis="y")
    ax.set_title({"best-classes": "best classes", "worst-classes": "worst classes"}.get(part, "all classes"))
    legend(ax)
    shown = ", ".join(f"{name} {value:.0f}" for name, value in zip(names, values, strict=True))
    return finish(figure, part, f"Zero-shot accuracy of {label(compare, leader)} by class, percent: {shown}")


def _costs(compare: Compare) -> list[Plot]:
    panels = {
        "train_seconds": ("training time", "minutes", 1 / 60),
        "inference_params": ("parameters at inference", "millions", 1e-6),
    }
    return [plot for field, axis in panels.items() for plot in _cost(compare, field, *axis)]


def _cost(compare: Compare, field: str, what: str, unit: str, scale: float) -> list[Plot]:
    table, path = cells(compare), primary(compare)
    costs = {row_key(m): finite(m.get(field)) for m in compare["methods"]}
    points = [
        (key, x * scale)
        for key in ranking(compare)
        if (x := costs.get(key)) is not None and path in table[key]
    ]
    if not points:
        return []
    figure, ax = panel(286 + 9 * len(points), left=42, right=16, top=32, bottom=64 + 9 * len(points))
    for key, x in points:
        name = short(label(compare, key))
        ax.plot(x, 100 * table[key][path].mean, linestyle="", label=name, **_marker(compare, key))
    heading = f"{metric_name(path)}, %, by {what}"
    ax.set(xlabel=f"{what}, {unit}", title=heading)
    ax.margins(0.12)
    ax.set_xlim(left=0)
    legend(ax)
    return [finish(figure, f"cost-{field}", heading)]
