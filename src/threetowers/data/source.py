"""What a source of samples is, and what a format of sources is.

A source is an ordered, finite, indexable collection of images with captions or labels. Opening one reads no
image; every row that cannot be used is listed in `problems`, never dropped in silence.
"""

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, overload, runtime_checkable

import numpy as np

from threetowers.errors import BadSample, DataError, UsageError


@dataclass(frozen=True, slots=True)
class Record:
    """What a source knows about one sample before its image is decoded.

    id: unique and stable inside the source, such as the key in a shard or the path in a table.
    captions: one or more texts for the image; empty in a purely labelled set.
    label: index into the source's `class_names`, or None.
    image_id: equal for samples of the same image in a source that repeats images; empty where `id` identifies it.
    """

    id: str
    captions: tuple[str, ...]
    label: int | None = None
    image_id: str = ""


class Source(Protocol):
    """An ordered collection of samples; must be picklable, since loader workers receive a copy.

    problems: the samples that cannot be used, and defects of those that can. templates: prompts for zero-shot
    classification that come with the data, with `{}` for the class name. fingerprint: changes with the content.
    """

    name: str
    problems: Sequence[BadSample]
    class_names: Sequence[str]
    templates: Sequence[str]
    fingerprint: str

    @property
    def layout(self) -> str:
        """What was recognised, in words for the user."""
        ...

    def __len__(self) -> int: ...

    def record(self, index: int) -> Record:
        """The sample's id, captions and label; no image is read."""
        ...

    def image(self, index: int) -> bytes:
        """The encoded image file of the sample; raises BadSample when it cannot be read."""
        ...

    def image_sizes(self) -> np.ndarray:
        """The size of each encoded image in bytes, int64 [n], known without reading any."""
        ...

    def image_middles(self, indices: np.ndarray) -> np.ndarray:
        """The `middle_key` of some samples' images, uint64, by which `copies.find_copies` tells images apart."""
        ...


@runtime_checkable
class Drawn(Protocol):
    """A source that stores the hashes by which `split` draws, so that millions need not be computed one by one."""

    def split_draws(self, seed: int) -> np.ndarray | None:
        """`hash64("split", seed, id)` of every sample, uint64 [n]; None when it is not stored for this seed."""
        ...


SOURCE_REASONS = (
    "no image", "empty file", "missing file", "unreadable", "no path", "wrong number of fields", "damaged row",
    "damaged json", "no caption", "empty caption", "caption is not UTF-8", "bad label", "no class",
    "member given twice", "unknown image", "id given twice", "unsupported format", "two parts", "captions differ",
    "further image",
)  # fmt: skip
"""All values of `BadSample.reason` that sources use. A sample can still be usable after `caption is not UTF-8`,
`bad label`, `damaged json` and `member given twice`."""

REMARKS = frozenset({"captions differ", "further image"})
"""Reasons that are counted and named, but say nothing against the sample, which is used."""

MAX_CAPTION_CHARS = 2_000
MISSING_CAPTIONS = frozenset({"", "nan", "NaN", "None", "null"})
_SURROGATES = re.compile("[\ud800-\udfff]")


def clean_captions(texts: Iterable[str]) -> tuple[tuple[str, ...], bool]:
    """The captions that are not empty, and whether one of them held bytes that are not UTF-8.

    White space is collapsed, captions are cut at MAX_CAPTION_CHARS, and markers of a missing value (`NaN`) are
    left out. texts: decoded with `surrogateescape`, so that invalid bytes arrive as lone surrogates; they are
    replaced by U+FFFD.
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
    """A text file's content for `clean_captions`: no byte-order mark, invalid bytes as lone surrogates.

    It is in UTF-8, or in UTF-16 where it begins with that mark, as Windows writes it.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


class Texts(Sequence[str]):
    """A list of strings in one buffer, which takes less memory and is shared with forked workers without copying."""

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

    def image_sizes(self) -> np.ndarray:
        return self.source.image_sizes()[np.asarray(self.indices, np.int64)]

    def image_middles(self, indices: np.ndarray) -> np.ndarray:
        return self.source.image_middles(np.asarray(self.indices, np.int64)[indices])


SPLIT_COLUMN = "split"
"""The usual name of the column that says which part a row belongs to."""


class ColumnNames(NamedTuple):
    """The columns of a table that the caller names; None and empty: the format finds them.

    split: the column of each row's part, if the table has it; None: no column is that.
    """

    image: str | None = None
    captions: tuple[str, ...] = ()
    split: str | None = SPLIT_COLUMN


ANY_COLUMNS = ColumnNames()


class Opener(Protocol):
    """Opens the sources that a source consists of, as `open_source` and `splits` do."""

    def open(self, path: str, columns: ColumnNames) -> Source: ...

    def split(self, path: str, columns: ColumnNames) -> tuple[Source, Source, Source]:
        """Training, validation and test part, with the fractions that the caller of `splits` gave."""
        ...


def _no_check(path: str, columns: ColumnNames) -> None: ...


def _no_parts(path: str, columns: ColumnNames, opener: Opener) -> Mapping[str, Source]:
    return {}


@dataclass(frozen=True)
class Format:
    """A format of sources: an entry of `FORMATS` in data/open.py.

    have, give: what a user has and what to give as `--data`, in Markdown: a row of the README's table.
    accepts: whether a path means this format. The first format of the list that accepts a path opens it.
    open: the whole source at a path; raises DataError and UsageError.
    parts: the parts that come with the data, by name (train, val, test); empty when it is one whole.
    takes_columns: whether image and caption columns can be named.
    check: raises what `open` would raise for the columns, by a look at some rows.
    """

    have: str
    give: str
    accepts: Callable[[str], bool]
    open: Callable[[str, ColumnNames, Opener], Source]
    parts: Callable[[str, ColumnNames, Opener], Mapping[str, Source]] = _no_parts
    takes_columns: bool = False
    check: Callable[[str, ColumnNames], None] = _no_check


def check_parts(path: str, parts: Mapping[str, Source]) -> Mapping[str, Source]:
    """The parts themselves; raises DataError when one of them has no usable sample."""
    for label, part in parts.items():
        if not len(part):
            raise DataError(
                f"{path}: no sample of its part {label} can be used. {count_reasons(part.problems)}"
            )
    return parts


def check_problems(parts: Sequence[Source], *, limit: float = 0.01) -> None:
    """Raises DataError when more than `limit` of the samples of all parts together have problems.

    A sample counts once, whatever the number of its problems; REMARKS do not count. The message counts the reasons and
    names ten samples.
    """
    problems = [p for part in parts for p in part.problems if p.reason not in REMARKS]
    bad = {problem.id for problem in problems}
    total = sum(len(part) for part in parts)
    if len(bad) <= limit * total:
        return
    usable = {id for part in parts for index in range(len(part)) if (id := part.record(index).id) in bad}
    total += len(bad) - len(usable)
    if len(bad) > limit * total:
        raise DataError(
            f"{parts[0].name}: {len(bad)} of {total} samples have problems, more than inputs.max_bad_share = "
            f"{limit:g} allows; mend them, leave them out, or raise it. "
            f"{count_reasons(problems)}{list_examples(problems)}"
        )


def count_reasons(problems: Sequence[BadSample]) -> str:
    """The reasons and how often each occurs, for an error message."""
    counts = Counter(problem.reason for problem in problems)
    listed = ", ".join(f"{reason}: {count}" for reason, count in counts.most_common())
    return listed or "There is no image in it."


def list_examples(problems: Sequence[BadSample]) -> str:
    """The first ten problems, one a line, for an error message."""
    return "".join(f"\n  {problem}" for problem in problems[:10])


IMAGE_ENDINGS = (
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "jfif", "jpe", "tif", "tiff", "avif", "heic", "heif",
)  # fmt: skip
"""File name endings of images: lower case, without the dot."""
PICTURE_ENDINGS = (
    *IMAGE_ENDINGS, "jp2", "jxl", "svg", "ico", "psd", "tga",
    "ppm", "pgm", "pbm", "pnm", "cr2", "nef", "arw", "dng",
)  # fmt: skip
"""The endings of images and of files that are pictures, of which some formats are not read."""


def describe(source: Source) -> str:
    """A few lines for the user: what was recognised, the number of samples and problems, and the first samples.

        captions.csv: table captions.csv, images in column `file`, captions in `caption`
        5 samples, 1 problem (missing file: 1)
          captions.csv:3: missing file (b.jpg)
          a.jpg → a red square

    At most three problems and three samples are shown.
    """
    classes = f", {len(source.class_names)} classes" if source.class_names else ""
    problems, *named = (describe_problems(source) or "0 problems").split("\n")
    lines = [f"{source.name}: {source.layout}", f"{len(source)} samples{classes}, {problems}", *named]
    for index in range(min(3, len(source))):
        record = source.record(index)
        texts = list(record.captions[:1])
        if record.label is not None:
            texts.append(source.class_names[record.label] if source.class_names else f"class {record.label}")
        lines.append(f"  {record.id} → {' | '.join(texts)}")
    return "\n".join(map(_printable, lines))


def describe_problems(source: Source) -> str:
    """The number of problems and their reasons, and at most three of them, a line each; empty where there is none."""
    found = source.problems
    if not found:
        return ""
    counts = Counter(problem.reason for problem in found)
    reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.most_common())
    lines = [f"{len(found)} problem{'s' if len(found) > 1 else ''} ({reasons})"]
    lines += [f"  {problem}" for problem in found[:3]]
    if len(found) > 3:
        lines.append(f"  and {len(found) - 3} more")
    return "\n".join(map(_printable, lines))


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in line)


def is_image_name(text: str) -> bool:
    """Whether a text ends like the name of an image file."""
    return text.strip().lower().endswith(_IMAGES)


def is_picture_name(text: str) -> bool:
    """Whether a text ends like the name of a picture, of a format that is read or of another one."""
    return text.strip().lower().endswith(_PICTURES)


def check_holds_no_data(out: Path) -> None:
    """Raises UsageError for a folder with pictures or tables, among which what is written would lie."""
    if not out.is_dir():
        return
    names = sorted(path.name for path in out.iterdir() if path.is_file())
    data = [name for name in names if name.lower().endswith((*_PICTURES, *_TABLES))]
    if data:
        raise UsageError(
            f"--out {out}: this folder holds data ({data[0]}{' and more' if len(data) > 1 else ''}); give another one"
        )


_TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".tar")
_IMAGES = tuple(f".{ending}" for ending in IMAGE_ENDINGS)
_PICTURES = tuple(f".{ending}" for ending in PICTURE_ENDINGS)
