"""Frozen towers out of this project's own folders: file:RUN."""

import json
from pathlib import Path

from open_clip.model import _build_vision_tower

from threetowers.data.transforms import ImageSpec
from threetowers.errors import CheckpointError
from threetowers.towers.frozen.base import Kind, Loaded, pooled_only
from threetowers.towers.frozen.timm import load_timm
from threetowers.towers.weights import load_strictly, read_safetensors


def load_file(name: str, features: str) -> Loaded:
    """A classifier that `threetowers pretrain` wrote, or the image tower of a finished run of this project.

    Raises CheckpointError when the folder holds neither, or weights that do not fit.
    """
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
    spec = ImageSpec.from_dict(described["image"])
    return Loaded(image, model_config["embed_dim"], spec, model_config["vision_cfg"])


FILE = Kind(
    prefix="file",
    reads="images",
    forms=("file:RUN",),
    help="what `threetowers pretrain` wrote, or the image tower of a finished run",
    load=load_file,
)
