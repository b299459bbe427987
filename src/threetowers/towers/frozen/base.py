"""What every frozen tower is, and what each kind of them brings: its names, its loader and its card.

    tower = load_frozen("timm:resnet50")
    features = tower(pixels)      # uint8 [B, 3, H, W] of tower.image.size → float32 [B, P], no gradient

A frozen tower is not a submodule of anything: it stays in eval mode whatever its user does, and it is never part of an
optimiser, a checkpoint or an export. It brings its own preprocessing.

Legend: B images or texts, n tokens, N places of a feature map, P the tower's width.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from threetowers.data.transforms import Colours, ImageSpec, normalise, per_channel
from threetowers.errors import CheckpointError, UsageError
from threetowers.towers.attention import own_attention
from threetowers.towers.hub import cache_alone, why_no_hub

Reads = Literal["images", "texts"]
FEATURES = ("pooled", "cls", "mean")
"""What can be taken of a network: its own pooled features, its first token, or the mean of its tokens."""


class TextInput(Protocol):
    """Captions to the ids that a frozen text tower takes."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64 [B, n], padded on the right."""
        ...

    def lengths(self, tokens: Tensor) -> Tensor:
        """Number of ids of each text without padding, int64 [B]."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Plain values that differ whenever the ids of some text may differ."""
        ...


@dataclass(frozen=True)
class Loaded:
    """What a loader hands over.

    module: the network, whose output is features [B, P]. width: P. inputs: the preprocessing of a network of images,
    or the tokenizer of a network of texts. vision_cfg: open_clip's description of the same network, None when there
    is none.
    """

    module: nn.Module
    width: int
    inputs: ImageSpec | TextInput
    vision_cfg: dict[str, Any] | None = None


@dataclass(frozen=True)
class FrozenTower:
    """A pretrained model of images or of texts, in eval mode for ever.

    view: its name in rows, heads and metrics. spec: as the user wrote it. features: which of its outputs is meant,
    pooled, cls or mean. precision: of its weights and its arithmetic. The other fields are those of `Loaded`.
    """

    view: str
    spec: str
    module: nn.Module = field(repr=False)
    width: int
    inputs: ImageSpec | TextInput = field(repr=False)
    vision_cfg: dict[str, Any] | None = field(default=None, repr=False)
    features: str = "pooled"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        dtype = (
            torch.bfloat16 if self.precision == "bf16" else None
        )  # fp32 leaves every tensor as it was loaded
        self.module.eval().requires_grad_(False)
        self.module.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def reads(self) -> Reads:
        """Whether the tower takes images or texts."""
        return "images" if isinstance(self.inputs, ImageSpec) else "texts"

    @property
    def image(self) -> ImageSpec:
        """The preprocessing of a tower that reads images."""
        assert isinstance(self.inputs, ImageSpec), f"{self.spec} reads texts"
        return self.inputs

    @property
    def tokenizer(self) -> TextInput:
        """The tokenizer of a tower that reads texts."""
        assert not isinstance(self.inputs, ImageSpec), f"{self.spec} reads images"
        return self.inputs

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """Features float32 [B, P] of uint8 pixels [B, 3, size, size] or token ids int64 [B, n].

        The network runs in eval mode and without gradients, always.
        """
        if self.module.training:
            self.module.eval()
        if self.reads == "images":
            inputs = normalise(inputs, self.image)
            inputs = inputs.bfloat16() if self.precision == "bf16" else inputs
        with own_attention():
            return self.module(inputs).float()  # type: ignore[no-any-return]

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token ids int64 [B, n] of texts, without padding that all of them share."""
        tokens = self.tokenizer(texts)
        return tokens[:, : int(self.tokenizer.lengths(tokens).max())]

    def to(self, device: torch.device) -> "FrozenTower":
        """The tower itself, its network moved to the device."""
        self.module.to(device)
        return self

    def fingerprints(self) -> dict[str, str]:
        """Digests of the weights and of the preprocessing or tokenizer, and the choice of features."""
        return {
            "weights": weights_digest(self.module),
            "preprocessing": digest_of(self.inputs.as_dict()),
            "features": feature_name(self.features, self.precision),
        }

    def fingerprint(self) -> str:
        """One hex digest of all fingerprints."""
        return digest_of(self.fingerprints())

    def had_gradient(self) -> bool:
        """Whether any weight could receive a gradient, or has received one since the tower was loaded."""
        return any(weight.requires_grad or weight.grad is not None for weight in self.module.parameters())


@dataclass(frozen=True)
class Card:
    """What is known of a tower before it is used.

    image: the preprocessing, of a tower of images. context: the longest text in tokens, of a tower of texts.
    """

    spec: str
    num_parameters: int
    width: int
    image: ImageSpec | None = None
    context: int | None = None

    def text(self) -> str:
        """The card as a few lines for people."""
        lines = [self.spec, f"  parameters     {self.num_parameters:,}", f"  width          {self.width}"]
        if self.context is not None:
            lines.append(f"  reads texts of at most {self.context} tokens, with its own tokenizer")
        if self.image is not None:
            image = self.image
            target = image.resize_size or image.size
            how = "both sides" if image.resize == "squash" else "the shorter side"
            whole = image.size == target and image.resize == "squash"
            lines += [
                f"  input          {image.size} × {image.size} pixels"
                + (", grey" if len(image.mean) == 1 else ""),
                f"  resize         {how} to {target}, {image.interpolation}, "
                + ("no crop" if whole else f"centre crop {image.size}"),
                f"  mean           {', '.join(f'{v:g}' for v in image.mean)}",
                f"  std            {', '.join(f'{v:g}' for v in image.std)}",
            ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Kind:
    """One kind of frozen tower, as the list in `load.py` holds it.

    prefix: what its names begin with. forms: the names a user can write. help: a line for people.
    load: (name without prefix, features) → network; raises UsageError for a name or features that do not exist and
    CheckpointError for weights that are missing, damaged or do not fit.
    card: (whole name, name without prefix) → card of published weights, without fetching them; None where every tower
    has to be loaded to be described.
    """

    prefix: str
    reads: Reads
    forms: tuple[str, ...]
    help: str
    load: Callable[[str, str], Loaded]
    card: Callable[[str, str], Card] | None = None


def num_parameters(module: nn.Module) -> int:
    """How many numbers the parameters of a network hold."""
    return sum(parameter.numel() for parameter in module.parameters())


def weights_digest(module: nn.Module) -> str:
    """Sixteen hex digits of every weight's name, shape, type and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def digest_of(values: Any) -> str:
    """Sixteen hex digits of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def feature_name(features: str, precision: str) -> str:
    """The choice of features with the precision they are computed in; fp32 goes without saying."""
    return features if precision == "fp32" else f"{features} in {precision}"


def pooled_only(source: str, features: str) -> None:
    """Raises UsageError unless the features are pooled, for networks whose tokens nobody hands out."""
    if features != "pooled":
        raise UsageError(
            f"third_features: {source} gives its pooled features only, not {features!r}; take third_features = pooled"
        )


def token_mean(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean [B, P] over tokens [B, N, P]; with a mask [B, N] over those that count."""
    if mask is None:
        return tokens.mean(dim=1)
    counted = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, with the next one if it announces it, or its type when it has none."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip()[:300] for line in lines[: 2 if lines[0].endswith(":") else 1])


def channels_of(source: str, mean: Any, std: Any, channels: int) -> Colours:
    """`per_channel`, whose reasons become a UsageError that names the tower."""
    try:
        return per_channel(mean, std, channels)
    except (TypeError, ValueError) as error:
        raise UsageError(f"third: {source}: {error}") from None


@contextlib.contextmanager
def foreign(source: str, what: str, remedy: str = "", *, hub: bool = False) -> Iterator[None]:
    """Whatever another library's loader raises (network, hub, format) ends as CheckpointError with its reason.

    hub: whether the Hugging Face Hub may be asked. Where its address cannot be looked up, the loader takes what the
    cache has, at once, instead of trying again for a minute.
    """
    reason = why_no_hub() if hub else ""
    try:
        with cache_alone() if reason else contextlib.nullcontext():
            yield
    except Exception as error:
        advice = f". {remedy}" if remedy else ""
        said = first_line(error)
        if reason and re.search("offline|connect|cache", said, re.IGNORECASE):  # what the libraries then say
            said = reason
        raise CheckpointError(f"{source}: {what} could not be loaded ({said}){advice}") from error
