"""Unit vectors for search indexes: those of the run, in the order of the data, all of them or none."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

from kit.runs import Config
from threetowers import cli
from threetowers.commands import vectors as command
from threetowers.commands.arguments import VectorsArguments
from threetowers.commands.vectors import vectors
from threetowers.data.open import open_source
from threetowers.errors import CheckpointError, DataError, UsageError
from threetowers.run.finished import load_run
from threetowers.train.loop import train


@pytest.fixture
def run(folder: Path, tiny_config: Config) -> Path:
    if not (folder / "run").exists():
        train(tiny_config(steps=2), folder / "run")
    return folder / "run"


def written(out: Path) -> tuple[NDArray[np.float32], list[dict[str, Any]]]:
    lines = (out / "ids.jsonl").read_text(encoding="utf-8").splitlines()
    return np.load(out / "vectors.npy"), [json.loads(line) for line in lines]


def nothing_but(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


@pytest.mark.parametrize("block", [7, 4096])
def test_images_are_the_runs_vectors_in_the_order_of_the_data(
    block: int, run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "BLOCK", block)
    said = vectors(VectorsArguments(run=run, data=str(photos), out=tmp_path / "out", device="cpu"))
    found, ids = written(tmp_path / "out")
    source = open_source(str(photos))
    files = [photos.parent / source.record(index).id for index in range(len(source))]
    assert [line["id"] for line in ids] == [source.record(index).id for index in range(96)]
    assert found.dtype == np.float32 and found.shape == (96, 24)
    np.testing.assert_allclose(found, load_run(run).encode_image(files).numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert "96 unit vectors of images, 24 wide" in said and "could not" not in said
    assert nothing_but(tmp_path, "out", "embeddings") or nothing_but(tmp_path, "out")
    assert nothing_but(tmp_path / "out", "vectors.npy", "ids.jsonl")


def test_texts_are_the_runs_vectors_and_stand_beside_their_ids(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    vectors(VectorsArguments(run=run, data=str(photos), out=tmp_path / "out", of="texts", device="cpu"))
    found, lines = written(tmp_path / "out")
    source = open_source(str(photos))
    expected = [
        {"id": record.id, "text": caption}
        for record in map(source.record, range(96))
        for caption in record.captions
    ]
    assert lines == expected and len(lines) == 192
    texts = [line["text"] for line in lines]
    np.testing.assert_allclose(found, load_run(run).encode_text(texts).numpy(), rtol=0, atol=1e-6)


@pytest.fixture
def damaged(photos: Path, tmp_path: Path) -> Path:
    """The photos, two of which cannot be read."""
    shutil.copytree(photos.parent, tmp_path / "photos")
    for name in ("003.png", "095.png"):
        (tmp_path / "photos" / name).write_bytes(b"\x89PNG, and then nothing")
    return tmp_path / "photos" / photos.name


def test_images_that_cannot_be_read_have_no_row_and_are_named(
    run: Path, damaged: Path, tmp_path: Path
) -> None:
    said = vectors(VectorsArguments(run=run, data=str(damaged), out=tmp_path / "out", device="cpu"))
    found, lines = written(tmp_path / "out")
    names = [f"{index:03d}.png" for index in range(95) if index != 3]
    assert [line["id"] for line in lines] == names and len(found) == 94
    np.testing.assert_allclose(
        found[-1:], load_run(run).encode_image([damaged.parent / names[-1]]).numpy(), rtol=0, atol=1e-6
    )
    bad = (tmp_path / "out" / "bad_samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in bad] == ["003.png", "095.png"]
    assert "2 images could not be read and have no row (bad_samples.jsonl)" in said


def test_a_call_that_was_stopped_leaves_no_folder_and_is_continued(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    arguments = VectorsArguments(run=run, data=str(photos), out=tmp_path / "out", device="cpu")
    with (
        mock.patch.object(command, "_write", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        vectors(arguments)
    assert not (tmp_path / "out").exists()
    with mock.patch("threetowers.store.embed._features", side_effect=AssertionError("computed again")):
        vectors(arguments)
    assert written(tmp_path / "out")[0].shape == (96, 24)
    assert not list(tmp_path.glob(".*"))


def test_another_run_does_not_take_what_a_stopped_call_has_left(
    run: Path, photos: Path, tiny_config: Config, tmp_path: Path
) -> None:
    train(tiny_config(steps=2, seed=5), tmp_path / "other")
    arguments = VectorsArguments(run=run, data=str(photos), out=tmp_path / "out", device="cpu")
    with (
        mock.patch.object(command, "_write", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        vectors(arguments)
    vectors(replace(arguments, run=tmp_path / "other"))
    files = [photos.parent / line["id"] for line in written(tmp_path / "out")[1]]
    expected = load_run(tmp_path / "other").encode_image(files).numpy()
    np.testing.assert_allclose(written(tmp_path / "out")[0], expected, rtol=0, atol=1e-6)


def test_what_cannot_be_done_is_refused_and_nothing_is_written(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    arguments = VectorsArguments(run=run, data=str(photos), out=tmp_path / "out", device="cpu")
    with pytest.raises(CheckpointError, match=r"model\.json"):
        vectors(replace(arguments, run=tmp_path))
    (tmp_path / "images").mkdir()
    shutil.copy(photos.parent / "000.png", tmp_path / "images" / "broken.png")
    (tmp_path / "images" / "broken.txt").write_text("a square")
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match="not one of 1 samples could be read"):
        vectors(replace(arguments, data=str(tmp_path / "images")))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"out: something is there already"):
        vectors(arguments)
    assert nothing_but(tmp_path / "out", "mine.txt")


def test_the_command_line(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["vectors", str(run), "--data", str(photos), "--out", str(tmp_path / "out"), "--of", "texts"]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert not stop.value.code
    assert "192 unit vectors of texts, 24 wide" in capsys.readouterr().out
