"""The bf16 working copy beside its fp32 masters, activation checkpointing, and pinned batches."""

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
from threetowers.run.setup import Prepared, prepare
from threetowers.towers.pair import checkpoint_activations
from threetowers.towers.weights import read_safetensors
from threetowers.towers.working_copy import KEPT, WorkingCopy
from threetowers.train.accumulate import accumulate
from threetowers.train.loop import train


def opened(tiny_config: Config, folder: Path, vit: bool = True, **changes: Any) -> Prepared:
    config = tiny_config(**changes)
    if vit:
        config = with_vit(config)
    return prepare(config, folder)


def gradients(run: Prepared, batch: Batch) -> dict[str, Tensor]:
    run.model.zero_grad()
    loss, _ = run.model.loss(run.features(batch))
    loss.backward()
    if run.working:
        run.working.hand_over()
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


def error(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    difference = sum(float((a[name] - b[name]).square().sum()) for name in a)
    return math.sqrt(difference / sum(float(value.square().sum()) for value in b.values()))


@pytest.mark.parametrize("vit", [True, False])
@pytest.mark.parametrize("method", ["3t", "lit", "lit-unlocked"])
def test_gradients_of_the_copy_are_the_masters_to_bf16(
    vit: bool, method: str, tiny_config: Config, tmp_path: Path
) -> None:
    run = opened(tiny_config, tmp_path / "a", vit, method=method)
    run.model.train()
    batch = run.reader()[range(16)]
    exact = gradients(run, batch)
    run.working = WorkingCopy(run.model.img, run.model.txt)
    assert error(gradients(run, batch), exact) < 0.03
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_norms_and_embeddings_stay_the_masters_and_the_rest_is_bf16(
    tiny_config: Config, tmp_path: Path
) -> None:
    run = opened(tiny_config, tmp_path / "a")
    copy = WorkingCopy(run.model.img, run.model.txt)
    seen: list[torch.dtype] = []
    norms = 0
    assert copy.img is not None
    assert run.model.img is not None
    for tower, masters in ((copy.img, run.model.img), (copy.txt, run.model.txt)):
        for module, master in zip(tower.modules(), masters.modules(), strict=True):
            own = list(module.parameters(recurse=False))
            if isinstance(module, KEPT):
                assert all(a is b for a, b in zip(own, master.parameters(recurse=False), strict=True))
            else:
                assert all(p.dtype == torch.bfloat16 for p in own)
            if isinstance(module, nn.LayerNorm):
                norms += 1
                module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    run.working = copy
    features = run.features(run.reader()[range(4)])
    assert norms == len(seen) and set(seen) == {torch.float32}
    assert all(value.dtype == torch.float32 for value in features.values())


def test_the_copy_follows_the_masters_and_frozen_ones_stay(tiny_config: Config, tmp_path: Path) -> None:
    run = opened(tiny_config, tmp_path / "a")
    frozen = run.model.txt.get_parameter("text_projection").requires_grad_(False)
    run.working = WorkingCopy(run.model.img, run.model.txt)
    own = run.working.txt.get_parameter("text_projection")
    before = own.clone()
    optimizer = torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad], lr=0.01, fused=True)
    assert "txt.text_projection" not in gradients(run, run.reader()[range(8)])
    optimizer.step()
    stale = run.working.txt.get_parameter("positional_embedding").clone()
    run.working.refresh()
    for name, master in run.model.txt.named_parameters():
        value = run.working.txt.get_parameter(name)
        assert torch.equal(value, master.to(value.dtype)), name
    assert not torch.equal(stale, run.working.txt.get_parameter("positional_embedding"))
    assert torch.equal(own, before) and torch.equal(own, frozen.bfloat16())


def test_running_statistics_are_the_masters() -> None:
    norm = nn.BatchNorm2d(4)
    tower = nn.Sequential(nn.Conv2d(3, 4, 1), norm)
    copy = WorkingCopy(None, tower)
    copy.txt(torch.randn(8, 3, 2, 2).bfloat16())
    assert norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 1
    assert norm.running_mean is not None and norm.running_mean.abs().sum() > 0


def test_micro_batches_in_the_copy(tiny_config: Config, tmp_path: Path) -> None:
    run = opened(tiny_config, tmp_path / "a", micro_batch_size=5)
    run.working = WorkingCopy(run.model.img, run.model.txt)
    batch = run.reader()[range(16)]
    whole = gradients(run, batch)
    run.model.zero_grad()
    accumulate(run, batch)
    run.working.hand_over()
    parts = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    assert error(parts, whole) < 0.01, "sums of micro-batches are rounded to bf16 one by one"


@pytest.mark.parametrize("vit", [True, False])
def test_checkpointed_activations_give_the_same_gradients(
    vit: bool, tiny_config: Config, tmp_path: Path
) -> None:
    plain, spared = (
        opened(tiny_config, tmp_path / "a", vit, grad_checkpointing=spare) for spare in (False, True)
    )
    batch = plain.reader()[range(8)]
    for run in (plain, spared):
        run.model.train()
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


@pytest.mark.parametrize("precision", ["fp32", "bf16-copy"])
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
