"""Images in files of their own: the source that tables, folders and annotation files are opened as."""

import hashlib
import os
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from threetowers.data.copies import describe_copies, find_copies, middle_key_at, of_equal_size, some_of
from threetowers.data.shards.columns import Column, Columns, write_columns
from threetowers.data.shards.index import index_folder, index_key
from threetowers.data.source import Record, Texts
from threetowers.errors import BadSample, DataError
from threetowers.files import replacing

REMEMBERED_FROM = 5_000
"""Images of equal size; comparing fewer takes less than 0.1 s."""


@dataclass(eq=False)
class FileSource:
    """Images in files below `folder`, in the order in which they were added; implements Source.

    layout: what was recognised, in words for the user. A sample's id is its path relative to the folder, in NFC.
    """

    name: str
    layout: str
    folder: str
    class_names: Sequence[str] = ()
    templates: Sequence[str] = ()
    fingerprint: str = ""
    problems: Sequence[BadSample] = field(init=False)
    _problems: list[BadSample] = field(default_factory=list)
    _paths: Texts = field(default_factory=Texts)
    _captions: Texts = field(default_factory=Texts)
    _labels: "array[int]" = field(default_factory=lambda: array("q"))
    _sizes: "array[int]" = field(default_factory=lambda: array("q"))
    _firsts: dict[int, int] = field(default_factory=dict)
    """By the number of a sample whose image an earlier one has: that sample's."""

    def __post_init__(self) -> None:
        self.problems = self._problems

    def __len__(self) -> int:
        return len(self._paths)

    def record(self, index: int) -> Record:
        captions, label = self._captions[index], self._labels[index]
        return Record(
            path_id(self._paths[index]),
            tuple(captions.split("\n")) if captions else (),
            label if label >= 0 else None,
            path_id(self._paths[self._firsts[index]]) if index in self._firsts else "",
        )

    def path(self, index: int) -> Path:
        """The path of the sample's image."""
        return Path(self.folder, self._paths[index])

    def image(self, index: int) -> bytes:
        path = self.path(index)
        try:
            return path.read_bytes()
        except OSError as error:
            reason = "missing file" if isinstance(error, FileNotFoundError) else "unreadable"
            raise BadSample(path_id(self._paths[index]), reason, f"{path}: {error.strerror}") from error

    def image_sizes(self) -> np.ndarray:
        return np.array(self._sizes, np.int64)

    def image_middles(self, indices: np.ndarray) -> np.ndarray:
        return np.array([_middle_key(self.path(i), self._sizes[i]) for i in indices.tolist()], np.uint64)

    def add_problem(self, path: str, reason: str, detail: str = "") -> None:
        self._problems.append(BadSample(path_id(path), reason, detail))

    def fill(self, samples: Iterator[tuple[str, int, str, int]]) -> "FileSource":
        """Adds samples, each (path, size in bytes, captions joined by newlines, label or -1), and sets the fingerprint.

        Images with equal bytes are looked for, and counted in `layout`. Returns the source itself.
        """
        digest = hashlib.sha256(repr(tuple(self.class_names)).encode())
        for path, size, captions, label in samples:
            digest.update(repr((path_id(path), size, captions, label)).encode())
            self._paths.append(path)
            self._captions.append(captions)
            self._labels.append(label)
            self._sizes.append(size)
        digest.update(self.image_middles(np.array(some_of(len(self)), np.int64)).tobytes())
        self.fingerprint = digest.hexdigest()
        copies, firsts = self._find_copies()
        self._firsts = dict(zip(copies.tolist(), firsts.tolist(), strict=True))
        self.layout += describe_copies(len(copies))
        return self

    def _find_copies(self) -> tuple[np.ndarray, np.ndarray]:
        """What `find_copies` returns, remembered in the cache for as long as no file changes."""
        suspects = of_equal_size(self.image_sizes())
        folder = index_folder() if len(suspects) > REMEMBERED_FROM else None
        if folder is None:
            return find_copies(self.image_sizes(), self.image_middles, self.image)
        stamps = [_stamp(self.path(index)) for index in suspects.tolist()]
        key = index_key("copies", os.path.realpath(self.folder), self.fingerprint, stamps)
        file = folder / f"{key}.safetensors"
        try:
            found = Columns(file, key)
            return found.array("copies").copy(), found.array("firsts").copy()
        except DataError:
            copies, firsts = find_copies(self.image_sizes(), self.image_middles, self.image)
        with replacing(file) as out:
            columns = {"copies": copies, "firsts": firsts}
            write_columns(out, key, {name: Column("I64", len(v), [v]) for name, v in columns.items()})
        return copies, firsts


def _stamp(path: Path) -> int:
    """A file's time of change in ns; 0 when it is gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _middle_key(path: Path, size: int) -> int:
    """The `middle_key` of a file; 0 when it cannot be read."""
    try:
        with path.open("rb", buffering=0) as file:
            return middle_key_at(file.fileno(), 0, size)
    except OSError:
        return 0


def path_id(path: str) -> str:
    """The id of a file: its path in NFC, which is the same on every system, without bytes that cannot be printed."""
    return path if path.isascii() else unicodedata.normalize("NFC", path.encode("utf-8", "replace").decode())
