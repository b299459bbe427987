"""A frozen tower's network as an image tower of open_clip, for LiT and for training that starts at its weights."""

from typing import Any

import torch
from open_clip.model import _build_vision_tower
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from threetowers.errors import UsageError
from threetowers.towers.frozen.base import FrozenTower
from threetowers.towers.frozen.timm import TimmTrunk, pool_name
from threetowers.towers.weights import load_strictly


def as_image_tower(tower: FrozenTower, projection: Tensor | None) -> tuple[nn.Module, dict[str, Any]]:
    """The frozen tower's network as an open_clip image tower, and the vision_cfg that rebuilds it.

    projection: bias-free map [D, P] of the tower's features onto the pair's space; None keeps the width P.
    Raises UsageError when open_clip's format cannot describe the network.
    """
    if tower.reads == "texts":
        raise UsageError(
            f"third: {tower.spec!r} reads texts and cannot become an image tower (lit, lit-unlocked, "
            "pair.image_from). It can serve as third tower of 3t"
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
    image = _build_vision_tower(tower.width if projection is None else len(projection), config)
    load_strictly(image, state, tower.spec)
    return image.to(memory_format=torch.channels_last), config


def _projection_key(state: dict[str, Tensor], spec: str) -> str:
    for key in ("proj", "head.proj.weight"):
        if key in state:
            return key
    raise UsageError(
        f"third: {spec!r} ends in no linear projection, so open_clip has no place for another one"
    )
