"""The page of a forecast: what is recommended, each method's pilots with the line through them, and the figures."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import PercentFormatter

from threetowers.files import write_whole
from threetowers.progress import duration
from threetowers.report.page import document, plot_panels
from threetowers.report.panels import Plot, colour, drawing, finish, legend, panel, short
from threetowers.report.tables import Html, definitions, html_table, join, percent, read_json, tag

SCHEMA = 1
FILE = "advice.json"


def read_advice(folder: Path) -> dict[str, Any]:
    """The contents of a folder's advice.json; raises DataError when it is missing or damaged."""
    return read_json(
        folder / FILE, SCHEMA, "Run `threetowers advise` again, or name the folder that it wrote"
    )


def write_advice(folder: Path) -> Path:
    """Writes report.html into the folder of a forecast; returns the page's path. Raises DataError as `read_advice`."""
    advice = read_advice(folder)
    page = folder / "report.html"
    write_whole(page, _page(advice))
    return page


def advice_text(advice: dict[str, Any]) -> str:
    """The forecasts and the recommendation for the terminal."""
    lines = [f"{'method':<24} {'forecast':>10}  {'95 %':>13}  {'leads':>6}  training"]
    for each in _ranked(advice):
        found = each["forecast"]
        between = f"{percent(found['low'])} to {percent(found['high'])}"
        time = duration(3600 * each["hours"])
        label = short(each["label"], 24)
        lines.append(
            f"{label:<24} {percent(found['value']):>10}  {between:>13}  {found['leads']:>6.0%}  {time}"
        )
    return "\n".join([*lines, "", advice["advice"]])


def _ranked(advice: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(advice["methods"], key=lambda each: each["forecast"]["value"], reverse=True)


def _page(advice: dict[str, Any]) -> str:
    title = f"Which method for {advice['data']}"
    first, _, rest = advice["advice"].partition(". ")
    opening = join(
        tag("h1", title), tag("p", f"{first}.", class_="headline"), tag("p", rest, class_="certainty")
    )
    plots = [_plot(advice, third) for third in dict.fromkeys(each["third"] for each in _shown(advice))]
    how = (
        "Each point is a pilot: a short training on a part of the images, for as many passes as the full training "
        "makes. A line goes through the logits of a method's pilots over the logarithm of their number of images, and "
        "its value at the full number is the forecast. The bar there is the 95 % interval of one further run. The "
        "chance of leading comes from draws within these intervals. A method whose curve bends beyond the pilots is "
        "not where its line says."
    )
    settings = {
        "images": f"{advice['num_train']:,} to train on, {advice['num_val']:,} to validate",
        "full training": f"{advice['steps']:,} steps of {advice['batch_size']:,}",
        "seeds": ", ".join(map(str, advice["seeds"])),
        "metric": advice["metric"],
        **{str(name): str(value) for name, value in advice["machine"].items()},
    }
    sections = [
        ("forecast", "Forecasts", join(plot_panels(plots), _table(advice), tag("p", how, class_="muted"))),
        ("pilots", "Pilots", _pilots(advice)),
        ("settings", "Settings and machine", definitions(settings.items())),
    ]
    return document(title, opening, sections)


def _shown(advice: dict[str, Any]) -> list[dict[str, Any]]:
    """The methods that have a third tower, or all where none has."""
    return [each for each in advice["methods"] if each["third"]] or advice["methods"]


def _table(advice: dict[str, Any]) -> Html:
    rows = [
        [
            each["label"],
            percent(each["forecast"]["value"]),
            f"{percent(each['forecast']['low'])}–{percent(each['forecast']['high'])}",
            f"{each['forecast']['leads']:.0%}",
            duration(3600 * each["hours"]),
            f"{each['lr']:g}",
        ]
        for each in _ranked(advice)
    ]
    head = ["method", "forecast, %", "95 %", "chance of leading", "full training", "learning rate"]
    return html_table(head, rows)


def _pilots(advice: dict[str, Any]) -> Html:
    rows = [
        [
            each["label"], f"{row['images']:,}", f"{row['steps']:,}", str(row["seed"]), percent(row["score"]),
            duration(row["seconds"]),
        ]
        for each in advice["methods"]
        for row in each["pilots"]
    ]  # fmt: skip
    return html_table(["method", "images", "steps", "seed", "mean R@1, %", "training"], rows)


def _plot(advice: dict[str, Any], third: str) -> Plot:
    """Pilots, lines and forecasts of the methods with this third tower, and of those without one."""
    chosen = [each for each in advice["methods"] if each["third"] in ("", third)]
    full = advice["num_train"]
    with drawing():
        figure, ax = panel(300, left=48, right=16, top=34, bottom=44 + 17 * -(-len(chosen) // 2))
        for place, each in enumerate(chosen):
            images = np.array([row["images"] for row in each["pilots"]])
            scores = np.array([row["score"] for row in each["pilots"]])
            found, tint = each["forecast"], colour(each["method"])
            ax.plot(images, scores, "o", color=tint, markersize=4.5)
            x = np.geomspace(images.min(), full, 50)
            line = _logit(found["value"]) + found["slope"] * np.log2(x / full)
            ax.plot(x, 1 / (1 + np.exp(-line)), color=tint, linewidth=1.4, label=short(each["label"], 22))
            at = full * 1.04 ** (place + 1)  # beside each other, so that the bars can be told apart
            ax.plot([at, at], [found["low"], found["high"]], color=tint, linewidth=2.2)
            ax.plot([at], [found["value"]], "D", color=tint, markersize=5)
        ax.set_xscale("log", base=2)
        ticks = sorted({row["images"] for each in chosen for row in each["pilots"]} | {full})
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=0)
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set(xlabel="training images", title="mean R@1, validation" + (f", {third}" if third else ""))
        legend(ax)
        values = "; ".join(f"{each['label']} {percent(each['forecast']['value'])} %" for each in chosen)
        return finish(figure, f"forecast-{third or 'all'}", f"Forecast at {full:,} images: {values}")


def _logit(share: float) -> float:
    share = min(max(share, 1e-4), 1 - 1e-4)
    return float(np.log(share / (1 - share)))
