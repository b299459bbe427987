"""Activation checkpointing, compiled towers, and pinned batches."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kit.runs import Config, with_vit
from threetowers.data.loader import Batch
from threetowers.errors import UsageError
from threetowers.run.setup import Setup, prepare
from threetowers.towers.pair import checkpoint_activations
from threetowers.towers.weights import read_safetensors
from threetowers.train.loop import train
from threetowers.train.step import TrainingStep


def opened(tiny_config: Config, folder: Path, vit: bool = True, **changes: Any) -> Setup:
    config = tiny_config(**changes)
    if vit:
        config = with_vit(config)
    return prepare(config, folder)


def gradients(setup: Setup, batch: Batch) -> dict[str, Tensor]:
    step = TrainingStep(setup.config, setup.model, setup.device, setup.thirds.features)
    loss, _ = step.loss(step.features(batch), batch)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in setup.model.named_parameters() if p.grad is not None}
    setup.model.zero_grad()
    return found


def error(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    difference = sum(float((a[name] - b[name]).square().sum()) for name in a)
    return math.sqrt(difference / sum(float(value.square().sum()) for value in b.values()))


@pytest.mark.parametrize("vit", [True, False])
def test_checkpointed_activations_give_the_same_gradients(
    vit: bool, tiny_config: Config, tmp_path: Path
) -> None:
    plain, spared = (
        opened(tiny_config, tmp_path / "a", vit, grad_checkpointing=spare) for spare in (False, True)
    )
    batch = plain.reader()[range(8)]
    assert error(gradients(spared, batch), gradients(plain, batch)) < 1e-6


def test_dropped_patches_are_the_same_ones_when_activations_are_computed_again(
    tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(steps=4)
    config = with_vit(config, patch_dropout=0.5)
    train(config, tmp_path / "plain")
    train(replace(config, grad_checkpointing=True), tmp_path / "spared")
    plain, spared = (read_safetensors(tmp_path / name / "model.safetensors") for name in ("plain", "spared"))
    for name, value in plain.items():
        torch.testing.assert_close(spared[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast"])
def test_compiled_towers_train_the_same_weights_under_the_same_names(
    precision: str, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and run as it is (backend eager), so that no compiler is needed; dropout is drawn from the same state."""
    compiled: list[str] = []
    real = nn.Module.compile

    def eager(module: nn.Module, **options: Any) -> None:
        compiled.append(type(module).__name__)
        real(module, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", eager)
    config = tiny_config(steps=4, precision=precision)
    config = with_vit(config, patch_dropout=0.5)
    train(config, tmp_path / "plain")
    assert not compiled
    train(replace(config, compile=True), tmp_path / "compiled")
    assert compiled == ["VisionTransformer", "Transformer"]
    plain, traced = (
        read_safetensors(tmp_path / name / "model.safetensors") for name in ("plain", "compiled")
    )
    assert plain.keys() == traced.keys()
    for name, value in plain.items():
        torch.testing.assert_close(traced[name], value, rtol=1e-4, atol=1e-5)


def test_a_tower_that_cannot_checkpoint_is_said(tiny_config: Config, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="grad_checkpointing: Linear"):
        checkpoint_activations(nn.Linear(2, 2))


def test_a_batch_pins_all_its_tensors(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[tuple[int, ...]] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    batch = opened(tiny_config, tmp_path / "a").reader()[range(4)]
    again = batch.pin_memory()
    assert isinstance(again, Batch) and again.bad is batch.bad
    assert len(pinned) == 5 and tuple(batch.pixels.shape) in pinned  # type: ignore[union-attr]
