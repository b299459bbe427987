"""Folders that Hugging Face `datasets` wrote with `save_to_disk`. Nothing is fetched and no image is decoded.

Rows with equal image bytes become one sample with several captions, whose id is a digest of those bytes. Published
sets often have one row per caption, and splitting them by row would put the same image into training and test.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from threetowers.data.cells import cell_texts
from threetowers.data.copies import describe_copies, middle_key
from threetowers.data.formats.columns import NUM_SNIFFED, split_column
from threetowers.data.formats.hf_columns import find_dataset_columns
from threetowers.data.parts import PART_NAMES, JoinedSource, check_known, part_of, parts_of, subsets
from threetowers.data.source import ColumnNames, Format, Record, Source, Texts, check_parts, clean_captions
from threetowers.errors import BadSample, DataError, UsageError

PREFIX = "hfds:"
_EDGE = 4096  # bytes from both ends and the middle of an image that its id is made from at first


def names_dataset(path: str) -> bool:
    """Whether a path means a saved dataset: it begins with `hfds:`, or is a folder with the files of one."""
    place = Path(path.removeprefix(PREFIX))
    saved = (place / "state.json").is_file() and (place / "dataset_info.json").is_file()
    return path.startswith(PREFIX) or saved or (place / "dataset_dict.json").is_file()


@dataclass(eq=False)
class DatasetSource:
    """The rows of a saved dataset, equal images merged; implements Source. Made by `open_dataset`."""

    name: str
    layout: str
    folder: str
    image_column: str
    rows: Any
    """A `datasets.Dataset` of the image column alone, undecoded; memory-mapped, so its pickle is a path."""
    class_names: Sequence[str] = ()
    templates: Sequence[str] = ()
    fingerprint: str = ""
    problems: Sequence[BadSample] = ()
    _ids: Texts = field(default_factory=Texts)
    _captions: Texts = field(default_factory=Texts)
    _labels: "array[int]" = field(default_factory=lambda: array("q"))
    _rows: "array[int]" = field(default_factory=lambda: array("q"))
    _sizes: "array[int]" = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self._ids)

    def record(self, index: int) -> Record:
        id, captions, label = self._ids[index], self._captions[index], self._labels[index]
        return Record(
            id,
            tuple(captions.split("\n")) if captions else (),
            label if label >= 0 else None,
            id.partition("~")[0],
        )

    def image(self, index: int) -> bytes:
        id = self._ids[index]
        try:
            cell = self.rows[self._rows[index]][self.image_column]
            cell = cell if isinstance(cell, dict) else {"bytes": cell}
            return (
                bytes(cell["bytes"]) if cell["bytes"] is not None else self._file(cell["path"]).read_bytes()
            )
        except OSError as error:
            reason = "missing file" if isinstance(error, FileNotFoundError) else "unreadable"
            raise BadSample(id, reason, str(error)) from error

    def image_sizes(self) -> np.ndarray:
        return np.array(self._sizes, np.int64)

    def image_middles(self, indices: np.ndarray) -> np.ndarray:
        return np.array([middle_key(self.image(index)) for index in indices.tolist()], np.uint64)

    def _file(self, path: str) -> Path:
        return Path(self.folder, path)


def open_dataset(path: str, columns: ColumnNames) -> Source:
    """The samples of a folder that `Dataset.save_to_disk` wrote; those of a `DatasetDict` one part after the other.

    The image column is the one of type Image; captions are found by name as in tables. Without captions a ClassLabel
    column gives labels. Raises UsageError for a name on the hub or a column that is not there, DataError when the
    folder cannot be read.
    """
    place = _place(path)
    names = _part_folders(place)
    if len(names) > 1:
        return JoinedSource(place.resolve().name, {name: _open(place / name, columns)[0] for name in names})
    return _open(place.joinpath(*names), columns)[0]


def open_dataset_parts(path: str, columns: ColumnNames) -> dict[str, Source]:
    """The parts (train, val, test) of a saved `DatasetDict`, or those that a column says; empty without them.

    Raises DataError for parts that are none of these, and like `open_dataset`.
    """
    place = _place(path)
    folders = _part_folders(place)
    if len(folders) < 2:
        place = place.joinpath(*folders)
        rows = _load(place)
        if _split_column(rows, place, columns) is None:
            return {}
        source, parts = dataset_source(rows, place, columns, folder=place, name=_name(place.resolve()))
        return parts.subsets(source, str(place))
    present = {part: [name for name in folders if part_of(name) == part] for part in PART_NAMES}
    extra = [name for name in folders if part_of(name) is None]
    if extra or not present["train"] or any(len(names) > 1 for names in present.values()):
        raise DataError(
            f"{path}: its parts are {', '.join(folders)}; train, validation and test are known. "
            f"Name one of them, for example {PREFIX}{place / folders[0]}, or save it with those alone"
        )
    sources = {part: _open(place / names[0], columns)[0] for part, names in present.items() if names}
    return parts_of(place.resolve().name, sources)


def _open(place: Path, columns: ColumnNames) -> "tuple[DatasetSource, RowParts]":
    return dataset_source(_load(place), place, columns, folder=place, name=_name(place.resolve()))


@dataclass
class RowParts:
    """The part that each row of a dataset belongs to, and those of the samples and problems that it became.

    column: that says so; None where the rows' files do, or nothing does.
    """

    column: str | None = None
    of_rows: Sequence[str | None] = ()
    unknown: Counter[str] = field(default_factory=Counter)
    samples: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def of(self, row: int) -> str:
        return (self.of_rows[row] or "train") if self.of_rows else "train"

    def subsets(self, source: Source, path: str) -> dict[str, Source]:
        check_known(path, self.column, self.unknown)
        return subsets(source, self.samples, self.problems)


def _split_column(rows: Any, place: Path, columns: ColumnNames) -> str | None:
    return split_column(place, list(rows.features), columns, lambda name: _values(rows, name, NUM_SNIFFED))


def _values(rows: Any, column: str, num: int) -> list[str]:
    """The first values of a column as texts, those of a ClassLabel by name."""
    cells = rows.select_columns([column])[:num].column(column).to_pylist()
    names = getattr(rows.features[column], "names", None)
    return [
        names[cell] if names and cell is not None and 0 <= cell < len(names) else str(cell) for cell in cells
    ]


def _parts_by_column(rows: Any, column: str | None) -> RowParts:
    if column is None:
        return RowParts()
    values = _values(rows, column, rows.num_rows)
    parts = {value: part_of(value) for value in dict.fromkeys(values)}
    unknown = Counter(value for value in values if parts[value] is None)
    return RowParts(column, [parts[value] for value in values], unknown)


def dataset_source(
    rows: Any, place: Path, columns: ColumnNames, *, folder: Path, name: str, parts: RowParts | None = None
) -> tuple[DatasetSource, RowParts]:
    """The samples of a `datasets.Dataset` in arrow format, and their parts.

    place: what messages name. folder: that image paths are relative to. parts: of the rows, where their files say
    them; else a column can. Raises UsageError for a column that is not there.
    """
    split = None if parts else _split_column(rows, place, columns)
    parts = parts or _parts_by_column(rows, split)
    image, captions, label, note = find_dataset_columns(place, rows, columns, split)
    named = (
        f"captions in {', '.join(f'`{name}`' for name in captions)}" if captions else f"labels in `{label}`"
    )
    said = f"; its column `{split}` says each row's part" if split else ""
    source = DatasetSource(
        name=name,
        layout=f"Hugging Face dataset of {rows.num_rows} rows, images in column `{image}`, {named}{said}{note}",
        folder=str(folder),
        image_column=image,
        rows=rows.select_columns([image]).with_format(None),
        class_names=[] if captions else list(rows.features[label].names),
    )
    _fill(source, rows, captions, label, parts)
    return source, parts


def _place(path: str) -> Path:
    place = Path(path.removeprefix(PREFIX))
    if place.is_dir() and names_dataset(str(place)):
        return place
    what = "is no folder that `save_to_disk` wrote" if place.is_dir() else "there is no such folder"
    raise UsageError(
        f"{path}: {what}, and nothing is fetched from the hub. Save it first: "
        f"python -c \"from datasets import load_dataset; load_dataset('{place}').save_to_disk('DIR')\", "
        f"then give {PREFIX}DIR"
    )


def _name(place: Path) -> str:
    parted = (place.parent / "dataset_dict.json").is_file()
    return f"{place.parent.name}/{place.name}" if parted else place.name


def _part_folders(place: Path) -> list[str]:
    file = place / "dataset_dict.json"
    if not file.is_file():
        return []
    try:
        names = list(json.loads(file.read_bytes())["splits"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{file} is damaged; save the dataset again") from error
    missing = [name for name in names if not isinstance(name, str) or not (place / name).is_dir()]
    if missing or not names:
        raise DataError(f"{place}: its parts {missing} are not there; save the dataset again")
    return names


def _load(place: Path) -> Any:
    """The dataset with its image columns undecoded."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{place}: reading it needs datasets; pip install 'threetowers[datasets]'"
        ) from error
    try:
        rows = datasets.load_from_disk(str(place))
        for name, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        return rows.with_format("arrow")
    except Exception as error:  # damaged metadata and arrow files raise nearly everything
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{place}: it is no saved dataset, or a damaged one: {reason}. Save it again"
        ) from error


def _fill(source: DatasetSource, rows: Any, captions: tuple[str, ...], label: str, parts: RowParts) -> None:
    """Adds every row, merges captioned rows of equal images, and sets the fingerprint and the problems."""
    problems: list[BadSample] = []
    seen: dict[str, int] = {}  # id → number of its sample
    merged: list[list[str]] = []
    digest = hashlib.sha256(repr(tuple(source.class_names)).encode())
    for row, cell, texts, number in _cells(source, rows, captions, label):
        parts.problems += [parts.of(row - 1)] * (len(problems) - len(parts.problems))
        where = f"{source.name}:{row}"
        if cell is None or not len(cell):
            problems.append(BadSample(where, "no image" if cell is None else "empty file"))
            continue
        cleaned, damaged = clean_captions(texts)
        if damaged:
            problems.append(BadSample(where, "caption is not UTF-8"))
        if captions and not cleaned:
            problems.append(BadSample(where, "empty caption"))
            continue
        if not captions and not 0 <= number < len(source.class_names):
            problems.append(BadSample(where, "bad label", f"`{label}` is {number}"))
            continue
        id = _image_id(source, cell, seen, merge=bool(captions))
        if id in seen:
            merged[seen[id]] += cleaned
            before, part = parts.samples[seen[id]], parts.of(row)
            if before != part:  # an image of two parts is kept out of training
                kept = parts.samples[seen[id]] = max(before, part, key=list(PART_NAMES).index)
                problems.append(BadSample(where, "two parts", f"{part}, and {before} before; kept in {kept}"))
            continue
        seen[id] = len(merged)
        merged.append(list(cleaned))
        source._ids.append(id)
        source._rows.append(row)
        source._labels.append(number)
        source._sizes.append(len(cell))
        parts.samples.append(parts.of(row))
    parts.problems += [parts.of(rows.num_rows - 1)] * (len(problems) - len(parts.problems))
    for texts in merged:
        source._captions.append("\n".join(texts))
    for index in range(len(source)):
        digest.update(repr((source._ids[index], source._captions[index], source._labels[index])).encode())
    source.layout += describe_copies(sum("~" in source._ids[index] for index in range(len(source))))
    source.fingerprint, source.problems = digest.hexdigest(), problems


def _cells(
    source: DatasetSource, rows: Any, captions: tuple[str, ...], label: str
) -> Iterator[tuple[int, memoryview | None, list[str], int]]:
    """The number, encoded image, caption texts and label (-1: none) of each row; images are not copied."""
    import pyarrow

    wanted = [source.image_column, *captions, *([label] if label else [])]
    row = 0
    for table in rows.select_columns(wanted).iter(1000):
        images = table.column(source.image_column).combine_chunks()
        in_objects = pyarrow.types.is_struct(images.type)
        data = images.field("bytes") if in_objects else images
        has_path = in_objects and images.type.get_field_index("path") >= 0
        paths = images.field("path") if has_path else None
        columns = [table.column(name).to_pylist() for name in captions]
        labels = table.column(label).to_pylist() if label else []
        for i in range(table.num_rows):
            cell: memoryview | None = None
            if images[i].is_valid and data[i].is_valid:
                # The buffer's own format is signed, in which bytes above 127 would not equal those of `bytes`.
                cell = memoryview(data[i].as_buffer()).cast("B")
            elif images[i].is_valid and paths is not None and paths[i].is_valid:
                file = source._file(paths[i].as_py())
                cell = memoryview(file.read_bytes()) if file.is_file() else None
            texts = [text for column in columns for text in cell_texts(column[i])]
            number = labels[i] if label and labels[i] is not None else -1
            yield row, cell, texts, number
            row += 1


def _image_id(source: DatasetSource, data: memoryview, seen: dict[str, int], *, merge: bool) -> str:
    """A digest of the image's size and of three parts of it, or of all its bytes if another image has equal parts."""
    middle = len(data) // 2
    digest = hashlib.blake2b(str(len(data)).encode(), digest_size=8)
    for place in (data[:_EDGE], data[middle : middle + _EDGE], data[-_EDGE:]):
        digest.update(place)
    id = digest.hexdigest()
    if id in seen and source.image(seen[id]) != data:
        id = hashlib.blake2b(data, digest_size=16).hexdigest()
    if merge:
        return id
    # Equal images of a labelled set stay separate samples, so that accuracy is over the published number of images.
    count, plain = 1, id
    while id in seen:
        count += 1
        id = f"{plain}~{count}"
    return id


HF_DATASETS = Format(
    have="a dataset saved by Hugging Face `datasets` (`pip install 'threetowers[datasets]'`)",
    give="`hfds:DIR`; its train, validation and test parts, or those of its `split` column, are kept",
    accepts=names_dataset,
    open=lambda path, columns, opener: open_dataset(path, columns),
    parts=lambda path, columns, opener: check_parts(path, open_dataset_parts(path, columns)),
    takes_columns=True,
)
