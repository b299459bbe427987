"""A configuration made real: its data opened, its towers built and loaded, its frozen features stored."""

from array import array
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from threetowers.config import RunConfig, check, data_of
from threetowers.data.decode import check_decoder
from threetowers.data.kept import KeptImages
from threetowers.data.loader import BatchReader
from threetowers.data.open import splits
from threetowers.data.order import Order, hash64
from threetowers.data.source import Source, Subset, check_problems, describe, describe_problems
from threetowers.data.tokenize import Tokenizer, load_tokenizer, train_tokenizer
from threetowers.errors import DataError, UsageError
from threetowers.model import Architecture, ThreeTowers, build
from threetowers.objective.pairs import METHODS, objective
from threetowers.processes import ALONE, Processes
from threetowers.progress import Progress
from threetowers.run.allocator import keep_freed_memory
from threetowers.run.finished import Parts, describe_parts
from threetowers.run.pixels import kept_images, kept_views
from threetowers.run.thirds import Thirds, load_image_start, load_thirds, stores_place
from threetowers.towers.pair import checkpoint_activations, model_config
from threetowers.towers.start import TextStart, text_start
from threetowers.world.scenes import Kind
from threetowers.world.write import write_world

SHAPES_FOLDER = Path("data/shapes")
FEW = 100  # test images: one is a point of R@1
TOKENIZER_CAPTIONS = 200_000  # enough to learn a vocabulary from, whatever the size of the data
learned_tokenizers: dict[tuple[str, int, int], Tokenizer] = {}
"""What this process has learned, by fingerprint of the data, size of the vocabulary and context length; the runs of a
comparison use the same one."""


@dataclass
class Setup:
    """What training and evaluation of one configuration need."""

    config: RunConfig
    device: torch.device
    train: Source
    val: Source
    test: Source
    tokenizer: Tokenizer
    thirds: Thirds
    model: ThreeTowers
    architecture: Architecture

    def parts(self) -> Parts:
        """The three parts of the data, as the run records them."""
        return describe_parts(self.train, self.val, self.test)

    def reader(self) -> BatchReader:
        """The reader that makes the batches of training; raises UsageError when there is less data than one batch."""
        return BatchReader(
            self.train,
            Order(self.config.seed, len(self.train), self.config.batch_size),
            self.tokenizer,
            self.config.inputs,
            image=self.model.image if self.model.needs_pixels() else None,
            live=self.thirds.live_images(),
            stores=self.thirds.stores(self.train, training=True),
            kept=kept_images(self.train) if self._keeps_images() else None,
        )

    def kept_views(self, source: Source) -> KeptImages | None:
        """Where the fixed views of a source's images stay between evaluations; None for a source that is too large."""
        if not (self.config.inputs.keep_pixels and self.model.needs_pixels()):
            return None
        return kept_views(source, self.model.image)

    def _keeps_images(self) -> bool:
        """Whether a pass over the training data would find what an earlier pass has decoded."""
        several = self.config.steps * self.config.batch_size > len(self.train)
        return self.config.inputs.keep_pixels and several


def autocast(config: RunConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which the main towers run."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision != "fp32")


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, else the CPU; raises UsageError for a device that is not there.

    Every command that computes comes here before it does: for a CPU the allocator is set.
    """
    device = _device(name)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def _device(name: str) -> torch.device:
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
    """Raises UsageError for settings that are wrong whatever the data is; reads nothing and builds nothing."""
    check(config)
    check_decoder(config.inputs.decoder)
    pick_device(config.device)
    model_config(config.pair)


def world(folder: Path = SHAPES_FOLDER) -> Path:
    """The built-in world on disk, rendered on first use: captioned images, and labelled ones to evaluate on."""
    return rendered(folder, num_labelled=0)


def labelled_world(kind: Kind, seed: int = 0) -> Path:
    """The labelled images of one kind of the built-in world, to pretrain on; rendered on first use."""
    name = f"{SHAPES_FOLDER.name}-{kind}" + (f"-{seed}" if seed else "")
    return rendered(SHAPES_FOLDER.with_name(name), seed=seed, num_labelled=20_000, kinds=(kind,)) / kind


def rendered(folder: Path, **sizes: Any) -> Path:
    bars: dict[int, Progress] = {}

    def show(done: int, total: int) -> None:
        bars.setdefault(total, Progress("rendering the built-in world", total, "images")).update(done)

    write_world(folder, progress=show, **sizes)
    return folder


def open_data(config: RunConfig) -> tuple[Source, Source, Source]:
    """The training, validation and test sources of a configuration; raises DataError or UsageError."""
    data = data_of(config)
    path = str(world()) if data == "shapes" else data
    inputs = config.inputs
    parts, train = _open_splits(
        path,
        inputs.image_column,
        inputs.caption_columns,
        inputs.split_column,
        inputs.val_fraction,
        inputs.test_fraction,
        inputs.train_images,
    )
    check_problems(parts, limit=inputs.max_bad_share)
    return train, *parts[1:]


def check_enough(config: RunConfig) -> None:
    """Raises DataError or UsageError when fewer images are left to train on than one batch has."""
    train, val, test = open_data(config)
    if not len(train):
        raise DataError(
            f"{train.name}: no image is left to train on: {len(val):,} are for validation and {len(test):,} for tests, "
            "and equal images stay in one part. Give more data, or --inputs.val-fraction 0 --inputs.test-fraction 0"
        )
    Order(config.seed, len(train), config.batch_size)


@lru_cache(maxsize=2)  # a comparison opens the same data for every run
def _open_splits(
    path: str,
    image_column: str | None,
    caption_columns: tuple[str, ...],
    split_column: str | None,
    val_fraction: float,
    test_fraction: float,
    train_images: int,
) -> tuple[tuple[Source, Source, Source], Source]:
    """The three parts, and what is trained on of the first."""
    parts = splits(
        path,
        image_column=image_column,
        caption_columns=caption_columns,
        split_column=split_column,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
    )
    return parts, _drawn(parts[0], train_images) if train_images else parts[0]


def _drawn(source: Source, number: int) -> Source:
    """So many samples of a source, in its order, drawn by a hash of the id of each one's image.

    Raises UsageError where the source has fewer.
    """
    if number > len(source):
        raise UsageError(
            f"inputs.train_images: {number:,} images, and there are {len(source):,} to train on; 0 takes all"
        )
    records = (source.record(index) for index in range(len(source)))
    draws = np.array([hash64("drawn", each.image_id or each.id) for each in records], dtype=np.uint64)
    chosen = np.sort(np.argsort(draws, kind="stable")[:number])
    return Subset(source, array("q", chosen.tolist()), source.name)


def describe_data(config: RunConfig) -> str:
    """A few lines for people: what the training data is, its first rows, and the sizes of the three parts."""
    train, val, test = open_data(config)
    lines = [
        describe(train),
        *(f"{part.name}: {text}" for part in (val, test) if (text := describe_problems(part))),
        f"{len(train):,} images to train on, {len(val):,} to validate, {len(test):,} to test",
    ]
    if 0 < len(test) < FEW:
        lines.append(
            f"note: {len(test)} test images tell only large differences apart. A larger --inputs.test-fraction takes "
            "more, unless the data has a test part of its own"
        )
    return "\n".join(lines)


def make_tokenizer(
    config: RunConfig, train: Source, saved: Path | None = None, start: TextStart | None = None
) -> Tokenizer:
    """The configuration's tokenizer; one that was learned and saved in a run folder is read from there.

    start: a text tower to start at, which brings its own.
    """
    if start is not None:
        return start.tokenizer
    context_length = int(model_config(config.pair)["text_cfg"].get("context_length", 77))
    if config.pair.tokenizer != "trained":
        return load_tokenizer(config.pair.tokenizer, context_length)
    if saved is not None and (saved / "tokenizer.json").is_file():
        return load_tokenizer(str(saved), context_length)
    key = (train.fingerprint, config.pair.vocab_size, context_length)
    if key not in learned_tokenizers:
        learned_tokenizers[key] = train_tokenizer(
            _captions(train, TOKENIZER_CAPTIONS),
            vocab_size=config.pair.vocab_size,
            context_length=context_length,
        )
    tokenizer = learned_tokenizers[key]
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


def assemble(
    config: RunConfig, folder: Path, *, saved_tokenizer: Path | None = None, processes: Processes = ALONE
) -> Setup:
    """Opens, loads and builds what a configuration names. Nothing is embedded, and the frozen features' norms stay 1.

    folder: the run folder; embeddings are stored beside it unless the configuration says where. processes: those that
    will ask for embeddings together.
    """
    check_settings(config)
    device = pick_device(config.device)
    objective(config)  # a table that cannot be built should fail before anything is read
    train, val, test = open_data(config)
    text = text_start(config.start.text) if config.start.text is not None else None
    tokenizer = make_tokenizer(config, train, saved_tokenizer, text)
    towers = load_thirds(config, device) if METHODS[config.method].needs_third else {}
    model, architecture = build(config, towers, tokenizer.text_cfg(), load_image_start(config), text)
    if config.grad_checkpointing:
        checkpoint_activations(model.img, model.txt)
    thirds = Thirds(
        towers, model.thirds, config.inputs, device, *stores_place(config, folder),
        random_views=model.needs_pixels(), processes=processes,
    )  # fmt: skip
    return Setup(config, device, train, val, test, tokenizer, thirds, model.to(device), architecture)


def prepare(
    config: RunConfig, folder: Path, *, saved_tokenizer: Path | None = None, processes: Processes = ALONE
) -> Setup:
    """A configuration assembled, with the frozen features stored that training needs.

    processes: those that call this together. The first of them opens the data before the others do, and all share the
    embedding.
    """
    with processes.one_before_all():
        setup = assemble(config, folder, saved_tokenizer=saved_tokenizer, processes=processes)
    setup.thirds.set_norms(setup.model, setup.train)
    return setup
