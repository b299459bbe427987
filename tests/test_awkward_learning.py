"""Settings under which nothing can be learned are refused, by every command that trains."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kit.files import tar
from kit.pictures import picture
from kit.runs import Config
from threetowers.commands.validate import validate
from threetowers.compare.comparison import compare
from threetowers.config import (
    CompareConfig,
    InputConfig,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
)
from threetowers.errors import ThreeTowersError, UsageError
from threetowers.objective.kinds import LOSSES
from threetowers.objective.pairs import CONTRASTIVE
from threetowers.train import loop
from threetowers.train.loop import train
from threetowers.train.pretrain import pretrain


def training(config: RunConfig, out: Path) -> None:
    train(config, out / "run")


def validating(config: RunConfig, out: Path) -> None:
    list(validate(config, out / "run"))


def comparing(config: RunConfig, out: Path) -> None:
    compare(config, CompareConfig(methods=("baseline", config.method), lrs=(1e-3,)), out / "compare")


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "a batch of one": ({"batch_size": 1}, "batch_size: 1.*softmax"),
    "a batch of one sigmoid": (
        {"batch_size": 1, "objective": ObjectiveConfig(kind="sigmoid")},
        "batch_size.*sigmoid",
    ),
    "a batch of one regression": ({"batch_size": 1, "method": "3t-regression"}, "batch_size: 1.*img-txt"),
    "no weight at all": ({"objective": ObjectiveConfig(weights=(0.0, 0.0, 0.0))}, "objective.weights.*img"),
    "no weight for texts": (
        {"objective": ObjectiveConfig(weights=(0.0, 1.0, 0.0))},
        "objective.weights.*txt",
    ),
    "no weight for images": (
        {"objective": ObjectiveConfig(weights=(0.0, 0.0, 1.0))},
        "objective.weights.*img",
    ),
    "an infinite weight": ({"objective": ObjectiveConfig(weights=(float("inf"), 0.0, 1.0))}, "finite"),
    "only the scale": (
        {"optim": OptimConfig(freeze=("img.*", "txt.*", "heads.*"))},
        "optim.freeze.*nothing is left",
    ),
    "an infinite learning rate": ({"optim": OptimConfig(lr=float("inf"))}, "optim.lr"),
}


@pytest.mark.parametrize("command", [training, validating, comparing])
@pytest.mark.parametrize("name", CASES)
def test_nothing_to_learn_is_refused_before_the_first_step(
    name: str, command: Callable[[RunConfig, Path], None], tiny_config: Config, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    changes, words = CASES[name]
    if command is comparing and name in ("only the scale", "an infinite learning rate"):
        pytest.skip("a comparison has its own learning rates, and a baseline has no heads to freeze")
    monkeypatch.setattr(loop, "_steps", lambda _: pytest.fail("a step was taken"))
    with pytest.raises(UsageError, match=words):
        command(tiny_config(**changes), tmp_path)


def test_what_can_be_learned_is_let_pass(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config(batch_size=2, steps=1, objective=ObjectiveConfig(weights=(1.0, 0.0, 0.0)))
    assert train(config, tmp_path / "run").finished
    frozen = tiny_config(steps=1, optim=replace(config.optim, freeze=("img.*",)))
    assert train(frozen, tmp_path / "frozen").finished


def test_the_contrastive_kinds_are_those_of_the_losses() -> None:
    assert {kind for kind, loss in LOSSES.items() if loss.contrastive} == set(CONTRASTIVE)
    for kind in CONTRASTIVE[:1]:
        assert kind == "softmax" and torch.tensor([[3.0]]).log_softmax(1).item() == 0.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 1}, "batch_size: 1 .*2 or more"),
        ({"steps": -1}, "steps: -1"),
        ({"size": 0}, "size: 0"),
        ({"optim": OptimConfig(lr=0.0)}, "optim.lr"),
        ({}, "one class, 'red'"),
    ],
    ids=str,
)
def test_pretraining_that_learns_nothing_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    members = [(f"{index}.{ending}", data) for index in range(12) for ending, data in
               (("png", picture(index)), ("cls", b"0"))]  # fmt: skip
    tar(tmp_path / "classes" / "0.tar", members)
    (tmp_path / "classes" / "classnames.txt").write_text("red\n")
    inputs = InputConfig(workers=0, val_fraction=0.1)
    config = PretrainConfig(data=str(tmp_path / "classes"), batch_size=4, device="cpu", inputs=inputs)
    with pytest.raises(ThreeTowersError, match=words):
        pretrain(replace(config, **changes), tmp_path / "tower")
