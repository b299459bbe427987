"""A configuration made real: its data opened, its towers built and loaded, its frozen features stored."""

from array import array
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from threetowers.config import RunConfig, check
from threetowers.data.decode import check_decoder
from threetowers.data.loader import Batch, BatchReader
from threetowers.data.open import open_source, splits
from threetowers.data.order import Order
from threetowers.data.source import Source, Subset, check_problems, describe
from threetowers.data.tokenize import Tokenizer, load_tokenizer, train_tokenizer
from threetowers.errors import UsageError
from threetowers.model import Architecture, ThreeTowers, build
from threetowers.objective.pairs import objective
from threetowers.progress import Progress
from threetowers.run.allocator import keep_freed_memory
from threetowers.store.embed import given, stored
from threetowers.store.read import FIXED, Store, Views, fitted, is_store
from threetowers.towers.frozen.load import Frozen, FrozenTower, load_frozen
from threetowers.towers.frozen.text import FrozenTextTower
from threetowers.towers.pair import checkpoint_activations, model_config
from threetowers.towers.working_copy import WorkingCopy
from threetowers.world import write as shapes

SHAPES_FOLDER = Path("data/shapes")
TOKENIZER_CAPTIONS = 200_000  # enough to learn a vocabulary from, whatever the size of the data
NORM_SAMPLES = 1_024


@dataclass
class Prepared:
    """Everything that training and evaluation of one configuration stand on."""

    config: RunConfig
    device: torch.device
    train: Source
    val: Source
    test: Source
    tokenizer: Tokenizer
    thirds: dict[str, Frozen]
    model: ThreeTowers
    architecture: Architecture
    store_folder: Path
    named_store: Path | None = None
    """The one store that the configuration names; it serves what it was made of."""
    working: WorkingCopy | None = None
    """The towers in bf16 that training runs in, with precision bf16-copy."""
    _stores: dict[tuple[str, str, Views], Store] = field(default_factory=dict)
    _prints: dict[str, dict[str, str]] = field(default_factory=dict)

    def stores(self, source: Source, *, training: bool = False) -> dict[str, Store]:
        """The stored features of a source for every frozen tower that the model reads, made on first use.

        training: of the views that training takes, and none of the live towers. A tower of texts has no store of a
        source without captions. Raises UsageError for a named store that does not fit the training data.
        """
        found, live = {}, self.live_thirds() if training else {}
        for name in self.model.thirds:
            texts = isinstance(self.thirds[name], FrozenTextTower)
            if name in live or (texts and not captioned(source)):
                continue
            key = (name, source.fingerprint, self._views() if training and not texts else FIXED)
            if key not in self._stores:
                self._stores[key] = self._store(name, source, key[2], training)
            found[name] = self._stores[key]
        return found

    def _store(self, name: str, source: Source, views: Views, training: bool) -> Store:
        tower = self.thirds[name]
        if name not in self._prints:
            self._prints[name] = tower.fingerprints()
        prints = self._prints[name]
        if self.named_store is not None and training:
            return given(self.named_store, tower, prints, source, views)
        if self.named_store is not None:
            store, _ = fitted(self.named_store, prints, source, views)
            if store is not None:
                return store
        workers = self.config.inputs.workers
        return stored(
            tower, source, self.store_folder, self.device, views=views, prints=prints, workers=workers
        )

    def _views(self) -> Views:
        """What training takes of each image: random views only where a main tower sees the same region."""
        inputs = self.config.inputs
        if not inputs.stored_views or not self.model.needs_pixels():
            return FIXED
        return Views(inputs.stored_views, inputs.crop_scale, inputs.crop_ratio, inputs.flip)

    def live(self) -> bool:
        """Whether a frozen tower computes features while the model trains."""
        return bool(self.live_thirds())

    def live_thirds(self) -> dict[str, FrozenTower]:
        """The frozen towers that see the main tower's augmented view, batch by batch."""
        if self.config.inputs.third_view != "same":
            return {}
        towers = {name: self.thirds[name] for name in self.model.thirds}
        return {name: tower for name, tower in towers.items() if isinstance(tower, FrozenTower)}

    def third_features(self, batch: Batch) -> dict[str, Tensor]:
        """A batch's frozen features: as stored, or computed now from its pixels."""
        live = self.live_thirds()
        return batch.third_features | {
            name: live[name](pixels) for name, pixels in batch.third_pixels.items()
        }

    def features(self, batch: Batch) -> dict[str, Tensor]:
        """The features fp32 by tower name of a batch that lies on the device."""
        return self.model.features(
            pixels=batch.pixels,
            tokens=batch.tokens,
            thirds=self.third_features(batch),
            autocast=None if self.working else self.autocast(),
            working=self.working,
        )

    def reader(self) -> BatchReader:
        """What makes the batches of training; raises UsageError when there is less data than one batch."""
        return BatchReader(
            self.train,
            Order(self.config.seed, len(self.train), self.config.batch_size),
            self.tokenizer,
            self.config.inputs,
            image=self.model.spec if self.model.needs_pixels() else None,
            live={name: tower.image for name, tower in self.live_thirds().items()},
            stores=self.stores(self.train, training=True),
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the main towers run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision != "fp32")


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, else the CPU; raises UsageError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device: {name!r} is no device; write auto, cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= max(
        torch.cuda.device_count(), device.type == "cpu"
    ):
        found = torch.cuda.device_count()
        raise UsageError(
            f"device: {name!r} was asked for, but torch finds {found} CUDA devices; give --device cpu"
        )
    return device


def check_settings(config: RunConfig) -> None:
    """Raises UsageError for settings that no data could make right; reads nothing and builds nothing."""
    check(config)
    check_decoder(config.inputs.decoder)
    pick_device(config.device)
    model_config(config.pair)


def world(folder: Path = SHAPES_FOLDER) -> Path:
    """The built-in world on disk, rendered on first use."""
    bars: dict[int, Progress] = {}

    def show(done: int, total: int) -> None:
        bars.setdefault(total, Progress("rendering the built-in world", total, "images")).update(done)

    shapes.write_world(folder, num_labelled=20_000, progress=show)
    return folder


def open_data(config: RunConfig) -> tuple[Source, Source, Source]:
    """The training, validation and test sources of a configuration; raises DataError or UsageError."""
    if config.data == "none":
        raise UsageError(
            "data: say what to train on: --data FOLDER|TABLE|SHARDS, or --data shapes for the built-in world"
        )
    path = str(world()) if config.data == "shapes" else config.data
    inputs = config.inputs
    parts = _open_splits(
        path, inputs.image_column, inputs.caption_columns, inputs.val_fraction, inputs.test_fraction
    )
    for source in parts:
        check_problems(source, limit=inputs.max_bad_share)
    return parts


@lru_cache(maxsize=2)  # a comparison opens the same data for every run
def _open_splits(
    path: str, image_column: str, caption_columns: tuple[str, ...], val_fraction: float, test_fraction: float
) -> tuple[Source, Source, Source]:
    return splits(
        path,
        image_column=None if image_column == "none" else image_column,
        caption_columns=caption_columns,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
    )


def captioned(source: Source) -> bool:
    """Whether any sample of the source has captions."""
    return any(source.record(index).captions for index in range(len(source)))


def describe_data(config: RunConfig) -> str:
    """What was found in the training data, its first rows, and the sizes of the three parts."""
    train, val, test = open_data(config)
    return f"{describe(train)}\n{len(train):,} images to train on, {len(val):,} to validate, {len(test):,} to test"


def open_classes(config: RunConfig) -> Source | None:
    """The labelled images for zero-shot classification, or None when the configuration names none."""
    if config.classes == "none":
        return None
    return open_source(str(world() / "objects" / "test") if config.classes == "shapes" else config.classes)


def make_tokenizer(config: RunConfig, train: Source, saved: Path | None = None) -> Tokenizer:
    """The configuration's tokenizer; one that was learned and saved in a run folder is read from there."""
    context_length = int(model_config(config.pair)["text_cfg"].get("context_length", 77))
    if config.pair.tokenizer != "trained":
        return load_tokenizer(config.pair.tokenizer, context_length)
    if saved is not None and (saved / "tokenizer.json").is_file():
        return load_tokenizer(str(saved), context_length)
    tokenizer = train_tokenizer(
        _captions(train, TOKENIZER_CAPTIONS), vocab_size=config.pair.vocab_size, context_length=context_length
    )
    if saved is not None:
        saved.mkdir(parents=True, exist_ok=True)
        tokenizer.save(saved)
    return tokenizer


def _captions(source: Source, most: int) -> Iterable[str]:
    count = 0
    for index in range(len(source)):
        for caption in source.record(index).captions:
            if count == most:
                return
            count += 1
            yield caption


def assemble(config: RunConfig, run: Path, *, saved_tokenizer: Path | None = None) -> Prepared:
    """Opens, loads and builds what a configuration names, and embeds nothing: the frozen features' norms stay 1.

    run: the run folder; embeddings are stored beside it unless the configuration says where.
    """
    check_settings(config)
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    table = objective(config)  # a table that cannot be built should fail before anything is read
    train, val, test = open_data(config)
    tokenizer = make_tokenizer(config, train, saved_tokenizer)
    needed = {} if config.method == "baseline" else config.thirds()
    options = {"features": config.third_features, "precision": config.third_precision}
    thirds = {view: load_frozen(spec, view, **options).to(device) for view, spec in needed.items()}
    model, architecture = build(config, thirds, tokenizer.text_cfg())
    if config.grad_checkpointing:
        checkpoint_activations(model.img, model.txt)
    named = None if config.embeddings == "none" else Path(config.embeddings)
    folder = run.parent / "embeddings" if named is None or is_store(named) else named
    assert table == model.objective
    return Prepared(
        config, device, train, val, test, tokenizer, thirds, model.to(device), architecture, folder,
        named if named is not None and is_store(named) else None,
    )  # fmt: skip


def prepare(config: RunConfig, run: Path, *, saved_tokenizer: Path | None = None) -> Prepared:
    """A configuration assembled, with the frozen features stored that training needs."""
    prepared = assemble(config, run, saved_tokenizer=saved_tokenizer)
    model, train = prepared.model, prepared.train
    stores = prepared.stores(train, training=True)
    if prepared.live_thirds():
        sample = Subset(train, array("q", range(min(len(train), NORM_SAMPLES))), f"the first of {train.name}")
        stores = prepared.stores(sample) | stores
    for view, store in stores.items():
        model.set_third_norm(view, store.mean_square_norm())
    return prepared
