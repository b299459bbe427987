"""Small pictures of random pixels."""

import io
from functools import cache

import numpy as np
from PIL import Image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Random RGB pixels."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    """The file that Pillow writes; `options` are those of the format."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@cache
def picture(seed: int, format: str = "PNG") -> bytes:
    """An encoded picture of 3 to 11 pixels in each direction."""
    height, width = np.random.default_rng(seed).integers(3, 12, 2).tolist()
    return encoded(noise(width, height, seed), format)
