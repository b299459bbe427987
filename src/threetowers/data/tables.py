"""Images that lie as files: a table with a path column and captions, or a folder with sidecar texts or classes."""

import hashlib
import itertools
import json
import os
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from threetowers.config import did_you_mean
from threetowers.data.places import find_file, image_folder
from threetowers.data.rows import TABLE_ENDINGS, Row, is_image_name, read_rows
from threetowers.data.sources import (
    MISSING_CAPTIONS,
    Record,
    Source,
    Texts,
    clean_captions,
    decode_text,
)
from threetowers.errors import BadSample, DataError, UsageError

_PATH_NAMES = (
    "image", "image_path", "img_path", "filepath", "file_path", "image_file", "image_name", "image_filename",
    "file_name", "filename", "file", "path", "img",
)  # fmt: skip
_CAPTION_NAMES = ("caption", "text", "sentence", "comment", "raw", "description", "title", "alt", "alt_text")
_NUM_SNIFFED = 100  # rows that columns are recognised by


@dataclass(eq=False)
class FileSource:
    """Images in files below `folder`, sorted as found; implements Source.

    layout: what was recognised, for people. A sample's id is its path relative to the folder, in NFC.
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
            _id(self._paths[index]),
            tuple(captions.split("\n")) if captions else (),
            label if label >= 0 else None,
        )

    def path(self, index: int) -> Path:
        """Where the sample's image lies."""
        return Path(self.folder, self._paths[index])

    def image(self, index: int) -> bytes:
        path = self.path(index)
        try:
            return path.read_bytes()
        except OSError as error:
            reason = "missing file" if isinstance(error, FileNotFoundError) else "unreadable"
            raise BadSample(_id(self._paths[index]), reason, f"{path}: {error.strerror}") from error

    def _problem(self, path: str, reason: str, detail: str = "") -> None:
        self._problems.append(BadSample(_id(path), reason, detail))

    def _fill(self, samples: Iterator[tuple[str, int, str, int]]) -> "FileSource":
        """Takes in (path, size in bytes, captions joined by newlines, label or -1) and signs it all."""
        digest = hashlib.sha256(repr(tuple(self.class_names)).encode())
        for path, size, captions, label in samples:
            digest.update(repr((_id(path), size, captions, label)).encode())
            self._paths.append(path)
            self._captions.append(captions)
            self._labels.append(label)
        self.fingerprint = digest.hexdigest()
        return self


def _id(path: str) -> str:
    """One spelling of a path on every system: NFC, and no bytes that cannot be printed."""
    return path if path.isascii() else unicodedata.normalize("NFC", path.encode("utf-8", "replace").decode())


def open_table(
    path: str | Path, image_column: str = "none", caption_columns: tuple[str, ...] = ()
) -> FileSource:
    """The samples of a CSV (any delimiter), TSV, JSONL or parquet table.

    Image paths are relative to its folder, or to a folder of images beside it when none is found there.
    Columns are recognised by name, else by content, when they are `none` and empty. Rows with the same image are
    one sample with several captions, as are several caption columns, lists in JSONL and JSON lists in a cell.
    Raises UsageError for a column that is not there or cannot be recognised, DataError when nothing can be read.
    """
    path = Path(path)
    problems: list[BadSample] = []
    try:
        rows = read_rows(path, problems)
        head = list(itertools.islice(rows, _NUM_SNIFFED))
        if not head:
            found = "; ".join(map(str, problems[:5])) or "It is empty, or holds a header alone"
            raise DataError(f"{path}: there is no row in it that can be read. {found}")
        image_column, caption_columns = _columns(path, head, image_column, caption_columns)
        source = FileSource(
            name=path.stem,
            layout=f"table {path.name}, images in column `{image_column}`, "
            f"captions in {', '.join(f'`{column}`' for column in caption_columns)}",
            folder=str(_folder(path, head, image_column)),
            _problems=problems,
        )
        merged = merge_rows(source, path.name, itertools.chain(head, rows), image_column, caption_columns)
        return source._fill(
            (file, size, captions, -1) for file, (size, captions) in merged.items() if captions
        )
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: it cannot be read as {path.suffix or 'a table'}: {error}") from error


def _folder(table: Path, head: list[Row], image_column: str) -> Path:
    names = [cell for _, row in head if isinstance(cell := row.get(image_column), str) and cell.strip()]
    if not names or any(find_file(str(table.parent), name.strip()) for name in names):
        return table.parent
    folder, found = image_folder(table, names)
    return folder if found else table.parent


def merge_rows(
    source: FileSource, table: str, rows: Iterator[Row], image_column: str, caption_columns: tuple[str, ...]
) -> dict[str, tuple[int, str]]:
    """Size and captions by file; every row that adds nothing is put on the source's list of problems."""
    files: dict[str, tuple[int, str]] = {}
    spelled: dict[str, str] = {}  # as in the table → as on the disk; "" for what is missing
    for line, row in rows:
        where, cell = f"{table}:{line}", row.get(image_column)
        if not isinstance(cell, str) or cell.strip() in MISSING_CAPTIONS:
            source._problem(where, "no path", f"column `{image_column}` is empty")
            continue
        if cell not in spelled:
            found = find_file(source.folder, cell.strip())
            spelled[cell] = found[0] if found else ""
            if found:
                files.setdefault(found[0], (found[1], ""))
            else:
                source._problem(cell, "missing file", f"{where}: {Path(source.folder, cell.strip())}")
        file = spelled[cell]
        if not file:
            continue
        captions, damaged = clean_captions(
            text for column in caption_columns for text in cell_texts(row.get(column))
        )
        if damaged:
            source._problem(file, "caption is not UTF-8", where)
        if captions:
            size, before = files[file]
            files[file] = size, "\n".join((before, *captions) if before else captions)
        else:
            source._problem(file, "empty caption", where)
    return files


def cell_texts(cell: Any) -> list[str]:
    """The texts in a cell: one, a list of them, a JSON list written as text, or none."""
    if isinstance(cell, str):
        if cell.startswith('["') and cell.endswith('"]'):
            try:
                return cell_texts(json.loads(cell))
            except (ValueError, RecursionError):
                pass  # a caption that only looks like a list
        return [cell]
    if isinstance(cell, list):
        return [text for item in cell if not isinstance(item, list) for text in cell_texts(item)]
    return [] if cell is None or isinstance(cell, dict) else [str(cell)]


# Recognising columns


def _columns(
    path: Path, head: list[Row], image_column: str, caption_columns: tuple[str, ...]
) -> tuple[str, tuple[str, ...]]:
    names = list(dict.fromkeys(name for _, row in head for name in row))
    listed = f"Its columns: {', '.join(names)}"
    for column in (image_column, *caption_columns):
        if column != "none" and column not in names:
            hint = did_you_mean(column, names)
            hint = f"{hint} {listed}" if "did you mean" in hint else f". {listed}"
            raise UsageError(f"{path}: there is no column `{column}`{hint}")
    cells = {name: [row[name] for _, row in head if row.get(name) is not None] for name in names}
    if image_column == "none":
        found = _path_column(path.parent, cells)
        if found is None:
            raise UsageError(f"{path}: no column holds paths of images. Name it as image_column. {listed}")
        image_column = found
    others = {name: cells[name] for name in names if name != image_column}
    caption_columns = caption_columns or known_captions(list(others)) or longest_texts(others)
    if not caption_columns:
        raise UsageError(f"{path}: no column holds captions. Name it as caption_columns. {listed}")
    return image_column, caption_columns


def _path_column(folder: Path, cells: dict[str, list[Any]]) -> str | None:
    """The column of image paths: known by name and not contradicted by content, or by content alone."""

    def share(name: str) -> float:
        hits = (
            isinstance(cell, str) and (is_image_name(cell) or _is_file(folder, cell)) for cell in cells[name]
        )
        return sum(hits) / max(len(cells[name]), 1)

    known = _known_paths(cells)
    for name in known:
        if share(name) > 0:
            return name
    best = max(cells, key=share)
    if share(best) > 0.5:
        return best
    return known[0] if known else None


def _known_paths(names: Iterable[str]) -> list[str]:
    found = sorted((_PATH_NAMES.index(_plain(name)), name) for name in names if _plain(name) in _PATH_NAMES)
    return [name for _, name in found]


def known_path(names: Iterable[str]) -> str | None:
    """The column that is known by its name to hold images; None when none is."""
    return next(iter(_known_paths(names)), None)


def known_captions(names: Sequence[str]) -> tuple[str, ...]:
    """All columns of the first known family of captions: `caption_0`, `caption_1`, …; empty when there is none."""
    for family in _CAPTION_NAMES:
        found = [name for name in names if re.fullmatch(rf"{family}s?(_?\d+)?", _plain(name))]
        if found:
            return tuple(found)
    return ()


def longest_texts(cells: dict[str, list[Any]]) -> tuple[str, ...]:
    """The column with the longest texts, as a tuple of one; empty when none has any."""
    lengths = {name: sum(len(text) for cell in cells[name] for text in cell_texts(cell)) for name in cells}
    texts = [name for name in cells if any(isinstance(cell, str | list) for cell in cells[name])]
    best = max(texts, key=lengths.__getitem__, default=None)
    return (best,) if best is not None and lengths[best] else ()


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _is_file(folder: Path, text: str) -> bool:
    return 0 < len(text.strip()) < 4096 and find_file(str(folder), text.strip()) is not None


# Folders


def open_folder(path: str | Path) -> FileSource:
    """The images below a folder: with captions from `NAME.txt` beside them, else one class per subfolder.

    Captions stand one per line. Classes are the sorted names of at least two subfolders.
    Raises DataError when the folder holds a table instead, or a subfolder cannot be read.
    """
    folder = Path(path)
    images = list(_image_files(folder))
    source = FileSource(folder.resolve().name, "folder of images with .txt files", str(folder))
    if any(has_text for _, has_text in images):
        return source._fill(_captioned(source, images))
    tables = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in TABLE_ENDINGS)
    if tables:
        raise DataError(
            f"{path} holds {', '.join(tables)}, and no image has a .txt beside it; open {folder / tables[0]}"
        )
    classes = sorted({image.split("/")[0] for image, _ in images if "/" in image})
    if len(classes) < 2:
        return source._fill(_captioned(source, images))
    source.layout = f"folder with {len(classes)} class folders"
    source.class_names = [_id(name) for name in classes]
    return source._fill(_classified(source, images, {name: label for label, name in enumerate(classes)}))


def _image_files(folder: Path) -> Iterator[tuple[str, bool]]:
    """Relative path of each image in sorted order, and whether a .txt of its name is there."""

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: it cannot be read: {error.strerror}")

    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link back up would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        texts = {name for name in files if name.endswith(".txt")}
        prefix = Path(parent).relative_to(folder).as_posix()
        for name in sorted(files):
            if is_image_name(name) and not name.startswith("."):
                relative = name if prefix == "." else f"{prefix}/{name}"
                yield relative, f"{name.rpartition('.')[0]}.txt" in texts


def _captioned(source: FileSource, images: list[tuple[str, bool]]) -> Iterator[tuple[str, int, str, int]]:
    for image, has_text in images:
        path = Path(source.folder, image)
        if not has_text:
            source._problem(image, "no caption", "there is no .txt beside it")
            continue
        try:
            text = decode_text(path.with_suffix(".txt").read_bytes())
            size = path.stat().st_size
        except OSError as error:
            source._problem(image, "unreadable", f"{error.filename}: {error.strerror}")
            continue
        captions, damaged = clean_captions(text.split("\n"))
        if damaged:
            source._problem(image, "caption is not UTF-8")
        if captions:
            yield image, size, "\n".join(captions), -1
        else:
            source._problem(image, "empty caption")


def _classified(
    source: FileSource, images: list[tuple[str, bool]], labels: dict[str, int]
) -> Iterator[tuple[str, int, str, int]]:
    for image, _ in images:
        name, slash, _ = image.partition("/")
        path = Path(source.folder, image)
        if not slash:
            source._problem(image, "no class", "it lies beside the class folders")
        elif path.is_file():
            yield image, path.stat().st_size, "", labels[name]
        else:
            source._problem(image, "missing file", f"{path}: the link leads nowhere")


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
