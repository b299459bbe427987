"""Configurations of runs, what a run leaves in its folder, and runs that end in the midst of a step."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from threetowers.config import InputConfig, PairConfig, RunConfig
from threetowers.data import loader
from threetowers.towers.weights import read_safetensors
from threetowers.train import loop
from threetowers.train.loop import train
from threetowers.train.optim import learning_rate

Config = Callable[..., RunConfig]
"""The fixture tiny_config: keyword arguments replace fields."""

VIT: dict[str, str | bool | int | float] = {
    "layers": 2,
    "width": 32,
    "head_width": 16,
    "patch_size": 8,
    "image_size": 32,
}


TINY_PAIR = PairConfig(
    embed_dim=24,
    vision={"timm_model_name": "test_convnext2", "timm_pool": "", "image_size": 32},
    text={"context_length": 16, "width": 32, "heads": 2, "layers": 1},
    tokenizer="trained",
    vocab_size=300,
)
TINY_INPUTS = InputConfig(val_fraction=0.15, test_fraction=0.15, workers=0)


def with_vit(config: RunConfig, **changes: float) -> RunConfig:
    """The configuration with open_clip's own ViT as image tower; `changes` replace settings of the ViT."""
    return replace(config, pair=replace(config.pair, vision={**VIT, **changes}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a finished run."""
    return read_safetensors(folder / "model.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    """Two finished runs have the same weights to the bit."""
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def logged(folder: Path, key: str = "train/loss") -> dict[int, float]:
    """A metric by its step."""
    return {row["step"]: row[key] for row in rows(folder) if key in row}


def events(folder: Path) -> str:
    """The text of events.log."""
    return (folder / "events.log").read_text(encoding="utf-8")


def at_step(step: int, act: Callable[[], None]) -> "mock._patch[Callable[..., float]]":
    """A patch under which a run calls `act` in the midst of a step, counted from 0."""

    def rate(at: int, *arguments: Any) -> float:
        if at == step:
            act()
        return learning_rate(at, *arguments)

    return mock.patch.object(loop, "learning_rate", rate)


def interrupt_at(step: int, config: RunConfig, folder: Path) -> None:
    """A run that ends in the midst of a step, and leaves what a kill would leave."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with at_step(step, interrupt), pytest.raises(KeyboardInterrupt):
        train(config, folder)


def poisoned(steps: set[int]) -> Callable[..., Iterator[loader.Batch]]:
    """The loader's `batches` with stored features that are not finite in these steps of the data's order."""

    def batches(reader: Any, first: int, last: int, **options: Any) -> Iterator[loader.Batch]:
        for step, batch in enumerate(loader.batches(reader, first, last, **options), start=first):
            if step in steps:
                batch.third_features["third"][0, 0] = float("nan")
            yield batch

    return batches
