"""Third towers out of timm: timm:NAME, timm:NAME@FILE, timm:local-dir:DIR."""

import math
from pathlib import Path
from typing import Any, get_args

import timm
import torch
from torch import Tensor, nn

from threetowers.data.transforms import ImageSpec, Interpolation
from threetowers.errors import CheckpointError, UsageError
from threetowers.settings import did_you_mean
from threetowers.towers.frozen.base import (
    Card,
    Kind,
    Loaded,
    channels_of,
    foreign,
    num_parameters,
    token_mean,
)
from threetowers.towers.weights import load_strictly, read_safetensors, say_unwrapped, unwrapped

OTHER_SIZE = "give the timm name of that size, or timm:local-dir:DIR whose model_args have that img_size"


class TimmTrunk(nn.Module):
    """A timm network without classifier: images in, features [B, P] out.

    features: pooled as the network pools, cls the class token, mean the mean over patches or places.
    """

    def __init__(self, trunk: nn.Module, features: str = "pooled") -> None:
        super().__init__()
        self.trunk, self.features = trunk, features

    def forward(self, images: Tensor) -> Tensor:
        if self.features == "pooled":
            return self.trunk(images)  # type: ignore[no-any-return]
        found: Tensor = self.trunk.forward_features(images)  # type: ignore[operator]
        if found.ndim == 4:
            return found.mean(dim=(1, 2) if getattr(self.trunk, "output_fmt", "NCHW") == "NHWC" else (2, 3))
        if self.features == "cls":
            return found[:, 0]
        return token_mean(found[:, getattr(self.trunk, "num_prefix_tokens", 0) :])


def load_timm(name: str, features: str) -> Loaded:
    """A timm network without its classifier, and the preprocessing that its weights were published with.

    Raises UsageError for an unknown name or features it has not, CheckpointError for weights that fail.
    """
    local = name.startswith("local-dir:")
    name, at, file = (name, "", "") if local else name.partition("@")
    if local:
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "config.json").is_file():
            found = "holds no" if folder.is_dir() else "is no folder with a"
            raise CheckpointError(f"timm:{name}: {folder} {found} config.json in timm's format")
        file = str(folder / "model.safetensors")
        if not Path(file).is_file():
            raise CheckpointError(
                f"timm:{name}: no model.safetensors in {folder}; save it with safe_serialization"
            )
    else:
        known_name(name)
        if at and not file:
            raise UsageError(
                f"third: timm:{name}@: no file behind the @, for example because a shell variable is empty; give "
                f"timm:{name}@FILE, or timm:{name} for the published weights"
            )
    remedy = "Offline, give them as timm:NAME@FILE or timm:local-dir:DIR"
    with foreign(f"timm:{name}", "the weights", remedy, hub=not (local or at)):
        # with its classifier, so that timm checks the published weights key by key before the classifier goes
        trunk = timm.create_model(name, pretrained=not (local or at))
    classifier = trunk.pretrained_cfg.get("classifier", ())
    trunk.reset_classifier(0)
    if file:
        names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
        drop = tuple(f"{prefix}." for prefix in names)
        whole, prefix = unwrapped(read_safetensors(file), trunk.state_dict())
        say_unwrapped(prefix, file)
        state = {key: value for key, value in whole.items() if not key.startswith(drop)}
        load_strictly(trunk, state, file, other_size=OTHER_SIZE)
    spec = timm_image_spec(trunk, name)
    width = pooled_width(trunk)
    if features != "pooled":
        width = _unpooled_width(trunk, name, features, spec)
        return Loaded(TimmTrunk(trunk, features), width, spec)
    _check_pooled(trunk, name, spec, width)
    vision_cfg = None
    if (
        width == trunk.num_features and len(spec.mean) == 3 and (not local or _as_timm_builds_it(trunk))
    ):  # open_clip counts on num_features
        vision_cfg = {
            "timm_model_name": trunk.pretrained_cfg["architecture"],
            "timm_pool": "",
            "image_size": spec.size,
        }
    return Loaded(TimmTrunk(trunk), width, spec, vision_cfg)


def known_name(name: str) -> None:
    """Raises UsageError, with the nearest name, unless timm has the model."""
    if Path(name).is_dir():
        raise UsageError(f"third: timm:{name} is a folder; write timm:local-dir:{name}")
    if not timm.is_model(name):
        raise UsageError(f"third: timm has no model {name!r}" + near_timm(name))


def pooled_width(trunk: Any) -> int:
    """P of the pooled features; some heads widen what they pool."""
    return int(getattr(trunk, "head_hidden_size", None) or trunk.num_features)


@torch.no_grad()
def _check_pooled(trunk: Any, name: str, image: ImageSpec, width: int) -> None:
    """Raises UsageError for a network that gives something else than one vector of `width` for an image."""
    found = trunk.eval()(torch.zeros(1, len(image.mean), image.size, image.size))
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != (1, width):
        raise UsageError(
            f"third: timm:{name}: this network does not pool its features (it gives {shape} for an image, not "
            f"{(1, width)}); take third_features = mean, or set global_pool in its config.json"
        )


@torch.no_grad()
def _unpooled_width(trunk: Any, name: str, features: str, image: ImageSpec) -> int:
    """P of the class token or of the mean, which some families keep narrower than what they pool."""
    if features == "cls" and (
        getattr(trunk, "cls_token", None) is None or getattr(trunk, "num_prefix_tokens", 0) < 1
    ):
        raise UsageError(f"third_features: timm:{name} has no class token; take pooled or mean")
    pixels = torch.zeros(1, len(image.mean), image.size, image.size)
    found = trunk.eval().forward_features(pixels)
    if not isinstance(found, Tensor) or found.ndim not in (3, 4):
        raise UsageError(
            f"third_features: timm:{name} gives no map of features to take {features!r} from; take pooled"
        )
    width: int = TimmTrunk(trunk, features)(pixels).shape[1]
    return width


def _as_timm_builds_it(trunk: Any) -> bool:
    """Whether the architecture's name alone rebuilds this network; open_clip's format has no place for arguments."""
    with torch.random.fork_rng(devices=[]):
        named = timm.create_model(trunk.pretrained_cfg["architecture"], num_classes=0)

    def shapes(module: nn.Module) -> dict[str, torch.Size]:
        return {key: value.shape for key, value in module.state_dict().items()}

    return (
        repr(named) == repr(trunk) and shapes(named) == shapes(trunk) and pool_name(named) == pool_name(trunk)
    )


def pool_name(trunk: Any) -> str:
    """The name of a timm network's pooling, wherever its family keeps it; empty when it keeps none."""
    for owner in (trunk, getattr(trunk, "head", None)):
        pool = getattr(owner, "global_pool", None)
        name = getattr(pool, "pool_type", pool)
        if isinstance(name, str):
            return name
    return ""


def timm_image_spec(trunk: nn.Module, name: str) -> ImageSpec:
    """The preprocessing that timm gives a network; raises UsageError for one that is not square."""
    config = timm.data.resolve_model_data_config(trunk)
    channels, height, width = config["input_size"]
    first = trunk.pretrained_cfg.get("first_conv")  # type: ignore[union-attr, operator]
    if isinstance(first, str) and first in dict(trunk.named_modules()):
        channels = getattr(trunk.get_submodule(first), "in_channels", channels)
    if height != width or config["crop_mode"] not in ("center", "squash"):
        raise UsageError(
            f"third: timm:{name} wants {height}×{width} pixels with crop mode {config['crop_mode']!r}; "
            "only square inputs with crop mode center or squash are supported"
        )
    if config["interpolation"] not in get_args(Interpolation):
        raise UsageError(
            f"third: timm:{name}: its interpolation {config['interpolation']!r} is none of "
            f"{', '.join(get_args(Interpolation))}; set one in its config.json"
        )
    return ImageSpec(
        size=height,
        **channels_of(f"timm:{name}", config["mean"], config["std"], channels),
        interpolation=config["interpolation"],
        resize="squash" if config["crop_mode"] == "squash" else "shortest",
        resize_size=math.floor(height / config["crop_pct"]),
    )


def near_timm(name: str) -> str:
    """A clause that names the nearest known network, or says how to list them."""
    clause = did_you_mean(name, timm.list_models())
    return (
        clause
        if clause.startswith(";")
        else ". `python -c 'import timm; print(timm.list_models())'` lists them"
    )


def timm_card(spec: str, name: str) -> Card:
    """The card of published weights; the network is built without memory."""
    name = name.partition("@")[0]
    known_name(name)
    with torch.device("meta"), foreign(spec, "the network"):
        trunk = timm.create_model(name, pretrained=False, num_classes=0)
    image = timm_image_spec(trunk, name)
    return Card(spec, num_parameters(trunk), pooled_width(trunk), image)


TIMM = Kind(
    prefix="timm",
    reads="images",
    forms=("timm:NAME", "timm:NAME@FILE", "timm:local-dir:DIR"),
    help="published weights of a timm model; timm:NAME@FILE and timm:local-dir:DIR read yours",
    load=load_timm,
    card=timm_card,
)
