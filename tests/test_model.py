"""Equivalences of the method within one process, each to a stated tolerance."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kit.runs import Config
from kit.towers import EmbeddingTower, image_tower
from threetowers.compare.showcase import third_checks
from threetowers.config import ObjectiveConfig, RunConfig, StartConfig
from threetowers.data.transforms import ImageSpec
from threetowers.errors import UsageError
from threetowers.model import ThreeTowers, build
from threetowers.objective import losses, pairs
from threetowers.objective.pairs import METHODS, Objective, Row
from threetowers.run.finished import load_run
from threetowers.towers.frozen.load import load_frozen
from threetowers.towers.weights import read_safetensors
from threetowers.train.loop import train
from threetowers.train.optim import adamw

SPEC = ImageSpec(8, (0.5,) * 3, (0.5,) * 3)


def small(rows: tuple[Row, ...], thirds: dict[str, int], **options: Any) -> ThreeTowers:
    torch.manual_seed(0)
    image = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    return ThreeTowers(
        Objective(rows),
        image,
        EmbeddingTower(10),
        10,
        thirds,
        ObjectiveConfig(**options),
        SPEC,
        0,
    )


def inputs(num: int = 7, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixels": torch.randint(0, 256, (num, 3, 8, 8), dtype=torch.uint8, generator=generator),
        "tokens": torch.randint(0, 30, (num, 4), generator=generator),
        "third": torch.randn(num, 6, generator=generator) * 3,
    }


def main_gradients(model: ThreeTowers) -> dict[str, Tensor]:
    return {
        n: p.grad.clone()
        for n, p in model.named_parameters()
        if not n.startswith("heads") and p.grad is not None
    }


def test_one_third_tower_given_twice_with_half_weight_each_is_one_third_tower() -> None:
    """Loss and main-tower gradients to 1e-6 when the heads are equal."""
    once = small(pairs.three_towers(["third"]), {"third": 6})
    twice = small(pairs.three_towers(["third_a", "third_b"]), {"third_a": 6, "third_b": 6})
    with torch.no_grad():
        for name, linear in twice.heads.items():
            one = name.replace("third_a", "third").replace("third_b", "third")
            linear.load_state_dict(once.heads[one].state_dict())
    batch = inputs()
    results = []
    for model, views in ((once, ["third"]), (twice, ["third_a", "third_b"])):
        thirds = dict.fromkeys(views, batch["third"])
        loss, _ = model.loss(model.features(pixels=batch["pixels"], tokens=batch["tokens"], thirds=thirds))
        loss.backward()
        results.append((loss.detach(), main_gradients(model)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_frozen_sides_heads_get_their_gradient_and_p_gets_none() -> None:
    model = small(pairs.three_towers(["third"]), {"third": 6})
    batch = inputs()
    third = batch["third"].requires_grad_(False)
    loss, rows = model.loss(
        model.features(pixels=batch["pixels"], tokens=batch["tokens"], thirds={"third": third})
    )
    loss.backward()
    assert set(rows) == {"img-txt", "img-third", "txt-third"}
    for name in ("img@third", "third@img", "txt@third", "third@txt"):
        gradient = model.heads[name].get_parameter("weight").grad
        assert gradient is not None and gradient.abs().sum() > 0, name
    assert third.grad is None


@pytest.mark.parametrize(
    ("heads", "names", "width"),
    [
        ("third", {"third@img", "third@txt"}, 6), ("main", {"img@third", "txt@third"}, 6), ("none", set[str](), 10),
    ],
)  # fmt: skip
def test_a_side_without_head_is_compared_as_the_tower_gives_it(
    heads: pairs.Heads, names: set[str], width: int
) -> None:
    """The loss is the written sum over these views, and both main towers get a gradient from the third rows alone."""
    model = small(pairs.three_towers(["third"], (0, 0.5, 0.5), heads=heads), {"third": width})
    assert set(model.heads) == names
    batch = inputs()
    third = torch.randn(7, width, generator=torch.Generator().manual_seed(1))
    feats = model.features(pixels=batch["pixels"], tokens=batch["tokens"], thirds={"third": third})
    loss, rows = model.loss(feats)
    for main in ("img", "txt"):
        own, other = feats[main], third
        if f"{main}@third" in names:
            own = own @ model.heads[f"{main}@third"].get_parameter("weight").T
        if f"third@{main}" in names:
            other = other @ model.heads[f"third@{main}"].get_parameter("weight").T
        expected = losses.softmax_loss(losses.unit(own), losses.unit(other), model.scale())
        torch.testing.assert_close(rows[f"{main}-third"], expected)
    loss.backward()
    for tower in (model.img, model.txt):
        assert tower is not None
        assert sum(float(p.grad.abs().sum()) for p in tower.parameters() if p.grad is not None) > 0


def test_the_loss_is_the_sum_as_written() -> None:
    model = small(pairs.three_towers(["third"], (0.5, 0.25, 2.0)), {"third": 6})
    batch = inputs()
    feats = model.features(pixels=batch["pixels"], tokens=batch["tokens"], thirds={"third": batch["third"]})
    loss, rows = model.loss(feats)
    expected = 0.5 * rows["img-txt"] + 0.25 * rows["img-third"] + 2.0 * rows["txt-third"]
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_regression_rows_predict_the_frozen_features(kind: str) -> None:
    """A head that maps onto p exactly has no regression loss; heads face p in its own width."""
    model = small(pairs.regression(["third"], kind=kind), {"third": 6})  # type: ignore[arg-type]
    assert set(model.heads) == {"img@third", "txt@third"}
    assert model.heads["img@third"].out_features == 6
    batch = inputs()
    feats = model.features(pixels=batch["pixels"], tokens=batch["tokens"], thirds={"third": batch["third"]})
    feats["img"] = torch.linalg.lstsq(model.heads["img@third"].weight, feats["third"].T).solution.T
    assert model.row_loss(1, feats).item() == pytest.approx(0.0, abs=1e-5)
    assert model.row_loss(2, feats).item() > 0.1


def test_the_norm_constant_brings_the_mean_squared_norm_to_the_width() -> None:
    model = small(pairs.three_towers(["third"]), {"third": 6})
    stored = inputs(50)["third"].half()
    model.set_third_norm("third", float(stored.float().square().sum(1).mean()))
    scaled = model.raw_view("third", model.features(thirds={"third": stored}))
    assert float(scaled.square().sum(1).mean()) == pytest.approx(6.0, rel=1e-5)


def test_a_scale_per_row_and_a_bias_per_sigmoid_row_are_learned_separately() -> None:
    model = small(pairs.three_towers(["third"], kind="sigmoid"), {"third": 6}, scale="per-row")
    batch = inputs()
    loss, _ = model.loss(
        model.features(pixels=batch["pixels"], tokens=batch["tokens"], thirds={"third": batch["third"]})
    )
    loss.backward()
    assert model.log_scale.shape == (3,) and model.log_scale.grad is not None
    assert model.bias is not None and model.bias.grad is not None
    assert model.log_scale.grad.all() and model.bias.grad.all()
    with torch.no_grad():
        model.log_scale.add_(50.0)
    model.clamp_scale()
    assert model.scale(2).item() == pytest.approx(100.0)


def test_weights_one_zero_zero_are_the_baseline_step_for_step(tiny_config: Config, tmp_path: Path) -> None:
    """After six steps with clipping, every weight of both towers agrees to 1e-6."""
    only_pair = tiny_config(objective=ObjectiveConfig(weights=(1.0, 0.0, 0.0)))
    train(only_pair, tmp_path / "3t")
    train(tiny_config(method="baseline"), tmp_path / "baseline")
    first = read_safetensors(tmp_path / "3t" / "model.safetensors")
    second = read_safetensors(tmp_path / "baseline" / "model.safetensors")
    compared = [key for key in second if key.startswith(("img.", "txt.", "log_scale"))]
    assert len(compared) > 20
    for key in compared:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-6, msg=key)


def test_adding_a_third_tower_does_not_change_the_start(tiny_config: Config, timm_tower: str) -> None:
    text_cfg = {"vocab_size": 300, "pool_type": "eos", "eos_id": 2}
    thirds = {"third": load_frozen(timm_tower)}
    alone, _ = build(tiny_config(method="baseline"), {}, text_cfg)
    beside, _ = build(tiny_config(), thirds, text_cfg)
    for key, value in alone.state_dict().items():
        if key != "third_norms":
            assert torch.equal(value, beside.state_dict()[key]), key


def test_without_the_third_tower_the_pair_is_the_same_to_the_bit(
    tiny_config: Config, timm_tower: str
) -> None:
    thirds = {"third": load_frozen(timm_tower)}
    text_cfg = {"vocab_size": 300, "pool_type": "eos", "eos_id": 2}
    model, _ = build(tiny_config(), thirds, text_cfg)
    model.eval()
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.randint(3, 300, (5, 9))
    tokens[:, -1] = 2
    with torch.no_grad():
        features = thirds["third"](torch.randint(0, 256, (5, 3, 48, 48), dtype=torch.uint8))
        beside = model.features(pixels=pixels, tokens=tokens, thirds={"third": features})
        alone = model.features(pixels=pixels, tokens=tokens)
        del model.heads["img@third"], model.heads["txt@third"]
        stripped = model.features(pixels=pixels, tokens=tokens)
    for name in ("img", "txt"):
        assert torch.equal(model.view(name, beside), model.view(name, alone))
        assert torch.equal(model.view(name, beside), model.view(name, stripped))


def test_lit_trains_its_projection_and_the_text_tower_and_nothing_of_the_trunk(
    tiny_config: Config, timm_tower: str, tmp_path: Path
) -> None:
    tower = load_frozen(timm_tower)
    model, _ = build(tiny_config(method="lit"), {"third": tower}, {"vocab_size": 300})
    names = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"txt", "heads", "log_scale"}
    assert model.heads["img"].get_parameter("weight").shape == (24, tower.width)
    text = sum(p.numel() for p in model.txt.parameters())
    assert model.num_trainable() == text + 24 * tower.width + 1
    result = train(tiny_config(method="lit", steps=4), tmp_path / "lit")
    finished = load_run(result.folder)
    trunk = tower.module.state_dict()
    for key, value in finished.img.state_dict().items():
        if key.startswith("trunk."):
            assert torch.equal(value, trunk[key]), key
    start = model.heads["img"].get_parameter("weight").detach()
    assert not torch.equal(finished.heads["img"], start), "the projection has moved"


def test_lit_without_projection_ends_the_text_tower_in_the_third_towers_width(
    tiny_config: Config, timm_tower: str, tmp_path: Path
) -> None:
    config = tiny_config(method="lit", steps=2, objective=ObjectiveConfig(lit_projection=False))
    result = train(config, tmp_path / "lit")
    finished = load_run(result.folder)
    assert finished.embed_dim == load_frozen(timm_tower).width
    assert not finished.heads


def test_unlocked_lit_starts_at_the_frozen_towers_weights_and_moves(
    tiny_config: Config, timm_tower: str
) -> None:
    tower = image_tower(timm_tower)
    model, architecture = build(tiny_config(method="lit-unlocked"), {"third": tower}, {"vocab_size": 300})
    assert architecture.image == tower.image and model.image == tower.image, "its own preprocessing"
    assert model.img is not None
    for key, value in tower.module.state_dict().items():
        assert torch.equal(model.img.state_dict()[key], value)
    optimizer = adamw(model, replace(tiny_config().optim, lr=0.1))
    batch = {"pixels": torch.randint(0, 256, (6, 3, 48, 48), dtype=torch.uint8),
             "tokens": torch.randint(3, 300, (6, 16))}  # fmt: skip
    model.loss(model.features(pixels=batch["pixels"], tokens=batch["tokens"]))[0].backward()
    optimizer.step()
    moved = model.img.state_dict()
    assert any(not torch.equal(value, moved[key]) for key, value in tower.module.state_dict().items())
    assert tower.fingerprint() == load_frozen(timm_tower).fingerprint(), "the third tower itself has not"


def test_3t_trains_a_copy_of_the_third_tower_and_leaves_the_tower_itself_alone(
    tiny_config: Config, timm_tower: str, tmp_path: Path
) -> None:
    start = StartConfig(image="third")
    tower = image_tower(timm_tower)
    model, architecture = build(tiny_config(method="3t", start=start), {"third": tower}, {"vocab_size": 300})
    assert architecture.image == tower.image and model.img is not None
    for key, value in tower.module.state_dict().items():
        assert torch.equal(model.img.state_dict()[key], value)
    result = train(tiny_config(method="3t", start=start), tmp_path / "run")
    trained = load_run(result.folder).img.state_dict()
    trunk = load_frozen(timm_tower).module.state_dict()
    assert any(not torch.equal(value, trained[key]) for key, value in trunk.items())
    checks = third_checks(result.folder)
    assert all(checks), checks


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method": "baseline"}, "with method 'baseline' it has no third tower"),
        ({"method": "lit"}, "'lit' has the third tower as image tower"),
        ({"third": ("one=timm:a", "two=timm:b")}, "its third towers are third_one, third_two"),
    ],
)
def test_an_image_tower_starts_at_one_third_towers_weights_that_stands_beside_it(
    changes: dict[str, Any], expected: str
) -> None:
    config = RunConfig(
        **{"method": "3t", "third": ("timm:a",), "start": StartConfig(image="third"), **changes}
    )
    with pytest.raises(UsageError, match=rf"start\.image: .*{expected}"):
        pairs.objective(config)


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_gets_a_gradient_in_every_method(
    method: str, tiny_config: Config, timm_tower: str
) -> None:
    tower = load_frozen(timm_tower)
    thirds = {} if method == "baseline" else {"third": tower}
    model, _ = build(tiny_config(method=method), thirds, {"vocab_size": 300})
    size = model.image.size
    features = model.features(
        pixels=torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8),
        tokens=torch.randint(3, 300, (6, 16)),
        thirds={view: torch.randn(6, tower.width) for view in model.thirds},
    )
    model.loss(features)[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
