"""A finished run with its frozen towers, which encodes images and texts in every system that it has.

A system is a way to compare images with texts: `main` is the trained pair, and a third tower's name is that tower read
through the heads, as in `Encoded.systems`.

Legend: N images or texts, D width of the shared space.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from threetowers.data.transforms import fixed_view
from threetowers.explore.curves import run_label
from threetowers.objective.losses import unit
from threetowers.run.finished import FinishedRun, load_run
from threetowers.run.setup import pick_device
from threetowers.run.thirds import check_trained_with, load_thirds
from threetowers.settings import read_config
from threetowers.towers.frozen.base import FrozenTower

Vectors = dict[str, Tensor]
"""Unit vectors fp32 [N, D] by system."""
BATCH = 64


@dataclass(frozen=True, eq=False)
class Model:
    """A finished run, and the frozen towers that its systems need, by view name. label: for people."""

    folder: Path
    label: str
    run: FinishedRun
    towers: dict[str, FrozenTower]

    @property
    def systems(self) -> tuple[str, ...]:
        """`main`, then every third tower that has heads to and from the main tower of the other modality."""
        return ("main", *self.towers)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> Vectors:
        """Unit vectors of upright RGB images in every system."""
        found: Vectors = {"main": self.run.encode_image(images, BATCH)}
        for view, tower in self.towers.items():
            if tower.reads == "texts":
                found[view] = self._headed(found["main"], f"img@{view}")
                continue
            parts = []
            for start in range(0, len(images), BATCH):
                views = [fixed_view(image, tower.image) for image in images[start : start + BATCH]]
                parts.append(tower(torch.from_numpy(np.stack(views)).to(self.run.device)).cpu())
            feats = torch.cat(parts) if parts else torch.empty(0, tower.width)
            found[view] = self._headed(feats, f"{view}@txt")
        return found

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors of texts in every system."""
        found: Vectors = {"main": self.run.encode_text(texts)}
        for view, tower in self.towers.items():
            if tower.reads == "images":
                found[view] = self._headed(found["main"], f"txt@{view}")
                continue
            parts = [
                tower(tower.tokens(texts[start : start + BATCH]).to(self.run.device)).cpu()
                for start in range(0, len(texts), BATCH)
            ]
            feats = torch.cat(parts) if parts else torch.empty(0, tower.width)
            found[view] = self._headed(feats, f"{view}@img")
        return found

    def _headed(self, feats: Tensor, head: str) -> Tensor:
        """What a head makes of features. It has no bias, so features of any length give the same unit vectors."""
        return unit(feats @ self.run.heads[head].T)


def open_model(folder: Path, device: str = "auto") -> Model:
    """The model of a finished run, with the frozen towers of its training.

    Raises CheckpointError for a run that is not finished or damaged, and for a frozen tower that is another one now.
    """
    run = load_run(folder, pick_device(device))
    config = read_config(folder / "config.toml")
    sides = {
        third["view"]: "txt" if third["reads"] == "images" else "img" for third in run.described["thirds"]
    }
    used = [view for view, side in sides.items() if {f"{view}@{side}", f"{side}@{view}"} <= run.heads.keys()]
    loaded = load_thirds(config, run.device) if used else {}
    for third in run.described["thirds"]:
        if third["view"] in used:
            check_trained_with(folder, third, loaded[third["view"]])
    return Model(folder, run_label(folder, config), run, {view: loaded[view] for view in used})
