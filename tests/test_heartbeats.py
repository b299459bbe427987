"""A process that is stopped, that hangs or that is slow is named to the user; one that works is not."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from kit.processes import Processes as Group
from kit.processes import processes as group_of
from kit.runs import Config, assert_same_weights
from kit.started import LINUX, TORCHRUN, Started, command
from threetowers import heartbeats
from threetowers.heartbeats import EVERY, LATE, PATIENT, Beat, Place, Watch
from threetowers.processes import Processes

AT_WORK = Beat(0, "node-a", 100, step=7, phase="forward", place=(21, 3), inside=False, still=0.0)
WAITS = replace(AT_WORK, phase="optimiser", place=(22, 0), inside=True)


class World:
    """Processes of a run whose heartbeats a watch hears, on a clock of the test's."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self.watch, self.now, self.size = Watch(rank), 1000.0, size
        self.beats = {rank: replace(AT_WORK, pid=100 + rank) for rank in range(size)}
        self.silent: set[int] = set()

    def passes(self, seconds: float) -> list[str]:
        """Lines that are said while all but the silent processes go on telling the same place."""
        lines = []
        for _ in range(round(seconds / EVERY)):
            self.now += EVERY
            self.watch.woke(self.now)
            for rank, beat in self.beats.items():
                if rank not in self.silent:
                    beat = replace(beat, count=beat.count + 1, still=beat.still + EVERY)
                    self.beats[rank] = beat
                self.watch.hear(rank, beat, self.now)
            lines += self.watch.look(self.now)
        return lines

    def at(self, rank: int, beat: Beat) -> None:
        """The process reaches a place."""
        known = self.beats[rank]
        self.beats[rank] = replace(beat, count=known.count, pid=known.pid)


def test_one_without_a_heartbeat_is_named_once_and_when_it_is_back() -> None:
    world = World(3)
    assert not world.passes(600)
    world.silent = {2}
    (line,) = world.passes(30 - EVERY)
    assert "rank 2 (process 102 on node-a) has given no sign of life for 2" in line
    assert "in the phase 'forward' after step 7" in line and "kill -CONT 102" in line
    assert not world.passes(600)
    for rank in (0, 1):
        world.at(rank, WAITS)
    world.passes(60)
    world.silent = set()
    (line,) = world.passes(LATE - EVERY)
    assert re.fullmatch("rank 2 gives signs of life again, after 1[01] min .. s", line)
    (line,) = world.passes(2 * LATE)
    assert "the others have waited" in line and "for rank 2" in line, "it is alive, and has not gone on"


def test_the_one_that_others_wait_for_is_named_with_what_it_does() -> None:
    world = World(3)
    for rank in (0, 2):
        world.at(rank, WAITS)
    world.at(1, replace(AT_WORK, phase="data"))
    assert not world.passes(LATE - EVERY)
    (line,) = world.passes(30 - LATE)
    assert "the others have waited 21 s for rank 1 (process 101 on node-a)" in line
    assert "reading its batch after step 7 for 21 s" in line and "file system that its data lies on" in line
    assert "py-spy dump --pid 101" in line
    assert not world.passes(600)
    for rank in range(3):
        world.at(rank, replace(AT_WORK, place=(22, 1)))
    (line,) = world.passes(EVERY)
    assert re.fullmatch("rank 1 goes on, after 10 min .. s", line)


@pytest.mark.parametrize("phase", ["validation", "starting"])
def test_what_rank_0_does_for_all_may_take_longer(phase: str) -> None:
    world = World(2)
    world.at(0, replace(AT_WORK, phase=phase))
    world.at(1, WAITS)
    assert not world.passes(PATIENT - EVERY)
    (line,) = world.passes(3 * EVERY)
    assert "rank 0" in line and "That may be normal" in line


def test_long_steps_that_are_alike_are_normal() -> None:
    """Nobody waits for anybody, though nobody gets on; nor while all are in the same collective."""
    world = World(4)
    assert not world.passes(3600)
    for rank in range(4):
        world.at(rank, WAITS)
    assert not world.passes(3600)


def test_few_lines_where_many_hang_and_none_of_those_that_have_ended() -> None:
    world = World(12)
    world.at(0, WAITS)
    world.at(1, replace(AT_WORK, ended=True))
    world.silent = {1}
    lines = world.passes(60)
    assert len(lines) == heartbeats.MOST_LINES + 1 and lines[-1] == "and 6 more: ranks 6, 7, 8, 9, 10, 11"


def test_one_that_was_stopped_itself_does_not_blame_the_others() -> None:
    world = World(2)
    world.passes(30)
    world.now += 3600
    world.silent = {1}  # it wakes a little later
    assert not world.passes(LATE - EVERY)
    world.silent = set()
    assert not world.passes(60)


def steps(world: World, seconds: list[float], whole: float, num: int) -> list[str]:
    """Lines after so many steps, in which each process had its own part and all took equally long."""
    lines = []
    for _ in range(num):
        for rank, own in enumerate(seconds):
            beat = world.beats[rank]
            world.beats[rank] = replace(
                beat,
                steps=beat.steps + 10,
                own_seconds=beat.own_seconds + 10 * own,
                seconds=beat.seconds + 10 * whole,
            )
        lines += world.passes(EVERY)
    return lines


def test_one_that_is_slow_for_long_is_named_once() -> None:
    world = World(4)
    assert not steps(world, [0.5, 0.5, 0.5, 0.9], 1.0, 9)
    (line,) = steps(world, [0.5, 0.5, 0.5, 0.9], 1.0, 100)
    assert line.startswith(
        "rank 3 (process 103 on node-a) takes 0.9 s for its part of a step, where 0.5 s are usual"
    )
    world = World(2)
    steps(world, [0.5, 0.5], 1.0, 20)
    assert not steps(world, [0.5, 25.0], 25.0, 1) and not steps(world, [0.5, 0.5], 1.0, 40), "one long step"
    assert not steps(World(4), [0.5, 0.6, 0.5, 0.74], 1.0, 40), "differences are normal"
    assert not steps(World(2), [0.001, 0.003], 1.0, 40), "what is small beside the step does not matter"


@given(st.lists(st.floats(0.001, 10), min_size=2, max_size=6), st.floats(0, 10))
def test_at_most_those_above_the_median_are_slow(seconds: list[float], more: float) -> None:
    """And none of processes that are alike."""
    lines = steps(World(len(seconds)), seconds, max(seconds) + more, 20)
    assert len(lines) <= len(seconds) / 2
    assert not steps(World(4), [seconds[0]] * 4, seconds[0] + more, 20)


def test_the_own_part_of_a_step_is_what_is_not_spent_in_collectives() -> None:
    clock = iter([0.0, 10.0, 13.0, 14.0, 18.0, 19.0, 100.0, 104.0])
    with mock.patch.object(time, "monotonic", lambda: next(clock)):
        place = Place()  # 0
        with place.named("data"):  # 10
            pass
        with place.named("forward"):  # 13
            assert place.phase == "forward" and (place.collectives, place.phases) == (0, 2)
        with place.collective():  # 14 to 18
            assert place.inside and (place.collectives, place.phases) == (1, 0)
        place.step_done(5)  # 19
        with place.named("validation"):  # 100
            pass
        place.step_done(6)  # 104
    assert (place.step, place.steps, place.seconds, place.own_seconds) == (6, 2, 13.0, 9.0)


def hung(seconds: float) -> list[str]:
    """What a process says while rank 1 is long in a phase, and the others wait for it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    lines: list[str] = []
    store = dist.distributed_c10d._get_default_store()
    with (
        mock.patch.multiple(heartbeats, EVERY=0.1, LATE=1.0, say=lines.append),
        heartbeats.told(store, rank, size),
    ):
        with heartbeats.PLACE.named("data"):
            time.sleep(seconds * (rank == 1))
        Processes(rank, size).add(torch.ones(1))
        time.sleep(1.0)  # until it is seen
        Processes(rank, size).add(torch.ones(1))
    return lines


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with group_of(2, tmp_path_factory.mktemp("group")) as started:
        yield started


def test_a_process_names_another_over_the_store(group: Group) -> None:
    first, second = group.run(hung, 4.0)
    late = [line for line in first if "for rank 1" in line]
    assert late and "reading its batch" in late[0], first
    assert "goes on" in "".join(first) and not [line for line in second if "for rank 1" in line]


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 0])
def test_a_stopped_process_is_named_within_30_seconds_and_the_run_goes_on(
    rank: int, tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(steps=600, log_every_steps=1, method="baseline")
    whole = Started(config, tmp_path / "whole")
    assert whole.end()[0] == 0
    assert "rank" not in whole.said, "nothing is said of a run that works"
    run = Started(config, tmp_path / "run")
    run.wait_for(3)
    stopped, start = run.rank(rank), time.monotonic()
    os.kill(stopped, signal.SIGSTOP)
    try:
        line = run.wait_for_line("no sign of life")
        assert time.monotonic() - start < 30
        assert f"rank {rank} (process {stopped} on " in line
    finally:
        os.kill(stopped, signal.SIGCONT)
    run.wait_for_line(f"rank {rank} gives signs of life again")
    code, said = run.end()
    assert code == 0 and said.count("rank ") == 2, said
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


SLEEPS = """
import sys, time
from threetowers.cli import main
from threetowers.processes import named_by_environment
from threetowers.train import loop
real = loop.batches
def batches(*arguments, **options):
    for number, batch in enumerate(real(*arguments, **options)):
        if number == 2 and named_by_environment().rank == 1:
            time.sleep(35)
        yield batch
loop.batches = batches
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_loader_that_hangs_is_named(tiny_config: Config, tmp_path: Path) -> None:
    words = command(tiny_config(steps=300, method="baseline"), tmp_path / "run")
    script = tmp_path / "sleeps.py"
    script.write_text(SLEEPS)
    words = [*TORCHRUN, str(script), *words[words.index("train") :]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"the others have waited 2\d s for rank 1 .* reading its batch after step 2", done.stderr
    )
    assert "rank 1 goes on" in done.stderr
