"""Where the time of a run's steps went, as a bar and a table, out of the profile.json that training writes."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from threetowers.report.panels import PHASE_COLOURS, WIDTH
from threetowers.report.tables import Html, finite, html_table, join, percent, tag

HEIGHT = 26  # px, of the bar
LETTER = 6.4  # px, of a label's letters on average


class _Part(NamedTuple):
    """A phase in the measured steps. share: of all their time. colour: its variable on the page."""

    name: str
    what: str
    seconds: float
    share: float
    longest: float
    steps: int
    colour: str


def time_split(folder: Path) -> Html | None:
    """The split of a step's time by phase; None for a run that was not profiled.

    Of a profile.json that cannot be used it says why.
    """
    try:
        described = json.loads((folder / "profile.json").read_bytes())
        return _split(described)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        return tag("p", f"Not shown: profile.json: {type(error).__name__}: {error}.")


def _split(described: dict[str, Any]) -> Html:
    if described["schema"] != 1:
        raise ValueError(f"schema is {described['schema']!r}, this version reads schema 1")
    steps, seconds = described["steps"], _seconds(described["seconds"])
    parts = [
        _Part(
            name, str(phase["what"]), _seconds(phase["seconds"]), _seconds(phase["seconds"]) / seconds,
            _seconds(phase["longest"]), int(phase["steps"]), f"var(--phase-{number % len(PHASE_COLOURS)})",
        )
        for number, (name, phase) in enumerate(described["phases"].items())
        if phase["steps"]
    ]  # fmt: skip
    measured = int(steps["measured"])
    text = (
        f"A step took {1e3 * seconds / measured:,.1f} ms on {described['device']}, the mean of {measured:,} steps from "
        f"step {described['first_step']:,} on. Not counted are {steps['warm_up']:,} steps to warm up"
    )
    traced = int(steps["traced"])
    text += (
        f" and {traced:,} steps that are traced in trace.json.gz, which Perfetto and Chrome open."
        if traced
        else "."
    )
    if described["waits_for_device"]:
        text += " Each phase waited for the device, so that a step took longer than without a profile."
    return join(tag("p", text), tag("figure", _bar(parts)), _table(parts, measured))


def _seconds(value: Any) -> float:
    number = finite(value)
    if number is None or number < 0:
        raise ValueError(f"{value!r} is no time in seconds")
    return number


def _bar(parts: list[_Part]) -> Html:
    """The phases side by side, as wide as their shares; those with room for it have their name below."""
    drawn, start = [], 0.0
    for part in parts:
        width = WIDTH * part.share
        drawn.append(
            tag(
                "rect", tag("title", f"{part.name}: {percent(part.share)} %"),
                x=f"{start:.2f}", y="0", width=f"{width:.2f}", height=str(HEIGHT), style=f"fill: {part.colour}",
            )
        )  # fmt: skip
        if width >= LETTER * len(part.name):
            middle = f"{start + width / 2:.2f}"
            drawn.append(tag("text", part.name, x=middle, y=f"{HEIGHT + 15}"))
            drawn.append(tag("text", f"{percent(part.share)} %", x=middle, y=f"{HEIGHT + 29}", class_="note"))
        start += width
    shares = ", ".join(f"{part.name} {percent(part.share)}" for part in parts)
    return tag(
        "svg", *drawn, class_="plot split", viewBox=f"0 0 {WIDTH} {HEIGHT + 34}", role="img",
        aria_label=f"Share of each phase in the time of a step, percent: {shares}",
    )  # fmt: skip


def _table(parts: list[_Part], measured: int) -> Html:
    """The legend of the bar and its figures."""
    rows = [
        [
            join(
                tag("span", class_="swatch", style=f"background: {part.colour}", aria_hidden="true"),
                part.name,
                tag("small", part.what),
            ),
            f"{percent(part.share)} %",
            f"{1e3 * part.seconds / measured:,.2f}",
            f"{1e3 * part.longest:,.2f}",
            f"{part.steps:,}",
        ]
        for part in parts
    ]
    return html_table(["phase", "share", "ms per step", "longest, ms", "in steps"], rows)
