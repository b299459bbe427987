"""Tar shards as webdataset and img2dataset write them, read by offset and never extracted.

A sample is the group of members that share their path up to the first dot of the file name: `00012.jpg`,
`00012.txt` (captions, one per line), `00012.json` (img2dataset's metadata), `00012.cls` (class index).
CLIP_benchmark's `classnames.txt` and `zeroshot_classification_templates.txt` are read from the shards' folder or the
one above. Nothing in a shard is executed: there is no pickle and no `pipe:`, and names are keys, never paths.
"""

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import overload

import numpy as np

from threetowers.data.copies import describe_copies, middle_key
from threetowers.data.parts import PART_NAMES, missing_pieces
from threetowers.data.shards.groups import Reading
from threetowers.data.shards.handles import read_extent
from threetowers.data.shards.index import Shard, TarIndex
from threetowers.data.shards.indexing import find_shards, open_index
from threetowers.data.shards.places import (
    expand,
    folder_name,
    names_shards,
    not_read,
    parts_by_name,
    stems_of,
)
from threetowers.data.shards.remote import is_address, text_beside
from threetowers.data.source import ColumnNames, Drawn, Format, Record, Source, Subset, check_parts
from threetowers.errors import BadSample, UsageError


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
        record = Record(self._id(index), self.index.captions(index), self.index.label(index))
        if self.index.num_copies and (first := self.index.first(index)) != index:
            return replace(record, image_id=self._id(first))
        return record

    def image(self, index: int) -> bytes:
        index = range(len(self))[index]
        try:
            return read_extent(self._shard(index), *self.index.extent(index))
        except OSError as error:
            raise BadSample(self._id(index), "unreadable", str(error)) from error

    def image_sizes(self) -> np.ndarray:
        return self.index.columns.array("sizes")

    def image_middles(self, indices: np.ndarray) -> np.ndarray:
        return np.array([middle_key(self.image(index)) for index in indices.tolist()], np.uint64)

    def split_draws(self, seed: int) -> np.ndarray | None:
        """`hash64("split", seed, id)` of every sample, uint64 [n]; it is stored for seed 0 only."""
        return self.index.draws if seed == 0 else None


def open_shards(path: str, caption_keys: tuple[str, ...] = ()) -> ShardSource:
    """The samples of a folder of shards, one shard, a range `x/{00000..00011}.tar`, or several joined by `::`.

    A folder without shards of its own means those in its subfolders. caption_keys: the keys of each sample's json that
    hold its captions; empty: they are found.
    Raises DataError when a shard is missing, compressed, cut short or damaged, or has not as many images as its
    `_stats.json` says; the message names the shard, what was expected and what was found.
    """
    places = expand(path)
    stems = stems_of(places)
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
    beside = missing_pieces([Path(stem).name for stem in stems]) if Path(path).is_dir() else ""
    beside += not_read(Path(path)) if Path(path).is_dir() and Path(path) == Path(places[0]).parent else ""
    name = Path(stems[0]).name if len(places) == 1 else folder_name(folder)
    title = f"indexing {name}"
    reading = Reading(len(class_names), caption_keys)
    shards = find_shards(list(zip(places, stems, strict=True)), reading, title)
    index = open_index(shards, reading, title)
    if caption_keys and not index.columns.length("captions"):
        named = ", ".join(f"`{key}`" for key in caption_keys)
        raise UsageError(f"{path}: there is no column {named}: no sample's json has a text under that key")
    keys = (
        f", captions in {', '.join(f'`{key}`' for key in caption_keys)} of the json" if caption_keys else ""
    )
    repeated = describe_copies(index.num_copies)
    return ShardSource(
        name=name,
        layout=f"{len(places)} tar shard{'s' if len(places) > 1 else ''}{keys}{repeated}{beside}",
        class_names=class_names,
        templates=templates,
        shards=shards,
        index=index,
    )


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


def _open(path: str, columns: ColumnNames) -> ShardSource:
    if columns.image is not None:
        raise UsageError(
            f"{path}: shards have no columns, so image_column means nothing; leave it out. "
            "caption_columns names keys of each sample's json"
        )
    return open_shards(path, columns.captions)


class _ShardPart(Subset):
    """Some of the shards of a set, which knows the stored hashes by which samples are drawn."""

    def split_draws(self, seed: int) -> np.ndarray | None:
        draws = self.source.split_draws(seed) if isinstance(self.source, Drawn) else None
        return None if draws is None else draws[np.asarray(self.indices)]


def _parts(path: str, columns: ColumnNames) -> dict[str, Source]:
    """The parts that the shards' names say, as `cc3m-train-0000.tar` and `cc3m-validation-0000.tar` do."""
    if columns.split is None or not (labels := parts_by_name(expand(path))):
        return {}
    source = _open(path, columns)
    source.layout += "; the names of its shards say their parts"
    of_stem = {shard.stem: label for shard, label in zip(source.shards, labels, strict=True)}

    def part_of_problem(problem: BadSample) -> str:
        ends = (place for place, letter in enumerate(problem.id) if letter == "/")
        return next(of_stem[stem] for end in ends if (stem := problem.id[:end]) in of_stem)

    indices = {part: array("q") for part in PART_NAMES if part in labels}
    start = 0
    for label, count in zip(labels, source.index.counts.tolist(), strict=True):
        indices[label].extend(range(start, start + count))
        start += count
    problems: dict[str, list[BadSample]] = {part: [] for part in indices}
    for problem in source.problems:
        problems[part_of_problem(problem)].append(problem)
    return {
        part: _ShardPart(source, indices[part], f"{source.name}/{part}", problems[part]) for part in indices
    }


SHARDS = Format(
    have="webdataset or img2dataset tar shards",
    give="the folder, or `'shards/{00000..00099}.tar'`; also `s3://…` and other addresses "
    "(`pip install 'threetowers[remote]'`)",
    accepts=names_shards,
    open=lambda path, columns, opener: _open(path, columns),
    parts=lambda path, columns, opener: check_parts(path, _parts(path, columns)),
    takes_columns=True,
)
