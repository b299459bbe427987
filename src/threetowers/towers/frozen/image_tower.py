"""A frozen tower's network as an image tower of open_clip, for LiT and for training that starts at its weights."""

import sys
from types import SimpleNamespace
from typing import Any

import torch
from open_clip.model import _build_vision_tower, resize_pos_embed
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from threetowers.errors import UsageError
from threetowers.towers.frozen.base import FrozenTower
from threetowers.towers.frozen.timm import TimmTrunk, pool_name
from threetowers.towers.pair import has_quick_gelu
from threetowers.towers.weights import load_strictly


def as_image_tower(
    tower: FrozenTower, projection: Tensor | None, size: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The frozen tower's network as an open_clip image tower, and the vision_cfg that rebuilds it.

    projection: bias-free map [D, P] of the tower's features onto the pair's space; None keeps the width P. size: side
    of its input, None for the tower's own; position embeddings are interpolated, which is said on standard error.
    Raises UsageError when open_clip's format cannot describe the network.
    """
    if tower.reads == "texts":
        raise UsageError(
            f"third: {tower.spec!r} reads texts and cannot become an image tower (lit, lit-unlocked, "
            "start.image). It can serve as third tower of 3t"
        )
    if tower.features != "pooled" or tower.precision != "fp32":
        raise UsageError(
            f"third: as image tower {tower.spec!r} is used as its library builds it, which needs "
            "third_features = pooled and third_precision = fp32"
        )
    if tower.vision_cfg is None:
        raise UsageError(
            f"third: {tower.spec!r} cannot become the image tower of an open_clip model: its network was built with "
            "arguments of its own, or ends in a head, that open_clip's format does not record. It can serve as third "
            "tower of 3t"
            + (", and a CLIPModel of transformers as start.image" if tower.spec.startswith("hf:") else "")
        )
    config = dict(tower.vision_cfg)
    state = {key: value.cpu() for key, value in tower.module.state_dict().items()}
    if isinstance(tower.module, TimmTrunk):
        config["timm_proj"] = "none" if projection is None else "linear"
        if projection is not None:
            state["head.proj.weight"] = projection
        else:
            config["timm_pool"] = pool_name(
                tower.module.trunk
            )  # without a projection open_clip has no default for it
    elif projection is not None:
        key = _projection_key(state, tower.spec)
        # the tower ends in a projection of its own; the two in a row are one matrix. A native ViT stores [in, out]
        native = isinstance(tower.module, VisionTransformer)
        state[key] = state[key] @ projection.T if native else projection @ state[key]
    if size is not None:
        config["image_size"] = size
    width = tower.width if projection is None else len(projection)
    image = _build_vision_tower(width, config, has_quick_gelu(tower.module))
    if isinstance(image, VisionTransformer):
        _interpolate(state, image, tower.spec)
    load_strictly(image, state, tower.spec)
    if size is not None:
        _check_size(image, tower, size)
    return image.to(memory_format=torch.channels_last), config


def _interpolate(state: dict[str, Tensor], image: VisionTransformer, spec: str) -> None:
    """Resizes the position embedding of `state` to the grid of `image`, by open_clip's bicubic interpolation."""
    key = "positional_embedding"
    before = len(state[key])
    prefixed = {f"visual.{key}": state[key]}
    resize_pos_embed(prefixed, SimpleNamespace(visual=image))
    state[key] = prefixed[f"visual.{key}"]
    if len(state[key]) != before:
        rows, columns = image.grid_size
        print(
            f"note: {spec}: its position embedding of {before - 1} patches is interpolated to {rows} × {columns}",
            file=sys.stderr,
        )


@torch.no_grad()
def _check_size(image: nn.Module, tower: FrozenTower, size: int) -> None:
    """Raises UsageError for a network that does not take images of this size as open_clip builds it."""
    was = image.training
    try:
        image.eval()(torch.zeros(1, len(tower.image.mean), size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"start.image_size: {tower.spec!r} as open_clip builds it takes no images of {size} pixels "
            f"({str(error).splitlines()[0]}). Leave it out, or give another tower"
        ) from None
    image.train(was)


def _projection_key(state: dict[str, Tensor], spec: str) -> str:
    for key in ("proj", "head.proj.weight"):
        if key in state:
            return key
    raise UsageError(
        f"third: {spec!r} ends in no linear projection, so open_clip has no place for another one"
    )
