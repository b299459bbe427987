"""Runs of a comparison side by side, in worker processes that stay from one run to the next.

Every worker has a pipe of its own: tasks and the request to stop go in, warnings, outcomes and errors come out. Its end
tells either side of the other's death, so that nothing waits for a dead worker, and no worker outlives its parent.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context, resource_tracker, set_start_method
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

import torch

from threetowers.data.tokenize import Tokenizer
from threetowers.data.workers import share_workers
from threetowers.errors import DataError, ThreeTowersError, UsageError
from threetowers.progress import Progress, send_warnings, warn, warn_once
from threetowers.run.pixels import Pixels, share_pixels
from threetowers.run.setup import learned_tokenizers
from threetowers.train.guards import StopRequest
from threetowers.train.log import last_step

SPAWN = get_context("spawn")
OUTPUT = "output.log"
"""What a run prints, and the libraries under it, in the run's folder."""
TICK_SECONDS = 0.25  # between looks at signals, the time limit and the runs' logs
END_SECONDS = 60.0  # how long a worker may take for the step, or the evaluation, in which its parent has died


class Stopped(Exception):  # noqa: N818 - a request that was met, not a failure
    """Runs were stopped on request, and are saved."""


@dataclass(frozen=True)
class Outcome:
    """What a task ended with. finished: whether nothing is left of it. stopped: whether a stop was requested
    meanwhile. text: the result, for people."""

    finished: bool
    stopped: bool
    text: str = ""


class Task(Protocol):
    """A run: picklable, with a name for people and the number of its steps. `run` raises ThreeTowersError."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path: ...

    @property
    def steps(self) -> int: ...

    def run(self, stop: StopRequest, /) -> Outcome: ...


T = TypeVar("T", bound=Task)


@dataclass(frozen=True)
class Shared:
    """What every worker is given once, when it starts; picklable.

    jobs: the number of workers. threads: of each. tokenizers: as in `learned_tokenizers`. pixels: memory for decoded
    images, which all use.
    """

    jobs: int
    threads: int
    tokenizers: Mapping[tuple[str, int, int], Tokenizer]
    pixels: Pixels

    def install(self) -> None:
        """Sets up the worker's process."""
        # loader workers start as they do elsewhere, and not as this process did, which takes seconds each time
        set_start_method(None, force=True)
        torch.set_num_threads(self.threads)
        share_workers(self.jobs)
        learned_tokenizers.update(self.tokenizers)
        share_pixels(self.pixels)


def side_by_side(
    waiting: deque[T], shared: Shared, begin: Callable[[T], None], *, num_left: int, max_minutes: float = 0.0
) -> Iterator[T]:
    """Runs the tasks that wait, `shared.jobs` at a time, and yields each that has finished; more may be appended then.

    begin: called when a task is handed out. num_left: of all tasks, with those that will be appended. On SIGINT,
    SIGTERM, SIGUSR1 or after max_minutes every running task saves and stops, and Stopped is raised. When one fails, or
    its process dies, the others do the same, and its error is raised. A script that calls this needs the usual
    `if __name__ == "__main__":`, because the processes import it.
    """
    workers: list[_Worker[T]] = []
    failure: Exception | None = None
    ending, finished_steps = False, 0
    total = sum(task.steps for task in waiting) + (num_left - len(waiting)) * waiting[0].steps
    bar = Progress(
        f"training {num_left} runs", total, "steps", done=sum(last_step(t.folder) for t in waiting)
    )
    try:
        with StopRequest(max_minutes) as stop:
            while True:
                if not ending and (failure is not None or stop.requested):
                    ending = True
                    for worker in workers:
                        worker.send(None)
                while not ending and waiting and (idle := _idle(workers, shared)):
                    task = waiting.popleft()
                    bar.clear()
                    begin(task)
                    idle.task = task
                    idle.send(task)
                busy = [worker for worker in workers if worker.task]
                if not busy:
                    break
                wait([worker.connection for worker in busy], TICK_SECONDS)
                for task, message in chain.from_iterable(worker.received() for worker in busy):
                    bar.clear()
                    if isinstance(message, _Warning):
                        message.say(task.name)
                    elif isinstance(message, Exception):
                        failure = failure or message
                    else:
                        if message.stopped:
                            stop.request()
                        if message.finished:
                            finished_steps += task.steps
                            print(
                                f"{task.name} is done:\n  " + message.text.replace("\n", "\n  "), flush=True
                            )
                            yield task
                running = [worker.task for worker in workers if worker.task]
                # the last step of a run counts when it is evaluated
                bar.update(finished_steps + sum(min(last_step(t.folder), t.steps - 1) for t in running))
    finally:
        bar.clear()
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.end()
    if failure is not None:
        raise failure
    if ending:
        raise Stopped


@dataclass(frozen=True)
class _Warning:
    """A warning on its way from a worker. once: whether it is the same for every run."""

    text: str
    once: bool

    def say(self, name: str) -> None:
        """Shows it; name: of the run that it is about."""
        if self.once:
            warn_once(self.text)
        else:
            warn(f"{name}: {self.text}")


class _Worker(Generic[T]):
    """A worker process, seen from its parent. task: what it runs now."""

    def __init__(self, shared: Shared) -> None:
        self.task: T | None = None
        self.connection, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_work, args=(theirs, shared))
        self._jobs = shared.jobs
        resource_tracker.ensure_running()  # its start would let the signals through again
        # a signal to the whole group waits until the process can handle it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.SIGNALS)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def send(self, task: T | None) -> None:
        """Hands over a task, or with None the request to stop; a dead process is noticed by `received`."""
        with contextlib.suppress(OSError):
            self.connection.send(task)

    def received(self) -> Iterator[tuple[T, _Warning | Outcome | Exception]]:
        """The task and each message about it since the last call; the death of the process comes as an error."""
        alive = self._process.is_alive()
        with contextlib.suppress(EOFError, OSError):
            while self.task is not None and self.connection.poll():
                message = self.connection.recv()
                task = self.task
                if not isinstance(message, _Warning):
                    self.task = None
                yield task, message
            if alive:
                return
        if self.task is not None:
            task, self.task = self.task, None
            yield task, self._death(task)

    def _death(self, task: T) -> DataError:
        self._process.join(END_SECONDS)
        code = self._process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return DataError(
            f"{task.name}: its process {how}; {task.folder / OUTPUT} may say more. If memory is short, give "
            f"fewer --jobs than {self._jobs}; the same command continues"
        )

    def end(self) -> None:
        """Waits for the process, whose connection is closed: it ends when its step is saved, or after END_SECONDS."""
        self._process.join(END_SECONDS)
        self._process.kill()
        self._process.join()


def _idle(workers: list[_Worker[T]], shared: Shared) -> _Worker[T] | None:
    """A worker without a task, started if there may be one more."""
    idle = next((worker for worker in workers if worker.task is None), None)
    if idle is None and len(workers) < shared.jobs:
        idle = _Worker(shared)
        workers.append(idle)
    return idle


def _work(connection: Connection, shared: Shared) -> None:
    """The body of a worker process: tasks until the connection ends."""
    tasks: SimpleQueue[Task | None] = SimpleQueue()
    sending = threading.Lock()

    def send(message: _Warning | Outcome | Exception) -> None:
        with sending, contextlib.suppress(BrokenPipeError):  # the listener ends a process without a parent
            connection.send(message)

    with StopRequest() as stop:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, StopRequest.SIGNALS)
        threading.Thread(target=_listen, args=(connection, tasks, stop), daemon=True).start()
        send_warnings(lambda text, once: send(_Warning(text, once)))
        shared.install()
        for task in iter(tasks.get, None):
            send(_outcome(task, stop, shared.jobs))


def _listen(connection: Connection, tasks: "SimpleQueue[Task | None]", stop: StopRequest) -> None:
    """Passes on what the parent sends. When the parent has closed the connection or died, the process ends soon."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            task = connection.recv()
            if task is None:
                stop.request()
            else:
                tasks.put(task)
    stop.request()
    tasks.put(None)
    time.sleep(END_SECONDS)
    os._exit(1)


def _outcome(task: Task, stop: StopRequest, jobs: int) -> Outcome | Exception:
    """Runs a task; returns what it raises, which the user's own mistakes name by the run."""
    if stop.requested:
        return Outcome(finished=False, stopped=True)
    try:
        task.folder.mkdir(parents=True, exist_ok=True)
        _print_into(task.folder / OUTPUT)
        return task.run(stop)
    except ThreeTowersError as error:
        return type(error)(f"{task.name}: {error}")
    except OSError as error:
        return OSError(error.errno, error.strerror or str(error), error.filename)
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            return UsageError(
                f"{task.name}: there is no memory left; give fewer --jobs than {jobs}, or a smaller "
                "--batch-size for another comparison"
            )
        return RuntimeError(f"{task.name}: {traceback.format_exc()}")  # a mistake of the program


def _print_into(path: Path) -> None:
    """Sends all output of this process, and of those that it starts, to the end of a file."""
    with path.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number in (1, 2):
            os.dup2(file.fileno(), number)
