"""The two encoders of an export: those of the main pair, or those of the convex combination with the third tower.

The combination's score s_α(I, T) = (1 − α) f(I)·g(T) + α h_g(I)·g_h(T) (arXiv 2305.16999, figure 5; in score space) is
the product of two vectors, so that one index serves it:

    [√(1−α) f ; √α h_g] · [√(1−α) g ; √α g_h]

f and g are the main towers, h_g is the third tower's head that faces the texts, and g_h the text tower's head that
faces the third tower. Each of them is a unit vector, and therefore the concatenated ones are too.
Legend: B batch, n tokens, D embedding, P width of the third tower, N samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from threetowers.data.transforms import ImageSpec, fixed_view
from threetowers.errors import UsageError
from threetowers.objective.losses import unit
from threetowers.run.finished import FinishedRun
from threetowers.run.thirds import check_trained_with
from threetowers.settings import read_config
from threetowers.towers.frozen.base import FrozenTower
from threetowers.towers.frozen.load import load_frozen
from threetowers.towers.pair import encode_text


@dataclass(frozen=True)
class Encoders:
    """What an export computes, as networks, and as the run itself computes it, for the comparison.

    image: pixels [B, 3, H, W], scaled and standardised, to unit vectors [B, width]. text: token ids [B, n] to unit
    vectors [B, width]. encode_image, encode_text: unit vectors float32 [N, width] of images and of texts.
    remarks: what a user has to know about them, a line each.
    """

    image: nn.Module
    text: nn.Module
    encode_image: Callable[[Sequence[Image.Image]], Tensor]
    encode_text: Callable[[Sequence[str]], Tensor]
    width: int
    remarks: tuple[str, ...] = ()


def main_encoders(finished: FinishedRun) -> Encoders:
    """The main pair of a run."""
    return Encoders(
        _Image(finished.img),
        _Text(finished.txt),
        finished.encode_image,
        finished.encode_text,
        finished.embed_dim,
    )


def combined_encoders(finished: FinishedRun, run: Path, alpha: float, target: str) -> Encoders:
    """The main pair of a run combined with its third tower, which reads the same pixels.

    alpha: in (0, 1]. target: how an error begins. Raises UsageError for an alpha outside, for a run without exactly one
    third tower of images that the text tower faces, and for a third tower whose pixels differ from the main tower's in
    more than mean and std. Raises CheckpointError when the third tower is not that of the training.
    """
    if not 0 < alpha <= 1:
        raise UsageError(f"{target}: --alpha {alpha:g}: a weight from 0 to 1 is needed")
    third = _third(finished, run, target)
    spec = finished.architecture.image
    if _geometry(third.image) != _geometry(spec) or len(third.image.mean) != len(spec.mean):
        raise UsageError(
            f"{target}: --alpha: the third tower {third.spec} takes other pixels than the main tower "
            f"({_words(third.image)}; {_words(spec)}), and a graph has one input for both; leave --alpha out"
        )
    head, text_head = finished.heads[f"{third.view}@txt"], finished.heads[f"txt@{third.view}"]
    weights = (1 - alpha) ** 0.5, alpha**0.5
    image = _CombinedImage(finished.img, third.module, head, weights, spec, third.image)
    text = _CombinedText(finished.txt, text_head, weights)

    @torch.inference_mode()
    def encode_image(images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.from_numpy(np.stack([fixed_view(each, third.image) for each in images]))
        side = unit(third(pixels) @ head.T)
        return torch.cat([weights[0] * finished.encode_image(images), weights[1] * side], dim=1)

    @torch.inference_mode()
    def encode_text_twice(texts: Sequence[str]) -> Tensor:
        raw = encode_text(finished.txt, finished.tokenizer(texts))
        return torch.cat([weights[0] * unit(raw), weights[1] * unit(raw @ text_head.T)], dim=1)

    width = finished.embed_dim + len(head)
    remark = (
        f"The vectors combine the main pair with the third tower {third.spec} at α = {alpha:g}. Their products are the "
        "combined scores. The image graph holds and runs both image towers."
    )
    return Encoders(image, text, encode_image, encode_text_twice, width, (remark,))


def _third(finished: FinishedRun, run: Path, target: str) -> FrozenTower:
    """The one third tower of images that shares a pair of heads with the text tower, loaded and checked."""
    heads = finished.heads
    found = [
        each
        for each in finished.described["thirds"]
        if each["reads"] == "images" and {f"{each['view']}@txt", f"txt@{each['view']}"} <= heads.keys()
    ]
    if len(found) != 1:
        method = finished.described["method"]
        raise UsageError(
            f"{target}: --alpha combines the main pair with a third tower of images that shares a pair of heads with "
            f"the text tower, and this run ({method}) has {len(found) or 'none'} of them; leave --alpha out"
        )
    (described,) = found
    config = read_config(run / "config.toml")
    third = load_frozen(
        described["spec"], described["view"], features=config.third_features, precision=config.third_precision
    )
    check_trained_with(run, described, third)
    if third.precision != "fp32":
        raise UsageError(
            f"{target}: --alpha: the third tower computes in {third.precision}; a graph is in fp32"
        )
    return third


def _geometry(spec: ImageSpec) -> ImageSpec:
    """The preprocessing but for mean and std, the same for specs that make the same pixels."""
    spec = replace(spec, mean=(0.0,), std=(1.0,), resize_size=spec.resize_size or spec.size)
    cropped = spec.resize == "shortest" or spec.resize_size != spec.size
    return spec if cropped else replace(spec, centre="round")


def _words(spec: ImageSpec) -> str:
    resized = f"{spec.resize} {spec.resize_size or spec.size}"
    return f"{resized}, crop {spec.size}, {spec.interpolation}, centre {spec.centre}"


class _Image(nn.Module):
    """An image tower whose output is scaled to unit vectors [B, D]."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        return unit(self.tower(pixels))


class _Text(nn.Module):
    """A text tower whose output is scaled to unit vectors [B, D]."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, tokens: Tensor) -> Tensor:
        return unit(encode_text(self.tower, tokens))


class _CombinedImage(nn.Module):
    """Both image towers on the same pixels, which are standardised again for the third: unit vectors [B, 2 D].

    head: weight [D, P]. weights: √(1−α) and √α.
    """

    ratio: Tensor
    offset: Tensor
    head: Tensor

    def __init__(
        self,
        tower: nn.Module,
        third: nn.Module,
        head: Tensor,
        weights: tuple[float, float],
        spec: ImageSpec,
        third_spec: ImageSpec,
    ) -> None:
        super().__init__()
        self.tower, self.third, self.weights = tower, third, weights
        mean, std, other_mean, other_std = (
            torch.tensor(values).view(1, -1, 1, 1)
            for values in (spec.mean, spec.std, third_spec.mean, third_spec.std)
        )
        self.register_buffer("ratio", std / other_std)
        self.register_buffer("offset", (mean - other_mean) / other_std)
        self.register_buffer("head", head)

    def forward(self, pixels: Tensor) -> Tensor:
        side = self.third(pixels * self.ratio + self.offset) @ self.head.T
        return torch.cat([self.weights[0] * unit(self.tower(pixels)), self.weights[1] * unit(side)], dim=1)


class _CombinedText(nn.Module):
    """The text tower by itself and through its head: unit vectors [B, 2 D]; head: weight [D, D]."""

    head: Tensor

    def __init__(self, tower: nn.Module, head: Tensor, weights: tuple[float, float]) -> None:
        super().__init__()
        self.tower, self.weights = tower, weights
        self.register_buffer("head", head)

    def forward(self, tokens: Tensor) -> Tensor:
        raw = encode_text(self.tower, tokens)
        return torch.cat([self.weights[0] * unit(raw), self.weights[1] * unit(raw @ self.head.T)], dim=1)
