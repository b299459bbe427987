"""Frozen towers: loading, their own preprocessing, and what happens when a file does not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kit.pictures import noise
from kit.towers import image_tower, open_clip_folder
from threetowers.config import PairConfig
from threetowers.data.transforms import ImageSpec, fixed_view, normalise
from threetowers.errors import CheckpointError, UsageError
from threetowers.towers.frozen import base
from threetowers.towers.frozen.image_tower import as_image_tower
from threetowers.towers.frozen.load import load_frozen
from threetowers.towers.heads import head
from threetowers.towers.pair import build_image_tower, build_text_tower, encode_text, model_config


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny open_clip model with a native ViT, in the CustomTextCLIP layout, with preprocessing of its own."""
    preprocess = {"size": 32, "mode": "RGB", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
                  "interpolation": "bilinear", "resize_mode": "shortest", "fill_color": 0}  # fmt: skip
    folder = tmp_path_factory.mktemp("clip")
    return open_clip_folder(folder, context_length=8, vocab_size=50, custom_text=True, preprocess=preprocess)


@pytest.mark.parametrize("size", [(48, 48), (61, 50), (33, 97), (20, 31), (300, 201)])
def test_numbers_that_enter_a_timm_tower_are_timms_own(timm_tower: str, size: tuple[int, int]) -> None:
    tower = image_tower(timm_tower)
    model = timm.create_model(timm_tower.removeprefix("timm:"), pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    image = noise(*size)
    ours = normalise(torch.from_numpy(fixed_view(image, tower.image).copy())[None], tower.image)
    theirs = transform(image)[None]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    pixels = torch.from_numpy(fixed_view(image, tower.image).copy())[None]
    torch.testing.assert_close(tower(pixels), model(theirs), rtol=1e-5, atol=1e-5)
    assert tower.image.mean == (0.3, 0.4, 0.5), "its own mean, not CLIP's"


@pytest.mark.parametrize("size", [(32, 32), (61, 50), (33, 97)])
def test_numbers_that_enter_an_open_clip_tower_are_open_clips_own(
    clip_folder: Path, size: tuple[int, int]
) -> None:
    tower = image_tower(f"open_clip:local-dir:{clip_folder}")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    image = noise(*size)
    pixels = torch.from_numpy(fixed_view(image, tower.image).copy())[None]
    theirs = transform(image)[None]
    torch.testing.assert_close(normalise(pixels, tower.image), theirs, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels), model.eval().encode_image(theirs), rtol=1e-5, atol=1e-5)
    assert tower.width == 20


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("size", [(48, 48), (50, 61), (97, 33)])
def test_fixed_view_is_torchvisions_resize_and_centre_crop(resize: str, size: tuple[int, int]) -> None:
    from torchvision.transforms import v2

    spec = ImageSpec(24, (0.5,) * 3, (0.5,) * 3, "bicubic", resize, 29)  # type: ignore[arg-type]
    to = 29 if resize == "shortest" else (29, 29)
    steps = [v2.Resize(to, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(24), v2.PILToTensor()]
    image = noise(*size)
    assert np.array_equal(fixed_view(image, spec), v2.Compose(steps)(image).numpy())


def test_eval_for_ever_no_gradient_and_never_changed(timm_tower: str) -> None:
    tower = image_tower(timm_tower)
    before = tower.fingerprint()

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tower
            self.head = head(tower.width, 4, seed=0, name="head")

    parent = Parent().train()
    assert not any(name.startswith("tower") for name, _ in parent.named_parameters())
    tower.module.train()  # even when somebody asks for it
    pixels = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    features = tower(pixels)
    assert not tower.module.training and not features.requires_grad
    assert torch.equal(features, tower(pixels)), "two forwards of an eval tower agree to the bit"
    optimizer = torch.optim.SGD(parent.parameters(), lr=1.0)
    parent.head(features).sum().backward()
    optimizer.step()
    assert all(p.grad is None for p in tower.module.parameters()) and not tower.had_gradient()
    assert parent.head.weight.grad is not None and parent.head.weight.grad.abs().sum() > 0
    assert tower.fingerprint() == before
    next(tower.module.parameters()).requires_grad_(True)
    assert tower.had_gradient()


def test_a_weights_file_beside_a_timm_name_is_loaded_strictly(timm_tower: str, tmp_path: Path) -> None:
    state = load_file(Path(timm_tower.removeprefix("timm:local-dir:")) / "model.safetensors")
    good = tmp_path / "good.safetensors"
    save_file(state, good)
    from_file, from_folder = load_frozen(f"timm:test_convnext2@{good}"), load_frozen(timm_tower)
    for key, value in from_folder.module.state_dict().items():
        assert torch.equal(from_file.module.state_dict()[key], value), key
    key = next(k for k in state if "stages" in k)
    broken = {**state, "stages.typo.weight": torch.zeros(1)}
    del broken[key]
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_frozen(f"timm:test_convnext2@{tmp_path / 'broken.safetensors'}")
    assert key in str(error.value) and "stages.typo.weight" in str(error.value)
    with pytest.raises(CheckpointError, match="wrong shape"):
        load_frozen(f"timm:test_convnext2@{_misshapen(state, key, tmp_path)}")


def _misshapen(state: dict[str, torch.Tensor], key: str, folder: Path) -> Path:
    path = folder / "misshapen.safetensors"
    save_file({**state, key: torch.zeros(3, 3)}, path)
    return path


@pytest.mark.parametrize("hub", ["", "the Hub cannot be reached"])
def test_a_network_name_without_network_says_how_to_go_on(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(base, "why_no_hub", lambda: hub)
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"no route to host.*@FILE"):
        load_frozen("timm:resnet18")


def test_an_image_tower_made_of_a_frozen_tower_is_the_tower_and_one_projection(
    timm_tower: str, clip_folder: Path
) -> None:
    for spec in (timm_tower, f"open_clip:local-dir:{clip_folder}"):
        tower = image_tower(spec)
        projection = torch.randn(6, tower.width) / 4
        image, _ = as_image_tower(tower, projection)
        pixels = torch.randint(0, 256, (3, 3, tower.image.size, tower.image.size), dtype=torch.uint8)
        with torch.no_grad():
            features = image.eval()(normalise(pixels, tower.image))
        torch.testing.assert_close(features, tower(pixels) @ projection.T, rtol=1e-4, atol=1e-5)
        bare, _ = as_image_tower(tower, None)
        with torch.no_grad():
            torch.testing.assert_close(bare.eval()(normalise(pixels, tower.image)), tower(pixels))


@pytest.mark.parametrize("pool", [{}, {"pool_type": "eos", "eos_id": 2}])
def test_short_text_equals_padded_text(pool: dict[str, Any]) -> None:
    """The sliced forward equals open_clip's own on padded text to 1e-6, for features and gradients."""
    pair = PairConfig(
        embed_dim=12,
        vision={"timm_model_name": "test_convnext2"},
        text={"context_length": 16, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2, **pool},
    )
    text = build_text_tower(model_config(pair), 0)
    torch.manual_seed(0)  # the bound is one of rounding, so the draw is fixed
    tokens = torch.zeros(5, 16, dtype=torch.long)
    for row, length in enumerate([2, 5, 9, 3, 7]):
        tokens[row, :length] = torch.randint(3, 38, (length,))
        tokens[row, length - 1] = 2 if pool else 39
    short = encode_text(text, tokens[:, :9])
    padded = text(tokens)
    torch.testing.assert_close(short, padded, rtol=1e-6, atol=1e-6)
    text.double()  # gradients differ only by the order of sums
    short, padded = encode_text(text, tokens[:, :9]), text(tokens)
    for features in (short, padded):
        text.zero_grad()
        (features**2).sum().backward()
        grads = [p.grad.clone() for p in text.parameters() if p.grad is not None]
        if features is short:
            first = grads
    for a, b in zip(first, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_text_tower_that_looks_at_padding_gets_it_back() -> None:
    text_cfg: dict[str, Any] = {
        "context_length": 10,
        "vocab_size": 40,
        "width": 32,
        "heads": 2,
        "layers": 1,
        "no_causal_mask": True,
    }
    text = build_text_tower(
        model_config(PairConfig(vision={"timm_model_name": "test_convnext2"}, text=text_cfg)), 0
    )
    tokens = torch.randint(1, 39, (2, 10))
    tokens[:, 6:] = 0
    torch.testing.assert_close(encode_text(text, tokens[:, :6]), text(tokens))


def test_a_module_starts_the_same_whatever_is_built_beside_it() -> None:
    config = model_config(PairConfig(vision={"timm_model_name": "test_convnext2"}, text={"vocab_size": 50}))
    alone = build_text_tower(config, 7).state_dict()
    torch.manual_seed(1)
    build_image_tower(config, 7)
    head(3, 4, seed=7, name="img@third")
    beside = build_text_tower(config, 7).state_dict()
    assert all(torch.equal(alone[key], beside[key]) for key in alone)
    other = build_text_tower(config, 8).state_dict()
    assert not torch.equal(alone["token_embedding.weight"], other["token_embedding.weight"])


def test_heads_start_at_the_stated_spread_without_bias() -> None:
    linear = head(400, 300, seed=0, name="img@third")
    assert linear.bias is None
    assert float(linear.weight.detach().std()) == pytest.approx(400**-0.5, rel=0.02)


def test_unknown_keys_of_a_tower_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"pair\.text\.layer.*did you mean `layers`"):
        model_config(PairConfig(text={"layer": 2}))
    with pytest.raises(UsageError, match="ViT-B-32"):
        model_config(PairConfig(model="ViT-B-3"))


def test_a_head_that_widens_its_features_is_read_at_its_width_and_refused_as_image_tower(
    tmp_path: Path,
) -> None:
    model = timm.create_model("test_mambaout")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    tower = image_tower(f"timm:test_mambaout@{tmp_path / 'weights.safetensors'}")
    pixels = torch.zeros(1, 3, tower.image.size, tower.image.size, dtype=torch.uint8)
    assert tower(pixels).shape == (1, tower.width)
    with pytest.raises(UsageError, match="third tower of 3t"):
        as_image_tower(tower, torch.zeros(4, tower.width))
    with pytest.raises(UsageError, match="test_mambaout"):
        build_image_tower(model_config(PairConfig(vision={"timm_model_name": "test_mambaout"})), 0)
