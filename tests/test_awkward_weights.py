"""Weights in safetensors whose names have a prefix, or that are for images of another size."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from kit.towers import image_tower, text_tower
from threetowers.errors import CheckpointError
from threetowers.towers.frozen.load import load_frozen
from threetowers.towers.pair import build_image_tower, build_text_tower, load_pair_weights
from threetowers.towers.weights import load_strictly, unwrapped

PREFIXES = (
    "module.", "model.", "visual.trunk.", "visual.", "image_encoder.", "backbone.", "_orig_mod.", "module._orig_mod.",
    "model.visual.trunk.",
)  # fmt: skip
PIXELS = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).to(torch.uint8)
MODEL: dict[str, Any] = {
    "embed_dim": 20,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def seeded() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", MODEL)
    return "tiny-clip"


def written(state: dict[str, torch.Tensor], path: Path, prefix: str = "") -> Path:
    save_file({f"{prefix}{name}": value.contiguous().clone() for name, value in state.items()}, path)
    return path


@pytest.mark.parametrize("with_classifier", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_before_every_name_of_a_timm_file_is_taken_off_and_said(
    prefix: str, with_classifier: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = timm.create_model("test_vit", num_classes=5 if with_classifier else 0).state_dict()
    plain = image_tower(f"timm:test_vit@{written(state, tmp_path / 'plain.safetensors')}")
    assert not capsys.readouterr().err
    tower = image_tower(f"timm:test_vit@{written(state, tmp_path / 'w.safetensors', prefix)}")
    assert tower.fingerprint() == plain.fingerprint()
    assert f"w.safetensors: {prefix!r} stands before every name and was taken off" in capsys.readouterr().err


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_a_prefix_of_an_open_clip_file(
    prefix: str, custom_text: bool, tiny_model: str, tmp_path: Path
) -> None:
    make = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    model = make(**MODEL)
    file = written(model.state_dict(), tmp_path / "w.safetensors", prefix)
    tower = image_tower(f"open_clip:{tiny_model}@{file}")
    for name, value in model.visual.state_dict().items():
        assert torch.equal(tower.module.state_dict()[name], value), name
    assert text_tower(f"open_clip-text:{tiny_model}@{file}").width == 20


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod."])
def test_a_prefix_and_either_layout_of_the_pairs_weights(
    prefix: str, custom_text: bool, tmp_path: Path
) -> None:
    model = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**MODEL)
    image, text = build_image_tower(MODEL, 1), build_text_tower(MODEL, 1)
    load_pair_weights(image, text, str(written(model.state_dict(), tmp_path / "w.safetensors", prefix)))
    for name, value in model.visual.state_dict().items():
        assert torch.equal(image.state_dict()[name], value), name
    assert torch.equal(text.state_dict()["token_embedding.weight"], model.state_dict()[
        "text.token_embedding.weight" if custom_text else "token_embedding.weight"])  # fmt: skip


def test_a_prefix_that_is_not_before_every_name_is_named(tmp_path: Path) -> None:
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    inner = {f"visual.trunk.{name}": value for name, value in state.items()}
    file = written({**inner, "logit_scale": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(
        CheckpointError, match=r"stand behind 'visual\.trunk\.', beside 1 others: write them alone"
    ):
        load_frozen(f"timm:test_vit@{file}")
    twice = {f"{name}.{key}": value for name in ("model", "ema") for key, value in state.items()}
    with pytest.raises(CheckpointError, match=r"behind 'ema\.' and 'model\.'"):
        load_frozen(f"timm:test_vit@{written(twice, tmp_path / 'two.safetensors')}")


def test_nothing_is_taken_off_what_fits_or_what_cannot_be_told() -> None:
    weights = {"a.b": torch.zeros(1), "a.c": torch.zeros(1)}
    assert unwrapped(weights, ["a.b", "a.c"])[1] == ""
    assert unwrapped(weights, ["b", "c"])[1] == "a."
    assert unwrapped(weights, ["b", "a.c"])[1] == ""
    assert unwrapped(weights, ["x"])[1] == unwrapped({}, ["x"])[1] == ""
    assert unwrapped({"a.a.b": torch.zeros(1)}, ["b", "a.b"])[1] == ""
    assert list(unwrapped(weights, ["b", "c"])[0]) == ["b", "c"]


def test_a_missing_weight_behind_a_prefix_is_still_missing(tmp_path: Path) -> None:
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    del state["norm.weight"]
    with pytest.raises(CheckpointError, match=r"missing: norm\.weight\)"):
        load_frozen(f"timm:test_vit@{written(state, tmp_path / 'w.safetensors', 'module.')}")


def test_a_position_embedding_of_another_size_is_named_with_what_to_do(tmp_path: Path) -> None:
    state = timm.create_model("test_vit", num_classes=0, img_size=96).state_dict()
    with pytest.raises(
        CheckpointError, match=r"wrong shape: pos_embed .*another size.*timm name of that size"
    ):
        load_frozen(f"timm:test_vit@{written(state, tmp_path / 't.safetensors')}")
    larger = {**MODEL, "vision_cfg": {**MODEL["vision_cfg"], "image_size": 64}}
    longer = {**MODEL, "text_cfg": {**MODEL["text_cfg"], "context_length": 16}}
    for config in (larger, longer):
        file = written(open_clip.CustomTextCLIP(**config).state_dict(), tmp_path / "p.safetensors")
        with pytest.raises(CheckpointError, match=r"another size.*pair\.vision\.image_size or pair\.text"):
            load_pair_weights(build_image_tower(MODEL, 0), build_text_tower(MODEL, 0), str(file))
    with pytest.raises(CheckpointError, match=r"of another size of image or length of text$"):
        load_strictly(build_image_tower(MODEL, 0), build_image_tower(larger, 0).state_dict(), "x")
