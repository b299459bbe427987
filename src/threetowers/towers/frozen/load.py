"""Third towers: pretrained image models that are read and never trained.

    tower = load_frozen("timm:resnet50", view="third")
    features = tower(pixels)      # uint8 [B, 3, H, W] of tower.image.size → float32 [B, P], no gradient

A frozen tower is not a submodule of anything: it stays in eval mode whatever its user does, and no optimiser,
checkpoint or export meets it. It brings its own preprocessing.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from open_clip.model import _build_vision_tower
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from threetowers.data.transforms import ImageSpec, normalise
from threetowers.errors import CheckpointError, UsageError
from threetowers.towers.attention import own_attention
from threetowers.towers.frozen.base import (
    Loaded,
    digest_of,
    feature_name,
    freeze,
    pooled_only,
    weights_digest,
)
from threetowers.towers.frozen.hf import load_hf
from threetowers.towers.frozen.open_clip import load_open_clip
from threetowers.towers.frozen.text import FrozenTextTower, LoadedText, load_hf_text, load_open_clip_text
from threetowers.towers.frozen.timm import TimmTrunk, load_timm, pool_name
from threetowers.towers.weights import load_strictly, read_safetensors


@dataclass(frozen=True)
class FrozenTower:
    """A pretrained image model in eval mode for ever.

    view: its name in rows, heads and metrics. spec: as the user wrote it. width: P of its features.
    image: its own preprocessing. vision_cfg: open_clip's description of the same network, None when there is none.
    features: which of its outputs is meant, pooled, cls or mean. precision: of its weights and its arithmetic.
    """

    view: str
    spec: str
    module: nn.Module = field(repr=False)
    width: int
    image: ImageSpec
    vision_cfg: dict[str, Any] | None = field(repr=False)
    features: str = "pooled"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        freeze(self.module, self.precision)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Features float32 [B, P] of uint8 pixels [B, 3, size, size]; eval mode and no gradient, always."""
        if self.module.training:
            self.module.eval()
        images = normalise(pixels, self.image)
        if self.precision == "bf16":
            images = images.bfloat16()
        with own_attention():
            return self.module(images).float()  # type: ignore[no-any-return]

    def to(self, device: torch.device) -> "FrozenTower":
        self.module.to(device)
        return self

    def fingerprints(self) -> dict[str, str]:
        """Digests of the weights and the preprocessing, and the choice of features: what the numbers depend on."""
        return {
            "weights": weights_digest(self.module),
            "preprocessing": digest_of(self.image.as_dict()),
            "features": feature_name(self.features, self.precision),
        }

    def fingerprint(self) -> str:
        """One hex digest of all fingerprints."""
        return digest_of(self.fingerprints())


Frozen = FrozenTower | FrozenTextTower
FEATURES, PRECISIONS = ("pooled", "cls", "mean"), ("fp32", "bf16")
KINDS = (
    "timm:NAME, timm:NAME@FILE, timm:local-dir:DIR, hf:DIR_OR_ID, open_clip:NAME@TAG, open_clip:local-dir:DIR or "
    "file:RUN for images; hf-text:DIR_OR_ID, open_clip-text:NAME@TAG or open_clip-text:local-dir:DIR for texts"
)


def load_frozen(
    spec: str, view: str = "third", *, features: str = "pooled", precision: str = "fp32"
) -> Frozen:
    """The tower that a name means; KINDS lists the names.

    Without @ the published weights are meant, never random ones. features: pooled, cls or mean. precision: fp32 or
    bf16. Raises UsageError for a name that means nothing or features that a network has not, and CheckpointError
    for weights that are missing, damaged or do not fit.
    """
    for key, value, known in (("features", features, FEATURES), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise UsageError(f"third_{key}: {value!r} is not one of {', '.join(known)}")
    prefix, colon, name = spec.partition(":")
    if colon and prefix in TEXT_LOADERS:
        module, width, tokenizer = TEXT_LOADERS[prefix](name, features)
        return FrozenTextTower(view, spec, module, width, tokenizer, features, precision)
    if not colon or prefix not in IMAGE_LOADERS:
        raise UsageError(f"third: {spec!r} names no tower. Write {KINDS}")
    image_module, width, image, vision_cfg = IMAGE_LOADERS[prefix](name, features)
    return FrozenTower(view, spec, image_module, width, image, vision_cfg, features, precision)


def as_image_tower(tower: Frozen, projection: Tensor | None) -> tuple[nn.Module, dict[str, Any]]:
    """The frozen tower's network as an open_clip image tower, and the vision_cfg that rebuilds it.

    projection: bias-free map [D, P] of the tower's features onto the pair's space; None keeps the width P.
    Raises UsageError when open_clip's format cannot describe the network.
    """
    if isinstance(tower, FrozenTextTower):
        raise UsageError(
            f"third: {tower.spec!r} reads texts and cannot become an image tower (lit, lit-unlocked). It can serve as "
            "third tower of 3t"
        )
    if tower.features != "pooled" or tower.precision != "fp32":
        raise UsageError(
            f"third: as image tower {tower.spec!r} is used as its library builds it; lit and lit-unlocked need "
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


def _load_file(name: str, features: str) -> Loaded:
    folder = Path(name)
    if (folder / "config.json").is_file():  # what `threetowers pretrain` writes is timm's own format
        return load_timm(f"local-dir:{folder}", features)
    if not (folder / "model.json").is_file():
        raise CheckpointError(
            f"file:{name}: neither a pretrained classifier (config.json) nor a finished run (model.json) is there"
        )
    pooled_only(f"file:{name}", features)
    described = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    model_config = described["model_cfg"]
    quick_gelu = bool(model_config.get("quick_gelu", False))
    image = _build_vision_tower(model_config["embed_dim"], dict(model_config["vision_cfg"]), quick_gelu)
    prefix = "img."
    state = read_safetensors(folder / "model.safetensors")
    load_strictly(
        image, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, f"file:{name}"
    )
    vision_cfg = None if quick_gelu else model_config["vision_cfg"]
    return image, model_config["embed_dim"], ImageSpec.from_dict(described["image"]), vision_cfg


IMAGE_LOADERS: dict[str, Callable[[str, str], Loaded]] = {
    "timm": load_timm,
    "hf": load_hf,
    "open_clip": load_open_clip,
    "file": _load_file,
}
TEXT_LOADERS: dict[str, Callable[[str, str], LoadedText]] = {
    "hf-text": load_hf_text,
    "open_clip-text": load_open_clip_text,
}
