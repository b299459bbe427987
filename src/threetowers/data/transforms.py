"""Turns decoded images into the pixels that a tower takes.

Every tower states its own `ImageSpec`. Fixed views are resized by Pillow, so that they equal those of torchvision,
timm and open_clip. Random views are resized by torch's uint8 kernel, which is several times faster and differs from
Pillow by a grey level or two. Pixels are uint8 until they are normalised on the device.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from threetowers.data.order import uniforms

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
TENSOR_KERNELS = ("bilinear", "bicubic")  # what torch resizes with antialiasing, as Pillow does


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """The input of an image tower.

    size: side of the square input in pixels. resize: `shortest` scales the shorter side to resize_size and takes the
    centre, `squash` scales both sides to it; resize_size 0 means size. centre: how half of an odd margin is rounded,
    `round` as in torchvision, `floor` as in transformers. mean, std: per channel, for pixels in [0, 1]; one value each
    means that the tower takes grey images.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bicubic"
    resize: Literal["shortest", "squash"] = "shortest"
    resize_size: int = 0
    centre: Literal["round", "floor"] = "round"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def at(self, size: int | None) -> "ImageSpec":
        """The same input of another size in pixels, of which the crop is the same share; None keeps the size."""
        if size is None:
            return self
        return replace(self, size=size, resize_size=round(self.resize_size * size / self.size))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "ImageSpec":
        """What `as_dict` made of the preprocessing of a main tower, which takes RGB images."""
        return ImageSpec(**{**values, **per_channel(values["mean"], values["std"], 3)})


class Colours(TypedDict):
    """The two fields of ImageSpec that depend on the number of channels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def per_channel(mean: Any, std: Any, channels: int) -> Colours:
    """The mean and std of a network that takes images of so many channels, as ImageSpec wants them.

    One value, or equal values, hold for all channels. Raises ValueError for channels that cannot be made of an image,
    and for values that do not belong to them.
    """
    if channels not in (1, 3):
        raise ValueError(
            f"it takes images of {channels} channels, and here are RGB images, of which grey ones can be made. "
            "Give a network of 3 channels or 1"
        )

    def values_of(name: str, given: Any) -> tuple[float, ...]:
        values = tuple(float(v) for v in (given if isinstance(given, list | tuple) else [given]))
        if len(set(values)) == 1:
            values = values[:1] * channels
        if len(values) != channels or (name == "std" and 0 in values):
            raise ValueError(
                f"its {name} {given!r} does not fit images of {channels} channels; correct its config file"
            )
        return values

    return Colours(mean=values_of("mean", mean), std=values_of("std", std))


def _filter(image_spec: ImageSpec) -> Image.Resampling:
    return Image.Resampling[image_spec.interpolation.upper()]


def _to_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


def fixed_view(image: Image.Image, image_spec: ImageSpec) -> np.ndarray:
    """The view of an image for inference, uint8 [3, size, size]; it equals torchvision's Resize and CenterCrop."""
    target = image_spec.resize_size or image_spec.size
    width, height = image.size
    if image_spec.resize == "squash":
        resized = (target, target)
    else:
        short, long = sorted((width, height))
        new_long = int(target * long / short)
        resized = (target, new_long) if width <= height else (new_long, target)
    if resized != image.size:
        image = image.resize(resized, _filter(image_spec))
    middle = round if image_spec.centre == "round" else math.floor
    left = middle((resized[0] - image_spec.size) / 2.0)
    top = middle((resized[1] - image_spec.size) / 2.0)
    if (left, top) != (0, 0) or resized != (image_spec.size, image_spec.size):
        image = image.crop((left, top, left + image_spec.size, top + image_spec.size))
    return _to_array(image)


@dataclass(frozen=True, slots=True)
class Crop:
    """A region of an image. box: left, top, right, bottom as shares of its sides; flip: whether it is mirrored."""

    box: tuple[float, float, float, float]
    flip: bool

    def pixels(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(left, top, width, height) in whole pixels, of an image of `size` (width, height); at least 1 × 1."""
        left, top, right, bottom = (
            round(edge * side) for edge, side in zip(self.box, (*size, *size), strict=True)
        )
        left, top = min(left, size[0] - 1), min(top, size[1] - 1)
        return left, top, max(min(right, size[0]) - left, 1), max(min(bottom, size[1]) - top, 1)

    def shrink(self, size: tuple[int, int], target: int) -> float:
        """The factor by which an image can be reduced such that the region's shorter side keeps `target` pixels.

        size: (width, height) of the image in pixels.
        """
        left, top, right, bottom = self.box
        return min((right - left) * size[0], (bottom - top) * size[1]) / target


def random_crop(
    seed: int, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], flip: bool
) -> Crop:
    """The region that belongs to a seed, drawn as in Inception's random resized crop.

    size: (width, height) of the image in pixels. scale, ratio: ranges of the area, as a share of the image, and of
    the aspect ratio. A region that does not fit is clamped to the image and not drawn again, so that every seed
    takes the same number of draws.
    """
    uniform = uniforms(5, seed)
    area = size[0] * size[1] * (scale[0] + (scale[1] - scale[0]) * uniform[0])
    aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * uniform[1])
    width = min(math.sqrt(area * aspect) / size[0], 1.0)
    height = min(math.sqrt(area / aspect) / size[1], 1.0)
    left, top = uniform[2] * (1 - width), uniform[3] * (1 - height)
    return Crop((left, top, left + width, top + height), flip and uniform[4] < 0.5)


def cropped_view(image: np.ndarray, crop: Crop, image_spec: ImageSpec) -> np.ndarray:
    """A region, in whole pixels, of an image uint8 [H, W, 3], resized to the tower's size: uint8 [3, size, size]."""
    height, width = image.shape[:2]
    left, top, across, down = crop.pixels((width, height))
    region, size = image[top : top + down, left : left + across].copy(), (image_spec.size, image_spec.size)
    if image_spec.interpolation in TENSOR_KERNELS:
        batch = torch.from_numpy(region).permute(2, 0, 1)[None]
        pixels = F.interpolate(batch, size, mode=image_spec.interpolation, antialias=True)[0].numpy()
    else:
        pixels = _to_array(Image.fromarray(region).resize(size, _filter(image_spec)))
    return pixels[:, :, ::-1] if crop.flip else pixels


def normalise(pixels: Tensor, image_spec: ImageSpec) -> Tensor:
    """Pixels uint8 [B, 3, H, W] as float32 [B, C, H, W], scaled to [0, 1] and standardised, on their device.

    C is 3, or 1 for a tower of grey images: luma by ITU-R 601, rounded as in Pillow's mode L.
    The memory format is channels last, in which convolutions are faster on CPUs and GPUs.
    """
    if len(image_spec.mean) == 1:
        red, green, blue = pixels.int().unbind(dim=1)
        pixels = (red * 19595 + green * 38470 + blue * 7471 + 0x8000 >> 16).unsqueeze(1)
    mean = torch.tensor(image_spec.mean, device=pixels.device).view(1, -1, 1, 1)
    std = torch.tensor(image_spec.std, device=pixels.device).view(1, -1, 1, 1)
    return ((pixels.float() / 255.0 - mean) / std).contiguous(memory_format=torch.channels_last)
