"""How a CSV is written: its encoding and its delimiter."""

import contextlib
import csv
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DELIMITERS = ",;\t|"
_EXCEL = re.compile(r'"?sep=([,;|\t])"?\s*', re.IGNORECASE)
_NUM_LINES = 50  # that a delimiter is recognised by


@dataclass(frozen=True)
class CsvForm:
    """num_skipped: lines before the header; Excel's `sep=;` is one. blanks: they stand between delimiter and quote."""

    encoding: str
    delimiter: str
    num_skipped: int = 0
    blanks: bool = False

    def reader(self, lines: Iterable[str], *, strict: bool) -> Any:
        """A csv.reader. Tab-separated files have no quoting."""
        form: dict[str, Any] = {"quoting": csv.QUOTE_NONE if self.delimiter == "\t" else csv.QUOTE_MINIMAL}
        form |= {"delimiter": self.delimiter, "skipinitialspace": self.blanks}
        return csv.reader(lines, strict=strict, **form)


def csv_form(path: Path) -> CsvForm:
    """The form of a CSV: of the delimiters in the header, the one that divides most of the first rows as the header.

    Of equals it is the most frequent one in the header.
    """
    encoding = _encoding(path)
    with path.open(encoding=encoding, errors="surrogateescape", newline="") as file:
        lines = [file.readline(1 << 20) for _ in range(_NUM_LINES)]
    header = next(filter(str.strip, lines), "")
    if excel := _EXCEL.fullmatch(lines[0]):
        return CsvForm(encoding, excel[1], 1)
    found = [delimiter for delimiter in _DELIMITERS if delimiter in header]
    best = max(found, key=lambda d: (_share(lines, d), header.count(d)), default=",")
    return CsvForm(encoding, best, blanks=_share(lines, best, blanks=True) > _share(lines, best))


def _encoding(path: Path) -> str:
    with path.open("rb") as binary:
        start = binary.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    if len(start) == 4 and 0 in start:  # no mark of the byte order, but ASCII in two bytes each
        return (
            "utf-16-le"
            if start[1] == start[3] == 0
            else "utf-16-be"
            if start[0] == start[2] == 0
            else "utf-8"
        )
    return "utf-8-sig"


def _share(lines: list[str], delimiter: str, *, blanks: bool = False) -> float:
    """The share of the first rows that a delimiter divides into as many fields as the header, which are several."""
    rows: list[int] = []
    with contextlib.suppress(csv.Error):  # a field that is too long
        rows.extend(len(cells) for cells in CsvForm("", delimiter, blanks=blanks).reader(lines, strict=False))
    widths = [width for width in rows if width]
    if not widths or widths[0] < 2:
        return -1.0
    return sum(width == widths[0] for width in itertools.islice(widths, 1, None)) / max(len(widths) - 1, 1)
