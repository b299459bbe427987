"""Images made worse in six ways and five degrees, to measure how far a model's figures fall.

    source = CorruptedSource(open_source("photos/"), "noise", severity=3)

The six kinds and the five severities follow the idea of ImageNet-C (Hendrycks and Dietterich, ICLR 2019, arXiv
1903.12261). The strengths are our own: its lengths are pixels of images of 224 px, and those here are shares of an
image's shorter side, so that small images are corrupted and not destroyed. `CORRUPTIONS` states all of them.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageFilter

from threetowers.data.copies import middle_key
from threetowers.data.decode import decode
from threetowers.data.order import hash64, uniforms
from threetowers.data.source import Record, Source
from threetowers.errors import BadSample, UsageError

SEVERITIES = (1, 2, 3, 4, 5)
_GRAINS = (
    224  # of noise on the shorter side of a larger image: finer noise would vanish when the image is reduced
)
_GREY = (128, 128, 128)


@dataclass(frozen=True)
class Corruption:
    """A kind of corruption. strengths: one for each severity. unit: what a strength is, in words.

    apply: image, strength, seed → image of the same size.
    """

    name: str
    strengths: tuple[float, float, float, float, float]
    unit: str
    apply: Callable[[Image.Image, float, int], Image.Image]


def _noise(image: Image.Image, strength: float, seed: int) -> Image.Image:
    pixels = np.asarray(image, np.float32)
    height, width = pixels.shape[:2]
    grain = max(min(width, height) / _GRAINS, 1.0)
    rows, columns = (np.arange(side) / grain for side in (height, width))
    rng = np.random.Generator(np.random.Philox(key=seed))
    grains = rng.standard_normal((int(rows[-1]) + 1, int(columns[-1]) + 1, 3), np.float32)
    noise = grains[rows.astype(np.int64)[:, None], columns.astype(np.int64)]
    return _image(pixels + noise * (255 * strength))


def _blur(image: Image.Image, strength: float, seed: int) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(strength * min(image.size)))


def _contrast(image: Image.Image, strength: float, seed: int) -> Image.Image:
    pixels = np.asarray(image, np.float32)
    mean = pixels.mean(axis=(0, 1))
    return _image(mean + (pixels - mean) * strength)


def _jpeg(image: Image.Image, strength: float, seed: int) -> Image.Image:
    with BytesIO() as file:
        image.save(file, "JPEG", quality=int(strength))
        return Image.open(file).convert("RGB")


def _pixelate(image: Image.Image, strength: float, seed: int) -> Image.Image:
    scale = min(strength / min(image.size), 1.0)
    cells = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(cells, Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


def _occlusion(image: Image.Image, strength: float, seed: int) -> Image.Image:
    side = max(round(strength * min(image.size)), 1)
    # the same draws at every severity: a larger square then covers what a smaller one covers
    across, down = uniforms(2, seed)
    left, top = round(across * (image.width - side)), round(down * (image.height - side))
    covered = image.copy()
    covered.paste(_GREY, (left, top, left + side, top + side))
    return covered


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


# fmt: off
CORRUPTIONS = (
    Corruption("noise", (.04, .08, .12, .18, .26), "standard deviation, as a share of the grey levels", _noise),
    Corruption("blur", (.012, .018, .025, .035, .05), "standard deviation, as a share of the shorter side", _blur),
    Corruption("contrast", (.85, .7, .55, .4, .2), "share of the contrast that is left", _contrast),
    Corruption("jpeg", (70, 45, 25, 12, 6), "quality, as Pillow counts it; blocks have 8 px at any size", _jpeg),
    Corruption("pixelate", (26, 22, 18, 14, 10), "cells on the shorter side", _pixelate),
    Corruption("occlusion", (.25, .35, .45, .55, .65), "side of a grey square, as a share of the shorter side",
               _occlusion),
)
# fmt: on
"""Every kind, with its strengths at severities 1 to 5."""
_BY_NAME = {corruption.name: corruption for corruption in CORRUPTIONS}


def corrupt(image: Image.Image, name: str, severity: int, seed: int) -> Image.Image:
    """The image with a corruption: mode RGB, the same size, and the same pixels for the same arguments.

    image: decoded, in mode RGB. name: of a kind in `CORRUPTIONS`. severity: 1 to 5. seed: of this image; noise and
    occlusion use it, each in draws of its own. Raises UsageError for an unknown name or severity.

        corrupt(image, "occlusion", severity=2, seed=hash64("corruption", 0, id))
    """
    check_corruption(name, severity)
    assert image.mode == "RGB"
    corruption = _BY_NAME[name]
    return corruption.apply(image, corruption.strengths[severity - 1], hash64(name, seed))


def check_corruption(name: str, severity: int) -> None:
    """Raises UsageError for a corruption or a severity that there is not."""
    if name not in _BY_NAME:
        raise UsageError(f"corruption: there is no {name!r}. Give one of {', '.join(_BY_NAME)}")
    if severity not in SEVERITIES:
        raise UsageError(f"severity: {severity!r} is not one of 1 to 5, of which 5 is the strongest")


@dataclass(eq=False)
class CorruptedSource:
    """A source with every image corrupted; itself a source.

    Images are returned as PNG, which keeps every pixel. What is drawn for an image depends on the seed and on the
    image's id, so that samples of equal images stay equal. The fingerprint changes with the corruption, the severity
    and the seed: stored features of one source are never taken for those of another.
    `image_sizes` has to corrupt every image, since the size of a PNG is not known before; evaluation never asks for it.
    Raises UsageError for an unknown name or severity.
    """

    source: Source
    corruption: str
    severity: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_corruption(self.corruption, self.severity)
        self.name = f"{self.source.name}, {self.corruption} {self.severity}"
        self.problems: Sequence[BadSample] = self.source.problems
        self.class_names, self.templates = self.source.class_names, self.source.templates
        strength = _BY_NAME[self.corruption].strengths[self.severity - 1]
        about = (self.source.fingerprint, self.corruption, strength, self.seed)
        self.fingerprint = hashlib.sha256(repr(about).encode("utf-8", "surrogateescape")).hexdigest()

    @property
    def layout(self) -> str:
        return f"{self.source.layout}; {self.corruption} of severity {self.severity}, seed {self.seed}"

    def __len__(self) -> int:
        return len(self.source)

    def record(self, index: int) -> Record:
        return self.source.record(index)

    def image(self, index: int) -> bytes:
        """The corrupted image as PNG; raises BadSample when the source's image cannot be read or decoded."""
        record = self.source.record(index)
        seed = hash64("corruption", self.seed, record.image_id or record.id)
        image = decode(self.source.image(index), record.id)
        with BytesIO() as file:
            # Not compressed: the bytes are decoded again at once.
            corrupt(image, self.corruption, self.severity, seed).save(file, "PNG", compress_level=0)
            return file.getvalue()

    def image_sizes(self) -> np.ndarray:
        return np.array([self._size(index) for index in range(len(self))], np.int64)

    def image_middles(self, indices: np.ndarray) -> np.ndarray:
        return np.array([middle_key(self.image(index)) for index in indices.tolist()], np.uint64)

    def _size(self, index: int) -> int:
        """In bytes; 0 for an image that cannot be decoded."""
        try:
            return len(self.image(index))
        except BadSample:
            return 0
