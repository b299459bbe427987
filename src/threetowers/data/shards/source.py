"""Tar shards as webdataset and img2dataset write them, read by offset and never extracted.

A sample is the group of members that share their path up to the first dot of the file name: `00012.jpg`,
`00012.txt` (captions, one per line), `00012.json` (img2dataset's metadata), `00012.cls` (class index).
CLIP_benchmark's `classnames.txt` and `zeroshot_classification_templates.txt` are read from the shards' folder or the
one above. Nothing in a shard is executed: there is no pickle and no `pipe:`, and names are keys, never paths.
"""

import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import overload

import numpy as np

from threetowers.data.shards.index import Shard, TarIndex
from threetowers.data.shards.indexing import find_shards, open_index
from threetowers.data.shards.remote import is_address, redacted, text_beside
from threetowers.data.shards.tar import OpenFile
from threetowers.data.source import Format, Record
from threetowers.errors import BadSample, DataError, UsageError


@lru_cache(maxsize=256)  # below the number of open files that systems allow
def _open_local(shard: Shard) -> OpenFile:
    return shard.open()


@lru_cache(maxsize=32)  # open shards are not evicted, so this many must fit into the cache
def _open_remote(shard: Shard) -> OpenFile:
    return shard.open()


class _Problems(Sequence[BadSample]):
    """The problems of an index, each read when it is asked for."""

    def __init__(self, index: TarIndex) -> None:
        self._index = index

    def __len__(self) -> int:
        return self._index.num_problems

    @overload
    def __getitem__(self, index: int) -> BadSample: ...
    @overload
    def __getitem__(self, index: slice) -> list[BadSample]: ...
    def __getitem__(self, index: int | slice) -> BadSample | list[BadSample]:
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return [self._index.problem(number) for number in numbers]
        return self._index.problem(numbers)


@dataclass(eq=False)
class ShardSource:
    """The samples of tar shards in the order of the shards; implements Source. Made by `open_shards`.

    A sample's id is `stem/key`. The index is a mapped file, which a copy in another process maps again.
    """

    name: str
    layout: str
    class_names: Sequence[str]
    templates: Sequence[str]
    shards: Sequence[Shard]
    index: TarIndex
    fingerprint: str = field(init=False)
    problems: Sequence[BadSample] = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(repr((self.class_names, self.templates)).encode())
        digest.update(self.index.digests)
        self.fingerprint = digest.hexdigest()
        self.problems = _Problems(self.index)
        self._ends = np.cumsum(self.index.counts).tolist()

    def __len__(self) -> int:
        return len(self.index)

    def _shard(self, index: int) -> Shard:
        return self.shards[bisect_right(self._ends, index)]

    def _id(self, index: int) -> str:
        return f"{self._shard(index).stem}/{self.index.key(index)}"

    def record(self, index: int) -> Record:
        index = range(len(self))[index]
        return Record(self._id(index), self.index.captions(index), self.index.label(index))

    def image(self, index: int) -> bytes:
        index = range(len(self))[index]
        shard = self._shard(index)
        offset, size = self.index.extent(index)
        if not (offset >= 0 and 0 < size <= shard.size - offset):
            detail = f"its index points to {size} bytes at {offset} of {shard.size}"
            raise BadSample(self._id(index), "unreadable", f"{redacted(shard.place)}: {detail}")
        try:
            # The name keeps the file open while it is read, when another thread pushes it out of the cache.
            file = _open_remote(shard) if is_address(shard.place) else _open_local(shard)
            data = os.pread(file.number, size, offset)
        except OSError as error:
            raise BadSample(self._id(index), "unreadable", f"{redacted(shard.place)}: {error}") from error
        if len(data) != size:
            raise BadSample(
                self._id(index), "unreadable", f"{redacted(shard.place)}: {len(data)} of {size} bytes"
            )
        return data

    def image_key(self, index: int) -> str:
        return ""

    def split_draws(self, seed: int) -> np.ndarray | None:
        """`hash64("split", seed, id)` of every sample, uint64 [n]; it is stored for seed 0 only."""
        return self.index.draws if seed == 0 else None


def names_shards(path: str) -> bool:
    """Whether a path means tar shards: a shard, a range of shards, several joined by `::`, or a folder with shards."""
    several = "::" in path or (path.endswith(".tar") and "{" in path)
    foreign = path.startswith("pipe:") or "://" in path  # refused by `open_shards`, with the reason
    place = Path(path)
    return several or foreign or (place.suffix == ".tar" and place.is_file()) or bool(_shards_in(place))


def _shards_in(folder: Path) -> list[Path]:
    return sorted(shard for shard in folder.glob("*.tar") if not shard.name.startswith("."))


def open_shards(path: str) -> ShardSource:
    """The samples of a folder of shards, one shard, a range `x/{00000..00011}.tar`, or several joined by `::`.

    Raises DataError when a shard is missing, cut short or damaged, or has not as many images as its `_stats.json`
    says; the message names the shard, what was expected and what was found.
    """
    places = _expand(path)
    stems = _stems(places)
    if Path(path).is_dir():
        folder = path
    elif is_address(places[0]):
        folder = places[0].rpartition("/")[0]
    else:
        folder = str(Path(places[0]).parent)
    class_names = _lines_beside(places[0], folder, "classnames.txt")
    templates = [
        template.replace("{c}", "{}")
        for template in _lines_beside(places[0], folder, "zeroshot_classification_templates.txt")
    ]
    name = Path(stems[0]).name if len(places) == 1 else _folder_name(folder)
    title = f"indexing {name}"
    shards = find_shards(list(zip(places, stems, strict=True)), len(class_names), title)
    return ShardSource(
        name=name,
        layout=f"{len(places)} tar shard{'s' if len(places) > 1 else ''}",
        class_names=class_names,
        templates=templates,
        shards=shards,
        index=open_index(shards, len(class_names), title),
    )


def _folder_name(folder: str) -> str:
    return redacted(folder).rpartition("/")[2] if is_address(folder) else Path(folder).resolve().name


def _stems(places: Sequence[str]) -> list[str]:
    """What the ids of each shard's samples begin with: its name and, where names are equal, some of its folders."""
    names = [place.partition("?")[0] if is_address(place) else place for place in places]
    stems = [Path(name).stem for name in names]
    if len(set(stems)) < len(stems):  # joined folders number their shards alike
        whole = [name if is_address(name) else os.path.realpath(name) for name in names]
        far = any(is_address(name) for name in names)
        common = "" if far else os.path.commonpath([Path(name).parent for name in whole])
        stems = [name.removesuffix(".tar")[len(common) :].lstrip("/") for name in whole]
    return stems


def _expand(path: str) -> list[str]:
    """The paths and addresses of the shards that a path names; raises DataError when one is missing, and UsageError."""
    places: list[str] = []
    for part in path.split("::"):
        if part.startswith("pipe:"):
            raise UsageError(f"{part}: only files and addresses of files are read, no commands")
        if is_address(part):
            if not part.partition("?")[0].endswith(".tar"):
                raise UsageError(
                    f"{redacted(part)}: name the shards, for example {redacted(part)}/{{00000..00011}}.tar"
                )
            places += _expand_braces(part)
        elif Path(part).is_dir():
            shards = _shards_in(Path(part))
            if not shards:
                raise DataError(f"{part}: there is no .tar in this folder")
            places += map(str, shards)
        else:
            places += [str(Path(place)) for place in _expand_braces(part)]
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


def _lines_beside(shard: str, folder: str, name: str) -> list[str]:
    """The lines of CLIP_benchmark's file in the folder or its parent; empty when there is no such file."""
    lines: list[str] = []
    if is_address(shard):
        lines = text_beside(shard, name).splitlines()
    else:
        files = (Path(folder) / name, Path(folder).resolve().parent / name)
        file = next((file for file in files if file.is_file()), None)
        lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines() if file else []
    return [line.strip() for line in lines if line.strip()]


SHARDS = Format(
    have="webdataset or img2dataset tar shards",
    give="the folder, or `'shards/{00000..00099}.tar'`; also `s3://…` and other addresses "
    "(`pip install 'threetowers[remote]'`)",
    accepts=names_shards,
    open=lambda path, columns, opener: open_shards(path),
)
