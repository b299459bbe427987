"""Merges the rows of tables and annotation files by image."""

import os
import reprlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from threetowers.data.cells import cell_texts
from threetowers.data.formats.columns import Found
from threetowers.data.formats.files import FileSource
from threetowers.data.formats.places import find_file, image_path, is_address, local_path, near_file
from threetowers.data.formats.rows import Row
from threetowers.data.parts import PART_NAMES, part_of
from threetowers.data.source import MISSING_CAPTIONS, clean_captions

_LONGEST_PATH = 1024
_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother = 70, 40
_EMPTY = "is empty"
_NUM_HINTS = 10  # missing files for which a similar name is looked for


def _held(cell: object) -> str:
    """What a cell holds that is of no use, in a few words."""
    if cell is None or (isinstance(cell, str) and cell.strip() in MISSING_CAPTIONS):
        return _EMPTY
    if isinstance(cell, str) and len(cell) > _LONGEST_PATH:
        return f"holds {len(cell)} characters, which are no path; write images in base64 to files first"
    return f"holds {_SHORT.repr(cell)}"


@dataclass
class Merged:
    """Rows merged by image. files: size and captions by path. parts: the part of each, where rows have one.

    problem_parts: the part of each of the source's problems. unknown: values of the split column that are no part.
    """

    source: FileSource
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    problem_parts: list[str] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)
    addresses: list[str] = field(default_factory=list)
    _spelled: dict[str, str] = field(default_factory=dict)
    """Path on the disk by the path in the table; empty for a missing file."""

    def add(
        self, table: str, rows: Iterator[Row], columns: Found, *, prefix: str = "", part: str | None = None
    ) -> None:
        """Adds the rows of a table; every row that adds nothing becomes one of the source's problems.

        prefix: of the paths, relative to the source's folder. part: that of all rows; None: the split column says it.
        """
        self._spelled.clear()
        problems = self.source.problems
        known: dict[str, str | None] = {}  # the part that each value names
        by_column = columns.split if part is None else None
        for line, row in rows:
            where, own = f"{table}:{line}", part
            if by_column is not None:
                value = str(row.get(by_column))
                own = known[value] if value in known else known.setdefault(value, part_of(value))
                if own is None:
                    self.unknown[value] += 1
            file = self._file(where, row.get(columns.image), columns.image, prefix)
            if file:
                if own is not None:
                    self._set_part(file, own, where)
                texts = (text for column in columns.captions for text in cell_texts(row.get(column)))
                captions, damaged = clean_captions(texts)
                if damaged:
                    self.source.add_problem(file, "caption is not UTF-8", where)
                if captions:
                    size, before = self.files[file]
                    self.files[file] = size, "\n".join((before, *captions) if before else captions)
                else:
                    held = ((name, _held(row.get(name))) for name in columns.captions)
                    odd = "".join(f": `{name}` {what}" for name, what in held if what != _EMPTY)
                    self.source.add_problem(file, "empty caption", where + odd[:200])
            if len(problems) > len(self.problem_parts):
                self.problem_parts += [own or "train"] * (len(problems) - len(self.problem_parts))

    def _file(self, where: str, cell: object, column: str, prefix: str) -> str:
        """The path on the disk that a cell names; empty when it names none."""
        given, cell = cell, image_path(cell)
        if cell is None or cell.strip() in MISSING_CAPTIONS or len(cell) > _LONGEST_PATH:
            self.source.add_problem(where, "no path", f"column `{column}` {_held(given)}")
            return ""
        known = self._spelled.get(cell)
        if known is not None:
            return known
        path = local_path(cell)
        if prefix:
            path = os.path.join(prefix, path)  # noqa: PTH118 - a Path costs more than the call
        on_disk = find_file(self.source.folder, path)
        self._spelled[cell] = on_disk[0] if on_disk else ""
        if on_disk:
            self.files.setdefault(on_disk[0], (on_disk[1], ""))
        elif is_address(cell):
            self.addresses.append(cell)
            self.source.add_problem(cell, "missing file", f"{where}: an address, and nothing is fetched")
        else:
            few = len(self.source.problems) < _NUM_HINTS
            near = near_file(self.source.folder, path) if few else None
            hint = f"; there is {near}" if near else ""
            self.source.add_problem(cell, "missing file", f"{where}: {Path(self.source.folder, path)}{hint}")
        return self._spelled[cell]

    def _set_part(self, file: str, part: str, where: str) -> None:
        """An image of two parts is kept out of training."""
        before = self.parts.setdefault(file, part)
        if before != part:
            kept = max(before, part, key=list(PART_NAMES).index)
            self.parts[file] = kept
            self.source.add_problem(
                file, "two parts", f"{where}: {part}, and {before} before; kept in {kept}"
            )

    def fill(self) -> FileSource:
        """The source with all samples that have captions."""
        return self.source.fill(
            (file, size, captions, -1) for file, (size, captions) in self.files.items() if captions
        )

    def sample_parts(self) -> list[str]:
        """The part of each sample of the source; rows whose part is unknown are training data."""
        return [self.parts.get(file, "train") for file, (_, captions) in self.files.items() if captions]
