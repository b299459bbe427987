"""A run's config.toml means the same from every working directory, and after its project has been moved."""

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kit.runs import Config
from threetowers.commands.arguments import load_file
from threetowers.compare.comparison import compare
from threetowers.config import CompareConfig, RunConfig
from threetowers.errors import CheckpointError
from threetowers.evaluate.evaluation import evaluate_run
from threetowers.objective.pairs import resolved
from threetowers.run import setup
from threetowers.settings import config_hash, read_config, write_config
from threetowers.train.guards import differing_keys
from threetowers.train.loop import train


@pytest.fixture
def project(tmp_path: Path, photos: Path, timm_tower: str) -> Path:
    """A project folder with photos, class folders and a tower, named in the configuration by relative paths."""
    folder = tmp_path / "project"
    shutil.copytree(photos.parent, folder / "photos")
    shutil.copytree(timm_tower.removeprefix("timm:local-dir:"), folder / "towers" / "mine")
    for number, name in enumerate(("red", "blue")):
        (folder / "classes" / name).mkdir(parents=True)
        shutil.copy(photos.parent / f"{number:03d}.png", folder / "classes" / name / "a.png")
    setup._open_splits.cache_clear()
    return folder


def relative(make: Config, **changes: Any) -> RunConfig:
    given = {
        "data": "photos/captions.csv",
        "classes": "classes",
        "third": ("mine=timm:local-dir:towers/mine",),
    }
    return make(**{**given, "embeddings": "stored", "steps": 2, **changes})


def elsewhere(project: Path, tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "other").mkdir()
    return project, tmp_path / "other"


def moved(project: Path, tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "new").mkdir()
    return project.rename(tmp_path / "new" / "place"), tmp_path


def run_moved_alone(project: Path, tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "archive").mkdir()
    (project / "runs" / "a").rename(tmp_path / "archive" / "a")
    return tmp_path / "archive", tmp_path


@pytest.mark.parametrize("method", ["3t", "lit", "lit-unlocked"])
@pytest.mark.parametrize("change", [elsewhere, moved, run_moved_alone])
def test_a_run_is_evaluated_and_continued_from_another_directory(
    change: Callable[[Path, Path], tuple[Path, Path]], method: Any, tiny_config: Config, project: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    config = relative(tiny_config, method=method)
    with contextlib.chdir(project):
        train(config, Path("runs/a"))
        before = evaluate_run(Path("runs/a")).sections
    folder, here = change(project, tmp_path)
    run = folder / "a" if change is run_moved_alone else folder / "runs" / "a"
    setup._open_splits.cache_clear()
    with contextlib.chdir(here):
        assert evaluate_run(run).sections == before
        again = read_config(run / "config.toml")
        assert not differing_keys(run / "config.toml", again)
        assert train(again, run).finished
        assert resolved(load_file(run / "config.toml")) == again
    assert not (here / "stored").exists() or here == project


def test_relative_paths_stay_as_they_are_written_in_the_same_directory(
    tiny_config: Config, project: Path
) -> None:
    with contextlib.chdir(project):
        config = relative(tiny_config)
        (project / "runs").mkdir()
        write_config(config, "runs/config.toml")
        assert read_config("runs/config.toml") == config
        assert config_hash(read_config("runs/config.toml")) == config_hash(config)


def test_the_same_words_from_another_directory_mean_other_data(
    tiny_config: Config, project: Path, tmp_path: Path
) -> None:
    with contextlib.chdir(project):
        train(relative(tiny_config, method="baseline"), Path("run"))
    other = tmp_path / "other"
    shutil.copytree(project / "photos", other / "photos")
    shutil.copytree(project / "classes", other / "classes")
    with (
        contextlib.chdir(other),
        pytest.raises(CheckpointError, match=r"data: .*project/photos.* → .*other/photos"),
    ):
        train(relative(tiny_config, method="baseline"), project / "run")


def test_a_comparison_is_read_from_another_directory(
    tiny_config: Config, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CompareConfig(methods=("baseline", "3t"), lrs=(1e-3,))
    with contextlib.chdir(project):
        first = compare(relative(tiny_config), options, Path("compared"))
    config = relative(tiny_config)
    there = replace(
        config, data=f"{project}/photos/captions.csv", classes=f"{project}/classes", embeddings=f"{project}/stored",
        third=(f"mine=timm:local-dir:{project}/towers/mine",),
    )  # fmt: skip
    setup._open_splits.cache_clear()
    from threetowers.compare import runs

    monkeypatch.setattr(runs, "train", lambda *_, **__: pytest.fail("a run was trained again"))
    with contextlib.chdir(tmp_path):
        second = compare(there, options, project / "compared")
    assert first is not None and second is not None and first["results"] == second["results"]


VALUES: dict[str, Any] = {
    "data": "shards/{00000..00003}.tar::more/x.tar",
    "classes": "hfds:saved",
    "third": [
        "a=timm:resnet18@towers/x.safetensors",
        "file:runs/x",
        "open_clip:ViT-B-32@openai",
        "hf:me/model",
    ],
    "embeddings": "none",
    "pair": {"weights": "w.safetensors", "tokenizer": "trained"},
}


def test_what_is_a_path_and_what_is_not(tmp_path: Path) -> None:
    from threetowers.paths import from_here

    (tmp_path / "shards").mkdir()
    (tmp_path / "towers").mkdir()
    (tmp_path / "towers" / "x.safetensors").touch()
    base = str(tmp_path)
    assert from_here({"directory": "..", **VALUES}, tmp_path / "run" / "config.toml") == {
        "data": f"{base}/shards/{{00000..00003}}.tar::{base}/more/x.tar",
        "classes": f"hfds:{base}/saved",
        "third": [
            f"a=timm:resnet18@{base}/towers/x.safetensors",
            f"file:{base}/runs/x",
            *VALUES["third"][2:],
        ],
        "embeddings": "none",
        "pair": {"weights": f"{base}/w.safetensors", "tokenizer": "trained"},
    }
    known = {
        "data": "shapes",
        "classes": "s3://bucket/x.tar",
        "embeddings": "/stored",
        "third": "timm:resnet18",
    }
    assert from_here({"directory": ["..", base], **known}, tmp_path / "run" / "config.toml") == known
    assert from_here(VALUES, tmp_path / "run" / "config.toml") == VALUES, "a file without `directory`"
