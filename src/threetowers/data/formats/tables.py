"""Tables with a column of image paths and columns of captions: one file, or several in a folder."""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from threetowers.data.formats.columns import NUM_SNIFFED, Found, find_columns, split_column
from threetowers.data.formats.files import FileSource
from threetowers.data.formats.folders import has_captions, image_names
from threetowers.data.formats.merge import Merged
from threetowers.data.formats.parquet_images import image_columns, open_parquet_images, parquet_image_parts
from threetowers.data.formats.places import find_file, image_folder, image_path, is_address, local_path
from threetowers.data.formats.rows import TABLE_ENDINGS, Row, read_rows, spread_rows, tables_in
from threetowers.data.parts import check_known, missing_pieces, name_part, subsets
from threetowers.data.source import ANY_COLUMNS, ColumnNames, Format, Source, check_parts
from threetowers.errors import BadSample, DataError


def open_table(path: str | Path, columns: ColumnNames = ANY_COLUMNS) -> Source:
    """The samples of a CSV (any delimiter), TSV, JSONL or parquet table, or of the tables of a folder.

    Image paths are relative to the table's folder, or to a folder of images beside it when none is found there.
    Columns that are not named are recognised by name and content. Rows with the same image are one sample with
    several captions, as are several caption columns, and lists and objects in a cell.
    Raises UsageError for a column that is not there or cannot be recognised, DataError when nothing can be read.
    """
    files = table_files(Path(path))
    return open_parquet_images(path, files, columns) or _read(files, columns, Path(path)).fill()


def open_table_parts(path: str | Path, columns: ColumnNames) -> dict[str, Source]:
    """The parts (train, val, test) that a `split` column or the names of several tables say; empty without them.

    Raises DataError for a part that is not known, and like `open_table`.
    """
    files = table_files(Path(path))
    by_name = _are_parts(files)
    parts = parquet_image_parts(
        path, files, columns, [file_part(file) or "" for file in files] if by_name else []
    )
    if parts is not None:
        return parts
    if not by_name and not any(_has_split(file, columns) for file in files):
        return {}
    merged = _read(files, columns, Path(path))
    check_known(str(path), columns.split, merged.unknown)
    source = merged.fill()
    return subsets(source, merged.sample_parts(), merged.problem_parts)


def check_table(path: str, columns: ColumnNames) -> None:
    """Raises what `open_table` raises for the columns of a table of image paths, in a folder of its first one."""
    file = table_files(Path(path))[0]
    if not image_columns(file):
        with _readable(file):
            _columns(file, columns)


def _columns(file: Path, columns: ColumnNames) -> tuple[list[Row], Found]:
    """The first rows of a table, and its columns."""
    head = _head(file)
    return head, find_columns(file, spread_rows(file, head), columns)


def _are_parts(files: Sequence[Path]) -> bool:
    """Whether the names of several tables say the part of each."""
    return len(files) > 1 and all(map(file_part, files))


def _has_split(file: Path, columns: ColumnNames) -> bool:
    with _readable(file):
        rows = [row for _, row in _head(file)]
    names = dict.fromkeys(name for row in rows for name in row)
    return (
        split_column(file, list(names), columns, lambda name: [r[name] for r in rows if name in r])
        is not None
    )


def _read(files: Sequence[Path], columns: ColumnNames, path: Path) -> Merged:
    """The rows of all tables, not yet filled into the source; of a folder, what else lies in it is in the layout."""
    problems: list[BadSample] = []
    found, places = [], []
    for file in files:
        with _readable(file):
            head, own = _columns(file, columns)
            found.append(own)
            places.append(_folder(file, head, own.image))
    folder = places[0] if len(set(places)) == 1 else files[0].parent
    by_name = _are_parts(files)
    named = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    captions = ", ".join(f"`{column}`" for column in found[0].captions)
    split = f"; its column `{found[0].split}` says each row's part" if found[0].split and not by_name else ""
    source = FileSource(
        name=files[0].stem if len(files) == 1 else files[0].resolve().parent.name,
        layout=f"table {named}, images in column `{found[0].image}`, captions in {captions}{split}{found[0].note}",
        folder=str(folder),
        _problems=problems,
    )
    merged = Merged(source)
    for file, each, place in zip(files, found, places, strict=True):
        prefix = "" if place == folder else os.path.relpath(place, folder)
        with _readable(file):
            part = file_part(file) if by_name else None
            merged.add(file.name, read_rows(file, problems), each, prefix=prefix, part=part)
    _check_addresses(files[0], merged, found[0].image)
    if path.is_dir():
        source.layout += missing_pieces([file.name for file in files])
    if unused := [table.name for table in tables_in(files[0].parent) if path.is_dir() and table not in files]:
        source.layout += f"; not read: {', '.join(unused)}"
    if path.is_dir() and path == folder:
        others = sorted(image for image in image_names(path) if image not in merged.files)
        if others:
            source.layout += f"; {len(others)} images of the folder are in no row, for example {others[0]}"
    return merged


def _head(file: Path) -> list[Row]:
    """The first rows of a table; raises DataError when there is none."""
    problems: list[BadSample] = []
    head = list(itertools.islice(read_rows(file, problems), NUM_SNIFFED))
    if not head:
        reason = "; ".join(map(str, problems[:5])) or "It is empty, or holds a header alone"
        raise DataError(f"{file}: there is no row in it that can be read. {reason}")
    return head


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError) as error:
        raise DataError(f"{file}: it cannot be read as {file.suffix or 'a table'}: {error}") from error


def _folder(table: Path, head: list[Row], image_column: str) -> Path:
    """The folder that the paths in a table are relative to."""
    cells = [cell for _, row in head if (cell := image_path(row.get(image_column))) and cell.strip()]
    names = [cell for cell in cells if not is_address(cell)]
    if not names or any(find_file(str(table.parent), local_path(name)) for name in names):
        return table.parent
    folder, num_hits = image_folder(table, names)
    return folder if num_hits else table.parent


def _check_addresses(file: Path, merged: Merged, column: str) -> None:
    """Raises DataError when most images are addresses, from which nothing is fetched."""
    if len(merged.addresses) <= len(merged.files):
        return
    raise DataError(
        f"{file}: its column `{column}` holds {len(merged.addresses)} addresses, for example "
        f"{merged.addresses[0][:80]}, and nothing is fetched from them. Download the images first, for example with "
        f"img2dataset --url_list {file} "
        f"--url_col {column} --output_folder shards --output_format webdataset, and give its folder"
    )


def table_files(path: Path) -> tuple[Path, ...]:
    """The tables that a path means: a file itself, and of a folder its tables; empty when it is no table.

    Those are `metadata.*`, else the only table, else tables that are the parts of a set by their names (`train.csv`,
    `test.csv`) or numbered pieces of one (`train-00000-of-00002.parquet`). A folder whose images have `.txt` files
    beside them is none.
    """
    if path.is_file():
        return (path,)
    if not path.is_dir():
        return ()
    metadata = [path / f"metadata{ending}" for ending in TABLE_ENDINGS]
    if (table := next((table for table in metadata if table.is_file()), None)) is not None:
        return (table,)
    tables = tables_in(path)
    if not tables and all(table.suffix.lower() == ".parquet" for table in tables_in(path / "data")):
        tables = tables_in(path / "data")  # as dataset hubs lay them out
    if not tables or has_captions(path):
        return ()
    if len(tables) == 1 or len(set(map(_piece, tables))) == 1:
        return tuple(tables)
    parts = [(file_part(table), table) for table in tables if file_part(table)]
    # Of each part there is one table, in pieces perhaps; two would not hold the same.
    of_parts = {(part, _piece(table)) for part, table in parts}
    one_each = len(of_parts) == len({part for part, _ in of_parts})
    return tuple(table for _, table in parts) if len(of_parts) > 1 and one_each else ()


def _piece(table: Path) -> str:
    """A file's name without its digits, which is the same for the pieces of one table."""
    return re.sub(r"\d+", "", table.name)


def file_part(table: Path) -> str | None:
    """The part that a file's name says, as `train-00000-of-00002.parquet` and `captions_val.csv` do."""
    return name_part(table.stem)


TABLES = Format(
    have="a CSV, TSV, JSON, JSONL or parquet table with image paths, or images in parquet, and one or more captions",
    give="its path, or the folder that holds it; a `split` column and tables named `train`, `val`, `test` are kept",
    accepts=lambda path: bool(table_files(Path(path))),
    open=lambda path, columns, opener: open_table(path, columns),
    parts=lambda path, columns, opener: check_parts(path, open_table_parts(path, columns)),
    takes_columns=True,
    check=check_table,
)
