"""Choice tasks: images and captions of which a model has to say what belongs together.

    add_att.json    {"0": {"filename": "a.jpg", "caption": "…", "negative_caption": "…"}, …}          SugarCrepe
    swap_obj.json   [{"id": 0, "filename": "a.jpg", "caption": "…", "caption2": "…", "negative_caption": "…"}, …]
                                                                                                      SugarCrepe++
    examples.jsonl  {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "…", "caption_1": "…",
                     "collapsed_tag": "Object"}                                                       Winoground

These are the layouts in which the authors publish them: SugarCrepe (Hsieh et al., NeurIPS 2023, arXiv 2306.14610) and
SugarCrepe++ (Dumpala et al., NeurIPS 2024, arXiv 2406.11171) as one JSON file for each category, with images of COCO's
val2017; Winoground (Thrush et al., CVPR 2022, arXiv 2204.03162) as a folder with examples.jsonl and images/. The
negatives of the built-in world are made by `world/negatives.py`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from threetowers.data.formats.files import FileSource
from threetowers.data.formats.places import find_file, image_folder, near_file
from threetowers.data.formats.rows import read_rows
from threetowers.data.source import (
    Source,
    clean_captions,
    count_reasons,
    decode_text,
    is_picture_name,
    list_examples,
)
from threetowers.errors import BadSample, DataError

Task = Literal["one_caption", "two_captions", "matching"]
"""What a choice consists of, and which captions are right.

one_caption: an image; its caption, and a wrong one. two_captions: an image; two captions of it, and a wrong one.
matching: two images; the caption of the first, and that of the second.
"""

UNREADABLE = "unreadable image"
CHOICE_REASONS = (
    "damaged json", "id given twice", "no path", "missing file", "no caption", "empty caption", UNREADABLE,
    "caption is not UTF-8", "equal captions",
)  # fmt: skip
"""All values of `BadSample.reason` among the problems of choices. A choice with one of the last two is used."""

WINOGROUND_FILE = "examples.jsonl"
_FIELDS: Mapping[Task, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "one_caption": (("filename",), ("caption", "negative_caption")),
    "two_captions": (("filename",), ("caption", "caption2", "negative_caption")),
    "matching": (("image_0", "image_1"), ("caption_0", "caption_1")),
}
"""The keys of the images and of the captions of a row, in the order of `Choice`."""
_KINDS: Mapping[Task, str] = {
    "one_caption": "SugarCrepe", "two_captions": "SugarCrepe++", "matching": "Winoground",
}  # fmt: skip


class Choice(NamedTuple):
    """One choice. images: indices into `ChoiceSet.images`. texts: indices into `ChoiceSet.texts`; for both see `Task`.

    id: unique in the set, such as `add_att/0`.
    """

    id: str
    category: str
    images: tuple[int, ...]
    texts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ChoiceSet:
    """Choices of one task; made by `open_choices` and `choice_set`.

    images: every image once, as a source without captions. texts: every caption once. problems: the choices that
    cannot be used, and defects of those that can. fingerprint: changes with the images, captions and choices.
    """

    name: str
    layout: str
    task: Task
    choices: Sequence[Choice]
    texts: Sequence[str]
    images: Source
    problems: Sequence[BadSample] = ()

    def __len__(self) -> int:
        return len(self.choices)

    @property
    def fingerprint(self) -> str:
        content = (
            self.images.fingerprint,
            self.task,
            list(self.texts),
            [tuple(each) for each in self.choices],
        )
        return hashlib.sha256(repr(content).encode("utf-8", "surrogateescape")).hexdigest()


class ChoiceRow(NamedTuple):
    """A choice whose captions are texts; see `Choice`."""

    id: str
    category: str
    images: tuple[int, ...]
    texts: tuple[str, ...]


def choice_set(
    name: str,
    layout: str,
    task: Task,
    rows: Iterable[ChoiceRow],
    images: Source,
    problems: Sequence[BadSample] = (),
) -> ChoiceSet:
    """The set of some choices. A choice whose wrong caption equals a right one is used, and named among the problems.

    No model can be right about such a choice. Published figures count it, so that it is counted here.
    """
    numbers: dict[str, int] = {}
    choices, found = [], list(problems)
    for row in rows:
        if row.texts[-1] in row.texts[:-1]:
            found.append(BadSample(row.id, "equal captions", f"{row.texts[-1]!r} is both right and wrong"))
        texts = tuple(numbers.setdefault(text, len(numbers)) for text in row.texts)
        choices.append(Choice(row.id, row.category, row.images, texts))
    return ChoiceSet(name, layout, task, choices, list(numbers), images, found)


def open_choices(path: str | Path, images: str | Path | None = None) -> ChoiceSet:
    """The choices of a SugarCrepe or SugarCrepe++ file, of a folder of them, or of Winoground's folder.

    images: the folder of the images; None looks for it beside the file and in the usual places. Rows that cannot be
    used are listed in `problems`. Raises DataError, with file and remedy, when nothing can be used.

        open_choices("sugar-crepe/data", images="coco/val2017")
    """
    path = Path(path)
    problems: list[BadSample] = []
    if path.name == WINOGROUND_FILE or (path / WINOGROUND_FILE).is_file():
        file = path if path.name == WINOGROUND_FILE else path / WINOGROUND_FILE
        entries = list(_winoground(file, problems))
        return _opened(file.resolve().parent.name, "matching", file, entries, images, problems)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.glob("*.json") if not file.name.startswith("."))
    if not files or not files[0].is_file():
        raise DataError(
            f"{path}: there are no choices. Give a JSON file of SugarCrepe or SugarCrepe++, the folder with all of "
            f"them, or Winoground's folder, which holds {WINOGROUND_FILE} and images/"
        )
    entries = [entry for file in files for entry in _sugarcrepe(file, problems)]
    second = {entry.file for entry in entries if "caption2" in entry.row}
    first = {entry.file for entry in entries} - second
    if first and second:
        raise DataError(
            f"{path}: {min(second)} has `caption2`, as in SugarCrepe++, and {min(first)} does not, as in SugarCrepe; "
            "put them into two folders"
        )
    name = path.stem if path.is_file() else path.resolve().name
    return _opened(name, "two_captions" if second else "one_caption", files[0], entries, images, problems)


class _Entry(NamedTuple):
    """A row of a file. where: the file and its key or line, for messages. id: unique in the set."""

    file: str
    where: str
    id: str
    category: str
    row: Mapping[str, Any]


def _sugarcrepe(file: Path, problems: list[BadSample]) -> list[_Entry]:
    """The entries of a category: a JSON object of objects, or a list of objects."""
    doubled: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, value in pairs if isinstance(value, dict)]
            doubled.extend(key for key in dict.fromkeys(keys) if keys.count(key) > 1)
        return values

    try:
        document = json.loads(decode_text(file.read_bytes()), object_pairs_hook=unique)
    except OSError as error:
        raise DataError(f"{file}: it cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: it is no JSON, or a damaged one: {error}. Fetch it again") from error
    rows = document if isinstance(document, dict) else {}
    if isinstance(document, list):
        rows = dict(enumerate(document))
    objects = {key: row for key, row in rows.items() if isinstance(row, dict)}
    if not any("negative_caption" in row for row in objects.values()):
        raise DataError(
            f"{file}: none of its entries has a `negative_caption`. SugarCrepe's files are "
            '{"0": {"filename": "a.jpg", "caption": "…", "negative_caption": "…"}, …}; put other JSON files elsewhere'
        )
    name = file.name
    problems += [BadSample(f"{name}:{key}", "id given twice", "the last one is used") for key in doubled]
    problems += [
        BadSample(f"{name}:{key}", "damaged json", "not an object") for key in rows if key not in objects
    ]
    return [
        _Entry(name, f"{name}:{key}", f"{file.stem}/{key}", file.stem, row) for key, row in objects.items()
    ]


def _winoground(file: Path, problems: list[BadSample]) -> Iterator[_Entry]:
    """The rows of examples.jsonl. The category is `collapsed_tag`: Object, Relation or Both."""
    seen: set[str] = set()
    try:
        for line, row in read_rows(file, problems):
            id, where = str(row.get("id", line)), f"{file.name}:{line}"
            if id in seen:
                problems.append(BadSample(where, "id given twice", f"`id` {id}; the first one is used"))
                continue
            seen.add(id)
            yield _Entry(file.name, where, id, str(row.get("collapsed_tag") or "all"), row)
    except OSError as error:
        raise DataError(f"{file}: it cannot be read: {error.strerror}") from error


def _opened(
    name: str,
    task: Task,
    file: Path,
    entries: Sequence[_Entry],
    images: str | Path | None,
    problems: list[BadSample],
) -> ChoiceSet:
    """The set of the entries whose images and captions are all there; the others are added to `problems`."""
    image_keys, text_keys = _FIELDS[task]
    cells = [entry.row.get(key) for entry in entries for key in image_keys]
    names = list(dict.fromkeys(cell for cell in cells if isinstance(cell, str)))
    folder = _image_folder(file, names, task, images)
    places = {each: place for each in names if (place := _find(folder, each))}
    if not places:
        example = f", for example {names[0]}" if names else ""
        raise DataError(
            f"{file}: none of its images was found{example}; looked in {folder.resolve()}. Give the folder of the "
            "images: COCO's val2017 for SugarCrepe, the unpacked images.zip for Winoground"
        )
    numbers: dict[tuple[str, int], int] = {}
    rows: list[ChoiceRow] = []
    for entry in entries:
        problem = _image_problem(entry, image_keys, places, folder) or _text_problem(entry, text_keys)
        if problem is not None:
            problems.append(problem)
            continue
        cleaned = [clean_captions([entry.row[key]]) for key in text_keys]
        if any(damaged for _, damaged in cleaned):
            problems.append(BadSample(entry.where, "caption is not UTF-8"))
        indices = tuple(numbers.setdefault(places[entry.row[key]], len(numbers)) for key in image_keys)
        rows.append(ChoiceRow(entry.id, entry.category, indices, tuple(texts[0] for texts, _ in cleaned)))
    if not rows:
        raise DataError(
            f"{file}: no choice can be used. {count_reasons(problems)}{list_examples(problems)}\n"
            f"A row needs {', '.join(f'`{key}`' for key in (*image_keys, *text_keys))}"
        )
    kind, categories = _KINDS[task], len({row.category for row in rows})
    source = FileSource(name, f"{len(numbers)} images of {kind} in {folder.resolve().name}", str(folder))
    source.fill((path, size, "", -1) for path, size in numbers)
    layout = f"{kind}, {len(rows)} choices in {categories} {'category' if categories == 1 else 'categories'}"
    return choice_set(name, layout, task, rows, source, problems)


def _image_folder(file: Path, names: Sequence[str], task: Task, given: str | Path | None) -> Path:
    if given is not None:
        if not Path(given).is_dir():
            raise DataError(f"{given}: there is no such folder of images")
        return Path(given)
    beside = file.parent / "images"
    return beside if task == "matching" and beside.is_dir() else image_folder(file, names)[0]


def _find(folder: Path, name: str) -> tuple[str, int] | None:
    """Path in the folder and size in bytes of an image; its name can lack the ending, as in Winoground."""
    if is_picture_name(name):
        return find_file(str(folder), name)
    if found := find_file(str(folder), f"{name}.png"):
        return found
    near = near_file(str(folder), name)
    return None if near is None else find_file(str(folder), str(Path(name).parent / near))


def _image_problem(
    entry: _Entry, keys: Sequence[str], places: Mapping[str, tuple[str, int]], folder: Path
) -> BadSample | None:
    for key in keys:
        cell = entry.row.get(key)
        if not isinstance(cell, str):
            return BadSample(entry.where, "no path", f"no `{key}`")
        if cell not in places:
            return BadSample(entry.where, "missing file", f"`{key}` {cell} is not in {folder}")
    return None


def _text_problem(entry: _Entry, keys: Sequence[str]) -> BadSample | None:
    for key in keys:
        cell = entry.row.get(key)
        if not isinstance(cell, str):
            return BadSample(entry.where, "no caption", f"no `{key}`")
        if not clean_captions([cell])[0]:
            return BadSample(entry.where, "empty caption", f"`{key}`")
    return None
