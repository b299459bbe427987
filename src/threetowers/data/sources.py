"""What a source of samples is, and which one a path means.

A source is an ordered, finite, indexable collection of images with captions or labels. Opening one reads no
image; every row that cannot be used is listed in `problems`, never dropped in silence.
"""

import difflib
import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, overload

from threetowers.data.order import hash64
from threetowers.errors import BadSample, DataError, UsageError


@dataclass(frozen=True, slots=True)
class Record:
    """What a source knows of one sample before its image is decoded.

    id: unique and stable inside the source: the key in a shard, the path in a table.
    captions: one or more texts for the image; empty in a purely labelled set.
    label: index into the source's `class_names`, or None.
    """

    id: str
    captions: tuple[str, ...]
    label: int | None = None


class Source(Protocol):
    """An ordered collection of samples; must be picklable, since loader workers receive a copy."""

    name: str
    problems: Sequence[BadSample]
    class_names: Sequence[str]
    templates: Sequence[str]
    fingerprint: str

    def __len__(self) -> int: ...

    def record(self, index: int) -> Record:
        """The sample's id, captions and label; no image is read."""
        ...

    def image(self, index: int) -> bytes:
        """The encoded image file of the sample; raises BadSample when it cannot be read."""
        ...


SOURCE_REASONS = (
    "no image", "empty file", "missing file", "unreadable", "no path", "wrong number of fields", "damaged json",
    "no caption", "empty caption", "caption is not UTF-8", "bad label", "no class", "member given twice",
)  # fmt: skip
"""Every reason that a source's problems and its `image` give; `caption is not UTF-8`, `bad label`, `damaged json`
and `member given twice` can leave the sample usable."""

MAX_CAPTION_CHARS = 2_000
MISSING_CAPTIONS = frozenset({"", "nan", "NaN", "None", "null"})
_SURROGATES = re.compile("[\ud800-\udfff]")


def clean_captions(texts: Iterable[str]) -> tuple[tuple[str, ...], bool]:
    """The captions that say something, and whether one of them held bytes that are not UTF-8.

    White space is collapsed, length is cut at MAX_CAPTION_CHARS, literal markers of a missing value are left out.
    texts: decoded with `surrogateescape`, so that stray bytes arrive as lone surrogates; they become U+FFFD.
    """
    captions, damaged = [], False
    for text in texts:
        caption = " ".join(text.split())[:MAX_CAPTION_CHARS].rstrip()
        if not caption.isascii() and _SURROGATES.search(caption):
            caption, damaged = _SURROGATES.sub("\ufffd", caption), True
        if caption not in MISSING_CAPTIONS:
            captions.append(caption)
    return tuple(captions), damaged


def decode_text(data: bytes) -> str:
    """A text file's content as `clean_captions` takes it: byte-order mark dropped, stray bytes as surrogates."""
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


class Texts(Sequence[str]):
    """Strings in one buffer: a fraction of a list's memory, and forked workers share it without copying."""

    __slots__ = ("_data", "_ends")

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._data, self._ends = bytearray(), array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        self._data += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self._data[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")


@dataclass(eq=False)
class Subset:
    """Some samples of a source, in the order of `indices`; itself a source."""

    source: Source
    indices: "array[int]"
    name: str
    problems: Sequence[BadSample] = ()

    def __post_init__(self) -> None:
        self.class_names, self.templates = self.source.class_names, self.source.templates
        digest = hashlib.sha256(self.source.fingerprint.encode() + self.indices.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.indices)

    def record(self, index: int) -> Record:
        return self.source.record(self.indices[index])

    def image(self, index: int) -> bytes:
        return self.source.image(self.indices[index])


def split(
    source: Source, *, val_fraction: float, test_fraction: float, seed: int = 0
) -> tuple[Source, Source, Source]:
    """Training, validation and test part, each sample's part drawn by a hash of (seed, id).

    A sample stays in its part when rows are added, removed or reordered; part sizes are therefore near the
    fractions, not exact. Raises UsageError for fractions that leave nothing to train on.
    """
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise UsageError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} must be 0 or more and sum to less than 1"
        )

    def part(id: str) -> int:
        draw = hash64("split", seed, id) / 2**64
        return 2 if draw < test_fraction else 1 if draw < test_fraction + val_fraction else 0

    indices = tuple(array("q") for _ in range(3))
    for index in range(len(source)):
        indices[part(source.record(index).id)].append(index)
    problems: tuple[list[BadSample], ...] = ([], [], [])
    for problem in source.problems:
        problems[part(problem.id)].append(problem)
    train, val, test = (
        Subset(source, indices[i], f"{source.name}/{label}", problems[i])
        for i, label in enumerate(("train", "val", "test"))
    )
    return train, val, test


def splits(
    path: str, *, val_fraction: float = 0.05, test_fraction: float = 0.05, seed: int = 0,
    image_column: str = "none", caption_columns: tuple[str, ...] = (),
) -> tuple[Source, Source, Source]:  # fmt: skip
    """Training, validation and test part of what a path holds.

    A folder with `train/` takes `val/` (or `valid/`, `validation/`) and `test/` beside it as they are; a part that
    is not there, like everything of any other path, is split off by `split`. Raises DataError and UsageError.
    """

    def opened(part: Path) -> Source:
        return open_source(str(part), image_column=image_column, caption_columns=caption_columns)

    folder = Path(path)
    if not _has_split_folders(folder):
        whole = open_source(path, image_column=image_column, caption_columns=caption_columns)
        return split(whole, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
    val = next((folder / name for name in _VAL_FOLDERS if (folder / name).is_dir()), None)
    test = folder / "test" if (folder / "test").is_dir() else None
    train, val_part, test_part = split(
        opened(folder / "train"),
        val_fraction=0.0 if val else val_fraction,
        test_fraction=0.0 if test else test_fraction,
        seed=seed,
    )
    parts = train, opened(val) if val else val_part, opened(test) if test else test_part
    for part in parts:
        if list(part.class_names) != list(train.class_names):
            raise DataError(
                f"{path}: {part.name} has other classes than {train.name} "
                f"({len(part.class_names)} and {len(train.class_names)}); give every part the same class folders"
            )
    return parts


_VAL_FOLDERS = ("val", "valid", "validation")


def _has_split_folders(folder: Path) -> bool:
    if not (folder / "train").is_dir() or any(folder.glob("*.tar")):
        return False
    others = {entry.name for entry in folder.iterdir() if entry.is_dir()} - {"train"}
    return not others or not others.isdisjoint((*_VAL_FOLDERS, "test"))


def open_source(path: str, *, image_column: str = "none", caption_columns: tuple[str, ...] = ()) -> Source:
    """The source that a path means: tar shards, a table with an image column, or a folder of images.

        open_source("cc3m/{00000..00331}.tar")     # shards; also a folder of them, one, or several joined by ::
        open_source("flickr/captions.csv")         # csv, tsv, jsonl or parquet
        open_source("photos")                      # images with .txt beside them, or one subfolder per class

    image_column, caption_columns: for tables; detected when `none` and empty.
    Raises DataError when nothing is there or nothing in it can be used, UsageError for a column that is not there.
    """
    from threetowers.data.rows import TABLE_ENDINGS
    from threetowers.data.shards import names_shards, open_shards
    from threetowers.data.tables import open_folder, open_table

    place = Path(path)
    columns = (image_column, caption_columns)
    source: Source
    if names_shards(path):
        source = _without_columns(path, columns, open_shards(path))
    elif place.is_dir():
        if _has_split_folders(place):
            raise DataError(f"{path} holds separate parts; name one of them, for example {place / 'train'}")
        tables = [place / f"metadata{ending}" for ending in TABLE_ENDINGS]
        table = next((table for table in tables if table.is_file()), None)
        source = open_table(table, *columns) if table else _without_columns(path, columns, open_folder(place))
    elif place.is_file():
        source = open_table(place, *columns)
    else:
        raise DataError(f"{path}: there is no such file or folder{_siblings(place)}")
    if not len(source):
        raise DataError(
            f"{path}: no sample in it can be used. {_counts(source.problems)}{_examples(source.problems)}"
        )
    return source


def _without_columns(path: str, columns: tuple[str, tuple[str, ...]], source: Source) -> Source:
    if columns != ("none", ()):
        raise UsageError(
            f"{path} is no table, so image_column and caption_columns mean nothing; leave them out"
        )
    return source


def check_problems(source: Source, *, limit: float = 0.01) -> None:
    """Raises DataError that counts the reasons and names ten examples when more than `limit` of the rows are bad."""
    total = len(source) + len(source.problems)
    if total and len(source.problems) > limit * total:
        raise DataError(
            f"{source.name}: {len(source.problems)} of {total} samples have problems, more than the {limit:.1%} "
            f"that is let pass. {_counts(source.problems)}{_examples(source.problems)}"
        )


def _counts(problems: Sequence[BadSample]) -> str:
    counts = Counter(problem.reason for problem in problems)
    return ", ".join(f"{reason}: {count}" for reason, count in counts.most_common()) or "It is empty."


def _examples(problems: Sequence[BadSample]) -> str:
    return "".join(f"\n  {problem}" for problem in problems[:10])


def _siblings(place: Path) -> str:
    """What a mistyped path may have meant: the nearest name in its folder, or the folder that is missing."""
    folder = place.parent
    if not folder.is_dir():
        return f"; the folder {folder} does not exist either"
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(place.name, names, n=1)
    if near:
        return f"; did you mean {folder / near[0]}?"
    return f"; {folder} holds {', '.join(names[:8]) or 'nothing'}{', …' if len(names) > 8 else ''}"
