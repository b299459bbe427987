"""A folder of images with a text file beside each, or with one subfolder per class."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from threetowers.data.cells import file_texts, json_texts
from threetowers.data.formats.files import FileSource, path_id
from threetowers.data.formats.rows import tables_in
from threetowers.data.source import (
    IMAGE_ENDINGS,
    PICTURE_ENDINGS,
    Format,
    clean_captions,
    decode_text,
    is_image_name,
)
from threetowers.errors import BadSample, DataError

_NUM_LOOKED_AT = 1000
_NUM_JSON = 20  # of which one has to hold captions
_NO_CAPTIONS = {
    "about", "attribution", "authors", "captions", "categories", "changelog", "changes", "classes", "classnames",
    "copying", "credits", "description", "files", "index", "info", "labels", "licence", "license", "licenses", "list",
    "metadata", "notes", "notice", "readme", "requirements", "source", "sources", "terms", "test", "todo", "train",
    "urls", "val", "zeroshot_classification_templates",
}  # fmt: skip
"""Names of .txt files at the top of a folder that are about the folder, not about an image."""

_RANKS = {"txt": 3, "caption": 2, "json": 1}
"""Endings of the files beside images that hold their captions; of several the first is read."""
_CAPTIONS = re.compile(r"(?i).*captions?.*\.json|dataset_.*\.json|.*\.token|captions\.txt")


def open_folder(path: str | Path) -> FileSource:
    """The images below a folder: with captions from `NAME.txt` beside them, else one class per subfolder.

    A `.txt` file holds one caption per line. Without one, `NAME.caption`, `NAME.json` and `NAME.jpg.txt` are read.
    Classes are the sorted names of at least two subfolders.
    Raises DataError when the folder holds tables instead, or a subfolder cannot be read.
    """
    folder = Path(path)
    left_out: list[BadSample] = []
    images = list(image_files(folder, left_out))
    source = FileSource(
        folder.resolve().name, "folder of images with .txt files", str(folder), _problems=left_out
    )
    if _has_texts(folder, images):
        if unused := tables_in(folder):
            source.layout += f"; not read: {', '.join(table.name for table in unused[:8])}"
        return source.fill(_captioned(source, images))
    left_out[:] = [problem for problem in left_out if problem.reason != "no image"]
    classes = sorted({image.split("/")[0] for image, _ in images if "/" in image})
    tables = tables_in(folder) or captions_in(folder)
    if len(classes) < 2:
        tables = tables or [table for sub in sorted(folder.glob("*/")) for table in tables_in(sub)]
    if tables:
        names = [str(table.relative_to(folder)) for table in tables]
        example = min(tables, key=lambda table: "train" not in table.name)
        raise DataError(
            f"{path} holds {', '.join(names[:8])}, and no image has a .txt beside it; open one of them, for example "
            f"{example}"
        )
    if len(classes) < 2:
        return source.fill(_captioned(source, images))
    source.layout = f"folder with {len(classes)} class folders"
    source.class_names = [path_id(name) for name in classes]
    return source.fill(_classified(source, images, {name: label for label, name in enumerate(classes)}))


def captions_in(folder: Path) -> list[Path]:
    """Files of captions for many images, as COCO, Karpathy and Flickr name them, in a folder and its subfolders.

    Without them `train2017/` and `val2017/` of COCO would be two classes.
    """
    files = [
        *folder.glob("*.*"),
        *folder.glob("*/*.json"),
        *folder.glob("*/*.token"),
        *folder.glob("*/captions.txt"),
    ]
    return sorted(file for file in files if _CAPTIONS.fullmatch(file.name) and file.is_file())


def _walk(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Each folder below, what its files' relative paths begin with, and their names; without hidden ones."""

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: it cannot be read: {error.strerror}")

    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder above would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = Path(parent).relative_to(folder).as_posix()
        yield (
            parent,
            "" if prefix == "." else f"{prefix}/",
            [name for name in files if not name.startswith(".")],
        )


def image_files(folder: Path, left_out: list[BadSample]) -> Iterator[tuple[str, str]]:
    """The relative path of each image in sorted order, and the name of the text file beside it, or "".

    What looks like an image or a caption and is none of these is added to `left_out`: a picture of a format that is
    not read, a text without an image, a link that leads nowhere. Hidden files are ignored.
    """
    for parent, prefix, names in _walk(folder):
        parted = [(name, *_stem_and_ending(name)) for name in sorted(names)]
        ranked = sorted(parted, key=lambda each: -_RANKS.get(each[2], 0))  # .txt before .TXT before .json
        texts = {stem: name for name, stem, ending in reversed(ranked) if ending in _RANKS}
        images = {stem for _, stem, ending in parted if ending in IMAGE_ENDINGS}
        others = {stem for _, stem, ending in parted if ending in PICTURE_ENDINGS} - images
        for name, stem, ending in parted:
            if ending in IMAGE_ENDINGS:
                yield prefix + name, texts.get(stem) or texts.get(name, "")
            elif stem in images:
                continue  # its caption, or the same picture in another format
            elif ending in PICTURE_ENDINGS:
                left_out.append(_unread(prefix + name, texts.get(stem, "")))
            elif ending == "txt" and stem not in others and not is_image_name(stem):
                if prefix or ((images or others) and stem.lower() not in _NO_CAPTIONS):
                    detail = "a text file without an image of the same name"
                    left_out.append(BadSample(path_id(prefix + name), "no image", detail))
            elif not stem and not Path(parent, name).exists():  # a folder, perhaps
                left_out.append(BadSample(path_id(prefix + name), "missing file", "the link leads nowhere"))


def _stem_and_ending(name: str) -> tuple[str, str]:
    stem, _, ending = name.rpartition(".")
    return stem, ending.strip().lower()


def image_names(folder: Path) -> Iterator[str]:
    """The relative paths of the images in a folder, in no order and without a look at anything else."""
    for _, prefix, files in _walk(folder):
        yield from (prefix + name for name in files if is_image_name(name))


def has_captions(folder: Path) -> bool:
    """Whether an image has a .txt beside it; looks at a thousand images, and at all that lie in one folder."""
    num_images = 0
    for _, _, files in _walk(folder):
        texts = {name[:-4] for name in files if name.lower().endswith(".txt")}
        images = list(filter(is_image_name, files))
        if texts and any(name.rpartition(".")[0] in texts for name in images):
            return True
        num_images += len(images)
        if num_images > _NUM_LOOKED_AT:
            return False
    return False


def _texts_of(path: Path) -> list[str]:
    """The captions in a file beside an image, not yet cleaned; raises OSError."""
    text = decode_text(path.read_bytes())
    return json_texts(text) if path.suffix.lower() == ".json" else file_texts(text)


def _has_texts(folder: Path, images: list[tuple[str, str]]) -> bool:
    """Whether captions lie beside images. A .json may hold anything, so that one with captions has to be found."""
    num_json = 0
    for image, text in images:
        num_json += bool(text)
        if text and not text.lower().endswith(".json"):
            return True
        if text and num_json <= _NUM_JSON:
            with contextlib.suppress(OSError):
                if clean_captions(_texts_of(Path(folder, image).with_name(text)))[0]:
                    return True
    return False


def _unread(path: str, text: str) -> BadSample:
    caption = f", its caption is {text}" if text else ""
    detail = f"read are {', '.join(IMAGE_ENDINGS)}; convert it{caption}"
    return BadSample(path_id(path), "unsupported format", detail)


def _captioned(source: FileSource, images: list[tuple[str, str]]) -> Iterator[tuple[str, int, str, int]]:
    for image, text_name in images:
        if not text_name:
            source.add_problem(image, "no caption", "there is no .txt beside it")
            continue
        path = os.path.join(source.folder, image)  # noqa: PTH118 - Paths would take a third of the time
        try:
            texts = _texts_of(Path(os.path.dirname(path), text_name))  # noqa: PTH120
            size = os.stat(path).st_size  # noqa: PTH116
        except OSError as error:
            source.add_problem(image, "unreadable", f"{error.filename}: {error.strerror}")
            continue
        captions, damaged = clean_captions(texts)
        if damaged:
            source.add_problem(image, "caption is not UTF-8")
        if captions:
            yield image, size, "\n".join(captions), -1
        else:
            detail = (
                "" if text_name.lower().endswith(".txt") else f"{text_name} holds no text under a usual key"
            )
            source.add_problem(image, "empty caption", detail)


def _classified(
    source: FileSource, images: list[tuple[str, str]], labels: dict[str, int]
) -> Iterator[tuple[str, int, str, int]]:
    for image, _ in images:
        name, slash, _ = image.partition("/")
        path = Path(source.folder, image)
        if not slash:
            source.add_problem(image, "no class", "it lies beside the class folders")
        elif path.is_file():
            yield image, path.stat().st_size, "", labels[name]
        else:
            source.add_problem(image, "missing file", f"{path}: the link leads nowhere")


FOLDERS = Format(
    have="a folder of images with a `.txt`, `.caption` or `.json` beside each",
    give="the folder",
    accepts=lambda path: Path(path).is_dir(),
    open=lambda path, columns, opener: open_folder(path),
)
