"""Parts that come with the data: their names, and the whole that they are parts of."""

import bisect
import hashlib
import itertools
import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from threetowers.data.copies import describe_copies, equal_images, image_ids_of, middles_of
from threetowers.data.source import Drawn, Record, Source, Subset
from threetowers.errors import BadSample, DataError

PART_NAMES = {
    "train": ("train", "training", "restval"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""The parts, and the names that are usual for each in any case."""


KNOWN_PARTS = ", ".join(itertools.chain.from_iterable(PART_NAMES.values()))
"""All names of parts, for error messages."""


_PIECE = re.compile(r"-\d+-of-(\d+)\b")


def part_of(name: Any) -> str | None:
    """The part that a name means: train, val or test; None for any other name."""
    plain = str(name).strip().lower()
    return next((part for part, names in PART_NAMES.items() if plain in names), None)


def name_part(name: str) -> str | None:
    """The part that a word in a name says, as in `cc3m-train-0000` and `val2017/00000`; None for none or several."""
    parts = {part_of(word) for word in re.split(r"[^A-Za-z]+", name)} - {None}
    return parts.pop() if len(parts) == 1 else None


def missing_pieces(names: Sequence[str]) -> str:
    """Which files are not there of sets whose names count them, `train-00000-of-00002`; empty when all are."""
    pieces = [match for name in names if (match := _PIECE.search(name))]
    sets = Counter((name.string[: name.start()], int(name[1])) for name in pieces)
    left = [f"{found} of the {num} files {start}-*" for (start, num), found in sets.items() if found < num]
    return f"; only {', '.join(left[:4])} are there" if left else ""


def check_known(path: str, column: str | None, unknown: Mapping[str, int]) -> None:
    """Raises DataError when rows have a value in their split column that names no part; counts them by value."""
    if unknown:
        raise DataError(
            f"{path}: {sum(unknown.values())} rows have a `{column}` that is none of {KNOWN_PARTS}: for example "
            f"{', '.join(map(repr, list(unknown)[:3]))}. Correct them, or leave the column out of account with "
            "--inputs.split-column none"
        )


def subsets(source: Source, parts: Sequence[str], problem_parts: Sequence[str]) -> dict[str, Source]:
    """The source's parts; `parts` and `problem_parts` have the part of each sample and of each problem."""
    indices: dict[str, array[int]] = {}
    for index, part in enumerate(parts):
        indices.setdefault(part, array("q")).append(index)
    return {
        part: Subset(
            source, indices[part], f"{source.name}/{part}",
            [problem for problem, its in zip(source.problems, problem_parts, strict=True) if its == part],
        )
        for part in PART_NAMES if part in indices
    }  # fmt: skip


@dataclass(eq=False)
class JoinedSource:
    """Several sources one after the other; implements Source. A sample's id is `label/id`."""

    name: str
    sources: Mapping[str, Source]
    note: str = ""
    """For the user, at the end of the layout."""

    def __post_init__(self) -> None:
        first, *others = self.sources.values()
        if any(list(other.class_names) != list(first.class_names) for other in others):
            raise DataError(
                f"{self.name}: its parts {', '.join(self.sources)} have other classes; name one of them"
            )
        self.class_names, self.templates = first.class_names, first.templates
        every = list(self.sources.values())
        self._image_ids = image_ids_of(equal_images(every), every, list(self.sources))
        repeated = describe_copies(len(self._image_ids))
        self.layout = f"parts {', '.join(self.sources)}; {first.layout}{repeated}{self.note}"
        self.problems: Sequence[BadSample] = [
            BadSample(f"{label}/{problem.id}", problem.reason, problem.detail)
            for label, source in self.sources.items()
            for problem in source.problems
        ]
        prints = [(label, source.fingerprint) for label, source in self.sources.items()]
        self.fingerprint = hashlib.sha256(repr(prints).encode()).hexdigest()
        self._labels = list(self.sources)
        self._starts = [0, *itertools.accumulate(map(len, self.sources.values()))]

    def __len__(self) -> int:
        return self._starts[-1]

    def _place(self, index: int) -> tuple[str, int]:
        index = range(len(self))[index]
        number = bisect.bisect_right(self._starts, index) - 1
        return self._labels[number], index - self._starts[number]

    def start(self, label: str) -> int:
        """The index of a source's first sample."""
        return self._starts[self._labels.index(label)]

    def record(self, index: int) -> Record:
        label, own = self._place(index)
        record = self.sources[label].record(own)
        image_id = (
            self._image_ids.get((self._labels.index(label), own)) or f"{label}/{record.image_id or record.id}"
        )
        return replace(record, id=f"{label}/{record.id}", image_id=image_id)

    def image(self, index: int) -> bytes:
        label, own = self._place(index)
        try:
            return self.sources[label].image(own)
        except BadSample as problem:
            raise BadSample(f"{label}/{problem.id}", problem.reason, problem.detail) from problem

    def image_sizes(self) -> np.ndarray:
        return np.concatenate([source.image_sizes() for source in self.sources.values()])

    def image_middles(self, indices: np.ndarray) -> np.ndarray:
        starts = np.array(self._starts)
        numbers = starts.searchsorted(indices, "right") - 1
        return middles_of(list(self.sources.values()), numbers, indices - starts[numbers])


class Part(Subset):
    """A source that is a part of a joined one: all is as in the source itself, and a store of the whole serves it."""

    def __init__(self, name: str, sources: Mapping[str, Source], label: str, note: str) -> None:
        self.whole_name, self.sources, self.label, self.note = name, sources, label, note
        self.own = sources[label]
        self.name, self.problems, self.fingerprint = self.own.name, self.own.problems, self.own.fingerprint
        self.class_names, self.templates = self.own.class_names, self.own.templates

    @cached_property
    def source(self) -> Source:  # type: ignore[override]
        return JoinedSource(self.whole_name, self.sources, self.note)

    @cached_property
    def indices(self) -> "array[int]":  # type: ignore[override]
        assert isinstance(self.source, JoinedSource)
        start = self.source.start(self.label)
        return array("q", range(start, start + len(self.own)))

    @property
    def layout(self) -> str:
        return self.own.layout + self.note

    def __len__(self) -> int:
        return len(self.own)

    def record(self, index: int) -> Record:
        return self.own.record(index)

    def image(self, index: int) -> bytes:
        return self.own.image(index)

    def image_sizes(self) -> np.ndarray:
        return self.own.image_sizes()

    def image_middles(self, indices: np.ndarray) -> np.ndarray:
        return self.own.image_middles(indices)

    def split_draws(self, seed: int) -> np.ndarray | None:
        return self.own.split_draws(seed) if isinstance(self.own, Drawn) else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("source", "indices")}


def parts_of(name: str, sources: Mapping[str, Source], note: str = "") -> dict[str, Source]:
    """The sources as parts of what `JoinedSource` makes of them; the note is for the user."""
    return {label: Part(name, sources, label, note) for label in sources}
