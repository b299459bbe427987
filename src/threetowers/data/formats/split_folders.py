"""Data that is split already: a folder with `train/`, `val/` (or `valid/`, `validation/`, `dev/`) and `test/`."""

import os
from pathlib import Path

from threetowers.data.formats.folders import captions_in
from threetowers.data.formats.rows import tables_in
from threetowers.data.formats.tables import table_files
from threetowers.data.parts import JoinedSource, part_of, parts_of
from threetowers.data.source import ColumnNames, Format, Opener, Source, is_image_name
from threetowers.errors import DataError


def has_split_folders(path: str) -> bool:
    """Whether a folder holds `train/`, and beside it nothing or a validation or test folder, but no shards.

    Where `train/` holds images whose captions are in a table beside it, the table is meant.
    """
    if not Path(path).is_dir():
        return False
    folder = _home(path)
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    parts = {part_of(name) for name in names}
    if (
        "train" not in parts
        or (len(names) > 1 and parts.isdisjoint(("val", "test")))
        or any(folder.glob("*.tar"))
    ):
        return False
    train = [entry.name for name in names if part_of(name) == "train" for entry in (folder / name).iterdir()]
    return not (any(map(is_image_name, train)) and table_files(folder))


def _home(path: str) -> Path:
    """The folder that the parts are in: the one at the path, or the only one in it, and so on."""
    folder = Path(path)
    while (within := _within(folder)) is not None:
        folder = within
    return folder


def _within(folder: Path) -> Path | None:
    """The only folder in a folder without images and tables, which an archive was unpacked into; else None."""
    with os.scandir(folder) as entries:
        names = {
            entry.name: entry.is_dir(follow_symlinks=False)
            for entry in entries
            if not entry.name.startswith((".", "__MACOSX"))
        }
    folders = [name for name, is_folder in names.items() if is_folder]
    if (
        len(folders) != 1
        or part_of(folders[0]) is not None
        or tables_in(folder)
        or captions_in(folder)
        or any(map(is_image_name, names))
    ):
        return None
    return folder / folders[0]


def _folders(home: Path) -> dict[str, str]:
    """The folder of each part; raises DataError where two are the same part."""
    found: dict[str, str] = {}
    for entry in sorted(home.iterdir()):
        part = part_of(entry.name) if entry.is_dir() else None
        if part is not None and found.setdefault(part, str(entry)) != str(entry):
            raise DataError(
                f"{home}: {Path(found[part]).name} and {entry.name} are both its part {part}; put them into one folder"
            )
    return {part: found[part] for part in ("train", "val", "test") if part in found}


def _others(home: Path) -> str:
    """The folders beside the parts, in words for the user."""
    names = [entry.name for entry in sorted(home.iterdir()) if entry.is_dir() and part_of(entry.name) is None]
    names = [name for name in names if not name.startswith(".")]
    return f"; not read: {', '.join(names[:8])}" if names else ""


def _opened(path: str, columns: ColumnNames, opener: Opener) -> tuple[str, dict[str, Source], str]:
    """The name of the whole, its sources by part, and what beside them is not read."""
    home = _home(path)
    sources = {part: opener.open(folder, columns) for part, folder in _folders(home).items()}
    return Path(path).resolve().name, sources, _others(home)


def open_split_folders(path: str, columns: ColumnNames, opener: Opener) -> Source:
    """All parts one after the other; raises what `open_source` raises."""
    return JoinedSource(*_opened(path, columns, opener))


def split_folder_parts(path: str, columns: ColumnNames, opener: Opener) -> dict[str, Source]:
    """The sources in those of the folders that are there, by part; raises what `open_source` raises."""
    return parts_of(*_opened(path, columns, opener))


SPLIT_FOLDERS = Format(
    have="any of these already split",
    give="a folder with `train/`, `val/` and `test/`",
    accepts=has_split_folders,
    open=open_split_folders,
    parts=split_folder_parts,
    takes_columns=True,
)
