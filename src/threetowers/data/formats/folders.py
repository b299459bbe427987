"""A folder of images with sidecar texts, or with one subfolder per class."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from threetowers.data.formats.files import FileSource, _id
from threetowers.data.formats.rows import TABLE_ENDINGS
from threetowers.data.source import clean_captions, decode_text, is_image_name
from threetowers.errors import DataError


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
