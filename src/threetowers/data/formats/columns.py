"""Finds the columns of a table that hold images and captions, by name and by content."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from threetowers.data.cells import cell_texts
from threetowers.data.formats.places import find_file, image_path, is_address
from threetowers.data.parts import part_of
from threetowers.data.source import SPLIT_COLUMN, ColumnNames, is_picture_name
from threetowers.errors import UsageError
from threetowers.settings import did_you_mean

_PATH_NAMES = (
    "image", "image_path", "img_path", "filepath", "file_path", "image_file", "image_name", "image_filename",
    "file_name", "filename", "file", "path", "img",
)  # fmt: skip
_CAPTION_NAMES = (
    "caption",
    "text",
    "sentence",
    "comment",
    "raw",
    "description",
    "title",
    "alt",
    "alt_text",
    "txt",
)
_SPLIT_NAMES = (
    "splits", "subset", "partition", "set", "part", "fold", "phase", "usage", "mode", "stage", "data_split",
    "dataset_split", "split_name", "split_type", "train_test_split", "train_val_test", "split_set",
)  # fmt: skip
NUM_SNIFFED = 100  # rows at the beginning that columns are recognised by
_NUM_PARTS = 16  # cells that a column named `subset` or the like is recognised by
_ENOUGH = 20  # texts from which on it means something that all are the same
_NUMBER = re.compile(r"[\d\s.,:;+\-/%()\[\]eETZ]+")  # dates and lists of numbers too
_HASH = re.compile(r"(?=.*\d)(?:[0-9a-fA-F-]{16,}|[0-9A-Za-z+/=]{22,})")
_CODE = re.compile(r"(?=.*[\d_=])[!-~]{3,}")  # names and keys: no blank, but digits or _


@dataclass
class _Content:
    """What a column's sampled cells hold. kind: of most of them."""

    num: int = 0
    num_different: int = 0
    kind: str = "empty"
    mean_length: float = 0.0

    @property
    def constant(self) -> bool:
        return self.num >= _ENOUGH and self.num_different == 1

    @property
    def category(self) -> bool:
        """Whether few values are repeated, as those of a class are."""
        return self.num >= _ENOUGH and self.num_different < 0.1 * self.num

    @property
    def score(self) -> float:
        """How much there is to learn from: long texts of which many differ."""
        return self.mean_length * self.num_different / self.num if self.kind == "texts" else 0.0

    def __str__(self) -> str:
        if self.constant:
            return "always the same"
        return f"{self.num_different} values" if self.category and self.kind == "texts" else self.kind


class Found(NamedTuple):
    """The columns of a table. split: None where no column is that. note: for the user, what else was there."""

    image: str
    captions: tuple[str, ...]
    split: str | None
    note: str


def find_columns(path: Path, rows: Sequence[Mapping[str, Any]], columns: ColumnNames) -> Found:
    """The columns of a table: those named in `columns`, else those recognised.

    rows: from all over the table. Raises UsageError for a column that is not there or cannot be recognised, or where
    two can be meant alike.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    listed = f"Its columns: {', '.join(names)}"
    split = split_column(path, names, columns, lambda name: [row[name] for row in rows if name in row])
    for column in columns.captions if columns.image is None else (columns.image, *columns.captions):
        if column not in names:
            raise UsageError(f"{path}: there is no column `{column}`{_hint(column, names)}")
    cells = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    paths = {name: [image_path(cell) or cell for cell in cells[name]] for name in names}
    image = columns.image or _path_column(path, paths)
    if image is None:
        raise UsageError(f"{path}: no column holds paths of images. Name it as image_column. {listed}")
    texts = Captions(path, {name: cells[name] for name in names if name not in (image, split)})
    captions = columns.captions or texts.by_name() or texts.by_content()
    if not captions:
        raise UsageError(f"{path}: no column holds captions. Name it as caption_columns. {listed}")
    return Found(image, captions, split, texts.note(captions))


def split_column(
    path: str | Path, names: Sequence[str], columns: ColumnNames, cells: Callable[[str], list[Any]]
) -> str | None:
    """The column that says each row's part; None without one. Raises UsageError for a name that is not there.

    cells: the first cells of a column. One named `subset` or the like says the parts where all of these are parts.
    """
    if columns.split is None:
        return None
    if columns.split in names:
        return columns.split
    if columns.split != SPLIT_COLUMN:
        raise UsageError(f"{path}: there is no column `{columns.split}`{_hint(columns.split, names)}")
    named = next((name for name in names if _plain(name) == SPLIT_COLUMN), None)
    if named is not None:
        return named
    for name in names:
        if _plain(name) in _SPLIT_NAMES and (some := cells(name)[:_NUM_PARTS]) and all(map(part_of, some)):
            return name
    return None


def _hint(column: str, names: Sequence[str]) -> str:
    if "," in column:
        return f". Several columns are separated by spaces: {' '.join(column.split(','))}"
    hint, listed = did_you_mean(column, names), f"Its columns: {', '.join(names)}"
    return f"{hint} {listed}" if "did you mean" in hint else f". {listed}"


@dataclass
class Captions:
    """Chooses the caption columns among those whose cells are given, which come from all over the table."""

    path: str | Path
    cells: Mapping[str, list[Any]]
    content: dict[str, _Content] = field(init=False)

    def __post_init__(self) -> None:
        self.content = {name: _content(cells) for name, cells in self.cells.items()}

    def by_name(self) -> tuple[str, ...]:
        """All columns of a usual name, such as `caption_0` and `caption_1`; empty when none is usual.

        A column whose content contradicts its name gives way to others: one of addresses, numbers or hashes, or of a
        single value. One of codes or of few values gives way to another usual name alone, since tags can be captions.
        """
        families = [family for name in _CAPTION_NAMES if (family := _family(name, self.cells))]

        def some(family: tuple[str, ...], kinds: tuple[str, ...], *, category: bool) -> bool:
            members = [self.content[name] for name in family]
            return any(
                each.kind in kinds and not each.constant and (category or not each.category)
                for each in members
            )

        rich = [family for family in families if some(family, ("texts",), category=False)]
        fitting = [family for family in families if some(family, ("texts", "codes"), category=True)]
        if rich or fitting:
            return (rich or fitting)[0]
        empty = any(self.content[name].kind == "empty" for family in families for name in family)
        return families[0] if families and (empty or not self._best()) else ()

    def by_content(self) -> tuple[str, ...]:
        """The column of the longest texts that differ, as a tuple of one; empty when none has any texts.

        Raises UsageError when another one is about as good.
        """
        best = self._best()
        if len(best) > 1:
            raise UsageError(
                f"{self.path}: the captions can be in `{best[0]}` or in `{best[1]}`, which are alike. Name them as "
                f"caption_columns, for example --inputs.caption-columns {best[0]}"
            )
        if best:
            return (best[0],)
        lengths = {
            name: each.num * each.mean_length for name, each in self.content.items() if each.kind != "empty"
        }
        longest = max(lengths, key=lengths.__getitem__, default=None)
        return () if longest is None or self.content[longest].kind == "values" else (longest,)

    def _best(self) -> list[str]:
        """The best column by content, and those that are nearly as good."""
        scores = {n: each.score for n, each in self.content.items() if each.score and not each.constant}
        most = max(scores.values(), default=0.0)
        return sorted((n for n in scores if scores[n] > most / 2), key=lambda n: -scores[n])

    def note(self, taken: Sequence[str]) -> str:
        """The columns of texts that are not taken, and what they hold: `; not taken: …`; empty when there is none."""
        others = [
            f"`{name}` ({each})"
            for name, each in self.content.items()
            if name not in taken and each.kind not in ("empty", "values")
        ]
        more = f" and {len(others) - 6} more" if len(others) > 6 else ""
        return f"; not taken: {', '.join(others[:6])}{more}" if others else ""


def _content(cells: Sequence[Any]) -> _Content:
    texts = [text for cell in cells for text in cell_texts(cell) if text.strip()]
    if not texts:
        return _Content()
    if not any(isinstance(cell, str | bytes | list | dict) for cell in cells):
        return _Content(len(texts), len(set(texts)), "values")
    kinds = [_kind(text.strip()) for text in texts]
    kind = max(dict.fromkeys(["texts", *kinds]), key=kinds.count)
    return _Content(len(texts), len(set(texts)), kind, sum(map(len, texts)) / len(texts))


def _kind(text: str) -> str:
    if is_address(text):
        return "addresses"
    if is_picture_name(text) or (("/" in text or "\\" in text) and " " not in text):
        return "paths"
    if _NUMBER.fullmatch(text):
        return "numbers"
    if _HASH.fullmatch(text):
        return "hashes"
    return "codes" if _CODE.fullmatch(text) else "texts"


def _path_column(path: Path, cells: Mapping[str, list[Any]]) -> str | None:
    """The column of image paths: one with a usual name whose content does not contradict it, else by content alone.

    Raises UsageError when two columns hold paths alike and no name is usual.
    """
    some = {name: _some(cells[name]) for name in cells}
    found = {name: sum(_is_file(path.parent, cell) for cell in some[name]) for name in cells}
    named = {
        name: sum(
            isinstance(cell, str) and is_picture_name(cell) and not is_address(cell) for cell in some[name]
        )
        for name in cells
    }

    def share(name: str) -> float:
        constant = len(cells[name]) >= _ENOUGH and len(set(map(str, cells[name]))) == 1
        return 0.0 if constant else max(found[name], named[name]) / max(len(some[name]), 1)

    shares = {name: share(name) for name in cells}
    usual = _path_names(cells)
    best = max(shares.values(), default=0.0)
    for name in usual:
        if shares[name] > best / 2:
            return name
    likely = [name for name in cells if shares[name] > max(best / 2, 0.5)]
    if any(found[name] for name in likely):
        likely = [name for name in likely if found[name]]
    if len(likely) > 1:
        raise UsageError(
            f"{path}: the images can be in `{likely[0]}` or in `{likely[1]}`. Name it as image_column, for example "
            f"--inputs.image-column {likely[0]}"
        )
    addresses = [n for n in cells if any(isinstance(cell, str) and is_address(cell) for cell in some[n])]
    return next(iter([*likely, *(name for name in usual if shares[name]), *usual, *addresses]), None)


def _some(cells: list[Any]) -> list[Any]:
    """At most 200 of the cells, at equal distances."""
    return cells[:: max(len(cells) // 200, 1)]


def _path_names(names: Iterable[str]) -> list[str]:
    """Those of the names that are usual for image columns, the most usual first."""
    ranked = sorted((_PATH_NAMES.index(_plain(name)), name) for name in names if _plain(name) in _PATH_NAMES)
    return [name for _, name in ranked]


def usual_image_column(names: Iterable[str]) -> str | None:
    """The column whose name is most usual for images; None when no name is usual."""
    return next(iter(_path_names(names)), None)


def _family(name: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(each for each in names if re.fullmatch(rf"{name}s?(_?\d+)*", _plain(each)))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _is_file(folder: Path, cell: Any) -> bool:
    if not isinstance(cell, str) or not 0 < len(cell.strip()) < 4096 or is_address(cell):
        return False
    return find_file(str(folder), cell.strip()) is not None
