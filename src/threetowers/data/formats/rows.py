"""Reads the rows of a table: CSV, TSV, JSONL or parquet."""

import csv
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from threetowers.data.formats.csv_form import CsvForm, csv_form
from threetowers.data.source import decode_text, is_image_name
from threetowers.errors import BadSample, DataError, UsageError

TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_JSON_ENDINGS = (".jsonl", ".ndjson")
_NUM_PLACES, _PLACE_BYTES, _PLACE_ROWS = 64, 1 << 14, 16  # that a table is known by without reading all of it
MAX_FIELD = 1 << 24
"""Characters of a CSV's longest field; more is a quote that does not pair up."""
_NAMED = re.compile(r"(?!\.\d+$).")  # the name of a column that has one

Row = tuple[int, dict[str, Any]]
"""Line (or row) number, counted from 1 with the header, and the cells by column."""


def read_rows(path: Path, problems: list[BadSample]) -> Iterator[Row]:
    """The rows of a table, whose format its ending says. Lines that cannot be read are added to `problems`.

    Raises DataError for an unknown ending.
    """
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path)
    if path.suffix.lower() in (*_JSON_ENDINGS, ".json"):
        return _json_rows(path, problems) if is_json_list(path) else _jsonl_rows(path, problems)
    if path.suffix.lower() in (".csv", ".tsv", ".txt"):
        return _csv_rows(path, problems)
    raise DataError(
        f"{path}: a table ends in {', '.join(TABLE_ENDINGS)}, and shards in .tar; save it as one of these"
    )


def _csv_rows(path: Path, problems: list[BadSample]) -> Iterator[Row]:
    """The rows of a CSV. Tab-separated files have no quoting."""
    form = csv_form(path)
    csv.field_size_limit(MAX_FIELD)
    with path.open(encoding=form.encoding, errors="surrogateescape", newline="") as file:
        columns: list[str] = []
        for line, cells in _records(path, file, form, columns, problems):
            if line <= form.num_skipped:
                continue
            if not columns:
                columns += _header(path, cells)
            elif len(cells) == len(columns):
                yield line, dict(zip(columns, cells, strict=True))
            elif fitted := _fitted(columns, cells):
                yield line, dict(zip(columns, fitted, strict=True))
            elif cells:
                detail = f"expected {len(columns)}, found {len(cells)}"
                problems.append(BadSample(f"{path.name}:{line}", "wrong number of fields", detail))


def _records(
    path: Path, file: Iterator[str], form: CsvForm, columns: list[str], problems: list[BadSample]
) -> Iterator[tuple[int, list[str]]]:
    """The first line's number and the fields of each record.

    Where quotes do not pair up, the first line alone becomes a problem, and reading goes on with the second.
    """
    again: list[str] = []  # lines to be read once more, the next one last
    record: list[str] = []  # the lines that the present record was read from

    def lines() -> Iterator[str]:
        while (line := again.pop() if again else next(file, None)) is not None:
            record.append(line)
            yield line

    line, reader = 1, form.reader(lines(), strict=True)
    while True:
        record.clear()
        try:
            cells = next(reader, None)
            error = (
                "another row is inside a field"
                if len(record) > 1 and _swallowed(record, columns, form)
                else ""
            )
        except csv.Error as raised:
            cells, error = [], str(raised)
        if cells is None:
            return
        if error:
            if not columns and line > form.num_skipped:
                raise DataError(f"{path}:{line}: the quotes in its header do not pair up; mend this line")
            problems.append(
                BadSample(f"{path.name}:{line}", "damaged row", f"the quotes do not pair up: {error}")
            )
            again += reversed(record[1:])
            reader = form.reader(lines(), strict=True)
            line += 1
        else:
            yield line, [_unquoted(cell) for cell in cells] if form.delimiter == "\t" else cells
            line += len(record)


def _swallowed(record: list[str], columns: list[str], form: CsvForm) -> bool:
    """Whether a record of several lines holds a line that is a row itself, which an unpaired quote made part of it."""
    for line in record[1:]:
        fields = line.split(form.delimiter)
        if len(fields) == len(columns) and any(is_image_name(field.strip('" \r\n')) for field in fields):
            return True
    return False


def _fitted(columns: list[str], cells: list[str]) -> list[str] | None:
    """The cells of a row that has more or fewer than there are columns, made to fit; None when it is wrong.

    Spreadsheets write empty cells at the end of a row or of the header, and leave them out in other rows.
    """
    extra = len(cells) - len(columns)
    if extra > 0:
        return None if any(cells[len(columns) :]) else cells[: len(columns)]
    return cells + [""] * -extra if cells and not any(map(_NAMED.match, columns[extra:])) else None


def _unquoted(cell: str) -> str:
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"'
    return cell[1:-1].replace('""', '"') if quoted else cell


def _header(path: Path, cells: list[str]) -> list[str]:
    """The column names, made unique; raises DataError when the first row holds data."""
    columns: list[str] = []
    for cell in (cell.strip() for cell in cells):
        if is_image_name(cell):
            raise DataError(
                f"{path}: its first line holds {cell!r}, which is data. Put column names above it, "
                "such as image,caption"
            )
        names = itertools.chain([cell], (f"{cell}.{number}" for number in itertools.count(1)))
        columns.append(next(name for name in names if name not in columns))
    return columns


def is_json_list(path: Path) -> bool:
    """Whether a file begins as a JSON list does."""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _json_rows(path: Path, problems: list[BadSample]) -> Iterator[Row]:
    """The objects of a JSON list, counted from 1. Raises DataError when it is damaged."""
    try:
        rows = json.loads(decode_text(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: it is no JSON, or a damaged one: {error}. Fetch it again") from error
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            yield number, row
        else:
            problems.append(BadSample(f"{path.name}:{number}", "damaged json", "not an object"))


def _jsonl_rows(path: Path, problems: list[BadSample]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                problems.append(BadSample(f"{path.name}:{line}", "damaged json", str(error)))
                continue
            if isinstance(row, dict):
                yield line, row
            else:
                problems.append(BadSample(f"{path.name}:{line}", "damaged json", "not an object"))


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow  # type: ignore[import-untyped, import-not-found]
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(
            f"{path}: reading parquet needs pyarrow; pip install pyarrow, or save as CSV"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
            yield from enumerate(rows, 1)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: it is no parquet file, or a damaged one: {error}") from error


def spread_rows(path: Path, head: list[Row]) -> list[dict[str, Any]]:
    """Rows from places at equal distances over a whole table, which begins with `head`; some may be wrong.

    They show what a column holds where the first rows are all alike. A large file is not read as a whole.
    """
    if path.suffix.lower() == ".parquet":
        return _spread_parquet(path)
    size, rows = path.stat().st_size, [row for _, row in head]
    whole = path.suffix.lower() not in (".csv", ".tsv", ".txt") and is_json_list(path)
    if size <= _NUM_PLACES * _PLACE_BYTES or whole:
        return [row for _, row in read_rows(path, [])]
    form = None if path.suffix.lower() in _JSON_ENDINGS else csv_form(path)
    encoding = form.encoding if form else "utf-8"
    with path.open("rb") as file:
        if encoding == "utf-16":
            encoding = "utf-16-le" if file.read(2) == b"\xff\xfe" else "utf-16-be"
        for number in range(1, _NUM_PLACES):
            file.seek(size * number // _NUM_PLACES // 2 * 2)  # UTF-16 has two bytes for a character
            lines = file.read(_PLACE_BYTES).decode(encoding, "replace").splitlines()[1:-1]
            rows += _parsed(lines, form, list(rows[0]))
    return rows


def _parsed(lines: list[str], form: CsvForm | None, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows in some lines of a table; lines that are none are left out."""
    if form is not None:
        rows = form.reader(lines, strict=False)
        yield from (dict(zip(columns, cells, strict=True)) for cells in rows if len(cells) == len(columns))
        return
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def _spread_parquet(path: Path) -> list[dict[str, Any]]:
    from pyarrow import parquet

    rows: list[dict[str, Any]] = []
    with parquet.ParquetFile(path) as file:
        every = max(file.metadata.num_rows // (_NUM_PLACES * _PLACE_ROWS), 1)
        for batch in file.iter_batches(_PLACE_ROWS * every):
            rows += batch.slice(0, _PLACE_ROWS).to_pylist()
    return rows


def tables_in(folder: Path) -> list[Path]:
    """The table files of a folder in the order of their names, without hidden ones."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [
            entry.name for entry in entries if entry.name.lower().endswith(TABLE_ENDINGS) and entry.is_file()
        ]
    return [folder / name for name in sorted(names) if not name.startswith(".")]
