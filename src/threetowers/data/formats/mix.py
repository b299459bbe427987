"""Several sources as one, each with a weight, described by a TOML file.

[[source]]
path = "cc3m/{00000..00331}.tar"   # relative to the file's folder; anything that can be given as data
weight = 0.5                       # how often each sample is visited per epoch; default 1

[[source]]
path = "flickr/captions.csv"
weight = 3
caption_columns = ["caption_0"]    # also image_column and split_column, as for a table alone
"""

import hashlib
import math
from array import array
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from threetowers.data.copies import Place, describe_copies, equal_images, image_ids_of, middles_of
from threetowers.data.formats.hf_datasets import PREFIX
from threetowers.data.order import hash64
from threetowers.data.source import ANY_COLUMNS, SPLIT_COLUMN, ColumnNames, Format, Opener, Record, Source
from threetowers.errors import BadSample, DataError, UsageError
from threetowers.settings import did_you_mean, read_toml

MAX_WEIGHT = 1000.0
T = TypeVar("T")
_KEYS = ("path", "weight", "image_column", "caption_columns", "split_column")


@dataclass(frozen=True)
class MixEntry:
    """One `[[source]]` of a mix file."""

    path: str
    weight: float = 1.0
    columns: ColumnNames = ANY_COLUMNS


@dataclass(eq=False)
class MixedSource:
    """The samples of several sources one after the other, some of them repeated; implements Source.

    prefixes: one per source. A sample's id is `prefix/id`, and `prefix/id~2` where it is repeated.
    Labels are kept when all sources have the same classes. image_ids: by the number of a source and of a sample in it,
    for images that come before in this source or in another.
    """

    name: str
    layout: str
    sources: Sequence[Source]
    prefixes: Sequence[str]
    problems: Sequence[BadSample] = ()
    class_names: Sequence[str] = ()
    templates: Sequence[str] = ()
    fingerprint: str = ""
    image_ids: Mapping[Place, str] = field(default_factory=dict)
    # Of each sample: the number of its source, its index there, and how often it has come before.
    _source: "array[int]" = field(default_factory=lambda: array("i"))
    _index: "array[int]" = field(default_factory=lambda: array("q"))
    _visit: "array[int]" = field(default_factory=lambda: array("i"))

    def __len__(self) -> int:
        return len(self._index)

    def record(self, index: int) -> Record:
        number, visit = self._source[index], self._visit[index]
        own = self._index[index]
        record = self.sources[number].record(own)
        prefix = self.prefixes[number]
        return replace(
            record,
            id=f"{prefix}/{record.id}" + (f"~{visit + 1}" if visit else ""),
            label=record.label if self.class_names else None,
            image_id=self.image_ids.get((number, own)) or f"{prefix}/{record.image_id or record.id}",
        )

    def image(self, index: int) -> bytes:
        try:
            return self.sources[self._source[index]].image(self._index[index])
        except BadSample as problem:
            raise BadSample(self.record(index).id, problem.reason, problem.detail) from problem

    def image_sizes(self) -> np.ndarray:
        sizes = [source.image_sizes() for source in self.sources]
        starts = np.cumsum([0, *map(len, sizes)])
        own: np.ndarray = np.concatenate(sizes)[starts[np.array(self._source)] + np.array(self._index)]
        return own

    def image_middles(self, indices: np.ndarray) -> np.ndarray:
        numbers, own = np.array(self._source)[indices], np.array(self._index)[indices]
        return middles_of(self.sources, numbers, own)

    def _add(self, number: int, index: int, num_visits: int) -> None:
        for visit in range(num_visits):
            self._source.append(number)
            self._index.append(index)
            self._visit.append(visit)

    def _set_fingerprint(self) -> None:
        origins = [(source.fingerprint, p) for source, p in zip(self.sources, self.prefixes, strict=True)]
        digest = hashlib.sha256(repr((origins, list(self.class_names))).encode("utf-8", "surrogateescape"))
        for column in (self._source, self._index, self._visit):
            digest.update(column.tobytes())
        self.fingerprint = digest.hexdigest()


def names_mix(path: str) -> bool:
    """Whether a source is a TOML file that lists several."""
    return Path(path).suffix.lower() == ".toml" and Path(path).is_file()


def open_mix(path: str, opener: Opener) -> MixedSource:
    """Every sample of every source once; weights count in training only.

    Raises UsageError for a key or value that cannot be meant, and what the opener raises for a source.
    """
    entries = read_mix(path)
    sources = [_opened(opener.open, path, number, entry) for number, entry in enumerate(entries, 1)]
    prefixes = _prefixes([source.name for source in sources])
    return _mixed(
        path, "", sources, entries, prefixes, image_ids_of(equal_images(sources), sources, prefixes, 0)
    )


def split_mix(path: str, opener: Opener) -> dict[str, Source]:
    """Training, validation and test part: each source is split first, then its training samples are repeated.

    An image that another source has in its test part is left out of training and validation, and one that another has
    in its validation part out of training; `layout` counts these. Raises what `open_mix` raises.
    """
    entries = read_mix(path)
    parts = [_opened(opener.split, path, number, entry) for number, entry in enumerate(entries, 1)]
    names = [train.name.removesuffix("/train") for train, _, _ in parts]
    folders = [Path(entry.path.removeprefix(PREFIX)).resolve().name for entry in entries]
    prefixes = _prefixes(
        [folder if name == "train" else name for name, folder in zip(names, folders, strict=True)]
    )
    train, val, test = ([each[part] for each in parts] for part in range(3))
    every = [*test, *val, *train]
    equal = equal_images(every)

    def part(label: str, sources: list[Source], place: int, *, weighted: bool) -> MixedSource:
        first = place * len(parts)
        held_out = {
            (number - first, index)
            for (number, index), (origin, _) in equal.items()
            if origin < first <= number < first + len(parts)
        }
        ids = image_ids_of(equal, every, prefixes, first)
        return _mixed(path, f"/{label}", sources, entries, prefixes, ids, held_out, weighted=weighted)

    return {
        "train": part("train", train, 2, weighted=True),
        "val": part("val", val, 1, weighted=False),
        "test": part("test", test, 0, weighted=False),
    }


def _opened(open: Callable[[str, ColumnNames], T], file: str, number: int, entry: MixEntry) -> T:
    """What `open` makes of an entry; its errors say which source of which file they are about."""
    try:
        return open(entry.path, entry.columns)
    except (DataError, UsageError) as error:
        raise type(error)(f"{file}: source {number}: {error}") from None


def _mixed(
    path: str,
    label: str,
    sources: list[Source],
    entries: list[MixEntry],
    prefixes: list[str],
    image_ids: Mapping[Place, str],
    held_out: Set[Place] = frozenset(),
    *,
    weighted: bool = False,
) -> MixedSource:
    """The sources one after the other.

    held_out: samples that are left out. weighted: samples come as often as the weights say, else once.
    """
    classes = [list(source.class_names) for source in sources]
    same = all(names == classes[0] for names in classes)
    for source, entry in zip(sources, entries, strict=True):
        if not same and len(source) and not source.record(0).captions:
            raise DataError(
                f"{path}: {entry.path} has labels and no captions, and the other sources have other classes; "
                "leave it out"
            )
    weights = [f"{source.layout} × {entry.weight:g}" for source, entry in zip(sources, entries, strict=True)]
    mixed = MixedSource(
        name=Path(path).stem + label,
        layout=f"mix of {len(sources)} sources: {'; '.join(weights)}",
        sources=sources,
        prefixes=prefixes,
        class_names=classes[0] if same else [],
        templates=sources[0].templates if same else [],
        image_ids=image_ids,
    )
    problems: list[BadSample] = []
    for number, (source, entry, prefix) in enumerate(zip(sources, entries, mixed.prefixes, strict=True)):
        problems += [BadSample(f"{prefix}/{p.id}", p.reason, p.detail) for p in source.problems]
        for index in range(len(source)):
            if (number, index) not in held_out:
                mixed._add(number, index, _num_visits(source, index, entry.weight) if weighted else 1)
    if held_out:
        mixed.layout += f"; {len(held_out)} left out, since another source validates or tests on their images"
    elif image_ids:
        mixed.layout += describe_copies(len(image_ids))
    mixed.problems = problems
    mixed._set_fingerprint()
    return mixed


def _num_visits(source: Source, index: int, weight: float) -> int:
    """How often a sample comes in an epoch: the weight, rounded up for the share of samples that its fraction is."""
    fraction, whole = math.modf(weight)
    if not fraction:
        return int(whole)
    return int(whole) + (hash64("mix", source.record(index).id) / 2**64 < fraction)


def _prefixes(names: list[str]) -> list[str]:
    """The names, with a number at the end of each that came before."""
    prefixes: list[str] = []
    for name in names:
        number, unique = 1, name
        while unique in prefixes:
            number += 1
            unique = f"{name}-{number}"
        prefixes.append(unique)
    return prefixes


def read_mix(path: str) -> list[MixEntry]:
    """The sources that a file lists, their paths relative to the working folder or absolute; raises UsageError."""
    values = read_toml(path)
    for key in values:
        if key != "source":
            raise UsageError(
                f"{path}: {key}: no such key{did_you_mean(key, ['source'])} (a mix is a list of [[source]])"
            )
    tables = values.get("source")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{path}: it names no source; write [[source]] and below it path = …")
    entries = [_entry(path, f"source {number}", table) for number, table in enumerate(tables, 1)]
    paths = [entry.path for entry in entries]
    for entry in entries:
        if paths.count(entry.path) > 1:
            raise UsageError(f"{path}: {entry.path} is named twice; name it once and raise its weight")
        if names_mix(entry.path):
            raise UsageError(f"{path}: {entry.path} is a mix itself; name its sources here")
    return entries


def _entry(file: str, where: str, values: dict[str, object]) -> MixEntry:
    for key in values:
        if key not in _KEYS:
            raise UsageError(f"{file}: {where}: {key}: no such key{did_you_mean(key, _KEYS)}")
    path, weight = values.get("path"), values.get("weight", 1.0)
    image, captions = values.get("image_column", "none"), values.get("caption_columns", [])
    split = values.get("split_column", SPLIT_COLUMN)
    if not isinstance(path, str) or not path:
        raise UsageError(f"{file}: {where}: path: expected a path, got {path!r}")
    if type(weight) not in (int, float) or not 0 < float(weight) <= MAX_WEIGHT:  # type: ignore[arg-type]
        raise UsageError(
            f"{file}: {where}: weight: {weight!r} is no number above 0 and at most {MAX_WEIGHT:g}"
        )
    for key, name in (("image_column", image), ("split_column", split)):
        if not isinstance(name, str):
            raise UsageError(f"{file}: {where}: {key}: expected a name, got {name!r}")
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(name, str) for name in captions):
        raise UsageError(f"{file}: {where}: caption_columns: expected a list of names, got {captions!r}")
    image, split = (None if name == "none" else name for name in (image, split))
    columns = ColumnNames(image, tuple(captions), split)  # type: ignore[arg-type]
    return MixEntry(_beside(file, path), float(weight), columns)  # type: ignore[arg-type]


def _beside(file: str, path: str) -> str:
    """A path that is relative to the file's folder; addresses and absolute paths stay as they are."""
    prefix = PREFIX if path.startswith(PREFIX) else ""
    places = [
        place if "://" in place or place.startswith("pipe:") else str(Path(file).parent / place)
        for place in path.removeprefix(prefix).split("::")
    ]
    return prefix + "::".join(places)


MIXES = Format(
    have="several of these",
    give="a `mix.toml` of `[[source]]` tables: `path`, `weight`, `image_column`, `caption_columns`, `split_column`",
    accepts=names_mix,
    open=lambda path, columns, opener: open_mix(path, opener),
    parts=lambda path, columns, opener: split_mix(path, opener),
)
