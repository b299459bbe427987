"""Stored embeddings: what a frozen tower says of every image of a source, computed once.

One safetensors file per (tower, source): `features` [n, P] in fp16 when it holds them, else fp32, and `usable` [n].
Its name is the fingerprint of both, so a store is found again or made anew, never mistaken for another's.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from threetowers.data.decode import decode
from threetowers.data.order import hash64
from threetowers.data.sources import Source
from threetowers.data.transforms import fixed_view
from threetowers.errors import BadSample, DataError
from threetowers.progress import Progress
from threetowers.towers.frozen import FrozenTower

FP16_LIMIT = 60_000.0  # just below the largest fp16 number


@dataclass(frozen=True)
class Store:
    """A frozen tower's features of a source's images, by index; `usable` is False where no image could be read."""

    features: np.ndarray
    usable: np.ndarray

    def mean_square_norm(self) -> float:
        """Mean of ‖p‖² over the usable images."""
        total, count = 0.0, max(int(self.usable.sum()), 1)
        for start in range(0, len(self.features), 65_536):
            block = self.features[start : start + 65_536].astype(np.float32)
            total += float((block**2).sum(dtype=np.float64))
        return total / count


def stored(
    tower: FrozenTower, source: Source, folder: Path, device: torch.device, batch_size: int = 256
) -> Store:
    """The store of a tower's fixed view of a source: read when it exists in the folder, else computed into it.

    Raises DataError when no image of the source can be read.
    """
    key = f"{hash64(tower.fingerprint(), source.fingerprint, len(source)):016x}"
    path = folder / f"{key}.safetensors"
    if path.is_file():
        tensors = load_file(path)
        return Store(tensors["features"], tensors["usable"])
    features = np.zeros((len(source), tower.width), dtype=np.float32)
    usable = np.zeros(len(source), dtype=bool)
    bar = Progress(f"embedding {source.name} with {tower.spec}", len(source), "images")
    done = 0
    for indices, pixels in fixed_batches(tower, source, batch_size):
        if indices:
            features[indices] = tower(torch.from_numpy(pixels).to(device)).cpu().numpy()
            usable[indices] = True
        done = min(done + batch_size, len(source))
        bar.update(done)
    if not usable.any():
        raise DataError(f"{source.name}: not one of {len(source)} images could be read for {tower.spec}")
    if not np.isfinite(features).all():
        raise DataError(
            f"{tower.spec}: some features of {source.name} are not finite; the tower cannot be used"
        )
    if np.abs(features).max() < FP16_LIMIT:
        features = features.astype(np.float16)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{key}.{os.getpid()}.partial"
    save_file({"features": features, "usable": usable}, partial)
    partial.replace(path)
    return Store(features, usable)


def fixed_batches(
    tower: FrozenTower, source: Source, batch_size: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """The readable images of each run of batch_size samples: their indices and the tower's fixed view of them."""
    for start in range(0, len(source), batch_size):
        indices, views = [], []
        for index in range(start, min(start + batch_size, len(source))):
            try:
                views.append(fixed_view(decode(source.image(index), source.record(index).id), tower.image))
            except BadSample:
                continue  # the loader meets the same sample, counts it and names it
            indices.append(index)
        yield indices, np.stack(views) if views else np.empty(0)
