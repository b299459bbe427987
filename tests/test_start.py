"""Main towers that start at the weights of another model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from torch import nn

from kit.runs import Config, assert_same_weights, interrupt_at
from kit.towers import image_tower, open_clip_folder
from threetowers.config import ObjectiveConfig, OptimConfig, RunConfig, StartConfig
from threetowers.data.transforms import normalise
from threetowers.errors import CheckpointError, UsageError
from threetowers.export.open_clip import export_open_clip
from threetowers.objective import pairs
from threetowers.objective.losses import unit
from threetowers.run.finished import load_run
from threetowers.run.setup import assemble
from threetowers.train.loop import train

TEXTS = ["a red square at the top left", "blue", "the bottom is green and the top is not"]


def with_batchnorm(folder: Path) -> str:
    """A convolutional timm network with running statistics that are not those of a fresh one."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = timm.create_model("test_efficientnet", num_classes=3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
    model.pretrained_cfg.update(input_size=(3, 32, 32), crop_pct=1.0)
    save_for_hf(model, str(folder), safe_serialization=True)
    return f"timm:local-dir:{folder}"


def images(size: int, num: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("method", "same"), [("3t-warm", "3t"), ("3t-main-warm", "3t-main"), ("lit-unlocked", "")]
)
def test_a_warm_method_is_its_cold_one_with_a_start_at_the_third_tower(method: Any, same: Any) -> None:
    third = ("timm:a",)
    warm = pairs.objective(RunConfig(method=method, third=third))
    cold = RunConfig(method=same, third=third) if same else RunConfig(method="baseline")
    assert warm == replace(pairs.objective(cold), image="start")
    if same:
        assert warm == pairs.objective(replace(cold, start=StartConfig(image="third")))


@pytest.mark.parametrize("method", ["baseline", "3t"])
def test_any_frozen_tower_can_be_the_start_and_gives_the_same_features_at_first(
    method: Any, tiny_config: Config, tmp_path: Path
) -> None:
    spec = with_batchnorm(tmp_path / "other")
    source = image_tower(spec)
    setup = assemble(tiny_config(method=method, start=StartConfig(image=spec)), tmp_path / "run")
    model = setup.model.eval()
    assert model.image == source.image and model.img is not None
    pixels = images(32)
    with torch.no_grad():
        features = model.img.get_submodule("trunk")(normalise(pixels, source.image))
        projected = model.img(normalise(pixels, source.image))
    torch.testing.assert_close(features, source(pixels), rtol=0, atol=1e-6)
    assert projected.shape == (5, 24), "a new projection leads to the width of the pair"


def test_both_towers_can_go_on_from_an_earlier_run(tiny_config: Config, tmp_path: Path) -> None:
    pair = replace(tiny_config().pair, embed_dim=20)
    train(tiny_config(method="baseline", pair=pair, steps=3), tmp_path / "first")
    first = load_run(tmp_path / "first")
    source = f"file:{tmp_path / 'first'}"
    config = tiny_config(method="3t", start=StartConfig(image=source, text=source))
    setup = assemble(config, tmp_path / "second")
    model = setup.model.eval()
    assert model.embed_dim == 20, "the space is that of the pair"
    assert model.started == dict.fromkeys(("img", "txt"), StartConfig().lr)
    pixels = images(model.image.size)
    tokens = setup.tokenizer(TEXTS)
    assert torch.equal(tokens, first.tokenizer(TEXTS))
    with torch.no_grad():
        views = model.features(pixels=pixels, tokens=tokens)
    picture = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pixels]
    torch.testing.assert_close(unit(views["img"]), first.encode_image(picture), rtol=0, atol=1e-6)
    torch.testing.assert_close(unit(views["txt"]), first.encode_text(TEXTS), rtol=0, atol=1e-6)
    train(config, tmp_path / "second")
    export_open_clip(tmp_path / "second", tmp_path / "exported")
    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'exported'}").eval()
    after = load_run(tmp_path / "second")
    shared = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'exported'}")
    with torch.no_grad():
        texts = loaded.encode_text(shared(TEXTS), normalize=True)
    torch.testing.assert_close(texts, after.encode_text(TEXTS), rtol=0, atol=1e-6)
    assert not torch.allclose(after.encode_text(TEXTS), first.encode_text(TEXTS), atol=1e-4), "it has trained"


def test_a_text_tower_of_open_clip_brings_its_width_and_its_tokenizer(
    tiny_config: Config, tmp_path: Path
) -> None:
    folder = open_clip_folder(tmp_path / "pair", 12, 49_408)
    spec = f"open_clip:local-dir:{folder}"
    source = open_clip.create_model(f"local-dir:{folder}").eval()
    setup = assemble(tiny_config(method="baseline", start=StartConfig(text=spec)), tmp_path / "run")
    tokens = setup.tokenizer(TEXTS)
    assert setup.model.embed_dim == 20 and tokens.shape[1] == 12
    with torch.no_grad():
        found = setup.model.eval().features(tokens=tokens, pixels=images(setup.model.image.size))
        expected = source.encode_text(open_clip.get_tokenizer("ViT-B-32", context_length=12)(TEXTS))
    torch.testing.assert_close(found["txt"], expected, rtol=0, atol=1e-5)
    assert found["img"].shape[1] == 20, "the image tower is built for that space"
    config = tiny_config(method="baseline", start=StartConfig(image=spec, text=spec))
    both = assemble(config, tmp_path / "both").model.eval()
    pixels = images(32)
    with torch.no_grad():
        found = both.features(pixels=pixels)
        expected = source.encode_image(normalise(pixels, both.image))
    torch.testing.assert_close(found["img"], expected, rtol=0, atol=1e-5)


def test_another_size_of_image_interpolates_positions_and_says_so(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = f"open_clip:local-dir:{open_clip_folder(tmp_path / 'pair', 12, 64)}"
    start = StartConfig(image=spec, image_size=48)
    setup = assemble(tiny_config(method="baseline", start=start), tmp_path / "run")
    assert "position embedding of 16 patches is interpolated to 6 × 6" in capsys.readouterr().err
    assert setup.model.image.size == 48 and setup.model.img is not None
    assert setup.model.img(torch.zeros(2, 3, 48, 48)).shape == (2, 20)
    before = image_tower(spec).module.state_dict()["positional_embedding"]
    after = setup.model.img.state_dict()["positional_embedding"]
    assert torch.equal(after[0], before[0]) and after.shape == (37, 32), "the class token has no place"
    same = assemble(tiny_config(method="baseline", start=replace(start, image_size=32)), tmp_path / "same")
    assert same.model.img is not None and torch.equal(
        same.model.img.state_dict()["positional_embedding"], before
    )
    assert not capsys.readouterr().err


def test_a_convolutional_start_takes_another_size_and_a_timm_vit_refuses_it(
    tiny_config: Config, tmp_path: Path
) -> None:
    spec = with_batchnorm(tmp_path / "conv")
    start = StartConfig(image=spec, image_size=64)
    config = tiny_config(method="baseline", start=start, steps=2)
    train(config, tmp_path / "run")
    assert load_run(tmp_path / "run").architecture.image.size == 64
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    save_for_hf(vit, str(tmp_path / "vit"), safe_serialization=True)
    start = StartConfig(image=f"timm:local-dir:{tmp_path / 'vit'}", image_size=64)
    with pytest.raises(UsageError, match=r"start\.image_size: .*takes no images of 64 pixels"):
        assemble(tiny_config(method="baseline", start=start), tmp_path / "refused")


@pytest.mark.parametrize("batchnorm", ["frozen", "train"])
def test_running_statistics_stay_or_follow_the_batches(
    batchnorm: Any, tiny_config: Config, tmp_path: Path
) -> None:
    spec = with_batchnorm(tmp_path / "conv")
    config = tiny_config(
        method="3t", start=StartConfig(image=spec, batchnorm=batchnorm), steps=4, eval_every_steps=2
    )
    train(config, tmp_path / "run")
    before = image_tower(spec).module.state_dict()
    after = load_run(tmp_path / "run").img.state_dict()
    moved = [key for key in before if "running_" in key and not torch.equal(before[key], after[key])]
    assert bool(moved) == (batchnorm == "train")
    assert any(
        "bn" in key and "weight" in key and not torch.equal(before[key], after[key]) for key in before
    ), "gains and biases train either way"


def test_a_stopped_run_with_a_start_continues_to_the_same_bits(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config(
        method="3t-warm",
        start=StartConfig(batchnorm="train"),
        third=(with_batchnorm(tmp_path / "conv"),),
        steps=7,
        checkpoint_every_steps=3,
        optim=OptimConfig(
            lr=1e-3,
            warmup_steps=2,
            layer_decay=0.8,
            rules=("img.trunk.* lr=0.1", "txt.* from=4"),
        ),
    )
    train(config, tmp_path / "whole")
    interrupt_at(5, config, tmp_path / "torn")
    assert train(config, tmp_path / "torn").finished
    assert_same_weights(tmp_path / "whole", tmp_path / "torn")


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (StartConfig(image="nowhere:x"), r"start\.image: 'nowhere:x' names no tower"),
        (StartConfig(image="timm:resnet5"), r"start\.image: timm has no model"),
        (StartConfig(image="file:/nowhere"), "/nowhere"),
        (StartConfig(text="timm:resnet50"), r"start\.text: 'timm:resnet50' is no text tower"),
        (StartConfig(text="file:/nowhere"), r"start\.text: file:/nowhere: no finished run"),
        (StartConfig(text="open_clip:ViT-B-32-quickgelu"), "say which weights"),
        (StartConfig(image_size=0), r"start\.image_size: 0 is out of range"),
    ],
)
def test_a_start_that_is_not_there_is_named(
    start: StartConfig, expected: str, tiny_config: Config, tmp_path: Path
) -> None:
    with pytest.raises((UsageError, CheckpointError), match=expected):
        assemble(tiny_config(method="baseline", start=start), tmp_path / "run")


def test_weights_of_a_pair_and_a_start_exclude_each_other(tiny_config: Config, tmp_path: Path) -> None:
    train(tiny_config(method="baseline", steps=1), tmp_path / "first")
    exported = export_open_clip(tmp_path / "first", tmp_path / "exported") / "open_clip_model.safetensors"
    pair = replace(tiny_config().pair, weights=str(exported))
    whole = assemble(tiny_config(method="3t", pair=pair), tmp_path / "whole").model
    assert whole.started == {"img": 1.0, "txt": 1.0}, (
        "weights that are given for a pair learn at the whole rate"
    )
    for start, whose in (
        (StartConfig(image="third"), r"start\.image"), (StartConfig(text=f"file:{tmp_path / 'first'}"), r"start\.text"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=rf"pair\.weights: .*{whose}"):
            assemble(tiny_config(method="3t", pair=pair, start=start), tmp_path / "second")


def test_without_a_projection_the_two_widths_must_agree(tiny_config: Config, tmp_path: Path) -> None:
    train(tiny_config(method="baseline", steps=1), tmp_path / "first")
    config = tiny_config(
        method="3t-warm", start=StartConfig(text=f"file:{tmp_path / 'first'}"),
        objective=ObjectiveConfig(lit_projection=False),
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"lit_projection: without it the pair is \d+ wide"):
        assemble(config, tmp_path / "second")
