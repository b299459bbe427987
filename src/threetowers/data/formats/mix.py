"""Several sources as one, each with a weight, described by a TOML file.

[[source]]
path = "cc3m/{00000..00331}.tar"   # relative to the file's folder; anything that `open_source` takes
weight = 0.5                       # visits of each sample per epoch; default 1

[[source]]
path = "flickr/captions.csv"
weight = 3
caption_columns = ["caption_0"]    # also image_column, as for a table alone
"""

import hashlib
import math
import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from threetowers.config import did_you_mean, read_toml
from threetowers.data.formats.files import FileSource
from threetowers.data.formats.hf_datasets import PREFIX, DatasetSource
from threetowers.data.open import open_source, splits
from threetowers.data.order import hash64
from threetowers.data.source import Record, Source, Subset
from threetowers.errors import BadSample, DataError, UsageError

MAX_WEIGHT = 1000.0
T = TypeVar("T")
_KEYS = ("path", "weight", "image_column", "caption_columns")


@dataclass(frozen=True)
class Part:
    """One source of a mix, as its file describes it."""

    path: str
    weight: float = 1.0
    image_column: str | None = None
    caption_columns: tuple[str, ...] = ()


@dataclass(eq=False)
class MixedSource:
    """Samples of several sources in their order, some of them repeated; implements Source.

    prefixes: one per part; a sample's id is `prefix/id`, and `prefix/id~2` where it comes the second time.
    Labels are kept when all parts have the same classes.
    """

    name: str
    layout: str
    parts: Sequence[Source]
    prefixes: Sequence[str]
    problems: Sequence[BadSample] = ()
    class_names: Sequence[str] = ()
    templates: Sequence[str] = ()
    fingerprint: str = ""
    _part: "array[int]" = field(default_factory=lambda: array("i"))
    _index: "array[int]" = field(default_factory=lambda: array("q"))
    _visit: "array[int]" = field(default_factory=lambda: array("i"))

    def _sign(self) -> None:
        signed = [(part.fingerprint, prefix) for part, prefix in zip(self.parts, self.prefixes, strict=True)]
        digest = hashlib.sha256(repr((signed, list(self.class_names))).encode("utf-8", "surrogateescape"))
        for column in (self._part, self._index, self._visit):
            digest.update(column.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._index)

    def record(self, index: int) -> Record:
        part, visit = self._part[index], self._visit[index]
        record = self.parts[part].record(self._index[index])
        image_id = f"{self.prefixes[part]}/{record.image_id or record.id}"
        return replace(
            record,
            id=f"{self.prefixes[part]}/{record.id}" + (f"~{visit + 1}" if visit else ""),
            label=record.label if self.class_names else None,
            image_id=image_id,
        )

    def image(self, index: int) -> bytes:
        part = self._part[index]
        try:
            return self.parts[part].image(self._index[index])
        except BadSample as problem:
            raise BadSample(self.record(index).id, problem.reason, problem.detail) from problem

    def _add(self, part: int, index: int, visits: int) -> None:
        for visit in range(visits):
            self._part.append(part)
            self._index.append(index)
            self._visit.append(visit)


def names_mix(path: str) -> bool:
    """Whether a source is a TOML file that lists several."""
    return Path(path).suffix.lower() == ".toml" and Path(path).is_file()


def open_mix(path: str) -> MixedSource:
    """Every sample of every part once; weights count in training alone.

    Raises UsageError for a key or value that cannot be meant, and what `open_source` raises for a part.
    """
    entries = read_mix(path)
    sources = [_opened(open_source, path, number, entry) for number, entry in enumerate(entries, 1)]
    return _mixed(path, "", sources, entries, _prefixes([source.name for source in sources]), None)


def mixed_splits(
    path: str, *, val_fraction: float, test_fraction: float, seed: int
) -> tuple[Source, Source, Source]:
    """Training, validation and test part; each source is split first, then its training samples are repeated.

    An image that another source has in its validation or test part is left out of training, and `layout` counts
    them; it is known by its file, or by its bytes in a Hugging Face dataset. Raises what `open_mix` and `splits` raise.
    """
    entries = read_mix(path)
    shares = {"val_fraction": val_fraction, "test_fraction": test_fraction, "seed": seed}
    parted = [_opened(splits, path, number, entry, **shares) for number, entry in enumerate(entries, 1)]
    held_out = {
        key for _, *others in parted for part in others for i in range(len(part)) if (key := _image(part, i))
    }
    names = [train.name.removesuffix("/train") for train, _, _ in parted]
    folders = [Path(entry.path.removeprefix(PREFIX)).resolve().name for entry in entries]
    prefixes = _prefixes(
        [folder if name == "train" else name for name, folder in zip(names, folders, strict=True)]
    )
    return (
        _mixed(path, "/train", [train for train, _, _ in parted], entries, prefixes, held_out),
        _mixed(path, "/val", [val for _, val, _ in parted], entries, prefixes, None),
        _mixed(path, "/test", [test for _, _, test in parted], entries, prefixes, None),
    )


def _opened(opener: Callable[..., T], file: str, number: int, entry: Part, **options: float) -> T:
    """What the opener makes of a part; its errors say which part of which file they are about."""
    try:
        return opener(
            entry.path, image_column=entry.image_column, caption_columns=entry.caption_columns, **options
        )
    except (DataError, UsageError) as error:
        raise type(error)(f"{file}: source {number}: {error}") from None


def _mixed(
    path: str,
    label: str,
    sources: list[Source],
    entries: list[Part],
    prefixes: list[str],
    held_out: set[str] | None,
) -> MixedSource:
    """The sources end to end; held_out: images that may not be in it, given when weights count."""
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
        parts=sources,
        prefixes=prefixes,
        class_names=classes[0] if same else [],
        templates=sources[0].templates if same else [],
    )
    problems: list[BadSample] = []
    left_out = 0
    for number, (source, entry, prefix) in enumerate(zip(sources, entries, mixed.prefixes, strict=True)):
        problems += [BadSample(f"{prefix}/{p.id}", p.reason, p.detail) for p in source.problems]
        for index in range(len(source)):
            if held_out is None:
                mixed._add(number, index, 1)
            elif _image(source, index) in held_out:
                left_out += 1
            else:
                mixed._add(number, index, _visits(source, index, entry.weight))
    if left_out:
        mixed.layout += f"; {left_out} left out, since another source validates or tests on their images"
    mixed.problems = problems
    mixed._sign()
    return mixed


def _visits(source: Source, index: int, weight: float) -> int:
    """How often a sample comes in an epoch: the weight, rounded up for as many samples as its fraction says."""
    fraction, whole = math.modf(weight)
    if not fraction:
        return int(whole)
    return int(whole) + (hash64("mix", source.record(index).id) / 2**64 < fraction)


def _image(source: Source, index: int) -> str:
    """What tells that two sources hold the same image; empty where only its bytes could."""
    if isinstance(source, Subset):
        return _image(source.source, source.indices[index])
    if isinstance(source, FileSource):
        return os.path.abspath(source.path(index))  # noqa: PTH100 - Path has no form that leaves links alone
    if isinstance(source, DatasetSource):
        return source.record(index).image_id
    return ""


def _prefixes(names: list[str]) -> list[str]:
    """The names, made unique by a number."""
    found: list[str] = []
    for name in names:
        number, unique = 1, name
        while unique in found:
            number += 1
            unique = f"{name}-{number}"
        found.append(unique)
    return found


# The file


def read_mix(path: str) -> list[Part]:
    """The parts that a file names, their paths made absolute or relative to the working folder; raises UsageError."""
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


def _entry(file: str, where: str, values: dict[str, object]) -> Part:
    for key in values:
        if key not in _KEYS:
            raise UsageError(f"{file}: {where}: {key}: no such key{did_you_mean(key, _KEYS)}")
    path, weight = values.get("path"), values.get("weight", 1.0)
    image, captions = values.get("image_column", "none"), values.get("caption_columns", [])
    if not isinstance(path, str) or not path:
        raise UsageError(f"{file}: {where}: path: expected a path, got {path!r}")
    if type(weight) not in (int, float) or not 0 < float(weight) <= MAX_WEIGHT:  # type: ignore[arg-type]
        raise UsageError(
            f"{file}: {where}: weight: {weight!r} is no number above 0 and at most {MAX_WEIGHT:g}"
        )
    if not isinstance(image, str):
        raise UsageError(f"{file}: {where}: image_column: expected a name, got {image!r}")
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(name, str) for name in captions):
        raise UsageError(f"{file}: {where}: caption_columns: expected a list of names, got {captions!r}")
    column = None if image == "none" else image
    return Part(_beside(file, path), float(weight), column, tuple(captions))  # type: ignore[arg-type]


def _beside(file: str, path: str) -> str:
    """The path as seen from the file's folder; addresses and absolute paths stay as they are."""
    prefix = PREFIX if path.startswith(PREFIX) else ""
    places = [
        place if "://" in place or place.startswith("pipe:") else str(Path(file).parent / place)
        for place in path.removeprefix(prefix).split("::")
    ]
    return prefix + "::".join(places)
