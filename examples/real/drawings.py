"""What the corpora share: a picture with captions, its part of the data, and how it is drawn at 64 pixels."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import resvg_py
from PIL import Image

from threetowers.data.shards.write import ShardSample, write_shards
from threetowers.progress import Progress

SIZE = 64
"""Pixels of a side."""


@dataclass(frozen=True)
class Drawing:
    """A picture that is still to be drawn.

    key: stable name, by which it gets its place. concept: what it shows; the parts of the data have none in common.
    category: its class, empty without one. svg: markup; or png: an image file.
    """

    key: str
    concept: str
    captions: tuple[str, ...]
    category: str = ""
    svg: str = field(default="", repr=False)
    png: bytes = field(default=b"", repr=False)


def place(text: str) -> int:
    """A number of a text by which things are put into a fixed order that has nothing to do with their names."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_concepts(concepts: Iterable[str], num_val: int, num_test: int) -> tuple[set[str], set[str]]:
    """Concepts for validation and for the test; the same ones whatever their order."""
    order = sorted(set(concepts), key=place)
    return set(order[num_test : num_test + num_val]), set(order[:num_test])


def one_each(drawings: Iterable[Drawing]) -> list[Drawing]:
    """One drawing of each concept."""
    first: dict[str, Drawing] = {}
    for drawing in sorted(drawings, key=lambda drawing: place(drawing.key)):
        first.setdefault(drawing.concept, drawing)
    return list(first.values())


def parts_by_concept(drawings: Sequence[Drawing], held_out: int) -> dict[str, list[Drawing]]:
    """Training drawings in their order, and one of each concept held out for validation and for the test."""
    val, test = split_concepts((drawing.concept for drawing in drawings), held_out, held_out)
    return {
        "train": [drawing for drawing in drawings if drawing.concept not in val | test],
        "val": one_each(drawing for drawing in drawings if drawing.concept in val),
        "test": one_each(drawing for drawing in drawings if drawing.concept in test),
    }


def draw(drawing: Drawing) -> bytes | None:
    """The picture as PNG of SIZE × SIZE pixels on white; None for one that cannot be drawn, or is blank."""
    try:
        if drawing.svg:
            drawn = bytes(
                resvg_py.svg_to_bytes(drawing.svg, background="#ffffff", width=SIZE, skip_system_fonts=True)
            )
        else:
            drawn = drawing.png
        image = Image.open(BytesIO(drawn)).convert("RGBA")
    except (ValueError, OSError, Image.DecompressionBombError):
        return None
    image.thumbnail((SIZE, SIZE), Image.Resampling.BICUBIC)
    page = Image.new("RGB", (SIZE, SIZE), "white")
    page.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2), image)
    if page.getcolors(1) is not None:  # a single colour
        return None
    with BytesIO() as file:
        page.save(file, "PNG")
        return file.getvalue()


def write_part(folder: Path, drawings: Sequence[Drawing], classes: Sequence[str] = ()) -> int:
    """Writes a part of a corpus as tar shards; with `classes` labelled, without captions, and with their names.

    Returns how many could not be drawn.
    """
    left_out, bar = 0, Progress(f"drawing {folder.parent.name}/{folder.name}", len(drawings), "pictures")

    def samples() -> Iterator[ShardSample]:
        nonlocal left_out
        for number, drawing in enumerate(drawings):
            picture = draw(drawing)
            if picture is None:
                left_out += 1
            else:
                label = classes.index(drawing.category) if classes else None
                captions = () if classes else drawing.captions
                yield ShardSample(f"{number:08d}", picture, "png", captions, label)
            if number % 500 == 499 or number + 1 == len(drawings):
                bar.update(number + 1)

    write_shards(folder, samples())
    if classes:
        write_lines(folder / "classnames.txt", classes)
        write_lines(
            folder / "zeroshot_classification_templates.txt", ["{c}", "a drawing of {c}", "an icon of {c}"]
        )
    return left_out


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
