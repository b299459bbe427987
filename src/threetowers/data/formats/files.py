"""Images in files of their own: the source that tables, folders and annotation files are opened as."""

import hashlib
import os
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from threetowers.data.source import Record, Texts
from threetowers.errors import BadSample


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

    def image_key(self, index: int) -> str:
        return os.path.abspath(self.path(index))  # noqa: PTH100 - Path.resolve would follow links

    def add_problem(self, path: str, reason: str, detail: str = "") -> None:
        self._problems.append(BadSample(path_id(path), reason, detail))

    def fill(self, samples: Iterator[tuple[str, int, str, int]]) -> "FileSource":
        """Adds samples, each (path, size in bytes, captions joined by newlines, label or -1), and sets the fingerprint.

        Returns the source itself.
        """
        digest = hashlib.sha256(repr(tuple(self.class_names)).encode())
        for path, size, captions, label in samples:
            digest.update(repr((path_id(path), size, captions, label)).encode())
            self._paths.append(path)
            self._captions.append(captions)
            self._labels.append(label)
        self.fingerprint = digest.hexdigest()
        return self


def path_id(path: str) -> str:
    """The id of a file: its path in NFC, which is the same on every system, without bytes that cannot be printed."""
    return path if path.isascii() else unicodedata.normalize("NFC", path.encode("utf-8", "replace").decode())
