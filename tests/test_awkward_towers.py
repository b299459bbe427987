"""Frozen towers as people have them: other channels, other layouts of a folder, features that say nothing."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.models import save_for_hf

from kit.mistakes import text_reader
from kit.pictures import noise
from kit.runs import Config
from kit.towers import image_tower, open_clip_folder, text_tower
from threetowers.config import PairConfig, PretrainConfig
from threetowers.data.transforms import ImageSpec, fixed_view, normalise, per_channel
from threetowers.errors import CheckpointError, ThreeTowersError, UsageError
from threetowers.towers.frozen.load import load_frozen
from threetowers.towers.pair import image_spec, model_config
from threetowers.train.loop import train
from threetowers.train.pretrain import pretrain

NARROW = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(autouse=True)
def seeded() -> Any:
    with torch.random.fork_rng(), contextlib.redirect_stderr(io.StringIO()):  # bars of saving
        torch.manual_seed(0)
        yield


def refused(spec: str, *words: str, **options: str) -> ThreeTowersError:
    with pytest.raises(ThreeTowersError) as caught:
        load_frozen(spec, **options)
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    return caught.value


def of_channels(folder: Path, channels: int, **settings: Any) -> str:
    """A timm network for images of so many channels, in timm's local format."""
    model = timm.create_model("test_vit", in_chans=channels, num_classes=0)
    size = model.pretrained_cfg["input_size"][1]
    model.pretrained_cfg.update(input_size=(channels, size, size), **settings)
    save_for_hf(model, str(folder), model_args={"in_chans": channels}, safe_serialization=True)
    return f"timm:local-dir:{folder}"


def test_grey_is_that_of_pillow() -> None:
    image = noise(32, 32)
    spec = ImageSpec(32, (0.3,), (0.2,))
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None]
    expected = (torch.from_numpy(np.asarray(image.convert("L")).copy())[None, None] / 255 - 0.3) / 0.2
    torch.testing.assert_close(normalise(pixels, spec), expected)


@pytest.mark.parametrize("features", ["pooled", "cls", "mean"])
@pytest.mark.parametrize("mean", [(0.3,), (0.3, 0.3, 0.3)])
def test_a_timm_tower_of_grey_images_gets_grey_images(
    features: str, mean: tuple[float, ...], tmp_path: Path
) -> None:
    tower = image_tower(of_channels(tmp_path, 1, mean=mean, std=(0.2,) * len(mean)), features=features)
    assert tower.image.mean == pytest.approx((0.3,)) and tower.image.std == pytest.approx((0.2,))
    assert tower.vision_cfg is None
    pixels = torch.from_numpy(fixed_view(noise(61, 50), tower.image).copy())[None]
    assert tower(pixels).shape == (1, tower.width)
    assert torch.equal(tower(pixels), tower.module(normalise(pixels, tower.image)))


def test_a_run_with_a_grey_third_tower(tiny_config: Config, tmp_path: Path) -> None:
    spec = of_channels(tmp_path / "grey", 1, mean=(0.3,), std=(0.2,))
    assert train(tiny_config(third=(spec,), steps=2), tmp_path / "run").finished


@pytest.mark.parametrize("channels", [2, 4, 13])
def test_other_channels_are_one_line(channels: int, tmp_path: Path) -> None:
    refused(
        of_channels(tmp_path, channels), f"{channels} channels", "RGB", "Give a network of 3 channels or 1"
    )


def test_a_file_of_other_channels_beside_a_name_is_one_line(tmp_path: Path) -> None:
    of_channels(tmp_path, 4)
    refused(f"timm:test_vit@{tmp_path / 'model.safetensors'}", "wrong shape: patch_embed.proj.weight")


@pytest.mark.parametrize(
    ("mean", "std"), [((0.1, 0.2), (0.1, 0.2)), ((0.1, 0.2, 0.3), (0.5, 0.0, 0.5)), ((0.1,) * 3, (0.0,) * 3)]
)
def test_mean_and_std_that_do_not_fit_are_named(mean: Any, std: Any, tmp_path: Path) -> None:
    if len(mean) == 3:  # of another number timm takes the mean value, and says so
        refused(of_channels(tmp_path / "timm", 3, mean=mean, std=std), "does not fit images of 3 channels")
    with pytest.raises(ValueError, match="does not fit"):
        per_channel(mean, std, 3)
    with pytest.raises(UsageError, match="of the classifier"):
        pretrain(PretrainConfig(mean=mean, std=std), tmp_path)
    with pytest.raises(UsageError, match=r"pair\.mean"):
        image_spec({"vision_cfg": {}}, PairConfig(mean=mean, std=std))
    preprocess = {"mean": mean, "std": std}
    folder = open_clip_folder(tmp_path / "open_clip", 8, 64, custom_text=True, preprocess=preprocess)
    refused(f"open_clip:local-dir:{folder}", "does not fit")


def test_one_value_holds_for_every_channel_of_a_main_tower() -> None:
    spec = image_spec({"vision_cfg": {"image_size": [32, 32]}}, PairConfig(mean=(0.5,), std=(0.25,)))
    assert spec.mean == (0.5,) * 3 and spec.std == (0.25,) * 3 and spec.size == 32
    assert ImageSpec.from_dict({**spec.as_dict(), "mean": [0.5]}).mean == (0.5,) * 3


@pytest.mark.parametrize("preprocess", [{"resize_mode": "longest"}, {"size": [32, 48]}])
def test_preprocessing_of_open_clip_that_cannot_be_said_is_refused(
    preprocess: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = {**open_clip.transform.PreprocessCfg().__dict__, "size": 32, **preprocess}
    monkeypatch.setattr(open_clip, "get_model_preprocess_cfg", lambda _: found)
    refused(
        f"open_clip:local-dir:{open_clip_folder(tmp_path, 8, 64, custom_text=True)}", "only square inputs"
    )


def test_main_towers_that_are_not_square_are_refused() -> None:
    pair = PairConfig(model="ViT-B-32")
    config = {**model_config(pair), "vision_cfg": {"image_size": (224, 160)}}
    with pytest.raises(UsageError, match="only square inputs"):
        image_spec(config, pair)


def vit(folder: Path, channels: int = 3, **processor: Any) -> str:
    config = transformers.ViTConfig(**NARROW, image_size=32, patch_size=8, num_channels=channels)
    transformers.ViTModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=size, **processor).save_pretrained(folder)
    return f"hf:{folder}"


def test_a_transformers_tower_of_grey_images_gets_grey_images(tmp_path: Path) -> None:
    tower = image_tower(vit(tmp_path / "grey", 1, image_mean=[0.3], image_std=[0.2]))
    assert tower.image.mean == (0.3,)
    assert tower(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 32)
    refused(vit(tmp_path / "four", 4), "4 channels")


def nested(folder: Path) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))


def both(folder: Path) -> None:
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))


def older(folder: Path) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    del settings["image_processor_type"]
    settings |= {"feature_extractor_type": "ViTFeatureExtractor", "size": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("layout", [nested, both, older])
def test_every_layout_of_an_image_processor_that_the_library_reads(
    layout: Callable[[Path], None], tmp_path: Path
) -> None:
    spec = vit(tmp_path, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    before = load_frozen(spec).fingerprint()
    layout(tmp_path)
    assert load_frozen(spec).fingerprint() == before


def test_settings_that_lack_a_part_are_one_line(tmp_path: Path) -> None:
    spec = vit(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    refused(spec, "no processor_config.json or preprocessor_config.json in the folder")
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "X"}))
    refused(spec, "the image processor could not be loaded")


TOKENIZERS = (
    ["tokenizer.json"],
    ["tokenizer.json", "tokenizer_config.json"],
    ["vocab.txt"],
    ["vocab.txt", "tokenizer_config.json"],
)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "reader"
    text_reader(folder)
    return folder


@pytest.mark.parametrize("files", TOKENIZERS, ids=" ".join)
def test_every_layout_of_a_tokenizer_that_the_library_reads(
    files: list[str], reader: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors", *files):
        shutil.copy(reader / name, tmp_path / name)
    expected = text_tower(f"hf-text:{reader}").tokenizer(["a b", "z"])
    assert torch.equal(text_tower(f"hf-text:{tmp_path}").tokenizer(["a b", "z"]), expected)


def test_a_tokenizer_without_vocabulary_is_no_tokenizer(reader: Path, tmp_path: Path) -> None:
    """transformers makes one that knows no word, and says nothing."""
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        shutil.copy(reader / name, tmp_path / name)
    refused(f"hf-text:{tmp_path}", "has no vocabulary", "tokenizer.json")
    (tmp_path / "tokenizer_config.json").unlink()
    refused(f"hf-text:{tmp_path}", "no tokenizer.json or tokenizer_config.json")


def causal(folder: Path, reader: Path) -> str:
    config = transformers.GPT2Config(vocab_size=31, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    transformers.GPT2Model(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reader / name, folder / name)
    return f"hf-text:{folder}"


def test_the_first_token_of_a_causal_model_is_neither_taken_nor_proposed(
    reader: Path, tmp_path: Path
) -> None:
    spec = causal(tmp_path, reader)
    assert "take mean" in str(refused(spec, "sees nothing of the text behind it", features="cls"))
    error = str(refused(spec, "no pooled features; take mean"))
    assert "cls" not in error
    assert load_frozen(spec, features="mean").width == 32


def test_features_of_a_model_without_its_pooler_are_those_that_it_has(reader: Path, tmp_path: Path) -> None:
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**NARROW, vocab_size=31))
    bert.save_pretrained(tmp_path / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reader / name, tmp_path / "bert" / name)
    refused(f"hf-text:{tmp_path / 'bert'}", "without its pooler", "take third_features = cls or mean")
    config = transformers.ViTConfig(**NARROW, image_size=32, patch_size=8)
    folder = tmp_path / "vit"
    spec = vit(folder)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    error = refused(spec, "without its pooler", "take third_features = cls or mean")
    assert isinstance(error, CheckpointError)
    for features in ("cls", "mean"):
        assert load_frozen(spec, features=features).width == 32


def test_a_network_without_pooler_and_class_token_proposes_the_mean_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = vit(tmp_path)
    forward = transformers.ViTModel.forward

    def patches_alone(self: Any, **inputs: Any) -> Any:
        found = forward(self, **inputs)
        return SimpleNamespace(last_hidden_state=found.last_hidden_state[:, 1:], pooler_output=None)

    monkeypatch.setattr(transformers.ViTModel, "forward", patches_alone)
    assert str(refused(spec)).endswith("has no pooler; take mean")
    assert str(refused(spec, features="cls")).endswith("has no class token; take mean")
    assert load_frozen(spec, features="mean").width == 32


def test_a_card_of_a_grey_tower_says_so(tmp_path: Path) -> None:
    from threetowers.commands.towers import describe

    text = describe(of_channels(tmp_path, 1, mean=(0.3,), std=(0.2,))).text()
    assert "pixels, grey" in text and "mean           0.3\n" in text


def test_an_image_of_one_pixel_reaches_a_grey_tower() -> None:
    spec = ImageSpec(8, (0.5,), (0.5,))
    pixels = torch.from_numpy(fixed_view(Image.new("RGB", (1, 1), (255, 255, 255)), spec).copy())[None]
    assert normalise(pixels, spec).shape == (1, 1, 8, 8) and normalise(pixels, spec).min() == 1
