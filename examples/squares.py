"""The data of the examples: pictures of one coloured square each, drawn in a second."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow", "white", "purple")
CORNERS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
SIDES = {"small": 10, "large": 22}  # pixels
GROUNDS = ("black", "grey", "brown")


def captioned(folder: Path) -> Path:
    """288 pictures, each with its caption in a .txt file of the same name; every caption stands twice."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, caption, _) in enumerate(pictures(shift=0)):
        image.save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(caption, encoding="utf-8")
    return folder


def labelled(folder: Path) -> Path:
    """288 other pictures in one subfolder per colour: what a classifier is trained on."""
    for number, (image, _, colour) in enumerate(pictures(shift=1)):
        (folder / colour).mkdir(parents=True, exist_ok=True)
        image.save(folder / colour / f"{number:03d}.png")
    return folder


def pictures(shift: int) -> Iterator[tuple[Image.Image, str, str]]:
    """Each picture with its caption and its colour; `shift` moves the squares by some pixels."""
    for corner, colour, size, ground, copy in itertools.product(CORNERS, COLOURS, SIDES, GROUNDS, range(2)):
        image = Image.new("RGB", (48, 48), ground)
        side, (right, down) = SIDES[size], CORNERS[corner]
        margin = 1 + shift + 2 * copy
        x, y = (48 - side - margin if far else margin for far in (right, down))
        ImageDraw.Draw(image).rectangle((x, y, x + side, y + side), fill=colour)
        yield image, f"a {size} {colour} square on {ground}, {corner}", colour
