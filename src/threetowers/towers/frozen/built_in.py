"""Frozen towers that come with the package: shapes:NAME, small networks pretrained on the built-in world."""

import json
from pathlib import Path
from typing import Any

from threetowers.errors import UsageError
from threetowers.settings import did_you_mean
from threetowers.towers.frozen.base import Kind, Loaded
from threetowers.towers.frozen.timm import load_timm

FOLDER = Path(__file__).with_name("shapes")


def names() -> list[str]:
    """The towers that there are; each is a folder in timm's local-dir format with a card."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def card(name: str) -> dict[str, Any]:
    """What a tower was trained on, its held-out accuracy and its probes."""
    described: dict[str, Any] = json.loads((FOLDER / name / "pretrain.json").read_bytes())
    return described


def load_built_in(name: str, features: str) -> Loaded:
    """A network of the package; raises UsageError for a name that it does not have."""
    if name not in names():
        raise UsageError(f"third: shapes:{name} is no built-in tower{did_you_mean(name, names())}")
    return load_timm(f"local-dir:{FOLDER / name}", features)


SHAPES = Kind(
    prefix="shapes",
    reads="images",
    forms=("shapes:NAME",),
    help=f"small towers of the built-in world: {', '.join(names())}",
    load=load_built_in,
)
