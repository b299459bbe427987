"""Presets: functions that return a configuration, by the name the command line takes."""

from collections.abc import Callable

from threetowers.config import RunConfig
from threetowers.recipes.shapes import shapes
from threetowers.recipes.tiny import tiny
from threetowers.recipes.vit import vit_b_16, vit_b_32

PRESETS: dict[str, Callable[[], RunConfig]] = {
    "tiny": tiny,
    "shapes": shapes,
    "vit-b-32": vit_b_32,
    "vit-b-16": vit_b_16,
}
