"""Learning rates and starts of training by rules over parameter names, and by layers."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kit.runs import Config, with_vit
from threetowers.commands.validate import validate
from threetowers.config import OptimConfig, RunConfig, StartConfig, check
from threetowers.errors import UsageError
from threetowers.run.finished import load_run
from threetowers.run.setup import assemble
from threetowers.train.loop import train
from threetowers.train.optim import adamw, layers_of, parameter_groups, read_rule, set_learning_rate


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.txt = nn.Linear(3, 2)
        self.log_scale = nn.Parameter(torch.zeros(1))


def settings(model: nn.Module, config: OptimConfig, step: int = 10**6) -> dict[str, float]:
    """The learning rate of each parameter as a multiple of the run's."""
    optimizer = adamw(model, config)
    set_learning_rate(optimizer, 1.0, step)
    return {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}


def test_the_last_rule_that_matches_holds_for_each_of_its_words() -> None:
    rules = ("img.* lr=0.5 from=3", "img.1.* lr=0.25", "txt.bias from=7", "* from=5", "img.0.bias from=0")
    config = OptimConfig(rules=rules, scale_lr_multiplier=0.1)
    late = {
        "img.0.weight": 0.5, "img.0.bias": 0.5, "img.1.weight": 0.25, "img.1.bias": 0.25, "txt.weight": 1.0,
        "txt.bias": 1.0, "log_scale": 0.1,
    }  # fmt: skip
    assert settings(Small(), config) == late
    assert settings(Small(), config, 5) == late, "from a step on means with it"
    waiting = dict.fromkeys(late, 0.0) | {"img.0.bias": 0.5, "log_scale": 0.1}
    assert settings(Small(), config, 4) == waiting, "the scale has a setting of its own"


@given(
    names=st.lists(st.sampled_from(["img.0.weight", "img.*", "*", "txt.*", "*.bias"]), max_size=6),
    values=st.lists(st.floats(0.0, 4.0, allow_nan=False), min_size=6, max_size=6),
)
def test_every_parameter_is_in_one_group_whatever_the_rules_are(
    names: list[str], values: list[float]
) -> None:
    model = Small()
    rules = tuple(f"{name} lr={value!r}" for name, value in zip(names, values, strict=False))
    groups = parameter_groups(model, OptimConfig(rules=rules))
    found = [name for group in groups for name in group["names"]]
    assert sorted(found) == sorted(name for name, _ in model.named_parameters())
    plain = parameter_groups(model, OptimConfig())
    decaying = {name for group in plain if group["weight_decay"] for name in group["names"]}
    assert {name for group in groups if group["weight_decay"] for name in group["names"]} == decaying


def test_what_waits_stays_to_the_bit_and_then_moves(tiny_config: Config, tmp_path: Path) -> None:
    def config(steps: int) -> RunConfig:
        optim = OptimConfig(lr=1e-2, weight_decay=0.3, warmup_steps=0, rules=("img.* from=3",))
        return tiny_config(method="baseline", steps=steps, optim=optim)

    start = assemble(config(3), tmp_path / "start").model.state_dict()
    for steps, moves in ((3, False), (5, True)):
        train(config(steps), tmp_path / f"run{steps}")
        run = load_run(tmp_path / f"run{steps}")
        moved = [
            key for key, value in run.img.state_dict().items() if not torch.equal(value, start[f"img.{key}"])
        ]
        assert bool(moved) == moves
        assert any(not torch.equal(value, start[f"txt.{key}"]) for key, value in run.txt.state_dict().items())


def test_layers_of_towers_are_counted_from_the_input(tiny_config: Config, tmp_path: Path) -> None:
    model = assemble(with_vit(tiny_config(method="baseline")), tmp_path / "vit").model
    assert model.img is not None
    for tower, first, last in (
        (model.img, "conv1.weight", "proj"), (model.txt, "token_embedding.weight", "text_projection"),
    ):  # fmt: skip
        layers = layers_of(tower)
        names = [name for name, _ in tower.named_parameters()]
        assert layers.keys() == set(names)
        blocks = {layers[name] for name in names if "resblocks." in name}
        assert layers[first] == layers["positional_embedding"] == 0 and blocks == set(
            range(1, len(blocks) + 1)
        )
        assert layers[last] == len(blocks) + 1


def test_each_layer_of_a_started_tower_learns_slower_than_the_one_above(
    tiny_config: Config, timm_tower: str, tmp_path: Path
) -> None:
    config = tiny_config(
        method="3t-warm",
        optim=OptimConfig(layer_decay=0.5, rules=("img.trunk.stem* lr=3",)),
        start=StartConfig(lr=0.2),
    )
    model = assemble(config, tmp_path / "run").model
    optimizer = adamw(model, config.optim, model.started)
    rates = {name: group["lr_multiplier"] for group in optimizer.param_groups for name in group["names"]}
    assert model.img is not None
    layers = layers_of(model.img)
    top = max(layers.values())
    assert top > 2 and layers["head.proj.weight"] == top
    for name, layer in layers.items():
        factor = 3.0 if name.startswith("trunk.stem") else 0.2 if name.startswith("trunk.") else 1.0
        assert rates[f"img.{name}"] == pytest.approx(factor * 0.5 ** (top - layer)), name
    others = {rate for name, rate in rates.items() if not name.startswith("img.")}
    assert others == {1.0}, "text tower, heads and scale do not start at given weights"


def test_the_resolved_table_stands_in_the_run_and_is_shown_before(
    tiny_config: Config, tmp_path: Path
) -> None:
    optim = OptimConfig(lr=0.01, rules=("img.* lr=0.5 from=20",))
    config = tiny_config(method="3t", optim=optim)
    said = "\n".join(validate(config, tmp_path / "run"))
    assert "learning rate 0.005, weight decay 0.1, from step 20" in said
    assert "learning rate 0.01, weight decay 0.1\n" in said
    train(config, tmp_path / "run")
    table = json.loads((tmp_path / "run" / "optimizer.json").read_text())
    names = [name for group in table for name in group["parameters"]]
    assert sorted(names) == sorted(
        name for name, _ in assemble(config, tmp_path / "x").model.named_parameters()
    )
    for group in table:
        towers = {name.split(".")[0] for name in group["parameters"]}
        assert (group["lr"], group["from_step"]) == ((0.005, 20) if towers == {"img"} else (0.01, 0))


@pytest.mark.parametrize(
    "rule",
    ["", "img.*", "img.* 0.5", "img.* lr=", "img.* lr=x", "img.* from=1.5", "img.* lr=-1", "img.* lr=nan",
     "img.* lr=inf", "img.* from=-2", "img.* decay=0", "img.* lr=1 lr=2 from=3", "* lr=1 from=2 x"],
)  # fmt: skip
def test_what_is_no_rule_is_refused(rule: str) -> None:
    with pytest.raises(UsageError, match=r"optim\.rules: .* is no rule\. Write a pattern"):
        read_rule(rule)


def test_rules_and_decays_without_use_are_errors() -> None:
    with pytest.raises(UsageError, match=r"optim\.rules: 'image\.\*' matches no parameter .* img\.0\.weight"):
        adamw(Small(), OptimConfig(rules=("image.* lr=0.5",)))
    with pytest.raises(UsageError, match="matches no parameter"):
        adamw(Small(), OptimConfig(rules=("log_scale lr=0.5",)))
    with pytest.raises(UsageError, match=r"optim\.layer_decay: .* none does"):
        adamw(Small(), OptimConfig(layer_decay=0.5))
    with pytest.raises(UsageError, match=r"optim\.layer_decay: 1\.5 is out of range"):
        check(RunConfig(optim=OptimConfig(layer_decay=1.5)))
