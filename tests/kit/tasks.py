"""Small tasks for worker processes: they step until they are asked to stop, save, and can fail in several ways."""

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from threetowers.compare.side_by_side import Outcome
from threetowers.data import workers
from threetowers.errors import UsageError
from threetowers.progress import warn, warn_once
from threetowers.train.guards import StopRequest
from threetowers.train.log import last_step

ENDLESS = 2_000
"""More steps than any test waits for."""
CHILD_SECONDS = 30.0


@dataclass(frozen=True)
class Steps:
    """A task of steps of 10 ms.

    does: what happens in its third step, the name of a function below or nothing. beside: the folder of a task that
    must have begun by then.
    """

    name: str
    folder: Path
    steps: int = ENDLESS
    does: str = ""
    beside: Path | None = None

    def run(self, stop: StopRequest) -> Outcome:
        for step in range(1, self.steps + 1):
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step}) + "\n")
            while step == 3 and self.beside and not last_step(self.beside):
                time.sleep(0.01)
            if step == 3 and self.does:
                globals()[self.does]()
            if stop.requested:
                (self.folder / "saved").write_text(str(step))
                return Outcome(finished=False, stopped=True)
            time.sleep(0.01)
        own = {"pid": os.getpid(), "threads": torch.get_num_threads(), "sharers": workers._sharers}
        return Outcome(True, False, json.dumps(own))


def mistake() -> None:
    raise UsageError("lr: it is too high")


def bug() -> None:
    raise ZeroDivisionError("a mistake of the program")


def no_memory() -> None:
    raise MemoryError


def die() -> None:
    """Dies, and leaves a process that holds its end of the pipe open, as loader workers do."""
    if not os.fork():
        time.sleep(CHILD_SECONDS)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def signalled() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def warn_both() -> None:
    warn("the loss is not finite")
    warn_once("shared memory is short")
    print("only for the log")
