"""A classifier trained with `threetowers pretrain` becomes a third tower."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

from kit.towers import image_tower
from threetowers.config import InputConfig, OptimConfig, PretrainConfig
from threetowers.data.transforms import fixed_view
from threetowers.errors import DataError, UsageError
from threetowers.towers.heads import initialised
from threetowers.train.pretrain import _targets, pretrain


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of flat colour with noise, 40 images each, as class folders."""
    root = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for label, colour in enumerate([(200, 40, 40), (40, 200, 40), (40, 40, 200)]):
        folder = root / f"class {label}"
        folder.mkdir()
        for index in range(40):
            pixels = np.clip(np.array(colour) + rng.normal(0, 30, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def config(data: Path, **more: object) -> PretrainConfig:
    small = PretrainConfig(
        data=str(data), size=16, steps=40, batch_size=16, device="cpu",
        inputs=InputConfig(val_fraction=0.2, workers=0), optim=OptimConfig(lr=3e-3, warmup_steps=5),
    )  # fmt: skip
    return replace(small, **more)  # type: ignore[arg-type]


def test_it_learns_and_its_folder_is_a_tower_in_timms_own_format(folders: Path, tmp_path: Path) -> None:
    accuracy = pretrain(config(folders), tmp_path / "tower")
    assert accuracy > 0.8
    assert pretrain(config(folders), tmp_path / "tower") == accuracy, "a finished one is left as it is"
    tower = image_tower(f"file:{tmp_path / 'tower'}")
    assert tower.image.size == 16 and tower.image.mean == (0.5, 0.5, 0.5)
    image = Image.open(folders / "class 0" / "0.png")
    pixels = torch.from_numpy(fixed_view(image, tower.image).copy())[None]
    model = timm.create_model(f"local-dir:{tmp_path / 'tower'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        theirs = model.forward_head(model.forward_features(transform(image)[None]), pre_logits=True)
        assert model(transform(image)[None]).argmax() == 0
    torch.testing.assert_close(tower(pixels), theirs, rtol=1e-4, atol=1e-5)


def test_mistakes_are_named(folders: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="class"):
        pretrain(config(photos), tmp_path / "a")
    with pytest.raises(UsageError, match="no model"):
        pretrain(config(folders, model="resnet5"), tmp_path / "b")
    with pytest.raises(UsageError, match=r"model_args: timm's test_nfnet cannot be built with .*rows"):
        pretrain(config(folders, model="test_nfnet", model_args={"rows": 3}), tmp_path / "c")


def test_arguments_of_the_architecture_are_kept_with_its_weights(folders: Path, tmp_path: Path) -> None:
    narrow = config(folders, model="test_nfnet", model_args={"num_features": 40}, steps=1)
    pretrain(narrow, tmp_path / "tower")
    assert image_tower(f"file:{tmp_path / 'tower'}").width == 40


def test_some_classes_alone_can_be_learned(folders: Path, tmp_path: Path) -> None:
    chosen = config(folders, only=("class 0", "* 2"))
    assert pretrain(chosen, tmp_path / "tower") > 0.8
    described = json.loads((tmp_path / "tower" / "pretrain.json").read_bytes())
    assert described["classes"] == 2 and described["outputs"] == [2]
    with pytest.raises(UsageError, match=r"only: no class matches 'klass \*'; the first are 'class 0'"):
        pretrain(replace(chosen, only=("klass *",)), tmp_path / "other")


def test_each_word_of_the_class_names_can_have_a_head(folders: Path, tmp_path: Path) -> None:
    accuracy = pretrain(config(folders, heads="words"), tmp_path / "tower")
    described = json.loads((tmp_path / "tower" / "pretrain.json").read_bytes())
    assert described["outputs"] == [1, 3] and described["classes"] == 3
    assert accuracy > 0.8
    (folders.parent / "uneven" / "one").mkdir(parents=True)
    (folders.parent / "uneven" / "two words").mkdir()
    for name in ("one", "two words"):
        for index in range(6):
            shutil.copy(folders / "class 0" / f"{index}.png", folders.parent / "uneven" / name)
    with pytest.raises(UsageError, match=r"'one' has 1, 'two words' has 2; take heads = classes"):
        pretrain(config(folders.parent / "uneven", heads="words"), tmp_path / "other")


def test_the_loss_of_several_heads_is_the_mean_of_theirs() -> None:
    targets = _targets(PretrainConfig(heads="words"), ["small red", "small blue", "large red"])
    assert targets.sizes == (2, 2)
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2])
    first = F.cross_entropy(logits[:, :2], torch.tensor([0, 0, 1]), label_smoothing=0.1)
    second = F.cross_entropy(logits[:, 2:], torch.tensor([0, 1, 0]), label_smoothing=0.1)
    torch.testing.assert_close(targets.loss(logits, labels), (first + second) / 2)
    sure = torch.tensor([[9.0, 0, 9, 0], [9, 0, 9, 0], [0, 9, 9, 0]])
    assert targets.right(sure, labels).tolist() == [True, False, True], "every part must be right"


def test_no_steps_write_the_untrained_weights(folders: Path, tmp_path: Path) -> None:
    pretrain(config(folders, steps=0), tmp_path / "tower")
    with initialised(0, "pretrain"):
        untrained = timm.create_model("test_nfnet", num_classes=3)
    saved = timm.create_model(f"local-dir:{tmp_path / 'tower'}", pretrained=True)
    for name, weight in untrained.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[name], weight, rtol=0, atol=0)
    assert image_tower(f"file:{tmp_path / 'tower'}").image.size == 16
