"""A comparison as text for the terminal."""

import textwrap
from collections.abc import Iterable
from pathlib import Path

from threetowers.report.claims import terminal_claims
from threetowers.report.order import headline
from threetowers.report.story import next_step, story
from threetowers.report.tables import Cell, Compare, cells, interval_note, label, percent, ranking

COLUMNS = {
    "retrieval/i2t_r@1": "i2t R@1",
    "retrieval/t2i_r@1": "t2i R@1",
    "retrieval/mean_r@1": "mean R@1",
    "zero_shot/top1": "zero-shot",
    "combination/mean_r@1": "combined",
}
WIDTH = 100


def text_table(compare: Compare) -> str:
    """The comparison for the terminal, at most 100 columns wide: headline, one row per method, and the claims.

    Figures are in percent, ± half the width of the 95 % interval; `*` marks the best of a column.
    """
    table = cells(compare)
    paths = [path for path in COLUMNS if any(path in row for row in table.values())]
    room = WIDTH - 14 * len(paths)
    names = {key: _cut(label(compare, key), room) for key in table}
    width = max([len("method"), *map(len, names.values())])
    head = "method".ljust(width) + "".join(f"{COLUMNS[path]:>13} " for path in paths)
    rows = [
        names[key].ljust(width) + "".join(_terminal_cell(table[key].get(path)) for path in paths)
        for key in ranking(compare)
    ]
    notes = [f"Percent: {interval_note(compare)} (± half its width). * marks the best of each column."]
    if "combination/mean_r@1" in paths:
        notes.append(
            "combined: mean R@1 with the third tower at inference as well; α is chosen on validation data."
        )
    opening = wrap([str(compare.get("title", "Comparison")), *headline(compare), *story(compare)])
    claims = terminal_claims(compare.get("claims", []))
    lines = [*opening, "", head, "─" * len(head), *rows, "", *wrap(notes)]
    lines += ["", "Claims of the paper:", *wrap(claims, "    ")] if claims else []
    lines += ["", *wrap([step])] if (step := next_step(compare)) else []
    return "".join(_printable(line).rstrip() + "\n" for line in lines)


def how_to_export(compare: Compare, folder: Path) -> str:
    """Where the runs are, and the command that exports one of the method with the best mean; its first seed."""
    best = ranking(compare)[0]
    runs = [run for run in compare["runs"] if (run["method"], run["third"]) == best]
    run = folder / min(runs, key=lambda run: run["seed"])["path"]
    return f"runs: {run.parent}\nto export one: threetowers export {run} --to open_clip --out exported"


def _terminal_cell(cell: Cell | None) -> str:
    if cell is None:
        return f"{'–':>13} "
    half = f" ±{50 * (cell.high - cell.low):4.1f}" if cell.low is not None and cell.high is not None else ""
    return f"{percent(cell.mean) + half:>13}" + ("*" if cell.best else " ")


def wrap(paragraphs: Iterable[str], indent: str = "") -> list[str]:
    """Paragraphs as lines of at most WIDTH columns; all but the first of a paragraph are indented."""
    return [line for text in paragraphs for line in textwrap.wrap(text, WIDTH, subsequent_indent=indent)]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
