"""Data that is split already: a folder with `train/`, `val/` (or `valid/`, `validation/`) and `test/`."""

from pathlib import Path

from threetowers.data.source import ColumnNames, Format, Opener, Source
from threetowers.errors import DataError

_VAL_FOLDERS = ("val", "valid", "validation")


def has_split_folders(path: str) -> bool:
    """Whether a folder holds `train/`, and beside it nothing or a validation or test folder, but no shards."""
    folder = Path(path)
    if not (folder / "train").is_dir() or any(folder.glob("*.tar")):
        return False
    others = {entry.name for entry in folder.iterdir() if entry.is_dir()} - {"train"}
    return not others or not others.isdisjoint((*_VAL_FOLDERS, "test"))


def open_split_folders(path: str, columns: ColumnNames, opener: Opener) -> Source:
    """Raises DataError: the parts are separate sources, and `splits` opens them."""
    raise DataError(f"{path} holds separate parts; name one of them, for example {Path(path) / 'train'}")


def split_folder_parts(path: str, columns: ColumnNames, opener: Opener) -> dict[str, Source]:
    """The sources in those of the folders that are there, by part; raises what `open_source` raises."""
    folder = Path(path)
    val = next((name for name in _VAL_FOLDERS if (folder / name).is_dir()), "val")
    folders = {"train": folder / "train", "val": folder / val, "test": folder / "test"}
    return {label: opener.open(str(part), columns) for label, part in folders.items() if part.is_dir()}


SPLIT_FOLDERS = Format(
    have="any of these already split",
    give="a folder with `train/`, `val/` and `test/`",
    accepts=has_split_folders,
    open=open_split_folders,
    parts=split_folder_parts,
    takes_columns=True,
)
