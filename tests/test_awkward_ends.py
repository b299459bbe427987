"""What a run needs at its end is looked at before its first step, and what cannot change weights may be corrected."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from kit.runs import Config, assert_same_weights
from threetowers.commands.validate import validate
from threetowers.compare.comparison import compare
from threetowers.config import CompareConfig, RunConfig
from threetowers.errors import CheckpointError, DataError, ThreeTowersError
from threetowers.evaluate import evaluation
from threetowers.evaluate.evaluation import evaluate_run
from threetowers.objective.pairs import resolved
from threetowers.settings import read_config
from threetowers.train import loop
from threetowers.train.loop import train


def class_folders(folder: Path) -> str:
    for name in ("red", "blue"):
        (folder / name).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (40, 40), name).save(folder / name / f"{index}.png")
    return str(folder)


def wrong_classes(kind: str, photos: Path, folder: Path) -> str:
    if kind == "missing":
        return str(folder / "nowhere")
    if kind == "captions without labels":
        return str(photos)
    classes = class_folders(folder)
    if kind == "no image readable":
        for path in folder.rglob("*.png"):
            path.write_bytes(b"<html>404</html>")
    return classes


def training(config: RunConfig, out: Path) -> None:
    train(config, out / "run")


def validating(config: RunConfig, out: Path) -> None:
    list(validate(config, out / "run"))


def comparing(config: RunConfig, out: Path) -> None:
    compare(config, CompareConfig(methods=("baseline",), lrs=(1e-3,)), out / "compare")


@pytest.fixture
def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_steps", lambda _: pytest.fail("a step was taken"))


@pytest.mark.parametrize("command", [training, validating, comparing])
@pytest.mark.parametrize("kind", ["missing", "captions without labels", "no image readable"])
def test_classes_that_cannot_be_classified_are_met_before_the_first_step(
    kind: str, command: Callable[[RunConfig, Path], None], tiny_config: Config, photos: Path, tmp_path: Path,
    no_step: None,
) -> None:  # fmt: skip
    classes = wrong_classes(kind, photos, tmp_path / "classes")
    with pytest.raises(ThreeTowersError) as caught:
        command(tiny_config(method="baseline", classes=classes), tmp_path)
    assert Path(classes).name in str(caught.value)
    assert not (tmp_path / "embeddings").exists()


@pytest.mark.parametrize("command", [training, validating, comparing])
def test_test_images_that_cannot_be_read_are_met_before_the_first_step(
    command: Callable[[RunConfig, Path], None],
    tiny_config: Config,
    photos: Path,
    tmp_path: Path,
    no_step: None,
) -> None:
    for part in ("train", "val", "test"):
        (tmp_path / "data" / part).mkdir(parents=True)
        for path in sorted(photos.parent.glob("*.png"))[:32]:
            damaged = part == "test"
            (tmp_path / "data" / part / path.name).write_bytes(b"" if damaged else path.read_bytes())
            (tmp_path / "data" / part / f"{path.stem}.txt").write_text(f"a square {path.stem}")
    with pytest.raises(DataError, match=r"test.*nothing can be evaluated|test.*no sample"):
        command(tiny_config(method="baseline", data=str(tmp_path / "data")), tmp_path)


def test_labelled_images_without_a_label_are_left_out_and_counted(
    tiny_config: Config, photos: Path, tmp_path: Path
) -> None:
    pictures = [path.read_bytes() for path in sorted(photos.parent.glob("*.png"))[:6]]
    rows = [
        (f"{n}", {"png": data} | ({"cls": str(n % 2).encode()} if n else {"txt": b"no label"}))
        for n, data in enumerate(pictures)
    ]
    write_labelled(tmp_path / "labelled", rows)
    config = tiny_config(method="baseline", classes=str(tmp_path / "labelled"))
    lines = "\n".join(validate(config, tmp_path / "run"))
    assert "5 images of 2 classes for zero-shot classification (no class: 1)" in lines
    train(config, tmp_path / "run")
    assert evaluate_run(tmp_path / "run").sections["zero_shot"]


def write_labelled(folder: Path, rows: list[tuple[str, dict[str, bytes]]]) -> None:
    from kit.files import tar

    tar(
        folder / "0.tar", [(f"{key}.{ending}", data) for key, parts in rows for ending, data in parts.items()]
    )
    (folder / "classnames.txt").write_text("square\ncircle\n")


def test_classes_may_be_corrected_in_a_run_that_is_there(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config(method="baseline")
    train(config, tmp_path / "run")
    assert not evaluate_run(tmp_path / "run").sections["zero_shot"]
    corrected = replace(config, classes=class_folders(tmp_path / "classes"))
    assert train(corrected, tmp_path / "run").finished
    assert read_config(tmp_path / "run" / "config.toml") == resolved(corrected)
    assert evaluate_run(tmp_path / "run").sections["zero_shot"]


def test_classes_may_be_corrected_in_a_comparison(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config(method="baseline", third=())
    comparing(config, tmp_path)
    options = CompareConfig(methods=("baseline",), lrs=(1e-3,))
    corrected = replace(config, classes=class_folders(tmp_path / "classes"))
    result = compare(corrected, options, tmp_path / "compare")
    assert result is not None and result["per_class"]


@pytest.mark.parametrize(
    "changes",
    [{"eval_every_steps": 2}, {"log_every_steps": 1}, {"checkpoint_every_steps": 3}, {"keep_checkpoints": 1}],
    ids=str,
)
def test_settings_that_may_differ_change_no_weight(
    changes: dict[str, int], tiny_config: Config, tmp_path: Path
) -> None:
    train(tiny_config(), tmp_path / "one")
    train(tiny_config(**changes), tmp_path / "other")
    assert_same_weights(tmp_path / "one", tmp_path / "other")
    assert train(tiny_config(**changes), tmp_path / "one").finished


def test_validations_that_choose_the_weights_may_not_differ(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config(eval_every_steps=2, keep_best="val/mean_r@1")
    train(config, tmp_path / "run")
    with pytest.raises(CheckpointError, match="eval_every_steps: 2 → 3"):
        train(replace(config, eval_every_steps=3), tmp_path / "run")


def test_a_comparison_looks_at_the_settings_of_all_its_runs_first(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(method="baseline", third=())
    options = CompareConfig(methods=("baseline",), lrs=(1e-3, 2e-3))
    train(
        replace(config, optim=replace(config.optim, lr=2e-3), steps=3),
        tmp_path / "runs" / "baseline-seed0-lr0.002",
    )
    monkeypatch.setattr(loop, "_steps", lambda _: pytest.fail("a step was taken"))
    with pytest.raises(CheckpointError, match=r"lr0\.002 holds a run with other settings.*steps: 3 → 6"):
        compare(config, options, tmp_path)


def test_a_disk_that_takes_one_checkpoint_and_not_all_is_met_before_the_first_step(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_step: None
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: usage._replace(free=5_800_000)
    )  # a checkpoint has 4.5 MB
    with pytest.raises(CheckpointError, match=r"the run needs 10\.\d MB, and 5\.8 MB are free"):
        train(tiny_config(method="baseline"), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-00000000").is_dir()


def test_a_run_folder_that_cannot_be_written_is_met_before_anything_is_encoded(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_config(method="baseline"), tmp_path / "run")
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(evaluation, "prepare", lambda *_, **__: pytest.fail("the run was prepared"))
    with pytest.raises(DataError, match="run: the figures are written there, and it cannot be written"):
        evaluate_run(tmp_path / "run")
