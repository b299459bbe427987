"""Files of captions that name their images: COCO's JSON, Karpathy's split files, Flickr's token files.

    {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "a cat"}]}   COCO
    {"images": [{"filename": "a.jpg", "split": "val", "sentences": [{"raw": "a cat"}]}]}                  Karpathy
    a.jpg#0<tab>a cat                                                                                     Flickr

The folder of the images is looked for beside the file and one level up.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from threetowers.data.formats.columns import Found
from threetowers.data.formats.files import FileSource
from threetowers.data.formats.merge import Merged
from threetowers.data.formats.places import image_folder, image_folders
from threetowers.data.formats.rows import Row, is_json_list
from threetowers.data.parts import KNOWN_PARTS, part_of
from threetowers.data.source import Format, check_parts, decode_text
from threetowers.errors import BadSample, DataError

_TOKEN_LINE = re.compile(rb"(?:\xef\xbb\xbf)?[^\t\n]+#\d+\t")


@dataclass
class _Annotations:
    """The content of a file. rows: one per caption or list of captions. splits: what is said of each image's part.

    flat: image names without their folder, for a set whose images were put into one folder.
    """

    layout: str
    rows: list[Row]
    splits: dict[str, Any] = field(default_factory=dict)
    problems: list[BadSample] = field(default_factory=list)
    flat: dict[str, str] = field(default_factory=dict)


def names_annotations(path: str | Path) -> bool:
    """Whether a path means a file of captions: JSON, or text whose first line is `name.jpg#0<tab>caption`."""
    path = Path(path)
    if not path.is_file():
        return False
    if path.suffix.lower() in (".json", ".token"):
        return path.suffix.lower() == ".token" or not is_json_list(path)
    if path.suffix.lower() != ".txt":
        return False
    with path.open("rb") as file:
        return _TOKEN_LINE.match(file.read(4096)) is not None


def open_annotations(path: str | Path) -> FileSource:
    """All images that the file has captions for, in every split.

    Raises DataError when the file cannot be read or is of another kind, or when none of its images is found.
    """
    return _source(Path(path), _read(Path(path)))


def open_parts(path: str | Path) -> dict[str, FileSource]:
    """The images by part (train with restval, val, test), where their `split` says it; empty for any other file.

    Raises DataError for a name that is no part, and like `open_annotations`.
    """
    annotations = _read(Path(path))
    parts = {name: part_of(split) for name, split in annotations.splits.items()}
    unknown = [f"{name}: {annotations.splits[name]!r}" for name, part in parts.items() if part is None]
    if unknown:
        raise DataError(
            f"{path}: {len(unknown)} images have a `split` that is none of {KNOWN_PARTS}, for example {unknown[0]}. "
            "Correct them, or leave it out of account with --inputs.split-column none"
        )
    return {
        part: _source(Path(path), annotations, part, parts)
        for part in sorted(set(filter(None, parts.values())))
    }


def _source(
    file: Path, annotations: _Annotations, part: str = "", parts: Mapping[str, str | None] = {}
) -> FileSource:
    names = list(dict.fromkeys(row["image"] for _, row in annotations.rows if isinstance(row["image"], str)))
    folder, num_hits = image_folder(file, names)
    flat_folder, num_flat_hits = image_folder(file, [annotations.flat.get(name, name) for name in names])
    flat = num_flat_hits > num_hits
    if not max(num_hits, num_flat_hits):
        tried = ", ".join(str(place) for place in dict.fromkeys(p.resolve() for p in image_folders(file)))
        raise DataError(
            f"{file}: none of its images was found, for example {', '.join(names[:2]) or 'no name at all'}. "
            f"Put the images into a folder `images` beside it; looked in {tried}"
        )
    source = FileSource(
        name=f"{file.stem}/{part}" if part else file.stem,
        layout=f"{annotations.layout} {file.name}, images in {(flat_folder if flat else folder).resolve().name}",
        folder=str(flat_folder if flat else folder),
        _problems=[] if part not in ("", "train") else list(annotations.problems),
    )
    rows = (
        (line, row | {"image": annotations.flat.get(row["image"], row["image"])} if flat else row)
        for line, row in annotations.rows
        if not part or parts[row["image"]] == part
    )
    merged = Merged(source)
    merged.add(file.name, rows, Found("image", ("captions",), None, ""))
    return merged.fill()


def _read(file: Path) -> _Annotations:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: it cannot be read: {error.strerror}") from error
    if file.suffix.lower() != ".json":
        return _read_tokens(file, decode_text(data))
    try:
        document = json.loads(decode_text(data))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: it is no JSON, or a damaged one: {error}. Fetch it again") from error
    if isinstance(document, dict) and isinstance(images := document.get("images"), list):
        if any(isinstance(image, dict) and "sentences" in image for image in images[:10]):
            return _read_karpathy(file, images)
        if isinstance(document.get("annotations"), list):
            return _read_coco(file, images, document["annotations"])
    raise DataError(f"{file}: {_content(document)}. Known are COCO captions (images, annotations) and "
                    "Karpathy's dataset_*.json (images with sentences); anything else can be written as JSONL, one "
                    'object per line: {"image": "a.jpg", "caption": "…"}')  # fmt: skip


def _content(document: Any) -> str:
    """What a JSON document of an unknown format holds, for the error message."""
    if isinstance(document, dict):
        keys = ", ".join(f"`{key}`" for key in list(document)[:8])
        return f"its keys are {keys or 'none'}, which fit no caption format"
    return "it holds a single value"


def _read_coco(file: Path, images: list[Any], entries: list[Any]) -> _Annotations:
    if not any(isinstance(entry, dict) and "caption" in entry for entry in entries):
        example = next((f", but {', '.join(entry)}" for entry in entries if isinstance(entry, dict)), "")
        raise DataError(
            f"{file}: its annotations hold no `caption`{example}; give the captions file, captions_*.json"
        )
    names: dict[Any, Any] = {}
    annotations = _Annotations("COCO captions", [])
    parted = any(isinstance(image, dict) and "split" in image for image in images)
    for line, image in enumerate(images, 1):
        has_id = isinstance(image, dict) and isinstance(image.get("id"), int | str)
        name = image.get("file_name") if has_id else None
        if not isinstance(name, str):
            annotations.problems.append(
                BadSample(f"{file.name}:image {line}", "no path", "no `id` or no `file_name`")
            )
        elif names.setdefault(image["id"], name) != name:
            detail = f"its id {image['id']} is that of {names[image['id']]}"
            annotations.problems.append(BadSample(name, "id given twice", detail))
        elif parted:
            annotations.splits[name] = image.get("split")
    captioned = set()
    for line, entry in enumerate(entries, 1):
        key = entry.get("image_id") if isinstance(entry, dict) else None
        if not isinstance(key, int | str) or key not in names:
            detail = f"image_id {key!r} is not among the images"
            annotations.problems.append(BadSample(f"{file.name}:{line}", "unknown image", detail))
            continue
        captioned.add(key)
        annotations.rows.append((line, {"image": names[key], "captions": entry.get("caption")}))
    annotations.problems += [
        BadSample(name, "no caption", f"no annotation has its id {key}")
        for key, name in names.items()
        if key not in captioned
    ]
    return annotations


def _read_karpathy(file: Path, images: list[Any]) -> _Annotations:
    annotations = _Annotations("Karpathy split", [])
    for line, image in enumerate(images, 1):
        name = image.get("filename") if isinstance(image, dict) else None
        if not isinstance(name, str):
            annotations.problems.append(BadSample(f"{file.name}:{line}", "no path", "no `filename`"))
            continue
        folder = image.get("filepath")
        path = f"{folder}/{name}" if isinstance(folder, str) and folder else name
        if path in annotations.splits:
            annotations.problems.append(BadSample(path, "id given twice", f"{file.name}:{line}"))
            continue
        annotations.flat[path] = name
        annotations.splits[path] = image.get("split")
        sentences = image.get("sentences")
        texts = (
            [each for each in sentences if isinstance(each, str | dict)]
            if isinstance(sentences, list)
            else []
        )
        annotations.rows.append((line, {"image": path, "captions": texts}))
    return annotations


def _read_tokens(file: Path, text: str) -> _Annotations:
    annotations = _Annotations("Flickr captions", [])
    for line, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        name, tab, caption = row.partition("\t")
        image, mark, number = name.rpartition("#")
        if not tab or not mark or not number.strip().isdigit():
            problem = BadSample(
                f"{file.name}:{line}", "wrong number of fields", "expected name.jpg#0<tab>caption"
            )
            annotations.problems.append(problem)
            continue
        annotations.rows.append((line, {"image": image, "captions": caption}))
    if not annotations.rows:
        raise DataError(f"{file}: no line is `name.jpg#0<tab>caption`, as in Flickr30k's token file")
    return annotations


ANNOTATIONS = Format(
    have="COCO captions JSON, Karpathy's `dataset_*.json`, Flickr's `.token` file",
    give="its path; images are found in the usual folders beside it, and Karpathy's splits are kept",
    accepts=names_annotations,
    open=lambda path, columns, opener: open_annotations(path),
    parts=lambda path, columns, opener: {} if columns.split is None else check_parts(path, open_parts(path)),
)
