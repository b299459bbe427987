"""Processes killed for real: the same call continues, and ends with the weights of an uninterrupted run."""

import itertools
import multiprocessing
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kit.faults import KINDS, POINTS, Fault, install
from kit.runs import Config, assert_same_weights, at_step, events, logged, rows, with_vit
from threetowers.config import RunConfig
from threetowers.errors import CheckpointError, ThreeTowersError
from threetowers.train import checkpoint
from threetowers.train.loop import train

FORK = multiprocessing.get_context(
    "fork"
)  # a process of its own without the seconds that a fresh import takes
STOPPED = 75


def randomised(tiny_config: Config, workers: int = 2, **changes: Any) -> RunConfig:
    """A run with random crops, flips, captions and dropped patches."""
    config = with_vit(tiny_config(), layers=1, patch_dropout=0.4)
    return replace(
        config,
        inputs=replace(config.inputs, workers=workers, crop_scale=(0.4, 1.0), flip=True),
        **{"steps": 24, "checkpoint_every_steps": 4, "log_every_steps": 4, **changes},
    )


def start(config: RunConfig, folder: Path, before: Callable[[], object] = lambda: None) -> Any:
    """`train` in a process of its own; it ends with the command's exit code."""

    def body() -> None:
        code = 1
        try:
            torch.set_num_threads(1)
            before()
            code = 0 if train(config, folder).finished else STOPPED
        except ThreeTowersError as error:
            print(error, flush=True)
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    process = FORK.Process(target=body)
    process.start()
    return process


def finish(config: RunConfig, folder: Path, before: Callable[[], object] = lambda: None) -> int:
    process = start(config, folder, before)
    process.join(600)
    assert process.exitcode is not None, "it hangs"
    return int(process.exitcode)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def assert_same(a: Path, b: Path) -> None:
    assert_same_weights(a, b)
    logged = [[row["step"] for row in rows(folder) if "train/loss" in row] for folder in (a, b)]
    assert logged[0] == logged[1], "no row is missing and none stands twice"


@pytest.mark.parametrize("count", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_sigkills_at_random_moments(
    count: int, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = randomised(tiny_config, steps=60 * count, checkpoint_every_steps=3, log_every_steps=50)
    begun = time.monotonic()
    assert finish(config, tmp_path / "whole") == 0
    draw, kills = random.Random(count), 0
    resumed: list[str] = []
    while kills < count:
        process = start(config, tmp_path / "torn")
        process.join(draw.uniform(0.05, 1.0))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
        resumed.append(max((p.name for p in (tmp_path / "torn").glob("checkpoints/step-*")), default=""))
    assert kills == count, f"over after {kills} kills with {process.exitcode}"
    assert finish(config, tmp_path / "torn") == 0
    assert_same(tmp_path / "whole", tmp_path / "torn")
    without_checkpoint = resumed.count("")
    assert events(tmp_path / "torn").count("starting:") <= 1 + without_checkpoint, (
        "what is saved is continued"
    )
    assert not list((tmp_path / "torn" / "checkpoints").glob(".partial-*")), (
        "what dead processes left is swept"
    )
    with capsys.disabled():
        print(
            f"\n{kills} SIGKILLs, dead at {len(set(resumed))} checkpoints, {time.monotonic() - begun:.0f} s"
        )


@pytest.mark.parametrize("point", POINTS)
def test_faults_aimed_at_a_save(point: str, tiny_config: Config, tmp_path: Path) -> None:
    """The fault is in the third save, of step 8; the run, or the next call, continues and never starts from zero."""
    config = randomised(tiny_config, workers=0, steps=14)
    train(config, tmp_path / "whole")
    for kind in KINDS:
        folder = tmp_path / kind
        code = finish(config, folder, lambda kind=kind: install(Fault(point, kind, 3)))  # type: ignore[misc]
        assert code == (-signal.SIGKILL if kind == "kill" else 0)
        file = "." in point or point == "sync file"
        if kind in ("full", "error") and point != "remove old":
            assert "the checkpoint of step 8 could not be saved" in events(folder)
        assert ("was not written whole" in events(folder)) == (kind == "short" and file)
        if kind == "kill":
            committed = point in ("sync parent", "remove old")
            found = checkpoint.find(folder / "checkpoints")
            assert found is not None and found.step == (8 if committed else 4)
            assert finish(config, folder) == 0
            assert f"continuing from step {found.step}" in events(folder)
        assert events(folder).count("starting:") == 1
        assert_same(tmp_path / "whole", folder)


@pytest.mark.parametrize("count", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_signals_save_at_the_step_they_come_in(count: int, tiny_config: Config, tmp_path: Path) -> None:
    config = randomised(tiny_config, steps=40, checkpoint_every_steps=1000, log_every_steps=1)
    whole = tmp_path / "whole"
    assert finish(config, whole) == 0
    draw = random.Random(count)
    for index in range(count):
        folder = tmp_path / f"{index}"
        process = start(config, folder)
        while not (folder / "metrics.jsonl").exists() and process.is_alive():
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.1))
        done = max(logged(folder), default=0)
        os.kill(process.pid, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[index % 3])
        process.join(60)
        assert process.exitcode == STOPPED
        newest = checkpoint.checkpoints(folder / "checkpoints")[0]
        step = int(newest.name.removeprefix("step-"))
        assert f"stopped on request at step {step}" in events(folder) and done <= step < 40
        assert finish(config, folder) == 0
        assert_same(whole, folder)


MATRIX = list(itertools.product((2, 4, 7), (0, 2), (False, True), (0, 4), ("fp32", "bf16-autocast")))
"""Step of death (inside the epoch of four steps, at its end, in the second), workers, augmentation, micro-batches,
precision."""


@pytest.mark.parametrize(
    ("step", "workers", "augmented", "micro", "precision"),
    [
        pytest.param(*case, marks=() if index % 7 == 3 else pytest.mark.slow)
        for index, case in enumerate(MATRIX)
    ],
)
def test_resume_matrix(
    step: int, workers: int, augmented: bool, micro: int, precision: str, tiny_config: Config, tmp_path: Path
) -> None:
    config = randomised(
        tiny_config, steps=10, checkpoint_every_steps=3, micro_batch_size=micro, precision=precision
    )
    crops = (0.4, 1.0) if augmented else (1.0, 1.0)
    inputs = replace(config.inputs, workers=workers, crop_scale=crops, flip=augmented)
    config = replace(config, inputs=inputs)
    assert finish(config, tmp_path / "whole") == 0
    assert finish(config, tmp_path / "torn", at_step(step, kill).start) == -signal.SIGKILL
    assert finish(config, tmp_path / "torn") == 0
    last = step // 3 * 3  # its save may still have been under way
    assert any(f"continuing from step {at}\n" in events(tmp_path / "torn") for at in (last, last - 3))
    assert_same(tmp_path / "whole", tmp_path / "torn")


def test_a_dead_worker_is_started_again_at_its_position(tiny_config: Config, tmp_path: Path) -> None:
    config = randomised(tiny_config, steps=60)
    assert finish(config, tmp_path / "whole") == 0
    struck: list[int] = []

    def kill_a_worker() -> None:
        if not struck:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            struck.append(int(children[0]))
            os.kill(struck[0], signal.SIGKILL)

    assert finish(config, tmp_path / "torn", at_step(5, kill_a_worker).start) == 0
    assert "a loader worker died" in events(tmp_path / "torn")
    assert_same(tmp_path / "whole", tmp_path / "torn")


def test_a_lock_keeps_a_second_trainer_out(tiny_config: Config, tmp_path: Path) -> None:
    config = randomised(tiny_config, steps=100_000)
    process = start(config, tmp_path / "run")
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert process.is_alive()
            time.sleep(0.01)
        with pytest.raises(
            CheckpointError, match=rf"process {process.pid} on \S+ is training in this folder"
        ):
            train(config, tmp_path / "run", fresh=True)
    finally:
        process.kill()
        process.join()
    assert train(replace(config, steps=2), tmp_path / "run", fresh=True).finished, (
        "the lock died with its holder"
    )
