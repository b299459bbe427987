"""A small classifier of one's own as third tower, saved in timm's own local format."""

import json
import math
import os
import shutil
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn import functional as F

from threetowers.config import PretrainConfig, RunConfig, check
from threetowers.data.decode import decode
from threetowers.data.loader import augmented_views, usable_sample
from threetowers.data.open import splits
from threetowers.data.order import Order, hash64
from threetowers.data.source import Source, Subset
from threetowers.data.transforms import ImageSpec, fixed_view, normalise, per_channel
from threetowers.data.workers import read_ahead
from threetowers.errors import BadSample, DataError, UsageError
from threetowers.files import disk_errors, write_whole, writing_aside
from threetowers.progress import Progress
from threetowers.run.setup import labelled_world, pick_device
from threetowers.towers.frozen.timm import near_timm
from threetowers.towers.heads import initialised
from threetowers.train.guards import BadSamples, StopRequest
from threetowers.train.optim import adamw, learning_rate, set_learning_rate
from threetowers.world.scenes import KINDS

LABELLED = KINDS[1:]


def image_spec(config: PretrainConfig) -> ImageSpec:
    """What the classifier is fed with."""
    try:
        colours = per_channel(config.mean, config.std, 3)
    except ValueError as error:
        raise UsageError(f"mean and std of the classifier: {error}") from None
    return ImageSpec(size=config.size, **colours, resize_size=config.size)


class Interrupted(Exception):  # noqa: N818 - a request that was met, not a failure
    """Pretraining was stopped on request; nothing of it is kept."""


def pretrain(config: PretrainConfig, folder: Path, *, stop: StopRequest | None = None) -> float:
    """Trains the classifier and writes config.json and model.safetensors; returns its accuracy on held-out images.

    A folder that holds a finished classifier is left as it is. stop: looked at in each step. Raises DataError without
    labels, and Interrupted when a stop was requested.
    """
    report = folder / "pretrain.json"
    if report.is_file():
        return float(json.loads(report.read_text(encoding="utf-8"))["val/top1"])
    _check(config)
    image_spec(config)  # refuses a mean that does not fit before anything is read
    device = pick_device(config.device)
    path = str(labelled_world(config.data)) if config.data in LABELLED else config.data
    train, val, _ = splits(path, val_fraction=config.inputs.val_fraction, test_fraction=0.0)
    if not train.class_names:
        raise DataError(
            f"{path}: no class labels were found. Give a folder with one subfolder of images per class"
        )
    if len(train.class_names) < 2:
        raise DataError(
            f"{path}: it has one class, {train.class_names[0]!r}, so nothing can be learned; give two or more"
        )
    targets = _targets(config, train.class_names)
    train, val = (_with_target(source, targets) for source in (train, val))
    with initialised(config.seed, "pretrain"):
        model = _network(config, sum(targets.sizes))
        model = model.to(device, memory_format=torch.channels_last)
    folder.mkdir(parents=True, exist_ok=True)
    bad = BadSamples(folder, config.inputs.max_bad_share, len(train))
    _fit(config, model, train, targets, bad, device, stop)
    accuracy = _accuracy(model, val, targets, image_spec(config), device)
    _save(model, config, folder)
    described = {
        "val/top1": accuracy,
        "data": config.data,
        "classes": int((targets.columns[:, 0] >= 0).sum()),
        "outputs": list(targets.sizes),
        "steps": config.steps,
        "seed": config.seed,
    }
    write_whole(report, json.dumps(described, indent=2))
    return accuracy


def _network(config: PretrainConfig, outputs: int) -> Any:
    """Raises UsageError for arguments that the architecture does not take."""
    try:
        return timm.create_model(config.model, num_classes=outputs, **config.model_args)
    except (TypeError, ValueError, AssertionError) as error:
        if not config.model_args:
            raise
        raise UsageError(
            f"model_args: timm's {config.model} cannot be built with {config.model_args}: {error}"
        ) from None


def _check(config: PretrainConfig) -> None:
    """Raises UsageError for settings with which nothing can be trained."""
    lowest = {"steps": 0, "batch_size": 2, "size": 1}  # a batch of one has no variance to normalise by
    for key, low in lowest.items():
        if getattr(config, key) < low:
            raise UsageError(f"{key}: {getattr(config, key)} is out of range; it must be {low} or more")
    check(RunConfig(inputs=config.inputs, optim=config.optim))
    if not timm.is_model(config.model):
        raise UsageError(f"model: timm has no model {config.model!r}{near_timm(config.model)}")


@dataclass(frozen=True)
class _Targets:
    """What the classifier tells apart: the names of one or several parts of a class, each with a softmax of its own.

    columns: int64 [classes, parts], the place of the class among the names of each part; -1 for a class that is not
    learned. sizes: the number of names of each part.
    """

    columns: Tensor
    sizes: tuple[int, ...]

    def split(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Logits [B, sum of sizes] → for each part [B, its size]."""
        parts: tuple[Tensor, ...] = logits.split(self.sizes, dim=1)  # type: ignore[no-untyped-call]
        return parts

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of the parts; labels are classes, int64 [B]."""
        columns = self.columns.to(labels.device)[labels]
        losses = [
            F.cross_entropy(part.float(), columns[:, place], label_smoothing=0.1)
            for place, part in enumerate(self.split(logits))
        ]
        return torch.stack(losses).mean()

    def right(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Whether every part of each class is predicted, bool [B]."""
        predicted = torch.stack([part.argmax(1) for part in self.split(logits)], dim=1).cpu()
        return (predicted == self.columns[labels.cpu()]).all(dim=1)


def _targets(config: PretrainConfig, class_names: Sequence[str]) -> _Targets:
    """Raises UsageError for patterns that match nothing, and for names that have no equal number of words."""
    for pattern in config.only:
        if not any(fnmatchcase(name, pattern) for name in class_names):
            raise UsageError(
                f"only: no class matches {pattern!r}; the first are {', '.join(map(repr, class_names[:5]))}"
            )
    kept = [not config.only or any(fnmatchcase(name, each) for each in config.only) for name in class_names]
    chosen = [name for name, keep in zip(class_names, kept, strict=True) if keep]
    parts = [tuple(name.split()) if config.heads == "words" else (name,) for name in chosen]
    if len({len(words) for words in parts}) != 1:
        few, many = min(parts, key=len), max(parts, key=len)
        raise UsageError(
            f"heads: words needs class names with equally many words, and {' '.join(few)!r} has {len(few)}, "
            f"{' '.join(many)!r} has {len(many)}; take heads = classes"
        )
    names = [list(dict.fromkeys(column)) for column in zip(*parts, strict=True)]
    columns = torch.full((len(class_names), len(names)), -1)
    places = [[column.index(word) for column, word in zip(names, words, strict=True)] for words in parts]
    columns[torch.tensor(kept)] = torch.tensor(places)
    return _Targets(columns, tuple(map(len, names)))


def _with_target(source: Source, targets: _Targets) -> Source:
    """The samples whose class is learned; samples without a label stay, to be named as unusable."""
    if (targets.columns >= 0).all():
        return source
    labels = ((index, source.record(index).label) for index in range(len(source)))
    kept = array("q", (i for i, label in labels if label is None or targets.columns[label, 0] >= 0))
    return Subset(source, kept, source.name, source.problems)


class _Labelled:
    """Batches of augmented pixels uint8 [B, 3, H, W] and labels int64 [B], by positions."""

    def __init__(self, source: Source, order: Order, config: PretrainConfig) -> None:
        self.source, self.order, self.config = source, order, config

    def __getitem__(self, positions: range) -> tuple[Tensor, Tensor, list[BadSample]]:
        bad: list[BadSample] = []
        samples = [
            usable_sample(
                self.order, position, self.source, bad, partial(self._read, self.order.epoch(position))
            )
            for position in positions
        ]
        pixels, labels = zip(*samples, strict=True)
        return torch.stack(pixels), torch.tensor(labels), bad

    def _read(self, epoch: int, index: int) -> tuple[Tensor, int]:
        record = self.source.record(index)
        if record.label is None:
            raise BadSample(record.id, "no label")
        seed = hash64(self.order.seed, epoch, record.id)
        views = augmented_views(
            self.source, index, record.id, seed, self.config.inputs, {"img": image_spec(self.config)}
        )
        return torch.from_numpy(views["img"].copy()), record.label


def _fit(
    config: PretrainConfig,
    model: nn.Module,
    train: Source,
    targets: _Targets,
    bad: BadSamples,
    device: torch.device,
    stop: StopRequest | None,
) -> None:
    order = Order(config.seed, len(train), config.batch_size)
    optimizer = adamw(model, config.optim)
    steps = list(order.batches(0, config.steps))
    loader = read_ahead(_Labelled(train, order, config), steps, config.inputs.workers, name=train.name)
    bar = Progress(f"pretraining {config.model} on {config.data}", config.steps, "steps")
    model.train()
    for step, (pixels, labels, problems) in enumerate(loader):
        if stop is not None and stop.requested:
            raise Interrupted
        bad.add(problems, seen=len(labels))
        set_learning_rate(optimizer, learning_rate(step, config.steps, config.optim), step)
        logits = model(normalise(pixels.to(device), image_spec(config)))
        loss = targets.loss(logits, labels.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm or math.inf)
        optimizer.step()
        if (step + 1) % 20 == 0 or step + 1 == config.steps:
            accuracy = float(targets.right(logits, labels).float().mean())
            bar.update(step + 1, f"loss {loss.item():.3f}, batch accuracy {accuracy:.0%}")


@torch.inference_mode()
def _accuracy(
    model: nn.Module,
    source: Source,
    targets: _Targets,
    spec: ImageSpec,
    device: torch.device,
    most: int = 5_000,
) -> float:
    """Top-1 accuracy on the fixed view of at most `most` images."""
    model.eval()
    right = seen = 0
    for start in range(0, min(len(source), most), 256):
        views, labels = [], []
        for index in range(start, min(start + 256, len(source))):
            try:
                view = torch.from_numpy(fixed_view(decode(source.image(index), ""), spec).copy())
            except BadSample:
                continue  # named when training met it, or counted by whoever evaluates this source
            label = source.record(index).label
            if label is not None:
                views.append(view)
                labels.append(label)
        if views:
            logits = model(normalise(torch.stack(views).to(device), spec))
            right += int(targets.right(logits, torch.tensor(labels)).sum())
            seen += len(labels)
    return right / max(seen, 1)


def _save(model: nn.Module, config: PretrainConfig, folder: Path) -> None:
    """timm's local-dir format, with this classifier's own preprocessing; in place only when complete."""
    model.pretrained_cfg.update(  # type: ignore[union-attr, operator]
        input_size=(3, config.size, config.size),
        mean=config.mean,
        std=config.std,
        crop_pct=1.0,
        crop_mode="center",
        interpolation="bicubic",
    )
    unfinished = folder / f".partial-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.to(memory_format=torch.contiguous_format)  # as timm and safetensors expect weights on disk
    with disk_errors(unfinished):
        save_for_hf(model, str(unfinished), model_args=config.model_args or None, safe_serialization=True)
    for name in ("model.safetensors", "config.json"):
        with writing_aside(folder / name) as temporary:
            (unfinished / name).replace(temporary)
    shutil.rmtree(unfinished)
