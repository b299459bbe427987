"""Which frozen tower a name means: the list of kinds, and how one of them is loaded."""

import json
from pathlib import Path
from typing import Any

from threetowers.errors import UsageError
from threetowers.settings import did_you_mean
from threetowers.towers.frozen.base import FEATURES, FrozenTower, Kind
from threetowers.towers.frozen.built_in import FOLDER, SHAPES
from threetowers.towers.frozen.file import FILE
from threetowers.towers.frozen.hf import HF
from threetowers.towers.frozen.open_clip import OPEN_CLIP
from threetowers.towers.frozen.text import HF_TEXT, OPEN_CLIP_TEXT
from threetowers.towers.frozen.timm import TIMM

KINDS: tuple[Kind, ...] = (TIMM, HF, OPEN_CLIP, FILE, SHAPES, HF_TEXT, OPEN_CLIP_TEXT)
"""Every kind of frozen tower. Help, cards and error messages are drawn from this list."""

PRECISIONS = ("fp32", "bf16")


def kind_of(spec: str, *, key: str = "third") -> tuple[Kind, str]:
    """The kind that a tower's name begins with, and the rest of the name.

    key: of the setting that an error names. Raises UsageError for an unknown kind.
    """
    prefix, colon, name = spec.partition(":")
    kind = next((kind for kind in KINDS if colon and kind.prefix == prefix), None)
    if kind is None:
        near = did_you_mean(prefix, [kind.prefix for kind in KINDS]) if colon else ""
        hint = near if near.startswith(";") else ""
        if form := _form_of_folder(spec):
            raise UsageError(f"{key}: {spec!r} is a folder; write {form}{spec}")
        raise UsageError(f"{key}: {spec!r} names no tower{hint}. Write {_all_forms()}")
    return kind, name


def _form_of_folder(path: str) -> str:
    """How the name of a tower in a folder begins, by the files in it; empty for a folder of no such kind, or none."""
    folder = Path(path)
    if (folder / "open_clip_config.json").is_file():
        return "open_clip:local-dir:"
    if (folder / "pretrain.json").is_file():
        return f"{FILE.prefix}:"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return "timm:local-dir:" if "architecture" in config else "hf:" if "model_type" in config else ""


def _all_forms() -> str:
    forms = {
        reads: ", ".join(form for kind in KINDS if kind.reads == reads for form in kind.forms)
        for reads in ("images", "texts")
    }
    return f"{forms['images']} for images; {forms['texts']} for texts"


def pretraining(spec: str) -> dict[str, Any] | None:
    """What `threetowers pretrain` noted about a tower that it made; None for any other tower."""
    kind, name = kind_of(spec)
    folders = {FILE: Path(name), SHAPES: FOLDER / name}
    path = folders.get(kind, Path(name)) / "pretrain.json"
    if kind not in folders or not path.is_file():
        return None
    noted: dict[str, Any] = json.loads(path.read_bytes())
    return noted


def load_frozen(
    spec: str, view: str = "third", *, features: str = "pooled", precision: str = "fp32"
) -> FrozenTower:
    """The tower that a name means, such as `timm:resnet50` or `hf-text:DIR`; KINDS lists the names.

    Without @ the published weights are meant, never random ones. features: pooled, cls or mean. precision: fp32 or
    bf16. Raises UsageError for a name that means nothing or features that a network does not have, and
    CheckpointError for weights that are missing, damaged or do not fit.
    """
    for key, value, known in (("features", features, FEATURES), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise UsageError(f"third_{key}: {value!r} is not one of {', '.join(known)}")
    kind, name = kind_of(spec)
    loaded = kind.load(name, features)
    return FrozenTower(
        view, spec, loaded.module, loaded.width, loaded.inputs, loaded.vision_cfg, features, precision
    )
