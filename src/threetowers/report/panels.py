"""The panel that each plot of the report is drawn in: its size, style, colours and legend, and its SVG and PNG.

Every panel is about 400 px wide, so that the page can place panels side by side or below each other. Colours in the
SVG are CSS variables with the names of PALETTE, which have other values in the page's dark theme.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import BytesIO, StringIO

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from threetowers.objective.pairs import METHODS

# Colour in the light theme, colour in the dark theme. The methods take theirs in the order of their list: the first six
# from Okabe and Ito's colour-blind-safe set, the others as far from all before them. One beyond the last takes "other".
METHOD_COLOURS = (
    ("#4d5560", "#b4bcc6"),
    ("#d55e00", "#f0803c"),
    ("#e69f00", "#f3bb45"),
    ("#0072b2", "#58aee8"),
    ("#56b4e9", "#8fd0f5"),
    ("#009e73", "#35c79a"),
    ("#6a3d9a", "#a987d3"),
    ("#800020", "#d0407a"),
)
# Of the phases of a training step, in their order.
PHASE_COLOURS = (
    ("#d4600a", "#f0803d"),
    ("#e5a010", "#f3bb46"),
    ("#0a70ae", "#58aee9"),
    ("#0a9c70", "#35c79b"),
    ("#6a51a3", "#a793dc"),
    ("#c878a4", "#e39ac4"),
    ("#8c6d31", "#c9a968"),
    ("#1b7f8c", "#5cc0cc"),
    ("#4c5561", "#b4bcc7"),
    ("#9aa3ae", "#6b7480"),
)
# The light colours must be distinct: `inline_svg` recognises them by value.
PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#1c2024", "#e8eaed"),
    "muted": ("#5f6977", "#a0a9b4"),
    "line": ("#d9dde2", "#3a4048"),
    "paper": ("#ffffff", "#14171a"),
    "soft": ("#f4f5f7", "#1e2227"),
    **dict(zip(METHODS, METHOD_COLOURS, strict=False)),
    "other": ("#cc79a7", "#e39ac3"),
    **{f"phase-{number}": shades for number, shades in enumerate(PHASE_COLOURS)},
}
INK, MUTED, GRID, PAPER = (PALETTE[name][0] for name in ("ink", "muted", "line", "paper"))
WIDTH = 400  # px, of every plot
# fmt: off
STYLE = {
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


@contextmanager
def drawing() -> Iterator[None]:
    """The style of all panels, while the block lasts."""
    with style.context(STYLE, after_reset=True), warnings.catch_warnings():
        # foreign scripts: the PNG's font may lack a character that the browser's font has
        warnings.filterwarnings("ignore", "Glyph")
        yield


@dataclass(frozen=True, slots=True)
class Plot:
    """A finished plot. name: the stem of its file. svg: markup for an HTML page. png: the bytes of the image file."""

    name: str
    svg: str
    png: bytes


def colour(method: str) -> str:
    """A method's colour in the light theme."""
    known = method in METHODS and method in PALETTE
    return PALETTE[method if known else "other"][0]


def short(text: str, width: int = 27) -> str:
    """The text on one line, cut to at most `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def panel(height: float, *, left: float, right: float, top: float, bottom: float) -> tuple[Figure, Axes]:
    """A figure of WIDTH × height px with one pair of axes inside the margins."""
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    size = ((WIDTH - left - right) / WIDTH, (height - top - bottom) / height)
    return figure, figure.add_axes((left / WIDTH, bottom / height, *size))


def _height(ax: Axes) -> float:
    """The height of the axes in px."""
    return float(ax.bbox.height * 72 / ax.figure.dpi)


def legend(ax: Axes) -> None:
    """Adds a legend in two columns below the axes, where it covers nothing."""
    ax.legend(loc="upper left", bbox_to_anchor=(-0.1, -40 / _height(ax)), ncols=2)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Moves ascending heights as little as possible, so that they are at least `gap` apart and at most 1."""
    steps = gap * np.arange(len(heights))
    placed = isotonic_regression(np.array(heights) - steps).x + steps
    return list(placed - max(0.0, placed[-1] - 1))


def label_ends(ax: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes labels right of the axes, moved apart where they would overlap.

    ends: (height in data units, text, colour) of each label.
    """
    low, high = ax.get_ylim()
    ends = sorted(ends)
    heights = [(y - low) / (high - low) for y, _, _ in ends]
    for (_, text, shade), start, end in zip(ends, heights, spread(heights, 14 / _height(ax)), strict=True):
        ax.plot([1.01, 1.05], [start, end], color=shade, linewidth=2, transform=ax.transAxes, clip_on=False)
        ax.text(1.07, end, text, transform=ax.transAxes, va="center", fontsize=10.5)


def finish(figure: Figure, name: str, description: str) -> Plot:
    """Renders a figure as SVG and PNG. description: the text for readers who cannot see the plot."""
    svg, png = StringIO(), BytesIO()
    figure.savefig(svg, format="svg", transparent=True)
    figure.savefig(png, format="png", dpi=144, facecolor=PAPER, metadata={"Software": None})
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", name)
    return Plot(name, inline_svg(svg.getvalue(), name, description), png.getvalue())


def inline_svg(svg: str, prefix: str, description: str) -> str:
    """matplotlib's SVG document as an element for an HTML page.

    Colours become CSS variables, the font becomes the page's, and ids are made unique by `prefix`. The header, the
    metadata and the style sheet are removed: they belong to a whole document.
    """
    body = svg[svg.index("<svg") : svg.index("</svg>")]
    for removed in (r"<metadata>.*?</metadata>", r"<defs>\s*<style.*?</style>\s*</defs>", r"<!--.*?-->"):
        body = re.sub(removed, "", body, flags=re.DOTALL)
    view = re.search(r'viewBox="([^"]+)"', body)
    assert view
    body = body[body.index(">") + 1 :].replace("xlink:href", "href")
    names = {value[0]: f"var(--{name})" for name, value in PALETTE.items()}
    # the colour of text is in `fill` too
    body = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", lambda m: f"{m[1]}: {names.get(m[2], m[2])}", body)
    body = re.sub(r"font: (?:(\w+) )?([\d.]+)px [^;\"]+", _font, body)
    # two decimals are enough in attributes; text keeps its own
    body = re.sub(r"<[^>]*>", lambda m: re.sub(r"(\d\.\d\d)\d+", r"\1", m[0]), body)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", body)
    body = re.sub(r">\s+<", "><", body)
    return f'<svg class="plot" viewBox="{view[1]}" role="img" aria-label="{escape(description)}">{body}</svg>'


def _font(match: re.Match[str]) -> str:
    weight = f"; font-weight: {match[1]}" if match[1] else ""
    return f"font-size: {match[2]}px{weight}"
