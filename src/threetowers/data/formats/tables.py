"""Images that lie as files: a table with a path column and captions, or a folder with sidecar texts or classes."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from threetowers.data.formats.columns import _NUM_SNIFFED, _columns, cell_texts
from threetowers.data.formats.files import FileSource
from threetowers.data.formats.places import find_file, image_folder
from threetowers.data.formats.rows import Row, read_rows
from threetowers.data.source import MISSING_CAPTIONS, clean_captions
from threetowers.errors import BadSample, DataError


def open_table(
    path: str | Path, image_column: str | None = None, caption_columns: tuple[str, ...] = ()
) -> FileSource:
    """The samples of a CSV (any delimiter), TSV, JSONL or parquet table.

    Image paths are relative to its folder, or to a folder of images beside it when none is found there.
    Columns are recognised by name, else by content, when they are None and empty. Rows with the same image are
    one sample with several captions, as are several caption columns, lists in JSONL and JSON lists in a cell.
    Raises UsageError for a column that is not there or cannot be recognised, DataError when nothing can be read.
    """
    path = Path(path)
    problems: list[BadSample] = []
    try:
        rows = read_rows(path, problems)
        head = list(itertools.islice(rows, _NUM_SNIFFED))
        if not head:
            found = "; ".join(map(str, problems[:5])) or "It is empty, or holds a header alone"
            raise DataError(f"{path}: there is no row in it that can be read. {found}")
        image_column, caption_columns = _columns(path, head, image_column, caption_columns)
        source = FileSource(
            name=path.stem,
            layout=f"table {path.name}, images in column `{image_column}`, "
            f"captions in {', '.join(f'`{column}`' for column in caption_columns)}",
            folder=str(_folder(path, head, image_column)),
            _problems=problems,
        )
        merged = merge_rows(source, path.name, itertools.chain(head, rows), image_column, caption_columns)
        return source._fill(
            (file, size, captions, -1) for file, (size, captions) in merged.items() if captions
        )
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: it cannot be read as {path.suffix or 'a table'}: {error}") from error


def _folder(table: Path, head: list[Row], image_column: str) -> Path:
    names = [cell for _, row in head if isinstance(cell := row.get(image_column), str) and cell.strip()]
    if not names or any(find_file(str(table.parent), name.strip()) for name in names):
        return table.parent
    folder, found = image_folder(table, names)
    return folder if found else table.parent


def merge_rows(
    source: FileSource,
    table: str,
    rows: Iterator[Row],
    image_column: str,
    caption_columns: tuple[str, ...],
) -> dict[str, tuple[int, str]]:
    """Size and captions by file; every row that adds nothing is put on the source's list of problems."""
    files: dict[str, tuple[int, str]] = {}
    spelled: dict[str, str] = {}  # as in the table → as on the disk; "" for what is missing
    for line, row in rows:
        where, cell = f"{table}:{line}", row.get(image_column)
        if not isinstance(cell, str) or cell.strip() in MISSING_CAPTIONS:
            source._problem(where, "no path", f"column `{image_column}` is empty")
            continue
        if cell not in spelled:
            found = find_file(source.folder, cell.strip())
            spelled[cell] = found[0] if found else ""
            if found:
                files.setdefault(found[0], (found[1], ""))
            else:
                source._problem(cell, "missing file", f"{where}: {Path(source.folder, cell.strip())}")
        file = spelled[cell]
        if not file:
            continue
        captions, damaged = clean_captions(
            text for column in caption_columns for text in cell_texts(row.get(column))
        )
        if damaged:
            source._problem(file, "caption is not UTF-8", where)
        if captions:
            size, before = files[file]
            files[file] = size, "\n".join((before, *captions) if before else captions)
        else:
            source._problem(file, "empty caption", where)
    return files


# Recognising columns


# Folders
