"""A configuration made real: its data opened, its towers built and loaded, its frozen features stored."""

from array import array
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from threetowers.allocator import keep_freed_memory
from threetowers.config import RunConfig, check
from threetowers.data import shapes
from threetowers.data.sources import Source, Subset, check_problems, open_source, splits
from threetowers.data.tables import describe
from threetowers.data.tokenize import Tokenizer, load_tokenizer, train_tokenizer
from threetowers.embeddings import Store, stored
from threetowers.errors import UsageError
from threetowers.model import Architecture, ThreeTowers, build
from threetowers.objective.pairs import objective
from threetowers.progress import Progress
from threetowers.towers.frozen import FrozenTower, load_frozen
from threetowers.towers.pair import model_config

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
    thirds: dict[str, FrozenTower]
    model: ThreeTowers
    architecture: Architecture
    store_folder: Path
    _stores: dict[tuple[str, str], Store] = field(default_factory=dict)

    def stores(self, source: Source) -> dict[str, Store]:
        """The stored features of a source for every frozen tower that a view of the model reads."""
        for view in self.model.thirds:
            key = (view, source.fingerprint)
            if key not in self._stores:
                self._stores[key] = stored(self.thirds[view], source, self.store_folder, self.device)
        return {view: self._stores[view, source.fingerprint] for view in self.model.thirds}

    def live(self) -> bool:
        """Whether the frozen towers see the main tower's augmented view, batch by batch."""
        return bool(self.model.thirds) and self.config.inputs.third_view == "same"

    def third_features(self, thirds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch's frozen features: as stored, or computed now from its pixels."""
        if not self.live():
            return dict(thirds)
        return {view: self.thirds[view](pixels) for view, pixels in thirds.items()}

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the main towers run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")


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
        image_column=image_column,
        caption_columns=caption_columns,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
    )


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


def prepare(config: RunConfig, run: Path, *, saved_tokenizer: Path | None = None) -> Prepared:
    """Opens, loads and builds what a configuration names; stores embed on first use.

    run: the run folder; embeddings are stored beside it unless the configuration says where.
    """
    check(config)
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    table = objective(config)  # a table that cannot be built should fail before anything is read
    train, val, test = open_data(config)
    tokenizer = make_tokenizer(config, train, saved_tokenizer)
    needed = {} if config.method == "baseline" else config.thirds()
    thirds = {view: load_frozen(spec, view).to(device) for view, spec in needed.items()}
    model, architecture = build(config, thirds, tokenizer.text_cfg())
    folder = run.parent / "embeddings" if config.embeddings == "none" else Path(config.embeddings)
    prepared = Prepared(
        config, device, train, val, test, tokenizer, thirds, model.to(device), architecture, folder
    )
    if prepared.live():
        sample = Subset(train, array("q", range(min(len(train), NORM_SAMPLES))), f"the first of {train.name}")
        stores = prepared.stores(sample)
    else:
        stores = prepared.stores(train)
    for view, store in stores.items():
        model.set_third_norm(view, store.mean_square_norm())
    assert table == model.objective
    return prepared
