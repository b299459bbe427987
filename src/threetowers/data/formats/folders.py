"""A folder of images with a text file beside each, or with one subfolder per class."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from threetowers.data.formats.files import FileSource, path_id
from threetowers.data.formats.rows import TABLE_ENDINGS
from threetowers.data.source import Format, clean_captions, decode_text, is_image_name
from threetowers.errors import DataError


def open_folder(path: str | Path) -> FileSource:
    """The images below a folder: with captions from `NAME.txt` beside them, else one class per subfolder.

    A `.txt` file holds one caption per line. Classes are the sorted names of at least two subfolders.
    Raises DataError when the folder holds a table instead, or a subfolder cannot be read.
    """
    folder = Path(path)
    images = list(_image_files(folder))
    source = FileSource(folder.resolve().name, "folder of images with .txt files", str(folder))
    if any(has_text for _, has_text in images):
        return source.fill(_captioned(source, images))
    tables = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in TABLE_ENDINGS)
    if tables:
        raise DataError(
            f"{path} holds {', '.join(tables)}, and no image has a .txt beside it; open {folder / tables[0]}"
        )
    classes = sorted({image.split("/")[0] for image, _ in images if "/" in image})
    if len(classes) < 2:
        return source.fill(_captioned(source, images))
    source.layout = f"folder with {len(classes)} class folders"
    source.class_names = [path_id(name) for name in classes]
    return source.fill(_classified(source, images, {name: label for label, name in enumerate(classes)}))


def _image_files(folder: Path) -> Iterator[tuple[str, bool]]:
    """The relative path of each image in sorted order, and whether there is a .txt of the same name."""

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
            source.add_problem(image, "no caption", "there is no .txt beside it")
            continue
        try:
            text = decode_text(path.with_suffix(".txt").read_bytes())
            size = path.stat().st_size
        except OSError as error:
            source.add_problem(image, "unreadable", f"{error.filename}: {error.strerror}")
            continue
        captions, damaged = clean_captions(text.split("\n"))
        if damaged:
            source.add_problem(image, "caption is not UTF-8")
        if captions:
            yield image, size, "\n".join(captions), -1
        else:
            source.add_problem(image, "empty caption")


def _classified(
    source: FileSource, images: list[tuple[str, bool]], labels: dict[str, int]
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
    have="a folder of images with a `.txt` beside each",
    give="the folder",
    accepts=lambda path: Path(path).is_dir(),
    open=lambda path, columns, opener: open_folder(path),
)
