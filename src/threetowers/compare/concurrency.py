"""How many runs of a comparison train at a time: as asked for, as recorded, or as a short trial finds fastest.

Small models gain little from a second thread, so that several runs with one thread each end sooner than one after the
other with all. Large models use all threads well. The last bits of a run depend on its number of threads.
"""

import json
import math
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from joblib import cpu_count

from threetowers.config import RunConfig
from threetowers.errors import UsageError
from threetowers.files import write_whole
from threetowers.run.allocator import return_freed_memory
from threetowers.run.setup import pick_device, prepare
from threetowers.system import free_memory
from threetowers.train.step import TrainingStep

FILE = "concurrency.json"
GAIN = 1.15
"""What runs side by side must gain in the trial, in which no other run competes for the caches."""
START_SECONDS = 10.0
"""What the start of the processes takes, and what they must therefore save."""
TRIAL_SECONDS = 3.0
LONG_STEP_SECONDS = 1.0
"""A longer step is not tried: it is work enough for all threads."""
FEW = 16  # samples that tell whether a step is long
FEW_STEPS = 4
ROUNDS = 2  # at least


@dataclass(frozen=True)
class Concurrency:
    """jobs: runs that train at a time. threads: of each. why: for people.

    step_seconds: from one step to the next over all of them, as the trial found it; None without a trial.
    """

    jobs: int
    threads: int
    why: str
    step_seconds: float | None = None

    def text(self) -> str:
        """The choice and its reason in one line."""
        return f"{_count(self.jobs, 'run')} at a time, {_count(self.threads, 'thread')} each: {self.why}"


def choose(asked: int, waiting: Sequence[RunConfig], folder: Path) -> Concurrency:
    """The concurrency of the runs that wait, and records it in the comparison's folder.

    asked: runs at a time; 0 takes what is recorded there, else what a trial of the first run's model finds fastest.
    Raises UsageError for a negative number, and what making the model raises.
    """
    if asked < 0:
        raise UsageError(
            f"--jobs: {asked} is out of range; it must be 1 or more, or 0 to find out what is fastest"
        )
    path = folder / FILE
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if recorded and asked in (0, recorded["jobs"]):
        recorded |= {"why": "as this comparison began"}
        return Concurrency(**recorded)
    if not waiting:
        return Concurrency(1, torch.get_num_threads(), "all runs are there")
    found = _concurrency(asked, "as --jobs says") if asked else _fastest(waiting, folder)
    write_whole(path, json.dumps(asdict(found), indent=1))
    return found


def _concurrency(jobs: int, why: str) -> Concurrency:
    """So many runs at a time, each with its share of the cores, or with all of torch's threads when it is alone."""
    most = torch.get_num_threads()
    return Concurrency(jobs, most if jobs == 1 else min(most, max(1, cpu_count() // jobs)), why)


def _fastest(waiting: Sequence[RunConfig], folder: Path) -> Concurrency:
    cores = cpu_count()
    numbers = {min(number, len(waiting)) for number in (cores, cores // 2 if cores >= 4 else 1)} - {1}
    if pick_device(waiting[0].device).type == "cuda":
        return _concurrency(1, "they share one GPU")
    if not numbers:
        return _concurrency(1, "there is one core" if cores == 1 else "one run is left")
    each = {jobs: _concurrency(jobs, "").threads for jobs in (1, *sorted(numbers))}
    seconds, num_steps = _trial(waiting[0], folder, each)
    if not seconds:
        return _concurrency(1, "a step is long enough for all threads")
    found = _by_times(seconds, num_steps, numbers, waiting)
    return replace(found, step_seconds=seconds.get(found.jobs, seconds[1]))


def _by_times(
    seconds: dict[int, float], num_steps: int, numbers: set[int], waiting: Sequence[RunConfig]
) -> Concurrency:
    best = min(numbers, key=lambda jobs: seconds[jobs])
    gain = f"{seconds[1] / seconds[best]:.1f} times as fast by a trial of {num_steps} steps"
    saved = (seconds[1] - seconds[best]) * sum(config.steps for config in waiting)
    fits = max(1, _room_for())
    if seconds[1] < GAIN * seconds[best]:
        return _concurrency(1, f"{best} at a time would be {gain}")
    if saved < START_SECONDS:
        return _concurrency(1, f"{best} at a time would be {gain}, which is less than their start takes")
    if fits < best:
        return _concurrency(fits, f"{best} would be {gain}, but memory is short")
    return _concurrency(best, gain)


def _trial(config: RunConfig, folder: Path, threads: dict[int, int]) -> tuple[dict[int, float], int]:
    """Seconds of this machine for a step, by the number of runs at a time, and the number of steps that were tried.

    threads: of each run, by the number of runs. No times are returned when a step is too long to be tried.
    """
    setup = prepare(config, folder / "runs" / "trial")
    reader, size = setup.reader(), config.batch_size
    few = reader[range(min(FEW, size))]
    take_step = TrainingStep(config, setup.model, setup.device, setup.thirds.features)
    own = torch.get_num_threads()
    lr = config.optim.lr
    shortest = math.inf
    for _ in range(FEW_STEPS):  # the first is slower, and so is any that another process disturbs
        start = time.perf_counter()
        take_step(few, lr)
        shortest = min(shortest, time.perf_counter() - start)
    if shortest * size / len(few.index) > LONG_STEP_SECONDS:
        return {}, 0
    start = time.perf_counter()
    batch = reader[range(size)]
    read = time.perf_counter() - start
    times: dict[int, list[float]] = {jobs: [] for jobs in threads}
    try:
        begun = time.perf_counter()
        while len(times[1]) < 1 + ROUNDS or time.perf_counter() - begun < TRIAL_SECONDS:
            for jobs, number in threads.items():
                torch.set_num_threads(number)
                start = time.perf_counter()
                take_step(batch, lr)
                times[jobs].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(own)
        return_freed_memory()
    workers = config.inputs.workers
    # loader workers take their time from the same cores, however many runs there are
    seconds = {
        jobs: statistics.median(each[1:]) / jobs + read / (cpu_count() if workers else jobs)
        for jobs, each in times.items()
    }
    return seconds, sum(len(each) - 1 for each in times.values())


def _room_for() -> int:
    """How many processes with the memory that this one has had at most fit into what is free."""
    free = free_memory()
    if free is None:
        return int(cpu_count())
    return int(free // (1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
