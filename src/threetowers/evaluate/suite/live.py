"""A suite measured on a model while it trains: on some images of each data set, with nothing kept on disk."""

from array import array
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from threetowers.data.source import Subset
from threetowers.evaluate.encode import Encoded, encode, encode_texts
from threetowers.evaluate.suite.features import ImageRows, Part, rows_of
from threetowers.evaluate.suite.run import check_tasks, fitting_tasks
from threetowers.evaluate.suite.sets import OpenSet, open_set, read_suite
from threetowers.evaluate.zero_shot import class_embeddings
from threetowers.processes import ALONE, Processes
from threetowers.run.setup import Setup, autocast


class LiveFeatures:
    """The main pair of a model in training, as it is when it is asked; implements Features.

    Each part is encoded once in the life of an object, which is that of one validation. processes: those that ask for
    the same features together, of which each encodes its share.
    """

    name = digest = "the model in training"
    views: Sequence[str] = ("img",)

    def __init__(self, setup: Setup, processes: Processes = ALONE) -> None:
        self.setup, self.processes = setup, processes
        self.scale: float | None = float(setup.model.log_scale[0].detach().exp())
        self.preprocessing = "that of the run"
        self._encoded: dict[str, Encoded] = {}

    def _of(self, part: Part) -> Encoded:
        if part.name not in self._encoded:
            setup = self.setup
            # a frozen tower is asked only where it is the image tower
            stores = {} if setup.model.needs_pixels() else setup.thirds.stores(part.source)
            self._encoded[part.name] = encode(
                setup.model, part.source, setup.tokenizer, stores, setup.device,
                workers=setup.config.inputs.workers, autocast=autocast(setup.config, setup.device), merge=False,
                kept=setup.kept_views(part.source), processes=self.processes,
            )  # fmt: skip
        return self._encoded[part.name]

    def images(self, part: Part, view: str = "img") -> ImageRows:
        encoded = self._of(part)
        return ImageRows(encoded.views[view], encoded.index)

    def captions(self, part: Part, samples: Sequence[int]) -> Tensor:
        encoded = self._of(part)
        counts = torch.bincount(encoded.text_image, minlength=len(encoded.index)).numpy()
        place = {sample: row for row, sample in enumerate(encoded.index.tolist())}
        return encoded.views["txt"][rows_of(counts, [place[sample] for sample in samples])]

    def texts(self, texts: Sequence[str]) -> Tensor:
        setup = self.setup
        precision = autocast(setup.config, setup.device)
        return encode_texts(
            setup.model,
            list(texts),
            setup.tokenizer,
            setup.device,
            autocast=precision,
            processes=self.processes,
        )

    def classes(self, part: Part, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        return class_embeddings(self.texts, names, templates)


def open_watched(suite: str | None, images: int) -> list[OpenSet]:
    """The data sets of a suite, each cut to so many images of every part, at equal distances; 0 takes all.

    Raises UsageError and DataError for a suite that cannot be used.
    """
    if suite is None:
        return []
    described = read_suite(suite)
    for each in described:
        check_tasks(each)
    return [_thinned(open_set(each), images) for each in described]


def _thinned(opened: OpenSet, images: int) -> OpenSet:
    def some(part: Part | None) -> Part | None:
        if part is None or not images or len(part.source) <= images:
            return part
        chosen = np.linspace(0, len(part.source) - 1, images).astype(np.int64)
        return part._replace(source=Subset(part.source, array("q", chosen.tolist()), part.source.name))

    test = some(opened.test)
    assert test is not None
    return replace(
        opened, test=test, train=some(opened.train), val=some(opened.val), outside=some(opened.outside)
    )


def describe_watched(sets: Sequence[OpenSet]) -> list[str]:
    """A line for each data set: its size and its tasks. Raises UsageError for a task that does not fit."""
    lines = []
    for opened in sets:
        tasks = ", ".join(fitting_tasks(opened, LiveFeatures.views))
        lines.append(f"suite: {opened.described.name}, {len(opened.test.source):,} images: {tasks}")
    return lines


def suite_metrics(setup: Setup, sets: Sequence[OpenSet], processes: Processes = ALONE) -> dict[str, float]:
    """Every metric of every task on the data sets, as `TASK/SET/METRIC`.

    processes: those that call this together, of which each encodes its share. Each of them also measures, since a task
    asks for features while it does; all return what the first one has.
    """
    features = LiveFeatures(setup, processes)
    found: dict[str, float] = {}
    for opened in sets:
        for name, task in fitting_tasks(opened, features.views).items():
            measured = task.measure(features, opened)
            found |= {
                f"{name}/{opened.described.name}/{key}": value for key, value in measured.metrics.items()
            }
    return processes.told(lambda: found)
