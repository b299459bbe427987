"""Weight decay is for matrices: vectors in the shape of a matrix have none, in every kind of tower."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from kit.runs import Config, assert_same_weights, interrupt_at, with_vit
from threetowers.config import OptimConfig
from threetowers.run.setup import prepare
from threetowers.train import optim
from threetowers.train.loop import train
from threetowers.train.optim import parameter_groups

SHAPES = {
    "vectors": [(5,), (), (1,), (1, 1), (5, 1, 1, 1), (1, 5, 1, 1), (1, 1, 5), (1, 5), (5, 1)],
    "matrices": [(5, 3), (5, 3, 1, 1), (5, 1, 3, 3), (1, 4, 5), (4, 5)],
}


def decaying(model: nn.Module) -> set[str]:
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1))
    return {name for group in groups if group["weight_decay"] for name in group["names"]}


@pytest.mark.parametrize("shape", SHAPES["vectors"] + SHAPES["matrices"], ids=str)
def test_vectors_of_any_shape_do_not_decay(shape: tuple[int, ...]) -> None:
    model = nn.Module()
    model.p = nn.Parameter(torch.zeros(shape))
    assert decaying(model) == ({"p"} if shape in SHAPES["matrices"] else set())


@pytest.mark.parametrize(
    "name", ["test_nfnet", "test_vit", "test_convnext2", "test_resnet", "test_efficientnet"]
)
def test_no_gain_bias_or_token_of_a_tower_decays(name: str) -> None:
    model = timm.create_model(name)
    small = {key for key, value in model.named_parameters() if value.numel() == max(value.shape, default=1)}
    assert small and not small & decaying(model)
    assert {
        key for key, value in model.named_parameters() if value.dim() == 2 and min(value.shape) > 1
    } <= decaying(model)


def test_a_normaliser_free_tower_keeps_its_gains(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config(method="baseline")
    pair = replace(config.pair, vision={"timm_model_name": "test_nfnet", "timm_pool": "", "image_size": 32})
    model = prepare(replace(config, pair=pair), tmp_path / "run").model
    gains = [key for key, value in model.named_parameters() if key.endswith(".gain") and value.dim() == 4]
    assert gains and not set(gains) & decaying(model)


def test_groups_of_a_transformer_are_those_of_its_dimensions(tiny_config: Config, tmp_path: Path) -> None:
    model = prepare(with_vit(tiny_config(method="baseline")), tmp_path / "run").model
    assert decaying(model) == {key for key, value in model.named_parameters() if value.dim() > 1}


def test_a_run_saved_with_other_groups_continues(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments are saved by the parameters' names, so that a group may change between two versions."""
    config = tiny_config(method="baseline", optim=OptimConfig(warmup_steps=1, weight_decay=0.0))
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(optim, "_is_matrix", lambda parameter: parameter.ndim >= 2)
        interrupt_at(4, replace(config, checkpoint_every_steps=2), tmp_path / "torn")
    train(replace(config, checkpoint_every_steps=2), tmp_path / "torn")
    assert_same_weights(tmp_path / "whole", tmp_path / "torn")
