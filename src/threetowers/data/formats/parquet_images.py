"""Parquet files with the images themselves in a column, as dataset hubs and img2dataset write them.

`datasets` turns them into a memory-mapped Arrow file in the cache folder, once for each state of the files.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from threetowers.data.formats.hf_columns import holds_bytes
from threetowers.data.formats.hf_datasets import DatasetSource, RowParts, dataset_source
from threetowers.data.parts import missing_pieces
from threetowers.data.source import ColumnNames, Source
from threetowers.errors import DataError, UsageError, of_system
from threetowers.files import cache_folder

_NUM_LOOKED_AT = 16  # rows of a column of bytes, for an image among them
_IMAGE_START = re.compile(rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|GIF8|BM|II\*\0|MM\0\*|....ftyp", re.DOTALL)


def image_columns(file: Path) -> list[str]:
    """The columns of a parquet file that hold encoded images, as bytes or in objects with bytes; else none."""
    if file.suffix.lower() != ".parquet":
        return []
    try:
        import pyarrow  # type: ignore[import-untyped, import-not-found]
        from pyarrow import parquet
    except ImportError:
        return []  # reading it as a table of paths says what to install

    def is_bytes(kind: Any) -> bool:
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    found = []
    try:
        with parquet.ParquetFile(file) as table:
            for column in table.schema_arrow:
                if pyarrow.types.is_struct(column.type):
                    index = column.type.get_field_index("bytes")
                    if index >= 0 and is_bytes(column.type.field(index).type):
                        found.append(column.name)
                elif is_bytes(column.type):
                    first = next(table.iter_batches(_NUM_LOOKED_AT, columns=[column.name]), None)
                    cells = first.column(0).to_pylist() if first else []
                    if any(cell and _IMAGE_START.match(cell) for cell in cells):
                        found.append(column.name)
    except (pyarrow.ArrowException, OSError):
        return []  # reading it as a table says what is wrong
    return found


def open_parquet_images(path: str | Path, files: Sequence[Path], columns: ColumnNames) -> Source | None:
    """The samples of parquet files that hold images; None for other tables. Raises UsageError and DataError."""
    read = _read(path, files, columns, [])
    return None if read is None else read[0]


def parquet_image_parts(
    path: str | Path, files: Sequence[Path], columns: ColumnNames, labels: Sequence[str]
) -> dict[str, Source] | None:
    """The parts of parquet files that hold images, by a `split` column or by file; None for other tables.

    labels: the part of each file; empty where the files' names say none.
    """
    read = _read(path, files, columns, labels)
    if read is None:
        return None
    source, parts = read
    return parts.subsets(source, str(path)) if parts.of_rows else {}


def _read(
    path: str | Path, files: Sequence[Path], columns: ColumnNames, labels: Sequence[str]
) -> tuple[DatasetSource, RowParts] | None:
    images = image_columns(files[0]) if files else []
    if not images or (columns.image is not None and columns.image not in images):
        return None
    rows, counts = _load(files, images)
    of_rows = (
        [label for label, count in zip(labels, counts, strict=True) for _ in range(count)] if labels else []
    )
    failed = []
    if {"url", "status"} <= rows.features.keys():  # img2dataset keeps a row for what it could not fetch
        statuses = rows.select_columns(["status"])[:].column("status").to_pylist()
        failed = [row for row, status in enumerate(statuses) if status != "success"]
    if failed:
        kept = sorted(set(range(len(statuses))) - set(failed))
        rows, of_rows = rows.select(kept), [of_rows[row] for row in kept] if of_rows else []
    parts = RowParts(None, of_rows) if of_rows else None
    source, parts = dataset_source(
        rows, Path(path), columns, folder=files[0].parent, name=_name(files), parts=parts
    )
    if Path(path).is_dir():
        source.layout += missing_pieces([file.name for file in files])
    if failed:
        source.layout += f"; {len(failed)} rows that were not downloaded are left out"
    return source, parts


def _name(files: Sequence[Path]) -> str:
    return files[0].stem if len(files) == 1 else files[0].resolve().parent.name


def _load(files: Sequence[Path], images: Sequence[str]) -> tuple[Any, list[int]]:
    """The rows of the files in their order, images undecoded and without other bytes, and the number of each file's."""
    import pyarrow
    from pyarrow import parquet

    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{files[0]}: it holds images, which needs datasets; pip install 'threetowers[datasets]'"
        ) from error
    counts = []
    for file in files:
        try:
            counts.append(parquet.read_metadata(file).num_rows)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{file}: it is no parquet file, or a damaged one: {error}. Fetch it again"
            ) from error
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        paths = [str(file) for file in files]
        rows = datasets.Dataset.from_parquet(paths, cache_dir=str(cache_folder() / "parquet"))
        for name, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        others = [name for name, each in rows.features.items() if holds_bytes(each) and name not in images]
        return rows.remove_columns(others).with_format("arrow"), counts
    except Exception as error:  # damaged files and columns that differ raise nearly everything
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and not isinstance(cause, pyarrow.ArrowException):
            raise DataError(
                f"{files[0].parent}: it cannot be read into {cache_folder() / 'parquet'}: {of_system(cause)}; "
                "$THREETOWERS_CACHE can name another folder"
            ) from error
        raise DataError(
            f"{files[0].parent}: its parquet files cannot be read as one dataset: {type(cause).__name__}: "
            f"{str(cause)[:300]}. Fetch them again, or name one of them"
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()
