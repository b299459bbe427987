"""Which attention kernels train, and that they agree with the ones that torch would choose."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kit.runs import VIT, Config, with_vit
from threetowers.run.setup import prepare
from threetowers.towers.attention import LONGEST, own_attention, trained_attention
from threetowers.train.loop import train
from threetowers.train.step import TrainingStep

CPU = torch.device("cpu")


def fused() -> bool:
    return bool(torch.backends.cuda.flash_sdp_enabled())


class Long(nn.Module):
    context_length = LONGEST + 1


@pytest.mark.parametrize(
    ("device", "bf16", "tower", "plain"),
    [
        (CPU, True, nn.Linear(2, 2), True),
        (CPU, True, None, True),
        (CPU, True, Long(), False),
        (CPU, False, nn.Linear(2, 2), False),
        (torch.device("cuda"), True, nn.Linear(2, 2), False),
    ],
)
def test_short_towers_in_bf16_on_cpus_train_with_plain_attention(
    device: torch.device, bf16: bool, tower: nn.Module | None, plain: bool
) -> None:
    with trained_attention(device, tower, nn.Linear(2, 2), bf16=bf16):
        assert fused() is not plain
        with own_attention():
            assert fused()
        assert fused() is not plain
    assert fused()


def test_patches_count_as_tokens(tiny_config: Config, tmp_path: Path) -> None:
    model = prepare(with_vit(tiny_config()), tmp_path).model
    fine = {**VIT, "patch_size": 2}
    longer = prepare(replace(tiny_config(), pair=replace(tiny_config().pair, vision=fine)), tmp_path).model
    for towers, plain in ((model, True), (longer, False)):
        with trained_attention(CPU, towers.img, towers.txt, bf16=True):
            assert fused() is not plain


def test_plain_attention_gives_the_gradients_of_the_fused_one(tiny_config: Config, tmp_path: Path) -> None:
    setup = prepare(with_vit(tiny_config(precision="bf16-autocast")), tmp_path)
    step = TrainingStep(setup.config, setup.model, setup.device, setup.thirds.features)
    batch = setup.reader()[range(13)]

    def gradients() -> dict[str, Tensor]:
        step.model.zero_grad()
        step.loss(step.features(batch), batch)[0].backward()  # type: ignore[no-untyped-call]
        return {name: p.grad.clone() for name, p in step.model.named_parameters() if p.grad is not None}

    expected = gradients()
    with trained_attention(CPU, step.model.img, step.model.txt, bf16=True):
        found = gradients()
    assert found.keys() == expected.keys()
    difference = sum(float((found[name] - value).square().sum()) for name, value in expected.items())
    assert difference < 0.02**2 * sum(float(value.square().sum()) for value in expected.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast"])
def test_every_training_step_runs_in_it(
    precision: str, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(precision=precision, grad_checkpointing=True, steps=3)
    config = with_vit(config)
    seen = []
    real = Tensor.backward

    def noted(self: Tensor, *arguments: object) -> None:
        seen.append(fused())
        real(self, *arguments)  # type: ignore[arg-type, no-untyped-call]

    monkeypatch.setattr(Tensor, "backward", noted)
    assert train(config, tmp_path / "run").finished
    assert seen == [precision == "fp32"] * 3
    assert fused()
