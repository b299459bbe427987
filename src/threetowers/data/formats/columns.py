"""Finds the columns of a table that hold images and captions, by name or by content."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from threetowers.config import did_you_mean
from threetowers.data.formats.places import find_file
from threetowers.data.formats.rows import Row
from threetowers.data.source import ColumnNames, is_image_name
from threetowers.errors import UsageError

_PATH_NAMES = (
    "image", "image_path", "img_path", "filepath", "file_path", "image_file", "image_name", "image_filename",
    "file_name", "filename", "file", "path", "img",
)  # fmt: skip
_CAPTION_NAMES = ("caption", "text", "sentence", "comment", "raw", "description", "title", "alt", "alt_text")
NUM_SNIFFED = 100  # rows that columns are recognised by


def cell_texts(cell: Any) -> list[str]:
    """The texts in a cell, which may hold one text, a list, a JSON list written as text, or nothing."""
    if isinstance(cell, str):
        if cell.startswith('["') and cell.endswith('"]'):
            try:
                return cell_texts(json.loads(cell))
            except (ValueError, RecursionError):
                pass  # a caption that only looks like a list
        return [cell]
    if isinstance(cell, list):
        return [text for item in cell if not isinstance(item, list) for text in cell_texts(item)]
    return [] if cell is None or isinstance(cell, dict) else [str(cell)]


def find_columns(path: Path, head: list[Row], columns: ColumnNames) -> tuple[str, tuple[str, ...]]:
    """The image column and the caption columns of a table: those named in `columns`, else those recognised.

    head: the table's first rows. Raises UsageError for a column that is not there or cannot be recognised.
    """
    names = list(dict.fromkeys(name for _, row in head for name in row))
    listed = f"Its columns: {', '.join(names)}"
    for column in columns.captions if columns.image is None else (columns.image, *columns.captions):
        if column not in names:
            hint = did_you_mean(column, names)
            hint = f"{hint} {listed}" if "did you mean" in hint else f". {listed}"
            raise UsageError(f"{path}: there is no column `{column}`{hint}")
    cells = {name: [row[name] for _, row in head if row.get(name) is not None] for name in names}
    image = columns.image or _path_column(path.parent, cells)
    if image is None:
        raise UsageError(f"{path}: no column holds paths of images. Name it as image_column. {listed}")
    others = {name: cells[name] for name in names if name != image}
    captions = columns.captions or caption_family(list(others)) or longest_texts(others)
    if not captions:
        raise UsageError(f"{path}: no column holds captions. Name it as caption_columns. {listed}")
    return image, captions


def _path_column(folder: Path, cells: dict[str, list[Any]]) -> str | None:
    """The column of image paths: one with a usual name whose content does not contradict it, else by content alone."""

    def share(name: str) -> float:
        hits = (
            isinstance(cell, str) and (is_image_name(cell) or _is_file(folder, cell)) for cell in cells[name]
        )
        return sum(hits) / max(len(cells[name]), 1)

    usual = _path_names(cells)
    for name in usual:
        if share(name) > 0:
            return name
    best = max(cells, key=share)
    if share(best) > 0.5:
        return best
    return usual[0] if usual else None


def _path_names(names: Iterable[str]) -> list[str]:
    """Those of the names that are usual for image columns, the most usual first."""
    ranked = sorted((_PATH_NAMES.index(_plain(name)), name) for name in names if _plain(name) in _PATH_NAMES)
    return [name for _, name in ranked]


def usual_image_column(names: Iterable[str]) -> str | None:
    """The column whose name is most usual for images; None when no name is usual."""
    return next(iter(_path_names(names)), None)


def caption_family(names: Sequence[str]) -> tuple[str, ...]:
    """All columns of the first usual name for captions, such as `caption_0` and `caption_1`; empty when none is."""
    for family in _CAPTION_NAMES:
        members = [name for name in names if re.fullmatch(rf"{family}s?(_?\d+)?", _plain(name))]
        if members:
            return tuple(members)
    return ()


def longest_texts(cells: dict[str, list[Any]]) -> tuple[str, ...]:
    """The column with the longest texts, as a tuple of one; empty when none has any."""
    lengths = {name: sum(len(text) for cell in cells[name] for text in cell_texts(cell)) for name in cells}
    texts = [name for name in cells if any(isinstance(cell, str | list) for cell in cells[name])]
    best = max(texts, key=lengths.__getitem__, default=None)
    return (best,) if best is not None and lengths[best] else ()


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _is_file(folder: Path, text: str) -> bool:
    return 0 < len(text.strip()) < 4096 and find_file(str(folder), text.strip()) is not None
