"""Checkpoints saved in a thread or in the loop. A failure is reported; several in a row end the run."""

import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn

from threetowers.errors import CheckpointError
from threetowers.processes import ALONE, Processes
from threetowers.train import checkpoint
from threetowers.train.log import RunLog

MAX_FAILED = 3  # saves in a row that may fail before the run ends


class Saver:
    """Writes a run's checkpoints under `root`.

    background: copy the tensors to host memory and write in a thread, one save at a time. environment: what the
    arithmetic depends on, for the manifest. writers: the processes that each write their part of a model that is cut
    up over them; they make every call together, and write in the loop.
    """

    def __init__(
        self,
        root: Path,
        keep: int,
        log: RunLog,
        environment: dict[str, Any],
        *,
        background: bool,
        writers: Processes = ALONE,
    ) -> None:
        background &= writers.size == 1
        self._root, self._keep, self._log, self._environment = root, keep, log, environment
        self._background, self._writers = background, writers
        self._own: checkpoint.Snapshot | None = {} if background else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._step = self._failed = 0

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        *,
        best: int | None = None,
        final: bool = False,
    ) -> None:
        """Saves a step; best: a step whose checkpoint is kept besides. final: wait, and let no failure pass.

        Raises CheckpointError when a final save fails, or several in a row have failed.
        """
        self.wait()
        metadata: dict[str, str] = {}
        if self._writers.size > 1:
            tensors, metadata = checkpoint.own_snapshot(model, optimizer, self._writers.rank)
        else:
            tensors = checkpoint.snapshot(model, optimizer, self._own)
        self._step = step
        self._thread = threading.Thread(target=self._write, args=(step, tensors, state, best, metadata))
        self._thread.start()
        if final or not self._background:
            self.wait(final=final)

    def _write(
        self,
        step: int,
        tensors: checkpoint.Snapshot,
        state: dict[str, Any],
        best: int | None,
        metadata: dict[str, str],
    ) -> None:
        try:
            checkpoint.save(
                self._root, step, tensors, state, self._environment, self._keep, best,
                writers=self._writers, metadata=metadata,
            )  # fmt: skip
        except BaseException as error:  # raised by `wait`, in the thread of the loop
            self._error = error

    def wait(self, *, final: bool = False) -> None:
        """Returns when nothing is being written; raises as `save` does."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error is None:
            self._failed = 0
            return
        error, self._error = self._error, None
        if not isinstance(error, OSError):
            raise error
        self._failed += 1
        reason = f"{error.strerror or error} ({error.filename or self._root})"
        there = checkpoint.checkpoints(self._root)
        last = f"the last one is {there[0].name}" if there else "there is none yet"
        if final or self._failed >= MAX_FAILED:
            raise CheckpointError(
                f"{self._root}: the checkpoint of step {self._step} could not be saved: {reason}; {last}. Free the "
                "disk and give the same command again"
            )
        self._log.warn(
            f"the checkpoint of step {self._step} could not be saved: {reason}; {last}. Training goes on"
        )
