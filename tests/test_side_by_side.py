"""Runs side by side: the same bits, stops, deaths of processes on either side, and the choice of how many."""

import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kit import tasks as tasks_module
from kit.runs import Config, assert_same_weights, events
from kit.tasks import Steps
from threetowers.compare import concurrency, runs, side_by_side
from threetowers.compare.comparison import compare
from threetowers.compare.concurrency import Concurrency, choose
from threetowers.compare.side_by_side import Shared, Stopped
from threetowers.config import CompareConfig, RunConfig
from threetowers.data import workers
from threetowers.errors import DataError, ThreeTowersError, UsageError
from threetowers.run.pixels import Pixels
from threetowers.run.setup import open_data
from threetowers.train.log import last_step

OPTIONS = CompareConfig(methods=("3t",), seeds=(0, 1), lrs=(1e-3, 3e-3))
SHARED = Shared(jobs=2, threads=2, tokenizers={}, pixels=Pixels(None))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forked from a server that has imported what they need, which saves them seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kit.tasks", "threetowers.compare.runs"])
    monkeypatch.setattr(side_by_side, "SPAWN", context)


def run(tasks: list[Steps], **options: Any) -> list[str]:
    """The names of the tasks that finish."""
    begun: list[str] = []

    def begin(task: Steps) -> None:
        begun.append(task.name)
        print(f"begun: {task.name}")

    done = side_by_side.side_by_side(deque(tasks), SHARED, begin, num_left=len(tasks), **options)
    return [task.name for task in done]


def saved(task: Steps) -> int:
    """The step at which a task was saved."""
    return int((task.folder / "saved").read_text())


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for has no command line."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


# The comparison


@pytest.mark.usefixtures("quick")
def test_runs_side_by_side_have_the_bits_of_runs_after_each_other(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(concurrency, "cpu_count", lambda: 2)
    config = tiny_config(embeddings=None, steps=4)
    config = replace(config, inputs=replace(config.inputs, workers=1))
    one = compare(config, OPTIONS, tmp_path / "one")
    said_of_one = capfd.readouterr()
    two = compare(config, OPTIONS, tmp_path / "two", jobs=2)
    said = capfd.readouterr()
    assert one is not None and two is not None
    assert (two["settings"].pop("jobs"), two["settings"].pop("threads")) == (2, 1)
    assert (one["settings"].pop("jobs"), one["settings"].pop("threads")) == (1, 1)
    equal = ("settings", "results", "summary", "claims", "runs", "combination")
    assert {key: two[key] for key in equal} == {key: one[key] for key in equal}
    names = [path.name for path in sorted((tmp_path / "one" / "runs").iterdir())]
    assert len(names) == 3 == len(list((tmp_path / "two" / "runs").iterdir()))
    for name in names:
        a, b = (tmp_path / folder / "runs" / name for folder in ("one", "two"))
        assert_same_weights(a, b)
        texts = [(each / "config.toml").read_text() for each in (a, b)]
        assert texts[1] == texts[0].replace(str(tmp_path / "one"), str(tmp_path / "two"))
        assert "training" in (b / "output.log").read_text() and not (a / "output.log").exists()
        assert "embedding" not in (b / "output.log").read_text(), "the parent has made the stores"
    assert "training 3t" in said_of_one.err and "training 3t" not in said.err
    assert "training 3 runs: 12/12 steps" in said.err
    numbers = re.findall(r"^\[(\d)/3\] \S+, seed \d, lr \S+ \(.* so far\)$", said.out, re.MULTILINE)
    assert numbers == list("123")
    assert (
        len(
            re.findall(
                r"^\S+, seed \d, lr \S+ is done:\n  (validation mean_r@1|retrieval on)",
                said.out,
                re.MULTILINE,
            )
        )
        == 3
    )
    assert "2 runs at a time, 1 thread each" in said.out


def test_the_other_seeds_wait_for_the_rate_of_their_own_method_alone(tmp_path: Path) -> None:
    def job(key: tuple[str, str], seed: int, lr: float) -> runs.Job:
        name = f"{key[0]}{seed}{lr:g}"
        return runs.Job(*key, seed, lr, RunConfig(), tmp_path / name)

    def finish(name: str, value: float) -> None:
        (done,) = (each for each in schedule.waiting if each.folder.name == name)
        schedule.waiting.remove(done)
        done.folder.mkdir()
        (done.folder / "evaluation.json").write_text(json.dumps({"val": {"mean_r@1": value}}))
        schedule.note(done)

    keys = [("a", ""), ("b", "")]
    options = CompareConfig(seeds=(0, 1, 2), lrs=(1.0, 2.0))
    schedule = runs._Schedule(keys, options, job)
    assert [each.folder.name for each in schedule.waiting] == ["a01", "a02", "b01", "b02"]
    finish("a02", 0.5)
    assert [each.folder.name for each in schedule.waiting] == ["a01", "b01", "b02"]
    finish("a01", 0.4)
    assert [each.folder.name for each in schedule.waiting] == ["b01", "b02", "a12", "a22"]
    one_rate = runs._Schedule(
        keys, replace(options, lrs=(1.0,)), lambda key, seed, lr: job(key, seed + 5, lr)
    )
    assert len(one_rate.waiting) == 6, "there is nothing to choose"
    for name in ("b01", "b02", "a12", "a22", "b11", "b21"):
        finish(name, 0.1)
    jobs, trials = schedule.results()
    assert [each.folder.name for each in jobs] == ["a02", "a12", "a22", "b01", "b11", "b21"]
    assert list(trials["a", ""]) == [1.0, 2.0], "in the order of the options"


# Stops, errors and deaths


@pytest.mark.usefixtures("quick")
def test_workers_stay_from_one_task_to_the_next(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tasks = [Steps(f"{number}", tmp_path / f"{number}", 4) for number in range(5)]
    assert sorted(run(tasks)) == ["0", "1", "2", "3", "4"]
    out, err = capfd.readouterr()
    own = [json.loads(line) for line in out.splitlines() if line.startswith("  {")]
    assert len({each["pid"] for each in own}) == 2 and os.getpid() not in {each["pid"] for each in own}
    assert {(each["threads"], each["sharers"]) for each in own} == {(2, 2)}
    assert "training 5 runs: 20/20 steps" in err
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("does", "error", "says"),
    [
        ("mistake", UsageError, r"^b: lr: it is too high$"),
        ("no_memory", UsageError, r"^b: there is no memory left; give fewer --jobs than 2"),
        (
            "die",
            DataError,
            r"^b: its process was killed by SIGKILL; .* give fewer --jobs than 2; the same command",
        ),
        ("bug", RuntimeError, r"^b: Traceback[^$]*ZeroDivisionError: a mistake of the program"),
    ],
)
def test_what_one_run_ends_with_is_said_when_the_others_are_saved(
    does: str, error: type[Exception], says: str, tmp_path: Path
) -> None:
    a, b, c = tasks = [Steps(name, tmp_path / name) for name in "abc"]
    tasks[1] = b = replace(b, does=does, beside=a.folder)
    begun = time.monotonic()
    with pytest.raises(error, match=says) as raised:
        run(tasks)
    assert time.monotonic() - begun < tasks_module.CHILD_SECONDS, "it waits for a process that it cannot end"
    assert saved(a) > 0 and not (b.folder / "saved").exists() and not c.folder.exists()
    if isinstance(raised.value, ThreeTowersError):
        assert "\n" not in str(raised.value)
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "minutes", "a worker's"])
def test_a_stop_saves_every_run_and_begins_no_other(
    how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    a, b, c = tasks = [Steps(name, tmp_path / name) for name in "abc"]
    if how == "a worker's":
        tasks[1] = b = replace(b, does="signalled", beside=a.folder)

    def strike() -> None:
        while not (last_step(a.folder) and last_step(b.folder)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.Signals[how])

    if how.startswith("SIG"):
        threading.Thread(target=strike).start()
    with pytest.raises(Stopped):
        run(tasks, max_minutes=1 / 60 if how == "minutes" else 0.0)
    assert not c.folder.exists() and "begun: c" not in capfd.readouterr().out
    assert saved(a) > 0 and saved(b) > 0
    assert not multiprocessing.active_children()


def test_a_signal_to_a_worker_that_starts_is_not_lost(tmp_path: Path) -> None:
    task = Steps("a", tmp_path / "a")

    def strike() -> None:
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.01)
        os.kill(workers[0].pid or 0, signal.SIGINT)

    threading.Thread(target=strike).start()
    with pytest.raises(Stopped):
        run([task])
    assert not task.folder.exists() or saved(task)


@pytest.mark.usefixtures("quick")
def test_warnings_of_runs_reach_the_user_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tasks = [Steps(name, tmp_path / name, 4, "warn_both") for name in "abc"]
    run(tasks)
    err = capfd.readouterr().err
    assert err.count("threetowers: shared memory is short") == 1
    for task in tasks:
        assert err.count(f"threetowers: {task.name}: the loss is not finite") == 1
        assert (task.folder / "output.log").read_text() == "only for the log\n"


def test_a_killed_comparison_ends_soon_and_continues(
    tiny_config: Config, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = tiny_config(steps=100_000, log_every_steps=1, checkpoint_every_steps=90_000, third=())
    options = CompareConfig(methods=("baseline",), seeds=(0, 1), lrs=(1e-3,))
    folders = [tmp_path / "runs" / f"baseline-seed{seed}-lr0.001" for seed in (0, 1)]

    def body() -> None:
        threading.Thread(target=kill_myself).start()
        compare(config, options, tmp_path, jobs=2)

    def kill_myself() -> None:
        while not all(last_step(folder) for folder in folders):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    begun = time.monotonic()
    while not all("stopped on request at step" in events(folder) for folder in folders):
        assert time.monotonic() - begun < 20, "a worker goes on without its parent"
        time.sleep(0.02)
    for folder in folders:
        pid = int((folder / ".lock").read_text().split()[0])
        while lives(pid):
            assert time.monotonic() - begun < 20, "its process stays"
            time.sleep(0.02)
    steps = [int(events(folder).split()[-1]) for folder in folders]

    request.getfixturevalue("quick")
    assert compare(config, options, tmp_path, jobs=0, max_minutes=6 / 60) is None
    for folder, step in zip(folders, steps, strict=True):
        assert f"continuing from step {step}\n" in events(folder)
        assert events(folder).count("stopped on request") == 2


# How many at a time


def test_the_choice_is_recorded_and_taken_again_unless_another_is_asked_for(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concurrency, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    waiting = [tiny_config()] * 4

    def chosen(asked: int) -> tuple[int, int]:
        found = choose(asked, waiting, tmp_path)
        written = json.loads((tmp_path / "concurrency.json").read_text())
        assert (written["jobs"], written["threads"]) == (found.jobs, found.threads)
        return found.jobs, found.threads

    assert chosen(4) == (4, 2) == chosen(0)
    monkeypatch.setattr(concurrency, "cpu_count", lambda: 2)
    assert chosen(4) == (4, 2) == chosen(0), "as it began, on whatever machine"
    assert chosen(2) == (2, 1) == chosen(0)
    assert chosen(1) == (1, 8) == chosen(0)
    with pytest.raises(UsageError, match="--jobs: -1 is out of range"):
        choose(-1, waiting, tmp_path)
    assert choose(0, [], tmp_path / "none").jobs == 1 and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("cores", "seconds", "room", "waiting", "jobs", "threads", "says"),
    [
        (
            2,
            {1: 1.5, 2: 1.0},
            9,
            3,
            2,
            1,
            "2 runs at a time, 1 thread each: 1.5 times as fast by a trial of 9 steps",
        ),
        (2, {1: 1.1, 2: 1.0}, 9, 3, 1, 2, "1 run at a time, 2 threads each: 2 at a time would be 1.1 times"),
        (
            2,
            {1: 1.5, 2: 1.0},
            1,
            3,
            1,
            2,
            "2 would be 1.5 times as fast by a trial of 9 steps, but memory is short",
        ),
        (2, {1: 0.0015, 2: 0.001}, 9, 3, 1, 2, "steps, which is less than their start takes"),
        (2, {}, 9, 3, 1, 2, "a step is long enough for all threads"),
        (2, {1: 1.5, 2: 1.0}, 9, 1, 1, 2, "one run is left"),
        (1, {1: 1.5, 2: 1.0}, 9, 3, 1, 1, "there is one core"),
        (8, {1: 1.5, 4: 1.0, 8: 1.1}, 9, 20, 4, 2, "4 runs at a time, 2 threads each: 1.5 times"),
        (8, {1: 1.5, 4: 1.0, 8: 0.9}, 9, 20, 8, 1, "8 runs at a time, 1 thread each: 1.7 times"),
        (8, {1: 1.5, 3: 1.0}, 9, 3, 3, 2, "3 runs at a time, 2 threads each: 1.5 times"),
    ],
)
def test_the_trial_decides_with_a_margin(
    cores: int, seconds: dict[int, float], room: int, waiting: int, jobs: int, threads: int, says: str,
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(concurrency, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(concurrency, "_room_for", lambda: room)

    def trial(config: RunConfig, folder: Path, threads: dict[int, int]) -> tuple[dict[int, float], int]:
        assert not seconds or threads.keys() == seconds.keys()
        return seconds, 9

    monkeypatch.setattr(concurrency, "_trial", trial)
    found = choose(0, [tiny_config(steps=100)] * waiting, tmp_path)
    assert (found.jobs, found.threads) == (jobs, threads) and says in found.text()


def test_a_gpu_is_not_shared_unless_asked(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concurrency, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(concurrency, "cpu_count", lambda: 8)
    assert choose(0, [tiny_config()] * 4, tmp_path).jobs == 1
    assert choose(3, [tiny_config()] * 4, tmp_path).jobs == 3


@pytest.mark.parametrize("long", [0.0, 10.0])
def test_a_trial_takes_real_steps_and_leaves_the_threads_as_they_were(
    long: float, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concurrency, "TRIAL_SECONDS", 0.0)
    monkeypatch.setattr(concurrency, "ROUNDS", 1)
    monkeypatch.setattr(concurrency, "LONG_STEP_SECONDS", long)
    monkeypatch.setattr(concurrency, "cpu_count", lambda: 2)
    seconds, steps = concurrency._trial(tiny_config(batch_size=32), tmp_path, {1: 2, 2: 1})
    assert torch.get_num_threads() == 1
    if long:
        assert seconds.keys() == {1, 2} and steps == 2 and all(0 < value < 10 for value in seconds.values())
    else:
        assert (seconds, steps) == ({}, 0)
    assert concurrency._room_for() >= 1


def test_loader_workers_are_shared_among_the_processes(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def start(packing: Any, tasks: Any, number: int, pin_memory: bool) -> Any:
        asked.append(number)
        raise OSError("enough")

    monkeypatch.setattr(workers, "_start", start)
    monkeypatch.setattr(workers, "_sharers", 1)
    source = open_data(tiny_config())[0]

    class Reads:
        def __getitem__(self, task: int) -> str:
            return source.record(task).id

    for processes, number in ((1, 3), (2, 3), (4, 3), (2, 0)):
        workers.share_workers(processes)
        assert len(list(workers.read_ahead(Reads(), [0, 1], number, name="data", say=print))) == 2
    assert asked == [3, 2, 1], "some stay at least one, and none stays none"


def test_the_last_step_of_a_log_is_found_at_its_end(tmp_path: Path) -> None:
    assert last_step(tmp_path) == 0
    rows = [json.dumps({"step": step, "train/loss": 1.0}) for step in range(2000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 99999, "tr')
    assert last_step(tmp_path) == 1999
    assert Concurrency(1, 1, "x").text() == "1 run at a time, 1 thread each: x"
