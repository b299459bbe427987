"""Files that the project writes may be read and written by whom the umask says."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.runs import Config
from threetowers.config import InputConfig, PretrainConfig
from threetowers.evaluate.evaluation import evaluate_run
from threetowers.export.open_clip import export_open_clip
from threetowers.train.loop import train
from threetowers.train.pretrain import pretrain
from threetowers.world.write import write_world


@pytest.fixture(params=[0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_modes(folder: Path, umask: int) -> None:
    for path in folder.rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_a_run_a_store_and_an_export_follow_the_umask(
    umask: int, tiny_config: Config, tmp_path: Path
) -> None:
    train(tiny_config(steps=2), tmp_path / "run")
    evaluate_run(tmp_path / "run")
    export_open_clip(tmp_path / "run", tmp_path / "exported")
    written = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert {"model.safetensors", "features.safetensors", "open_clip_model.safetensors"} <= written
    assert_modes(tmp_path, umask)


def test_a_pretrained_tower_and_a_world_follow_the_umask(umask: int, tmp_path: Path) -> None:
    write_world(tmp_path / "world", num_train=40, num_val=8, num_test=8, num_labelled=40)
    inputs = InputConfig(workers=0, val_fraction=0.2)
    config = PretrainConfig(
        data=str(tmp_path / "world" / "objects"), steps=1, batch_size=8, inputs=inputs, device="cpu"
    )
    pretrain(config, tmp_path / "tower")
    assert_modes(tmp_path, umask)
