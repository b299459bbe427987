"""Tasks of a study side by side, with what is said about them and the time that is left for them."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from threetowers.compare.concurrency import Concurrency, choose
from threetowers.compare.side_by_side import Shared, Task, side_by_side
from threetowers.config import RunConfig
from threetowers.progress import duration
from threetowers.run.pixels import Pixels


class Runner:
    """Runs tasks, as many at a time as a trial finds fastest, until the time is over.

    out: the folder of the runs. max_minutes: after which running tasks save and `Stopped` is raised; 0 sets no limit.
    """

    def __init__(self, out: Path, max_minutes: float) -> None:
        self.out, self.start = out, time.monotonic()
        self._max_minutes = max_minutes
        self._shared: Shared | None = None

    def choose(
        self, jobs: int, trial: RunConfig, num_runs: int, estimate: Callable[[Concurrency], str]
    ) -> None:
        """Finds how many runs train at a time, and says so; jobs 0 tries it with the steps of `trial`.

        estimate: a sentence about how long all runs take. The time of the trial is not part of max_minutes.
        """
        start = time.monotonic()
        found = choose(jobs, [trial] * num_runs, self.out)
        print(found.text(), flush=True)
        print(estimate(found), flush=True)
        self.start += time.monotonic() - start
        self._shared = Shared(found.jobs, found.threads, {}, Pixels())

    def run(self, tasks: Sequence[Task], what: str) -> None:
        """Runs the tasks, and says when each begins. what: a word for them."""
        assert self._shared is not None, "choose comes first"
        numbers = iter(range(1, len(tasks) + 1))

        def begin(task: Task) -> None:
            so_far = duration(time.monotonic() - self.start)
            print(f"[{what} {next(numbers)}/{len(tasks)}] {task.name} ({so_far} so far)", flush=True)

        if tasks:
            for _ in side_by_side(
                deque(tasks), self._shared, begin, num_left=len(tasks), max_minutes=self._minutes_left()
            ):
                pass

    def _minutes_left(self) -> float:
        if not self._max_minutes:
            return 0.0
        return max(self._max_minutes - (time.monotonic() - self.start) / 60, 1e-3)
