"""A classifier trained with `threetowers pretrain` becomes a third tower."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from kit.towers import image_tower
from threetowers.config import InputConfig, OptimConfig, PretrainConfig
from threetowers.data.transforms import fixed_view
from threetowers.errors import DataError, UsageError
from threetowers.train.pretrain import pretrain


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
    return PretrainConfig(
        data=str(data), size=16, steps=40, batch_size=16, device="cpu",
        inputs=InputConfig(val_fraction=0.2, workers=0), optim=OptimConfig(lr=3e-3, warmup_steps=5), **more,  # type: ignore[arg-type]
    )  # fmt: skip


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
