"""Trackers: what they get of a run and of one that continues, and that none can harm the training."""

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from threetowers.config import RunConfig
from threetowers.errors import UsageError
from threetowers.train import trackers
from threetowers.train.loop import train
from threetowers.train.trackers import TRACKERS, Trackers, run_id

Config = Callable[..., RunConfig]


class Broken:
    """Fails at its second row."""

    rows = 0

    def __init__(self, *_: Any) -> None: ...

    def log(self, step: int, values: Any) -> None:
        type(self).rows += 1
        if self.rows == 2:
            raise RuntimeError("no more space in the cloud")

    def close(self) -> None:
        raise AssertionError("it was dropped")


def rows(folder: Path) -> dict[tuple[str, int], float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {(name, line["step"]): value for line in lines for name, value in line.items() if name != "step"}


def shown(folder: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard shows of a run."""
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {(tag, event.step): event.value for tag in found.Tags()["scalars"] for event in found.Scalars(tag)}


def test_tensorboard_shows_the_metrics_of_a_run_that_was_continued(
    tiny_config: Config, tmp_path: Path
) -> None:
    settings = {"log_every_steps": 1, "checkpoint_every_steps": 2, "trackers": ("tensorboard",)}
    plain = tiny_config(steps=4, log_every_steps=1, checkpoint_every_steps=2)
    train(tiny_config(steps=4, **settings), tmp_path / "run")
    before = shown(tmp_path / "run")
    assert before == pytest.approx(rows(tmp_path / "run"), rel=1e-6) and ("train/loss", 4) in before
    train(plain, tmp_path / "plain")
    losses = {key: value for key, value in rows(tmp_path / "plain").items() if key[0] == "train/loss"}
    assert losses == {key: value for key, value in rows(tmp_path / "run").items() if key[0] == "train/loss"}
    again = Trackers(["tensorboard"], tmp_path / "run", plain, 2)
    again.log(3, {"train/loss": 9.0})
    again.close()
    after = shown(tmp_path / "run")
    assert after["train/loss", 3] == 9.0 and after["train/loss", 2] == before["train/loss", 2]
    assert ("train/loss", 4) not in after, "the steps that are taken again are shown once"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_that_continues_is_one_run_of_the_tracker(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "trackio" and importlib.util.find_spec(name) is None:
        pytest.skip("trackio is not among the packages of the tests, because it needs an older Pillow")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for start in (0, 2):
        some = Trackers([name], tmp_path, RunConfig(), start)
        for step in (start + 1, start + 2):
            some.log(step, {"train/loss": 1 / step, "note": "no number"})
        some.close()
    id = run_id(tmp_path)
    if name == "wandb":
        written = list(tmp_path.glob(f"wandb/offline-run-*-{id}/run-{id}.wandb"))
        assert len(written) == 2
        deadline = time.monotonic() + 30
        while not all(b"train/loss" in path.read_bytes() for path in written):
            assert time.monotonic() < deadline, "the rows never reached the disk"
            time.sleep(0.05)  # the process of wandb writes the file a moment after `finish` returned
    else:
        import trackio

        (run,) = trackio.Api().runs("threetowers")
        assert id in run.name


def test_a_tracker_that_fails_is_dropped_and_the_training_goes_on(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TRACKERS, "broken", Broken)
    monkeypatch.setattr(trackers, "import_tracker", lambda name: None)
    config = tiny_config(steps=4, log_every_steps=1, trackers=("broken",))
    assert train(config, tmp_path / "run").finished
    assert Broken.rows == 2 and capsys.readouterr().err.count("no more space in the cloud") == 1
    assert {step for _, step in rows(tmp_path / "run")} == {1, 2, 3, 4}


def test_unknown_trackers_and_missing_packages_are_named_before_training(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="no tracker 'tensorbord'; did you mean `tensorboard`"):
        train(tiny_config(trackers=("tensorbord",)), tmp_path / "a")
    monkeypatch.setitem(TRACKERS, "nowhere_tracker", Broken)
    with pytest.raises(UsageError, match=r"pip install 'threetowers\[nowhere_tracker\]'"):
        train(tiny_config(trackers=("nowhere_tracker",)), tmp_path / "b")
    assert not (tmp_path / "b" / "metrics.jsonl").exists()
