"""Data that changes under a run: said when the run is evaluated, continued or compared."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from kit.runs import Config
from threetowers.compare.comparison import compare
from threetowers.config import CompareConfig, RunConfig
from threetowers.errors import CheckpointError
from threetowers.evaluate.evaluation import evaluate_run
from threetowers.run import setup
from threetowers.train.loop import train

PARTS = ("train", "val", "test")


@pytest.fixture
def folders(photos: Path, tmp_path: Path) -> Path:
    """A folder with train/, val/ and test/, so that each part changes alone."""
    pictures = sorted(photos.parent.glob("*.png"))
    for number, part in enumerate(PARTS):
        place = tmp_path / "photos" / part
        place.mkdir(parents=True)
        for path in pictures[32 * number : 32 * number + 24]:
            shutil.copy(path, place)
            (place / f"{path.stem}.txt").write_text(f"a square {path.stem}")
    return tmp_path / "photos"


def grow(folder: Path, part: str, photos: Path) -> None:
    shutil.copy(photos.parent / "000.png", folder / part / "more.png")
    (folder / part / "more.txt").write_text("one more square")
    setup._open_splits.cache_clear()


def rewrite(folder: Path, part: str, photos: Path) -> None:
    next(iter(sorted((folder / part).glob("*.txt")))).write_text("another caption")
    setup._open_splits.cache_clear()


def config(make: Config, folders: Path, **changes: Any) -> RunConfig:
    return make(**{"method": "baseline", "data": str(folders), "steps": 3, "batch_size": 8, **changes})


@pytest.mark.parametrize(
    ("change", "words"), [(grow, "24 → 25 images"), (rewrite, "as many images, from data that differs")]
)
@pytest.mark.parametrize("part", PARTS)
def test_an_evaluation_says_which_part_has_changed(
    part: str, change: Any, words: str, tiny_config: Config, folders: Path, photos: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    train(config(tiny_config, folders), tmp_path / "run")
    evaluate_run(tmp_path / "run")
    assert "has changed" not in capfd.readouterr().err
    change(folders, part, photos)
    evaluate_run(tmp_path / "run")
    said = capfd.readouterr().err
    assert f"the data has changed since this run was trained: {part} ({words}" in said


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_continued_run_says_which_part_has_changed(
    part: str, tiny_config: Config, folders: Path, photos: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    train(config(tiny_config, folders), tmp_path / "run", max_minutes=1e-6)
    grow(folders, part, photos)
    assert train(config(tiny_config, folders), tmp_path / "run").finished
    assert f"data has changed since this run was stopped: {part} (24 → 25 images)" in capfd.readouterr().err


def test_other_training_data_is_still_refused(
    tiny_config: Config, folders: Path, photos: Path, tmp_path: Path
) -> None:
    train(config(tiny_config, folders), tmp_path / "run", max_minutes=1e-6)
    grow(folders, "train", photos)
    with pytest.raises(CheckpointError, match="the training data is not what it was"):
        train(config(tiny_config, folders), tmp_path / "run")


def test_a_comparison_on_changed_data_is_refused(
    tiny_config: Config, folders: Path, photos: Path, tmp_path: Path
) -> None:
    options = CompareConfig(methods=("baseline",), lrs=(1e-3,))
    compare(config(tiny_config, folders, third=()), options, tmp_path / "compare")
    grow(folders, "test", photos)
    with pytest.raises(CheckpointError, match=r"test \(24 → 25 images\).*another --out"):
        compare(config(tiny_config, folders, third=()), options, tmp_path / "compare")
