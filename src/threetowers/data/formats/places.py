"""Finds the images that a table or an annotation file names, and the folder that their paths are relative to."""

import os
import re
import stat
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from threetowers.data.source import is_picture_name

_IMAGE_FOLDERS = (
    "images", "Images", "train2017", "val2017", "train2014", "val2014",
    "flickr30k-images", "flickr30k_images", "Flicker8k_Dataset", "Flickr8k_Dataset",
)  # fmt: skip
_PATH_KEYS = ("path", "image_path", "file_path", "filepath", "file_name", "filename", "file", "image", "name")
_NUM_TRIED = 100  # names that a folder is recognised by
_MOST_FOLDERS = 200  # with names of their own that are looked into


_ADDRESS = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+://|www\.|data:image/)")


def is_address(text: str) -> bool:
    """Whether a text is an address such as `https://…`; `file://…` names a file of this machine and is none."""
    return _ADDRESS.match(text) is not None and not text.lstrip().lower().startswith("file:")


def local_path(text: str) -> str:
    """The path that a text means: as it is, of a `file://` address, or below the home folder for `~/`."""
    text = text.strip()
    if text[:5].lower() == "file:":
        path = re.sub(r"(?i)^file:(//[^/]*)?", "", text).encode("utf-8", "surrogateescape")
        return os.fsdecode(re.sub(rb"%([0-9A-Fa-f]{2})", lambda byte: bytes.fromhex(byte[1].decode()), path))
    return os.path.expanduser(text) if text.startswith("~") else text  # noqa: PTH111 - a Path costs more


def image_path(cell: Any) -> str | None:
    """The path in a cell: a text, an object that has it under a usual key, or a list of one of these; else None."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, list | tuple) and len(cell) == 1:
        return image_path(cell[0])
    in_cell = isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes)  # the image itself
    paths = (cell.get(key) for key in _PATH_KEYS) if isinstance(cell, dict) and not in_cell else ()
    return next((path for path in paths if isinstance(path, str)), None)


def near_file(folder: str, path: str) -> str | None:
    """A file that a path may have meant: one with its name in other case, or with an ending after it."""
    place = Path(folder, local_path(path).replace("\\", "/"))
    try:
        names = sorted(os.listdir(place.parent))  # noqa: PTH208 - names are enough
    except (OSError, ValueError):
        return None
    plain = place.name.lower()
    same = (name for name in names if name.lower() == plain or name.rpartition(".")[0].lower() == plain)
    return next((name for name in same if is_picture_name(name)), None)


def find_file(folder: str, path: str) -> tuple[str, int] | None:
    """The path as it is spelled on the disk, and the file's size in bytes; None when there is no such file.

    The path is tried as given, in both Unicode normal forms (macOS decomposes umlauts), and with / for \\.
    """
    plain = os.path.normpath(path)
    if found := _stat(folder, plain):
        return found
    forms = [*(unicodedata.normalize(form, plain) for form in ("NFC", "NFD")), plain.replace("\\", "/")]
    others = (_stat(folder, form) for form in dict.fromkeys(forms) if form != plain)
    return next(filter(None, others), None)


def _stat(folder: str, path: str) -> tuple[str, int] | None:
    """The path itself and the file's size; None when it is no file."""
    try:
        status = os.stat(os.path.join(folder, path))  # noqa: PTH116, PTH118 - a Path costs more than the call
    except (OSError, ValueError):
        return None
    return (path, status.st_size) if stat.S_ISREG(status.st_mode) else None


def image_folders(file: Path) -> list[Path]:
    """The folders that image names in a file can be relative to: its own, the one above, and usual ones in both.

    A usual folder whose name is part of the file's name, as in `captions_val2017.json`, comes before the others.
    """
    homes = (file.parent, file.parent / "..")
    words = re.split(r"[^A-Za-z]+", file.stem)  # the images of train.csv can be in train/
    named = [*sorted(_IMAGE_FOLDERS, key=lambda name: name not in file.name), file.stem, *filter(None, words)]
    within = [home / name for home in homes for name in named]
    within += [home / "images" / name for home in homes for name in named]
    return list(dict.fromkeys([*homes, *(folder for folder in within if folder.is_dir())]))


def image_folder(file: Path, names: Sequence[str]) -> tuple[Path, int]:
    """The folder with most of the names, the first of equals, and how many of the names that were tried it holds.

    After `image_folders`, every folder above the file and the one that the program runs in are tried. Where none of
    these has any of the names, the only folder below the file's that has some is taken.
    All names are resolved in one folder, since equal names in two folders can be different images.
    """
    above = [*file.resolve().parent.parents[1:], Path.cwd()]
    tried = names[:: max(len(names) // _NUM_TRIED, 1)]

    def num_hits(folder: Path) -> int:
        return sum(find_file(str(folder), local_path(name)) is not None for name in tried)

    hits = {folder: num_hits(folder) for folder in [*image_folders(file), *above]}
    if not any(hits.values()):
        below = {folder: num for folder in _folders_below(file.parent) if (num := num_hits(folder))}
        hits |= below if len(below) == 1 else {}
    best = max(hits, key=hits.__getitem__)
    return best, hits[best]


def _folders_below(folder: Path) -> list[Path]:
    """The folders in a folder and in those; at most _MOST_FOLDERS of them, and none that is hidden."""
    found: list[Path] = []
    for place, names, _ in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        found += [Path(place, name) for name in names]
        if Path(place) != folder:
            names.clear()
        if len(found) > _MOST_FOLDERS:
            break
    return found[:_MOST_FOLDERS]
