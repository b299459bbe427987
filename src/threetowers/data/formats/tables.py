"""A table with a column of image paths and columns of captions."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from threetowers.data.formats.columns import NUM_SNIFFED, cell_texts, find_columns
from threetowers.data.formats.files import FileSource
from threetowers.data.formats.places import find_file, image_folder
from threetowers.data.formats.rows import TABLE_ENDINGS, Row, read_rows
from threetowers.data.source import ANY_COLUMNS, MISSING_CAPTIONS, ColumnNames, Format, clean_captions
from threetowers.errors import BadSample, DataError


def open_table(path: str | Path, columns: ColumnNames = ANY_COLUMNS) -> FileSource:
    """The samples of a CSV (any delimiter), TSV, JSONL or parquet table, or of the `metadata` table of a folder.

    Image paths are relative to the table's folder, or to a folder of images beside it when none is found there.
    Columns that are not named are recognised by name, else by content. Rows with the same image are one sample with
    several captions, as are several caption columns, lists in JSONL and JSON lists in a cell.
    Raises UsageError for a column that is not there or cannot be recognised, DataError when nothing can be read.
    """
    path = _metadata(Path(path)) or Path(path)
    problems: list[BadSample] = []
    try:
        rows = read_rows(path, problems)
        head = list(itertools.islice(rows, NUM_SNIFFED))
        if not head:
            reason = "; ".join(map(str, problems[:5])) or "It is empty, or holds a header alone"
            raise DataError(f"{path}: there is no row in it that can be read. {reason}")
        image_column, caption_columns = find_columns(path, head, columns)
        source = FileSource(
            name=path.stem,
            layout=f"table {path.name}, images in column `{image_column}`, "
            f"captions in {', '.join(f'`{column}`' for column in caption_columns)}",
            folder=str(_folder(path, head, image_column)),
            _problems=problems,
        )
        merged = merge_rows(source, path.name, itertools.chain(head, rows), image_column, caption_columns)
        return source.fill(
            (file, size, captions, -1) for file, (size, captions) in merged.items() if captions
        )
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: it cannot be read as {path.suffix or 'a table'}: {error}") from error


def _metadata(folder: Path) -> Path | None:
    """The table in a folder that Hugging Face's image folders have; None when there is none."""
    tables = [folder / f"metadata{ending}" for ending in TABLE_ENDINGS]
    return next((table for table in tables if table.is_file()), None)


def _is_table(path: str) -> bool:
    """Any file counts, so that one with an unknown ending is refused with the endings of tables."""
    return Path(path).is_file() or _metadata(Path(path)) is not None


def _folder(table: Path, head: list[Row], image_column: str) -> Path:
    names = [cell for _, row in head if isinstance(cell := row.get(image_column), str) and cell.strip()]
    if not names or any(find_file(str(table.parent), name.strip()) for name in names):
        return table.parent
    folder, num_hits = image_folder(table, names)
    return folder if num_hits else table.parent


def merge_rows(
    source: FileSource, table: str, rows: Iterator[Row], image_column: str, caption_columns: tuple[str, ...]
) -> dict[str, tuple[int, str]]:
    """Size and captions by file; every row that adds nothing becomes one of the source's problems."""
    files: dict[str, tuple[int, str]] = {}
    spelled: dict[str, str] = {}  # path in the table → path on the disk; "" for a missing file
    for line, row in rows:
        where, cell = f"{table}:{line}", row.get(image_column)
        if not isinstance(cell, str) or cell.strip() in MISSING_CAPTIONS:
            source.add_problem(where, "no path", f"column `{image_column}` is empty")
            continue
        if cell not in spelled:
            on_disk = find_file(source.folder, cell.strip())
            spelled[cell] = on_disk[0] if on_disk else ""
            if on_disk:
                files.setdefault(on_disk[0], (on_disk[1], ""))
            else:
                source.add_problem(cell, "missing file", f"{where}: {Path(source.folder, cell.strip())}")
        file = spelled[cell]
        if not file:
            continue
        captions, damaged = clean_captions(
            text for column in caption_columns for text in cell_texts(row.get(column))
        )
        if damaged:
            source.add_problem(file, "caption is not UTF-8", where)
        if captions:
            size, before = files[file]
            files[file] = size, "\n".join((before, *captions) if before else captions)
        else:
            source.add_problem(file, "empty caption", where)
    return files


TABLES = Format(
    have="a CSV, TSV, JSONL or parquet table with image paths and one or more captions",
    give="its path",
    accepts=_is_table,
    open=lambda path, columns, opener: open_table(path, columns),
    takes_columns=True,
)
