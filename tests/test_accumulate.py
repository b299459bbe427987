"""A batch in micro-batches is the batch: gradients, random states, and whole runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kit.runs import TINY_PAIR, VIT, Config
from threetowers.config import InputConfig, ObjectiveConfig, RunConfig
from threetowers.data.loader import Batch
from threetowers.run.setup import prepare
from threetowers.towers.weights import read_safetensors
from threetowers.train.accumulate import accumulate
from threetowers.train.loop import train
from threetowers.train.step import TrainingStep

PATCH_DROPOUT = replace(TINY_PAIR, vision={**VIT, "patch_dropout": 0.5})


def step_of(config: RunConfig, folder: Path) -> tuple[TrainingStep, Batch]:
    setup = prepare(config, folder)
    step = TrainingStep(config, setup.model, setup.device, setup.thirds.features)
    return step, setup.reader()[range(config.batch_size)]


def accumulated(step: TrainingStep, batch: Batch) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    return accumulate(batch, step.config.micro_batch_size, step.device, step.features, step.loss)


def gradients(step: TrainingStep) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in step.model.named_parameters() if p.grad is not None}
    step.model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # some biases have no gradient but rounding: what counts is what is small beside the largest
        error = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-3)
        assert float(error) <= bound, f"{name}: {float(error):.1e}"


@pytest.mark.parametrize("size", [1, 5, 8, 15])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("3t", {}),
        ("3t", {"objective": ObjectiveConfig(kind="sigmoid", scale="per-row")}),
        ("3t-regression", {}),
        ("lit", {}),
        ("lit-unlocked", {}),
        ("baseline", {"inputs": InputConfig(workers=0, mask_duplicates=True)}),
    ],
)
def test_micro_batches_give_the_gradients_of_the_whole_batch(
    size: int, method: str, options: dict[str, Any], tiny_config: Config, tmp_path: Path
) -> None:
    step, batch = step_of(tiny_config(method=method, micro_batch_size=size, **options), tmp_path / "run")
    loss, rows = step.loss(step.features(batch), batch)
    loss.backward()  # type: ignore[no-untyped-call]
    expected = gradients(step)
    total, accumulated_rows, feats = accumulated(step, batch)
    assert total.item() == pytest.approx(loss.item(), rel=1e-6)
    assert accumulated_rows.keys() == rows.keys()
    assert all(len(value) == len(batch.index) for value in feats.values())
    assert_same_gradients(gradients(step), expected, 2e-6)


def test_dropped_patches_are_the_same_in_both_passes(tiny_config: Config, tmp_path: Path) -> None:
    """Against one graph over the same micro-batches under the same random states."""
    config = tiny_config(pair=PATCH_DROPOUT, micro_batch_size=6)
    step, batch = step_of(config, tmp_path / "run")
    torch.manual_seed(3)
    parts = [step.features(batch.part(start, start + 6)) for start in range(0, 16, 6)]
    loss, _ = step.loss({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    expected, after = gradients(step), torch.get_rng_state()
    torch.manual_seed(3)
    total, _, _ = accumulated(step, batch)
    assert torch.equal(torch.get_rng_state(), after)
    assert total.item() == pytest.approx(loss.item(), rel=1e-6)
    found = gradients(step)
    assert_same_gradients(found, expected, 2e-6)
    torch.manual_seed(4)
    accumulated(step, batch)
    assert not torch.allclose(gradients(step)["img.conv1.weight"], expected["img.conv1.weight"], rtol=1e-2)


def test_a_run_in_micro_batches_is_the_run(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config()
    train(config, tmp_path / "whole")
    train(replace(config, micro_batch_size=5), tmp_path / "parts")
    whole, parts = (read_safetensors(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=2e-5)
