"""The tar shards that a path means: a folder, a shard, a range of shards, or several joined by `::`."""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from threetowers.data.parts import name_part, part_of
from threetowers.data.shards.remote import is_address, redacted
from threetowers.data.source import is_image_name
from threetowers.errors import DataError, UsageError

ENDING = ".tar"
_COMPRESSED = {
    ".tar.gz": "gunzip",
    ".tgz": "gunzip",
    ".tar.bz2": "bunzip2",
    ".tar.xz": "unxz",
    ".tar.zst": "unzstd",
}
"""Endings of compressed shards, and the command that unpacks one."""
_DEPTH = 3  # levels of subfolders, which also ends circles of links


def names_shards(path: str) -> bool:
    """Whether a path means tar shards, compressed ones included, which `expand` refuses with the reason."""
    named = _is_shard(path) or _is_compressed(path)
    several = "::" in path or ("{" in path and ENDING in path.lower())
    foreign = path.startswith("pipe:") or "://" in path  # refused by `expand`, with the reason
    place = Path(path)
    if place.is_dir():
        return bool(_shards_in(place))
    return several or foreign or (named and place.is_file())


def _is_shard(name: str) -> bool:
    return name.lower().endswith(ENDING)


def _is_compressed(name: str) -> bool:
    return name.lower().endswith(tuple(_COMPRESSED))


def _shards_in(folder: Path) -> list[Path]:
    """The shards of a folder, compressed ones included; where it has none, those of its subfolders.

    Subfolders are looked at until there is an image, so that a folder of many images costs one listing.
    """
    found: list[Path] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        shards = [name for name in sorted(files) if not name.startswith(".")]
        shards = [name for name in shards if _is_shard(name) or _is_compressed(name)]
        found += [Path(parent, name) for name in shards]
        top = parent == str(folder)
        if top and (found or any(map(part_of, folders))):
            break
        if not shards and any(is_image_name(name) for name in files):
            return []
        if len(Path(parent).relative_to(folder).parts) >= _DEPTH:
            folders.clear()
    return found


def _all_shards(folder: Path) -> list[Path]:
    """The shards of a folder; raises DataError when there is none, or a compressed one without its unpacked form."""
    found = _shards_in(folder)
    if not found:
        raise DataError(f"{folder}: there is no {ENDING} in this folder")
    plain = [path for path in found if _is_shard(path.name)]
    unpacked = {path.with_suffix("") for path in plain}
    left = [str(path) for path in found if not _is_shard(path.name) and _unpacked(path) not in unpacked]
    if left:
        raise _compressed(left)
    return plain


def parts_by_name(places: Sequence[str]) -> list[str]:
    """The part of each shard, where every name says one and they are several with train; else empty.

    A name is that of the file with the folders that differ, as in `train-0000.tar` and `val2017/00000.tar`.
    """
    folders = [place.rpartition("/")[0] + "/" for place in places]
    common = os.path.commonprefix(folders).rpartition("/")[0]  # noqa: RUF071 - addresses too; of whole folders
    parts = [name_part(place.partition("?")[0][len(common) :].removesuffix(ENDING)) for place in places]
    named = [part for part in parts if part is not None]
    return named if len(named) == len(parts) and {"train"} < set(named) else []


def not_read(folder: Path) -> str:
    """What lies in a folder of shards that is not read, in words for the user; empty when it is nothing."""
    images, others, within = 0, [], 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                with contextlib.suppress(OSError):
                    within += sum(map(_is_shard, os.listdir(entry)))  # noqa: PTH208 - names are enough
            elif is_image_name(entry.name):
                images += 1
            elif f"{ENDING}." in entry.name.lower() and not _is_compressed(entry.name):
                others.append(entry.name)  # a download that has not ended
    counts = ((images, "images beside the shards"), (within, "shards in subfolders"))
    said = [f"{number} {what}" for number, what in counts if number] + sorted(others)[:8]
    return f"; not read: {', '.join(said)}" if said else ""


def _unpacked(path: Path) -> Path:
    """A compressed shard's path without its ending."""
    ending = next(ending for ending in _COMPRESSED if path.name.lower().endswith(ending))
    return path.with_name(path.name[: -len(ending)])


def _compressed(places: Sequence[str]) -> DataError:
    command = next(command for ending, command in _COMPRESSED.items() if places[0].lower().endswith(ending))
    number = "1 shard is" if len(places) == 1 else f"{len(places)} shards are"
    return DataError(
        f"{redacted(places[0])}: {number} compressed, and images are read by their position in a plain {ENDING}. "
        f"Unpack every one: {command} {redacted(places[0])}"
    )


def folder_name(folder: str) -> str:
    """The name of a folder of shards, without secrets of its address."""
    return redacted(folder).rpartition("/")[2] if is_address(folder) else Path(folder).resolve().name


def stems_of(places: Sequence[str]) -> list[str]:
    """What the ids of each shard's samples begin with: its name and, where names are equal, some of its folders."""
    names = [place.partition("?")[0] if is_address(place) else place for place in places]
    stems = [Path(name).stem for name in names]
    if len(set(stems)) < len(stems):  # joined folders number their shards alike
        whole = [name if is_address(name) else os.path.realpath(name) for name in names]
        far = any(is_address(name) for name in names)
        common = "" if far else os.path.commonpath([Path(name).parent for name in whole])
        stems = [name[len(common) : -len(ENDING)].lstrip("/") for name in whole]
    return stems


def expand(path: str) -> list[str]:
    """The paths and addresses of the shards that a path names; raises DataError when one is missing, and UsageError."""
    places: list[str] = []
    for part in path.split("::"):
        if part.startswith("pipe:"):
            raise UsageError(f"{part}: only files and addresses of files are read, no commands")
        if is_address(part):
            if not part.partition("?")[0].lower().endswith(ENDING):
                raise UsageError(
                    f"{redacted(part)}: name the shards, for example {redacted(part)}/{{00000..00011}}.tar"
                )
            places += _expand_braces(part)
        elif Path(part).is_dir():
            places += map(str, _all_shards(Path(part)))
        else:
            places += [str(Path(place)) for place in _expand_braces(part)]
    if compressed := [place for place in places if _is_compressed(place)]:
        raise _compressed(compressed)
    missing = [place for place in places if not (is_address(place) or Path(place).is_file())]
    if missing:
        raise DataError(
            f"{path}: expected {len(places)} shards, found {len(places) - len(missing)}; "
            f"missing: {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
        )
    real = {place.partition("?")[0] if is_address(place) else os.path.realpath(place) for place in places}
    if len(real) < len(places):
        raise UsageError(f"{path}: a shard is named twice")
    return places


def _expand_braces(path: str) -> list[str]:
    """Expands `a{08..10}.tar` to a08.tar, a09.tar and a10.tar, and `{x,y}` to both; several braces are combined."""
    brace = re.search(r"\{([^{}]*)\}", path)
    if not brace:
        return [path]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
    if bounds:
        names = [f"{i:0{len(bounds[1])}d}" for i in range(int(bounds[1]), int(bounds[2]) + 1)]
    else:
        names = brace[1].split(",")
    ends = _expand_braces(path[brace.end() :])
    return [path[: brace.start()] + name + end for name in names for end in ends]
