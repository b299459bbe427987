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
from typing import Protocol, overload, runtime_checkable

import numpy as np

from threetowers.data.order import hash64
from threetowers.errors import BadSample, DataError, UsageError


@dataclass(frozen=True, slots=True)
class Record:
    """What a source knows of one sample before its image is decoded.

    id: unique and stable inside the source: the key in a shard, the path in a table.
    captions: one or more texts for the image; empty in a purely labelled set.
    label: index into the source's `class_names`, or None.
    image_id: what samples of the same image share, when a source repeats images; else the id says it.
    """

    id: str
    captions: tuple[str, ...]
    label: int | None = None
    image_id: str = ""


class Source(Protocol):
    """An ordered collection of samples; must be picklable, since loader workers receive a copy."""

    name: str
    problems: Sequence[BadSample]
    class_names: Sequence[str]
    templates: Sequence[str]
    fingerprint: str

    @property
    def layout(self) -> str:
        """What was recognised, for people."""
        ...

    def __len__(self) -> int: ...

    def record(self, index: int) -> Record:
        """The sample's id, captions and label; no image is read."""
        ...

    def image(self, index: int) -> bytes:
        """The encoded image file of the sample; raises BadSample when it cannot be read."""
        ...


@runtime_checkable
class Drawn(Protocol):
    """A source that stores what `split` draws for its samples, so that millions need not be hashed one by one."""

    def split_draws(self, seed: int) -> np.ndarray | None:
        """`hash64("split", seed, id)` of every sample, uint64 [n]; None when it is not stored for this seed."""
        ...


SOURCE_REASONS = (
    "no image", "empty file", "missing file", "unreadable", "no path", "wrong number of fields", "damaged json",
    "no caption", "empty caption", "caption is not UTF-8", "bad label", "no class", "member given twice",
    "unknown image", "id given twice",
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

    @property
    def layout(self) -> str:
        return self.source.layout

    def __len__(self) -> int:
        return len(self.indices)

    def record(self, index: int) -> Record:
        return self.source.record(self.indices[index])

    def image(self, index: int) -> bytes:
        return self.source.image(self.indices[index])


def split(
    source: Source, *, val_fraction: float, test_fraction: float, seed: int = 0
) -> tuple[Source, Source, Source]:
    """Training, validation and test part, each sample's part drawn by a hash of (seed, id of its image).

    A sample stays in its part when rows are added, removed or reordered; part sizes are therefore near the
    fractions, not exact. Raises UsageError for fractions that leave nothing to train on.
    """
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise UsageError(
            f"inputs.val_fraction = {val_fraction:g} and inputs.test_fraction = {test_fraction:g} must be 0 or more "
            "and sum to less than 1, so that something is left to train on"
        )

    def part(draw: float) -> int:
        return 2 if draw < test_fraction else 1 if draw < test_fraction + val_fraction else 0

    draws = source.split_draws(seed) if isinstance(source, Drawn) else None
    indices = tuple(array("q") for _ in range(3))
    if draws is None:
        for index in range(len(source)):
            record = source.record(index)
            indices[part(hash64("split", seed, record.image_id or record.id) / 2**64)].append(index)
    else:
        for start in range(0, len(draws), 1 << 18):
            shares = draws[start : start + (1 << 18)] / 2.0**64  # rounded as Python rounds
            parts = np.where(shares < test_fraction, 2, np.where(shares < test_fraction + val_fraction, 1, 0))
            for number, chosen in enumerate(indices):
                chosen.frombytes((np.flatnonzero(parts == number) + start).astype(np.int64).tobytes())
    problems: tuple[list[BadSample], ...] = ([], [], [])
    for problem in source.problems:
        problems[part(hash64("split", seed, problem.id) / 2**64)].append(problem)
    train, val, test = (
        Subset(source, indices[i], f"{source.name.removesuffix('/train')}/{label}", problems[i])
        for i, label in enumerate(("train", "val", "test"))
    )
    return train, val, test


def splits(
    path: str, *, val_fraction: float = 0.05, test_fraction: float = 0.05, seed: int = 0,
    image_column: str = "none", caption_columns: tuple[str, ...] = (),
) -> tuple[Source, Source, Source]:  # fmt: skip
    """Training, validation and test part of what a path holds.

    Parts that come with the data are taken as they are: the folders `train/`, `val/` (or `valid/`, `validation/`)
    and `test/`, a Karpathy file's, a saved `DatasetDict`'s; one that is not there, like everything of any other path,
    is split off by `split`. The parts of a mix are split one by one. Raises DataError and UsageError.
    """
    from threetowers.data.mix import mixed_splits, names_mix

    columns = (image_column, caption_columns)
    if names_mix(path):
        _refuse_columns(path, columns)
        return mixed_splits(path, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
    given = _given_parts(path, columns)
    if not given:
        whole = open_source(path, image_column=image_column, caption_columns=caption_columns)
        return split(whole, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
    for label, part in given.items():
        if not len(part):
            raise DataError(f"{path}: no sample of its part {label} can be used. {_counts(part.problems)}")
    if "train" not in given:
        raise DataError(f"{path}: it has the parts {', '.join(given)}, but none to train on")
    if len(given) == 3:
        train, val, test = given["train"], given["val"], given["test"]
    else:
        train, val, test = split(
            given["train"],
            val_fraction=0.0 if "val" in given else val_fraction,
            test_fraction=0.0 if "test" in given else test_fraction,
            seed=seed,
        )
    parts = train, given.get("val", val), given.get("test", test)
    for part in parts:
        if list(part.class_names) != list(train.class_names):
            raise DataError(
                f"{path}: {part.name} has other classes than {train.name} "
                f"({len(part.class_names)} and {len(train.class_names)}); give every part the same class folders"
            )
    return parts


def _given_parts(path: str, columns: tuple[str, tuple[str, ...]]) -> dict[str, Source]:
    """The parts (train, val, test) that come with the data, by name; empty when it is one whole."""
    from threetowers.data.annotations import names_annotations, open_parts
    from threetowers.data.hf_datasets import names_dataset, open_dataset_parts

    place = Path(path)
    if names_dataset(path):
        return dict(open_dataset_parts(path, *columns))
    if names_annotations(place):
        _refuse_columns(path, columns)
        return dict(open_parts(place))
    if not _has_split_folders(place):
        return {}
    val = next((name for name in _VAL_FOLDERS if (place / name).is_dir()), "val")
    folders = {"train": place / "train", "val": place / val, "test": place / "test"}
    return {
        label: open_source(str(folder), image_column=columns[0], caption_columns=columns[1])
        for label, folder in folders.items()
        if folder.is_dir()
    }


_VAL_FOLDERS = ("val", "valid", "validation")


def _has_split_folders(folder: Path) -> bool:
    if not (folder / "train").is_dir() or any(folder.glob("*.tar")):
        return False
    others = {entry.name for entry in folder.iterdir() if entry.is_dir()} - {"train"}
    return not others or not others.isdisjoint((*_VAL_FOLDERS, "test"))


def open_source(path: str, *, image_column: str = "none", caption_columns: tuple[str, ...] = ()) -> Source:
    """The source that a path means: tar shards, a table or annotation file, a folder of images, or a mix of these.

        open_source("cc3m/{00000..00331}.tar")     # shards; also a folder of them, one, or several joined by ::
        open_source("flickr/captions.csv")         # csv, tsv, jsonl or parquet
        open_source("photos")                      # images with .txt beside them, or one subfolder per class
        open_source("captions_train2017.json")     # COCO or Karpathy JSON; also Flickr's token file
        open_source("hfds:saved")                  # what Hugging Face `datasets` wrote with save_to_disk
        open_source("mix.toml")                    # several of these, see `mix`

    image_column, caption_columns: for tables; detected when `none` and empty.
    Raises DataError when nothing is there or nothing in it can be used, UsageError for a column that is not there.
    """
    from threetowers.data.annotations import names_annotations, open_annotations
    from threetowers.data.hf_datasets import names_dataset, open_dataset
    from threetowers.data.mix import names_mix, open_mix
    from threetowers.data.rows import TABLE_ENDINGS
    from threetowers.data.shards import names_shards, open_shards
    from threetowers.data.tables import open_folder, open_table

    place = Path(path)
    columns = (image_column, caption_columns)
    source: Source
    if names_shards(path):
        source = _without_columns(path, columns, open_shards(path))
    elif names_dataset(path):
        source = open_dataset(path, *columns)
    elif names_mix(path):
        source = _without_columns(path, columns, open_mix(path))
    elif names_annotations(place):
        source = _without_columns(path, columns, open_annotations(place))
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
            f"{path}: no sample in it can be used ({source.layout}). "
            f"{_counts(source.problems)}{_examples(source.problems)}"
        )
    return source


def _without_columns(path: str, columns: tuple[str, tuple[str, ...]], source: Source) -> Source:
    _refuse_columns(path, columns)
    return source


def _refuse_columns(path: str, columns: tuple[str, tuple[str, ...]]) -> None:
    if columns != ("none", ()):
        raise UsageError(
            f"{path} is no table, so image_column and caption_columns mean nothing; leave them out"
        )


def check_problems(source: Source, *, limit: float = 0.01) -> None:
    """Raises DataError that counts the reasons and names ten examples when more than `limit` of the rows are bad."""
    total = len(source) + len(source.problems)
    if total and len(source.problems) > limit * total:
        raise DataError(
            f"{source.name}: {len(source.problems)} of {total} samples have problems, more than inputs.max_bad_share = "
            f"{limit:g} allows; mend them, leave them out, or raise it. "
            f"{_counts(source.problems)}{_examples(source.problems)}"
        )


def _counts(problems: Sequence[BadSample]) -> str:
    counts = Counter(problem.reason for problem in problems)
    listed = ", ".join(f"{reason}: {count}" for reason, count in counts.most_common())
    return listed or "There is no image in it."


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
