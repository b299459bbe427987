"""Models of every library as targets of an evaluation: their features are those that the library itself computes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from kit.runs import with_vit
from threetowers.config import RunConfig
from threetowers.data.open import open_source
from threetowers.errors import CheckpointError, UsageError
from threetowers.evaluate.suite.features import Part, TowerFeatures, is_foreign
from threetowers.evaluate.suite.target import TARGETS, open_target
from threetowers.export.open_clip import export_open_clip
from threetowers.objective.losses import unit
from threetowers.run.finished import load_run
from threetowers.train.loop import train

TEXTS = ["a red square at the top left", "a blue square", "green"]
NARROW = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def clip(folder: Path) -> Path:
    """A tiny CLIP of transformers with a vocabulary of its own."""
    return transformers_pair(
        folder,
        transformers.CLIPModel,
        transformers.CLIPConfig(
            text_config={**NARROW, "vocab_size": 20, "max_position_embeddings": 12, "eos_token_id": 3},
            vision_config={**NARROW, "image_size": 32, "patch_size": 8},
            projection_dim=24,
        ),
        {
            "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 32},
            "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "do_rescale": True,
            "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3],
            "image_std": [0.2, 0.3, 0.4], "resample": 3, "do_convert_rgb": True,
        },
    )  # fmt: skip


def siglip(folder: Path) -> Path:
    """A tiny SigLIP, whose tokenizer asks for no attention mask."""
    return transformers_pair(
        folder,
        transformers.SiglipModel,
        transformers.SiglipConfig(
            text_config={**NARROW, "vocab_size": 20, "max_position_embeddings": 12},
            vision_config={**NARROW, "image_size": 32, "patch_size": 8},
        ),
        {
            "image_processor_type": "SiglipImageProcessor", "do_resize": True, "size": {"height": 32, "width": 32},
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3, "resample": 3, "do_convert_rgb": True,
        },
        model_input_names=["input_ids"],
    )  # fmt: skip


def transformers_pair(
    folder: Path, kind: Any, config: Any, processor: dict[str, Any], **options: Any
) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set(" ".join(TEXTS).split()))]
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    vocabulary.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]", model_max_length=12,
        **options,
    ).save_pretrained(folder)  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def pictures(photos: Path) -> list[Image.Image]:
    return [Image.open(file) for file in sorted(photos.parent.glob("*.png"))[:5]]


@pytest.fixture
def finished(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> Path:
    train(with_vit(tiny_config(steps=2)), tmp_path / "run")
    return tmp_path / "run"


def features(name: str, tmp_path: Path) -> TowerFeatures:
    return TowerFeatures(open_target(name), tmp_path / "features")


def images_of(found: TowerFeatures, photos: Path) -> torch.Tensor:
    return found.images(Part("photos", "test", open_source(str(photos)))).features[:5]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, unit(expected.float()), rtol=0, atol=1e-6)


def test_a_run_has_the_features_of_its_two_towers(
    finished: Path, photos: Path, pictures: list[Image.Image], tmp_path: Path
) -> None:
    found, run = features(str(finished), tmp_path), load_run(finished)
    close(images_of(found, photos), run.encode_image(pictures))
    close(found.texts(TEXTS), run.encode_text(TEXTS))
    assert found.scale == pytest.approx(run.scale)
    assert list(found.views) == ["img", "third"]


def test_an_exported_run_has_the_same_features_in_open_clip_and_here(
    finished: Path, photos: Path, pictures: list[Image.Image], tmp_path: Path
) -> None:
    folder = export_open_clip(finished, tmp_path / "exported")
    found = features(str(folder), tmp_path)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        pixels = torch.stack([transform(image.convert("RGB")) for image in pictures])
        expected = (
            model.encode_image(pixels),
            model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)),
        )
    close(images_of(found, photos), expected[0])
    close(found.texts(TEXTS), expected[1])
    own = features(str(finished), tmp_path)
    close(images_of(found, photos), images_of(own, photos))
    close(found.texts(TEXTS), own.texts(TEXTS))
    assert found.scale == pytest.approx(own.scale)
    assert features(f"open_clip:local-dir:{folder}", tmp_path).digest == found.digest


@pytest.mark.parametrize("make", [clip, siglip])
def test_a_transformers_model_has_the_features_of_the_library(
    make: Callable[[Path], Path], photos: Path, pictures: list[Image.Image], tmp_path: Path
) -> None:
    folder = make(tmp_path / "model")
    found = features(str(folder), tmp_path)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    padding = "max_length" if make is siglip else True
    with torch.no_grad():
        pixels = processor(images=[image.convert("RGB") for image in pictures], return_tensors="pt")
        texts = tokenizer(TEXTS, padding=padding, truncation=True, max_length=12, return_tensors="pt")
        image = model.get_image_features(**pixels).pooler_output
        text = model.get_text_features(
            **{key: texts[key] for key in tokenizer.model_input_names}
        ).pooler_output
    close(images_of(found, photos), image)
    close(found.texts(TEXTS), text)
    assert features(f"hf:{folder}", tmp_path).digest == found.digest


def test_the_digest_changes_with_weights_and_preprocessing(tmp_path: Path) -> None:
    folder = clip(tmp_path / "model")
    before = open_target(str(folder)).digest()
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.1, 0.2, 0.3]}))
    assert open_target(str(folder)).digest() != before


def test_a_third_tower_that_is_gone_is_left_out_and_named(
    finished: Path, tiny_config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (finished / "config.toml").read_text()
    described = json.loads((finished / "model.json").read_text())
    described["thirds"][0]["spec"] = f"timm:local-dir:{tmp_path}/gone"
    (finished / "model.json").write_text(json.dumps(described))
    assert config and not open_target(str(finished)).thirds
    error = capsys.readouterr().err
    assert "without its third tower third" in error and f"{tmp_path}/gone" in error


def test_what_is_no_model_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no model\. Give a run folder, open_clip:NAME@TAG.*hf:DIR_OR_ID"):
        open_target(str(tmp_path))
    shutil.copytree(finished, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "model.json").unlink()
    with pytest.raises(CheckpointError, match="not finished"):
        open_target(str(tmp_path / "unfinished"))
    (tmp_path / "vit").mkdir()
    transformers.ViTModel(transformers.ViTConfig(**NARROW, image_size=32, patch_size=8)).save_pretrained(
        tmp_path / "vit"
    )
    (tmp_path / "vit" / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UsageError, match="ViTModel does not encode images and texts"):
        open_target(f"hf:{tmp_path / 'vit'}")
    assert [kind.accepts("hf:x") for kind in TARGETS] == [False, False, True]
    assert not is_foreign(str(finished)) and is_foreign("open_clip:ViT-B-32@openai")
