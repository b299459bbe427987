"""What a source of samples is, and which one a path means.

A source is an ordered, finite, indexable collection of images with captions or labels. Opening one reads no
image; every row that cannot be used is listed in `problems`, never dropped in silence.
"""

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, overload, runtime_checkable

import numpy as np

from threetowers.errors import BadSample, DataError


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


IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
"""Endings taken for images: lower case, without the dot."""


def describe(source: Source) -> str:
    """A few lines for people: what was recognised, how many samples, the first three, and the problems counted.

    captions.csv: table captions.csv, images in column `file`, captions in `caption`
    5 samples, 1 problem (missing file: 1)
      a.jpg → a red square
    """
    counts = Counter(problem.reason for problem in source.problems)
    reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.most_common())
    classes = f", {len(source.class_names)} classes" if source.class_names else ""
    lines = [
        f"{source.name}: {source.layout}",
        f"{len(source)} samples{classes}, {len(source.problems)} problems"
        + (f" ({reasons})" if reasons else ""),
    ]
    for index in range(min(3, len(source))):
        record = source.record(index)
        texts = list(record.captions[:1])
        if record.label is not None:
            texts.append(source.class_names[record.label] if source.class_names else f"class {record.label}")
        lines.append(f"  {record.id} → {' | '.join(texts)}")
    return "\n".join("".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines)


def is_image_name(text: str) -> bool:
    """Whether a text ends as the name of an image file does."""
    return text.strip().lower().endswith(tuple(f".{ending}" for ending in IMAGE_ENDINGS))
