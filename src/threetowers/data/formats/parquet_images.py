"""Parquet files with the images themselves in a column, as dataset hubs and img2dataset write them.

`datasets` turns them into a memory-mapped Arrow file in the cache folder, once for each state of the files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from threetowers.data.formats.hf_datasets import RowParts, dataset_source
from threetowers.data.source import ColumnNames, Source
from threetowers.errors import DataError, UsageError
from threetowers.files import cache_folder


def holds_images(file: Path) -> bool:
    """Whether a file is parquet with a column of bytes, or of objects with bytes; False where that cannot be told."""
    if file.suffix.lower() != ".parquet":
        return False
    try:
        import pyarrow  # type: ignore[import-untyped, import-not-found]
        from pyarrow import parquet
    except ImportError:
        return False
    try:
        schema = parquet.read_schema(file)
    except (pyarrow.ArrowException, OSError):
        return False

    def is_bytes(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            return any(
                kind.field(i).name == "bytes" and is_bytes(kind.field(i).type) for i in range(kind.num_fields)
            )
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    return any(is_bytes(field.type) for field in schema)


def open_parquet_images(path: str | Path, files: Sequence[Path], columns: ColumnNames) -> Source | None:
    """The samples of parquet files that hold images; None for other tables. Raises UsageError and DataError."""
    if not files or not holds_images(files[0]):
        return None
    rows = _load(files)
    return dataset_source(rows, Path(path), columns, folder=files[0].parent, name=_name(files))[0]


def parquet_image_parts(
    path: str | Path, files: Sequence[Path], columns: ColumnNames, labels: Sequence[str]
) -> dict[str, Source] | None:
    """The parts of parquet files that hold images, by a `split` column or by file; None for other tables.

    labels: the part of each file; empty where the files' names say none.
    """
    if not files or not holds_images(files[0]):
        return None
    rows = _load(files)
    parts = None
    if labels:
        from pyarrow import parquet

        counts = [parquet.read_metadata(file).num_rows for file in files]
        parts = RowParts(
            None, [label for label, count in zip(labels, counts, strict=True) for _ in range(count)]
        )
    source, parts = dataset_source(
        rows, Path(path), columns, folder=files[0].parent, name=_name(files), parts=parts
    )
    if not parts.of_rows:
        return {}
    return parts.subsets(source, str(path), columns)


def _name(files: Sequence[Path]) -> str:
    return files[0].stem if len(files) == 1 else files[0].resolve().parent.name


def _load(files: Sequence[Path]) -> Any:
    """The rows of the files in their order, images undecoded."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{files[0]}: it holds images, which needs datasets; pip install 'threetowers[datasets]'"
        ) from error
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        rows = datasets.Dataset.from_parquet(
            [str(file) for file in files], cache_dir=str(cache_folder() / "parquet")
        )
        for name, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        return rows.with_format("arrow")
    except Exception as error:  # damaged files raise nearly everything
        cause = error.__cause__ or error
        raise DataError(
            f"{files[0]}: it cannot be read as parquet: {type(cause).__name__}: {str(cause)[:300]}. Fetch it again"
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()
