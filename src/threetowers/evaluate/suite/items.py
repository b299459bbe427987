"""The answers behind a row: a value for each item, kept so that models can be compared on the same items."""

from pathlib import Path

import torch
from torch import Tensor

from threetowers.evaluate.statistics import Hits, directions_of
from threetowers.evaluate.suite.measured import Measured
from threetowers.evaluate.suite.rows import Row
from threetowers.towers.frozen.base import digest_of
from threetowers.towers.weights import read_safetensors, write_safetensors

FOLDER = "items"


def write_items(folder: Path, row: Row, found: Measured) -> None:
    """Keeps the values of a row's metric, and the image of each; nothing where the metric is no mean over items."""
    hits = found.hits.get(row.metric)
    if hits is None:
        return
    tensors: dict[str, Tensor] = {}
    for what, values in (("hits", hits), ("images", found.images)):
        if values is not None:
            sides = directions_of(values, what)
            tensors |= {f"{what}/{number}": torch.from_numpy(side) for number, side in enumerate(sides)}
    path = _path(folder, row)
    path.parent.mkdir(exist_ok=True)
    write_safetensors(path, tensors)


def read_items(folder: Path, row: Row) -> tuple[Hits, Hits | None] | None:
    """The values of a row's metric and their images, as `Measured` has them; None where they were not kept."""
    path = _path(folder, row)
    if not path.is_file():
        return None
    tensors = read_safetensors(path)
    sides = [
        [tensors[name].numpy() for name in sorted(tensors) if name.startswith(what)]
        for what in ("hits", "images")
    ]
    hits, images = ((side[0], side[1]) if len(side) == 2 else side[0] if side else None for side in sides)
    return None if hits is None else (hits, images)


def _path(folder: Path, row: Row) -> Path:
    return folder / FOLDER / f"{digest_of(list(row.key()))}.safetensors"
