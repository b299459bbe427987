"""Reads the rows of a table: CSV, TSV, JSONL or parquet."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from threetowers.data.source import is_image_name
from threetowers.errors import BadSample, DataError, UsageError

TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")

Row = tuple[int, dict[str, Any]]
"""Line (or row) number, counted from 1 with the header, and the cells by column."""


def read_rows(path: Path, problems: list[BadSample]) -> Iterator[Row]:
    """The rows of a table, whose format its ending says. Lines that cannot be read are added to `problems`.

    Raises DataError for an unknown ending.
    """
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _jsonl_rows(path, problems)
    if path.suffix.lower() in (".csv", ".tsv", ".txt"):
        return _csv_rows(path, problems)
    raise DataError(
        f"{path}: a table ends in {', '.join(TABLE_ENDINGS)}, and shards in .tar; save it as one of these"
    )


def _csv_rows(path: Path, problems: list[BadSample]) -> Iterator[Row]:
    """The rows of a CSV. The delimiter is the most frequent one in the header; tab-separated files have no quoting."""
    with path.open("rb") as binary:
        encoding = "utf-16" if binary.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    with path.open(encoding=encoding, errors="surrogateescape", newline="") as file:
        header = file.readline()
        file.seek(0)
        delimiter = max(",;\t|", key=header.count)
        tabs = delimiter == "\t"
        reader = csv.reader(
            file, delimiter=delimiter, strict=True, quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
        )
        columns: list[str] = []
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DataError(
                    f"{path}:{line}: the quotes do not pair up ({error}); mend this row"
                ) from error
            if cells is None:
                return
            if tabs:
                cells = [_unquoted(cell) for cell in cells]
            if not columns:
                columns = _header(path, cells)
            elif len(cells) == len(columns):
                yield line, dict(zip(columns, cells, strict=True))
            elif cells:
                detail = f"expected {len(columns)}, found {len(cells)}"
                problems.append(BadSample(f"{path.name}:{line}", "wrong number of fields", detail))


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
        columns.append(f"{cell}.{columns.count(cell)}" if cell in columns else cell)
    return columns


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
