"""Draws the README's figures as SVG, for light and dark pages: how the methods connect, and what the study found.

    python docs/figures/make.py      # writes docs/figures/*.svg; `make docs`

The study's figures are those of docs/claims/study.json, which `make claims` writes; they are drawn when its part `main`
is complete. Text is set in system fonts.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STUDY = HERE.parent / "claims" / "study.json"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class Palette:
    """Colours of one theme: text, faint text and lines, trained parts with text on them, frozen parts, and a frame."""

    text: str
    faint: str
    trained: str
    on_trained: str
    frozen: str
    frame: str


PALETTES = {
    "light": Palette("#1f2328", "#59636e", "#0b63c9", "#ffffff", "#e6e9ed", "#d1d9e0"),
    "dark": Palette("#f0f6fc", "#9198a1", "#4a9bff", "#0d1117", "#2b3138", "#3d444d"),
}


# Drawing


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """A whole file; `title` is what a screen reader says."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="{FONT}">\n<title>{title}</title>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def text(
    x: float, y: float, words: str, fill: str, size: int = 13, anchor: str = "middle", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" fill="{fill}" font-size="{size}" text-anchor="{anchor}"{weight}>{words}</text>'


def line(x1: float, y1: float, x2: float, y2: float, stroke: str, width: float = 1.0, extra: str = "") -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{stroke}" stroke-width="{width:g}"{extra}/>'


def arrow(x: float, y: float, height: float, stroke: str) -> str:
    """An arrow upwards that ends at (x, y)."""
    head = f'<path d="M{x - 4:g},{y + 6:g} L{x:g},{y:g} L{x + 4:g},{y + 6:g}" fill="none" stroke="{stroke}"/>'
    return line(x, y + height, x, y, stroke) + head


# How the methods connect

BOX_WIDTH, BOX_HEIGHT, TOWER_TOP = 92, 62, 128
PANEL_WIDTH, PANEL_GAP = 316, 16


def tower(x: float, words: tuple[str, str], colours: Palette, *, trained: bool) -> str:
    """A tower as a box around x, with two lines of text; a frozen one is grey with a dashed edge."""
    fill, ink = (colours.trained, colours.on_trained) if trained else (colours.frozen, colours.text)
    edge = "" if trained else f' stroke="{colours.faint}" stroke-dasharray="4 3"'
    box = (
        f'<rect x="{x - BOX_WIDTH / 2:g}" y="{TOWER_TOP}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" '
        f'fill="{fill}"{edge}/>'
    )
    return (
        box + text(x, TOWER_TOP + 27, words[0], ink, bold=True) + text(x, TOWER_TOP + 45, words[1], ink, 12)
    )


def head(x: float, colours: Palette) -> str:
    """A linear head as a small square on top of a tower."""
    top = TOWER_TOP - 14
    return f'<rect x="{x - 7:g}" y="{top}" width="14" height="14" rx="2" fill="{colours.trained}"/>'


def compared(x1: float, x2: float, y: float, from_y: float, words: str, colours: Palette) -> str:
    """A contrastive loss: a bracket at height y over two points, with its name above."""
    path = (
        f"M{x1:g},{from_y:g} V{y + 8:g} Q{x1:g},{y:g} {x1 + 8:g},{y:g} "
        f"H{x2 - 8:g} Q{x2:g},{y:g} {x2:g},{y + 8:g} V{from_y:g}"
    )
    curve = f'<path d="{path}" fill="none" stroke="{colours.trained}" stroke-width="2"/>'
    return curve + text((x1 + x2) / 2, y - 7, words, colours.text, 12)


def panel(number: int, title: str, notes: tuple[str, str], colours: Palette) -> tuple[float, list[str]]:
    """The left edge of a panel, and its frame, title and the two lines below."""
    left = number * (PANEL_WIDTH + PANEL_GAP) + 1
    middle = left + PANEL_WIDTH / 2
    return left, [
        f'<rect x="{left}" y="1" width="{PANEL_WIDTH}" height="288" rx="8" fill="none" stroke="{colours.frame}"/>',
        text(middle, 28, title, colours.text, 15, bold=True),
        *(text(middle, 254 + 19 * row, note, colours.faint) for row, note in enumerate(notes)),
    ]


def inputs(places: dict[float, str], colours: Palette) -> list[str]:
    """The arrows into towers at these places, and what comes in."""
    below = TOWER_TOP + BOX_HEIGHT
    return [
        part
        for x, words in places.items()
        for part in (arrow(x, below + 3, 18, colours.faint), text(x, below + 36, words, colours.faint, 12))
    ]


def methods(colours: Palette) -> str:
    """Baseline, LiT and 3T: which towers train, and which pairs of embeddings are contrasted."""
    left, parts = panel(
        0, "Baseline (CLIP)", ("Both towers learn from your", "captioned images alone."), colours
    )
    a, b = left + 84, left + 232
    parts += [
        tower(a, ("image", "trained"), colours, trained=True),
        tower(b, ("text", "trained"), colours, trained=True),
        compared(a, b, 82, TOWER_TOP, "contrastive loss", colours),
        *inputs({a: "image", b: "caption"}, colours),
    ]
    left, more = panel(1, "LiT", ("The frozen model is the image tower.", "Its mistakes remain."), colours)
    a, b = left + 84, left + 232
    parts += [
        *more,
        tower(a, ("pretrained", "frozen"), colours, trained=False),
        head(a, colours),
        tower(b, ("text", "trained"), colours, trained=True),
        compared(a, b, 82, TOWER_TOP - 14, "contrastive loss", colours),
        line(b, TOWER_TOP - 14, b, TOWER_TOP, colours.trained, 2),
        *inputs({a: "image", b: "caption"}, colours),
    ]
    left, more = panel(
        2,
        "Three Towers (3T)",
        ("Both towers train. They also learn from", "the frozen model, which is then dropped."),
        colours,
    )
    a, c, b = left + 54, left + 158, left + 262
    parts += [
        *more,
        tower(a, ("image", "trained"), colours, trained=True),
        tower(c, ("pretrained", "frozen"), colours, trained=False),
        tower(b, ("text", "trained"), colours, trained=True),
        *(head(x, colours) for x in (a + 28, c - 28, c + 28, b - 28)),
        compared(a, b, 60, TOWER_TOP, "contrastive loss", colours),
        compared(a + 28, c - 28, 96, TOWER_TOP - 14, "+", colours),
        compared(c + 28, b - 28, 96, TOWER_TOP - 14, "+", colours),
        *inputs({a: "image", c: "image", b: "caption"}, colours),
    ]
    width = 3 * PANEL_WIDTH + 2 * PANEL_GAP + 2
    legend = (
        f'<rect x="{width / 2 - 234:g}" y="304" width="12" height="12" rx="2" fill="{colours.trained}"/>'
        + text(width / 2 - 216, 314, "trained; small squares are linear heads", colours.faint, 12, "start")
        + f'<rect x="{width / 2 + 42:g}" y="304" width="12" height="12" rx="2" fill="{colours.frozen}" '
        f'stroke="{colours.faint}" stroke-dasharray="3 2"/>'
        + text(width / 2 + 60, 314, "frozen, with its pretrained weights", colours.faint, 12, "start")
    )
    title = "Baseline, LiT and Three Towers: which towers train, and which embeddings are contrasted"
    return svg(width, 324, title, [*parts, legend])


# What the study found

ROWS = (
    ("3t-main", "3T main"), ("3t", "3T"), ("lit-unlocked", "LiT unlocked"), ("3t-regression", "3T regression"),
    ("lit", "LiT"), ("baseline", "baseline"),
)  # fmt: skip
THIRDS = (
    ("matched", "Third tower that knows the captions' objects"),
    ("mismatched", "Third tower that knows other things"),
)
PLOT_WIDTH, ROW_HEIGHT, PLOT_TOP, LARGEST = 360, 34, 78, 0.9


def study(colours: Palette) -> str:
    """Mean R@1 of the methods with a matched and a mismatched third tower, with 95 % intervals over seeds."""
    figures = json.loads(STUDY.read_text(encoding="utf-8"))
    protocol = figures["protocol"]
    bottom = PLOT_TOP + ROW_HEIGHT * len(ROWS)
    heading = f"Retrieval on the built-in world: mean R@1 on {protocol['num_eval']:,} test images"
    note = (
        f"{protocol['num_train']:,} training images, {protocol['steps']} steps of {protocol['batch_size']}, "
        f"{len(protocol['seeds'])} seeds; bars: 95 % t-intervals; dashed: the baseline's mean"
    )
    parts = [
        text(490, 20, heading, colours.text, 15, bold=True),
        text(490, bottom + 50, note, colours.faint, 12),
    ]
    for number, (third, title) in enumerate(THIRDS):
        left = 120 + number * (PLOT_WIDTH + 60)

        def at(share: float, left: float = left) -> float:
            return left + PLOT_WIDTH * share / LARGEST

        parts.append(text(left + PLOT_WIDTH / 2, 54, title, colours.text, bold=True))
        for percent in range(0, 91, 30):
            x = at(percent / 100)
            parts.append(line(x, PLOT_TOP - 8, x, bottom, colours.frame))
            parts.append(text(x, bottom + 18, f"{percent} %", colours.faint, 12))
        reference = at(summary(figures, "baseline", "")["mean"])
        parts.append(
            line(reference, PLOT_TOP - 8, reference, bottom, colours.faint, 1, ' stroke-dasharray="4 3"')
        )
        for row, (method, label) in enumerate(ROWS):
            y = PLOT_TOP + ROW_HEIGHT * (row + 0.5)
            found = summary(figures, method, "" if method == "baseline" else third)
            colour = colours.trained if method in ("3t", "3t-main") else colours.faint
            if not number:
                parts.append(
                    text(left - 14, y + 4, label, colours.text, 13, "end", bold=method in ("3t", "3t-main"))
                )
            parts += [
                line(at(found["low"]), y, at(found["high"]), y, colour, 2),
                f'<circle cx="{at(found["mean"]):.1f}" cy="{y:g}" r="5" fill="{colour}"/>',
                text(at(found["high"]) + 9, y + 4, f"{100 * found['mean']:.0f}", colours.text, 12, "start"),
            ]
    return svg(980, bottom + 62, "Mean R@1 of the methods with a matched and a mismatched third tower", parts)


def summary(figures: dict[str, Any], method: str, third: str) -> dict[str, float]:
    """Mean and interval of the mean R@1 of a method beside a third tower, as shares."""
    (row,) = (row for row in figures["methods"] if (row["label"], row["third"]) == (method, third))
    found: dict[str, float] = row["metrics"]["retrieval/mean_r@1"]
    return found


def is_complete() -> bool:
    """Whether there is a study whose part `main` has all its runs."""
    if not STUDY.is_file():
        return False
    parts = json.loads(STUDY.read_text(encoding="utf-8"))["progress"]
    return any(part["part"] == "main" and part["done"] == part["total"] for part in parts)


FIGURES: dict[str, Callable[[Palette], str]] = {"methods": methods}
if is_complete():
    FIGURES["study"] = study


def figures() -> dict[str, str]:
    """Every figure's SVG by file name."""
    return {
        f"{name}-{theme}.svg": draw(colours)
        for name, draw in FIGURES.items()
        for theme, colours in PALETTES.items()
    }


if __name__ == "__main__":
    for name, drawn in figures().items():
        (HERE / name).write_text(drawn, encoding="utf-8")
