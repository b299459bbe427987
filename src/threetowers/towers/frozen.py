"""Third towers: pretrained image models that are read and never trained.

    tower = load_frozen("timm:resnet50", view="third")
    features = tower(pixels)      # uint8 [B, 3, H, W] of tower.image.size → float32 [B, P], no gradient

A frozen tower is not a submodule of anything: it stays in eval mode whatever its user does, and no optimiser,
checkpoint or export meets it. It brings its own preprocessing.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.model import _build_vision_tower
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from threetowers.config import did_you_mean
from threetowers.data.transforms import ImageSpec, normalise
from threetowers.errors import CheckpointError, UsageError
from threetowers.towers.pair import load_strictly, read_safetensors


@dataclass(frozen=True)
class FrozenTower:
    """A pretrained image model in eval mode for ever.

    view: its name in rows, heads and metrics. spec: as the user wrote it. width: P of its features.
    image: its own preprocessing. vision_cfg: open_clip's description of the same network, None when there is none.
    """

    view: str
    spec: str
    module: nn.Module = field(repr=False)
    width: int
    image: ImageSpec
    vision_cfg: dict[str, Any] | None = field(repr=False)

    def __post_init__(self) -> None:
        self.module.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Features float32 [B, P] of uint8 pixels [B, 3, size, size]; eval mode and no gradient, always."""
        if self.module.training:
            self.module.eval()
        return self.module(normalise(pixels, self.image)).float()  # type: ignore[no-any-return]

    def to(self, device: torch.device) -> "FrozenTower":
        self.module.to(device)
        return self

    def fingerprint(self) -> str:
        """Hex digest of the weights and the preprocessing: two towers that differ in either have different ones."""
        digest = hashlib.sha256(json.dumps(self.image.as_dict(), sort_keys=True).encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def load_frozen(spec: str, view: str = "third") -> FrozenTower:
    """The tower that a name means: timm:NAME[@FILE], timm:local-dir:DIR, open_clip:NAME@TAG|FILE, file:RUN.

    Without @ the published weights are meant, never random ones. Raises UsageError for a name that means nothing
    and CheckpointError for weights that are missing, damaged or do not fit.
    """
    prefix, colon, name = spec.partition(":")
    loaders: dict[str, Callable[[str], tuple[nn.Module, int, ImageSpec, dict[str, Any] | None]]] = {
        "timm": _load_timm,
        "open_clip": _load_open_clip,
        "file": _load_file,
    }
    if not colon or prefix not in loaders:
        raise UsageError(
            f"third: {spec!r} names no tower. Write timm:NAME, timm:NAME@FILE, timm:local-dir:DIR, "
            "open_clip:NAME@TAG, open_clip:local-dir:DIR or file:RUN"
        )
    module, width, image, vision_cfg = loaders[prefix](name)
    return FrozenTower(view, spec, module, width, image, vision_cfg)


def as_image_tower(tower: FrozenTower, projection: Tensor | None) -> tuple[nn.Module, dict[str, Any]]:
    """The frozen tower's network as an open_clip image tower, and the vision_cfg that rebuilds it.

    projection: bias-free map [D, P] of the tower's features onto the pair's space; None keeps the width P.
    Raises UsageError when open_clip's format cannot describe the network.
    """
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
            config["timm_pool"] = _pool(
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


class TimmTrunk(nn.Module):
    """A timm network without classifier: images in, pooled features out."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(images)  # type: ignore[no-any-return]


def _load_timm(name: str) -> tuple[nn.Module, int, ImageSpec, dict[str, Any] | None]:
    local = name.startswith("local-dir:")
    name, at, file = (name, "", "") if local else name.partition("@")
    if local:
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"timm:{name}: {folder} holds no config.json in timm's format")
        file = str(folder / "model.safetensors")
        if not Path(file).is_file():
            raise CheckpointError(
                f"timm:{name}: no model.safetensors in {folder}; save it with safe_serialization"
            )
    elif not timm.is_model(name):
        raise UsageError(f"third: timm has no model {name!r}" + _near_timm(name))
    try:
        # with its classifier, so that timm checks the published weights key by key before the classifier goes
        trunk = timm.create_model(name, pretrained=not (local or at))
    except (
        Exception
    ) as error:  # any network, hub or format failure of a foreign loader ends here with its reason
        raise CheckpointError(
            f"timm:{name}: the weights could not be loaded ({_first_line(error)}). "
            "Offline, give them as timm:NAME@FILE or timm:local-dir:DIR"
        ) from error
    classifier = trunk.pretrained_cfg.get("classifier", ())
    trunk.reset_classifier(0)
    if file:
        names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
        drop = tuple(f"{prefix}." for prefix in names)
        state = {key: value for key, value in read_safetensors(file).items() if not key.startswith(drop)}
        load_strictly(trunk, state, file)
    spec = _timm_image_spec(trunk, name)
    width = getattr(trunk, "head_hidden_size", None) or trunk.num_features  # some heads widen what they pool
    vision_cfg = None
    if width == trunk.num_features and (
        not local or _as_timm_builds_it(trunk)
    ):  # open_clip counts on num_features
        vision_cfg = {
            "timm_model_name": trunk.pretrained_cfg["architecture"],
            "timm_pool": "",
            "image_size": spec.size,
        }
    return TimmTrunk(trunk), width, spec, vision_cfg


def _as_timm_builds_it(trunk: Any) -> bool:
    """Whether the architecture's name alone rebuilds this network; open_clip's format has no place for arguments."""
    with torch.random.fork_rng(devices=[]):
        named = timm.create_model(trunk.pretrained_cfg["architecture"], num_classes=0)

    def shapes(module: nn.Module) -> dict[str, torch.Size]:
        return {key: value.shape for key, value in module.state_dict().items()}

    return repr(named) == repr(trunk) and shapes(named) == shapes(trunk) and _pool(named) == _pool(trunk)


def _pool(trunk: Any) -> str:
    """The name of a timm network's pooling, wherever its family keeps it; empty when it keeps none."""
    for owner in (trunk, getattr(trunk, "head", None)):
        pool = getattr(owner, "global_pool", None)
        name = getattr(pool, "pool_type", pool)
        if isinstance(name, str):
            return name
    return ""


def _timm_image_spec(trunk: nn.Module, name: str) -> ImageSpec:
    config = timm.data.resolve_model_data_config(trunk)
    _, height, width = config["input_size"]
    if height != width or config["crop_mode"] not in ("center", "squash"):
        raise UsageError(
            f"third: timm:{name} wants {height}×{width} pixels with crop mode {config['crop_mode']!r}; "
            "only square inputs with crop mode center or squash are supported"
        )
    return ImageSpec(
        size=height,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        resize="squash" if config["crop_mode"] == "squash" else "shortest",
        resize_size=math.floor(height / config["crop_pct"]),
    )


def _load_open_clip(name: str) -> tuple[nn.Module, int, ImageSpec, dict[str, Any] | None]:
    local = name.startswith("local-dir:")
    model_name, _, tag = (name, "", "") if local else name.partition("@")
    if local:
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise CheckpointError(
                f"open_clip:{name}: {folder} holds no open_clip_config.json with safetensors weights"
            )
        model_config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    else:
        model_config = open_clip.get_model_config(model_name)
        if model_config is None:
            raise UsageError(
                f"third: open_clip has no model {model_name!r}{did_you_mean(model_name, open_clip.list_models())}"
            )
        if not tag:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(model_name)) or "none"
            raise UsageError(
                f"third: say which weights, open_clip:{model_name}@TAG or @FILE. Published tags: {tags}"
            )
    try:
        model = open_clip.create_model(model_name, pretrained=tag or None, require_pretrained=not local)
    except (
        Exception
    ) as error:  # any network, hub or format failure of a foreign loader ends here with its reason
        raise CheckpointError(
            f"open_clip:{name}: the weights could not be loaded ({_first_line(error)})"
        ) from error
    cfg = open_clip.get_model_preprocess_cfg(model)
    size = cfg["size"] if isinstance(cfg["size"], int) else cfg["size"][0]
    spec = ImageSpec(
        size=size,
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=cfg["interpolation"],
        resize="squash" if cfg["resize_mode"] == "squash" else "shortest",
    )
    # open_clip keeps QuickGELU as a key of the whole model, which a pair with another text tower cannot take over
    vision_cfg = None if model_config.get("quick_gelu") else dict(model_config["vision_cfg"])
    return model.visual, model_config["embed_dim"], spec, vision_cfg


def _load_file(name: str) -> tuple[nn.Module, int, ImageSpec, dict[str, Any] | None]:
    folder = Path(name)
    if (folder / "config.json").is_file():  # what `threetowers pretrain` writes is timm's own format
        return _load_timm(f"local-dir:{folder}")
    if not (folder / "model.json").is_file():
        raise CheckpointError(
            f"file:{name}: neither a pretrained classifier (config.json) nor a finished run (model.json) is there"
        )
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


def _near_timm(name: str) -> str:
    clause = did_you_mean(name, timm.list_models())
    return (
        clause
        if clause.startswith(";")
        else ". `python -c 'import timm; print(timm.list_models())'` lists them"
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
