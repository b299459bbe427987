"""The frozen towers of a run: the networks, their stored features by source, and features computed while training.

This is the one owner of third towers at run time. The model receives nothing but their features.
"""

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from threetowers.config import InputConfig, RunConfig
from threetowers.data.loader import Batch
from threetowers.data.source import Source, Subset
from threetowers.data.transforms import ImageSpec
from threetowers.errors import CheckpointError, UsageError
from threetowers.model import ThreeTowers
from threetowers.objective.pairs import start_view
from threetowers.processes import ALONE, Processes
from threetowers.run.allocator import return_freed_memory
from threetowers.store.embed import find_or_make_store, store_for_training
from threetowers.store.read import FIXED, Store, Views, find_store, is_store
from threetowers.towers.frozen.base import FrozenTower, digest_of
from threetowers.towers.frozen.load import load_frozen
from threetowers.towers.start import image_start

NORM_SAMPLES = 1_024
"""Samples from which the norm of a live tower's features is taken."""


def load_thirds(config: RunConfig, device: torch.device) -> dict[str, FrozenTower]:
    """The frozen towers that a configuration names, by view name, on the device; raises as `load_frozen` does."""
    return {
        view: load_frozen(spec, view, features=config.third_features, precision=config.third_precision).to(
            device
        )
        for view, spec in config.thirds().items()
    }


def check_trained_with(folder: Path, described: Mapping[str, Any], tower: FrozenTower) -> None:
    """Raises CheckpointError for a tower that is not the one that model.json of a run's folder describes."""
    if tower.fingerprint() != described["fingerprint"]:
        raise CheckpointError(
            f"{folder}: third tower {described['spec']} is not the one that this run was trained with: weights or "
            "preprocessing differ; put it back"
        )


def load_image_start(config: RunConfig) -> FrozenTower | None:
    """The tower that `start.image` names, for its weights; None where it names none, or a third tower of the run."""
    spec = config.start.image
    if spec is None or start_view(config):
        return None
    try:
        return image_start(spec)
    except UsageError as error:
        raise UsageError(str(error).replace("third:", "start.image:", 1)) from None


class Thirds:
    """The frozen towers by view name, and where their features come from.

    used: the views that the model reads. random_views: whether a main tower sees the region of a stored random view,
    so that stores hold random views. folder: where stores are made and looked for. named: the one store that the
    configuration names, or None. processes: those that ask for the same stores together, of which each computes its
    share of a store that is made.
    """

    def __init__(
        self,
        towers: Mapping[str, FrozenTower],
        used: Sequence[str],
        inputs: InputConfig,
        device: torch.device,
        folder: Path,
        named: Path | None = None,
        *,
        random_views: bool = True,
        processes: Processes = ALONE,
    ) -> None:
        self.towers, self.used, self.inputs, self.device = dict(towers), tuple(used), inputs, device
        self.folder, self.named, self.processes = folder, named, processes
        self.live: dict[str, FrozenTower] = {}
        """The towers that see the main tower's augmented view and compute their features batch by batch."""
        if inputs.third_view == "same":
            self.live = {view: towers[view] for view in used if towers[view].reads == "images"}
        self.views = FIXED
        """What training takes of each image: random views only where a main tower sees the same region."""
        if inputs.stored_views and random_views:
            self.views = Views(inputs.stored_views, inputs.crop_scale, inputs.crop_ratio, inputs.flip)
        self._stores: dict[tuple[str, str, Views], Store] = {}
        self._fingerprints: dict[str, dict[str, str]] = {}

    def live_images(self) -> dict[str, ImageSpec]:
        """The preprocessing of the live towers, by view name."""
        return {view: tower.image for view, tower in self.live.items()}

    def stores(self, source: Source, *, training: bool = False) -> dict[str, Store]:
        """The stored features of a source for every tower that the model reads, made on first use.

        training: of the views that training takes, and without the live towers. A tower of texts has no store of a
        source without captions. Raises UsageError for a named store that does not fit the training data.
        """
        found = {}
        for view in self.used:
            texts = self.towers[view].reads == "texts"
            if (training and view in self.live) or (texts and not captioned(source)):
                continue
            views = self.views if training and not texts else FIXED
            key = (view, source.fingerprint, views)
            if key not in self._stores:
                self._stores[key] = self._store(view, source, views, training)
            found[view] = self._stores[key]
        return found

    def _store(self, view: str, source: Source, views: Views, training: bool) -> Store:
        tower, fingerprints = self.towers[view], self._fingerprints_of(view)
        if self.named is not None:
            if training:
                return store_for_training(self.named, tower, fingerprints, source, views)
            store, _ = find_store(self.named, fingerprints, source, views)
            if store is not None:
                return store
        store = find_or_make_store(
            tower, source, self.folder, self.device,
            views=views, fingerprints=fingerprints, workers=self.inputs.workers, processes=self.processes,
        )  # fmt: skip
        return_freed_memory()
        return store

    def _fingerprints_of(self, view: str) -> dict[str, str]:
        if view not in self._fingerprints:
            self._fingerprints[view] = self.towers[view].fingerprints()
        return self._fingerprints[view]

    def changed(self, before: Mapping[str, str]) -> list[str]:
        """The names of the towers that are other ones than those whose fingerprints were recorded by view name."""
        after = self.fingerprints()
        return [
            self.towers[view].spec for view, was in before.items() if view in after and after[view] != was
        ]

    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of every tower that the model reads, by view name."""
        return {view: digest_of(self._fingerprints_of(view)) for view in self.used}

    def features(self, batch: Batch) -> dict[str, Tensor]:
        """The features [B, P] of a batch by view name: as stored, or computed now from its pixels."""
        live = {view: self.live[view](pixels) for view, pixels in batch.third_pixels.items()}
        return batch.third_features | live

    def set_norms(self, model: ThreeTowers, train: Source) -> None:
        """Sets the model's constants that bring the mean squared norm of each tower's features to its width.

        A live tower's norm is that of the fixed views of the first NORM_SAMPLES images.
        """
        stores = self.stores(train, training=True)
        if self.live:
            first = array("q", range(min(len(train), NORM_SAMPLES)))
            stores = self.stores(Subset(train, first, f"the first of {train.name}")) | stores
        for view, store in stores.items():
            model.set_third_norm(view, store.mean_square_norm())


def stores_place(config: RunConfig, folder: Path) -> tuple[Path, Path | None]:
    """The folder for the stores of a run in `folder`, and the one store that its configuration names, or None."""
    given = None if config.embeddings is None else Path(config.embeddings)
    named = given if given is not None and is_store(given) else None
    return (folder.parent / "embeddings" if given is None or named is not None else given), named


def captioned(source: Source) -> bool:
    """Whether any sample of the source has captions."""
    return any(source.record(index).captions for index in range(len(source)))
