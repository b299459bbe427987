"""Starts the processes of a training run on this machine, by torchrun's launcher, and says what became of them."""

import dataclasses
import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from threetowers.errors import STOPPED, LostProcessError

SAVE_SECONDS = 600
"""How long the processes have for the last checkpoint after a signal; then they are killed."""


def launch(processes: int, words: Sequence[str]) -> int:
    """Runs a command of this package in so many processes; returns the exit code of the run.

    A signal is passed on to all of them. Raises LostProcessError, which names the rank, when one has died.
    """
    threads = max((os.cpu_count() or 1) // processes, 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    logging.disable(logging.CRITICAL)  # what went wrong is said here, in one line
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "min_nodes": 1, "max_nodes": 1, "nproc_per_node": processes, "run_id": str(uuid.uuid4()), "max_restarts": 0,
            "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost",
            "logs_specs": DefaultLogsSpecs(folder),
        }  # fmt: skip
        if "shutdown_timeout" in {field.name for field in dataclasses.fields(LaunchConfig)}:
            settings["shutdown_timeout"] = SAVE_SECONDS
        start = elastic_launch(LaunchConfig(**settings), sys.executable)
        try:
            start("-m", "threetowers", *words)
        except SignalException:
            return STOPPED
        except ChildFailedError as error:
            return _exit_code(error.failures)
    return 0


def _exit_code(failures: Mapping[int, ProcessFailure]) -> int:
    """The exit code of a run whose processes ended so; raises LostProcessError where a signal ended one."""
    signals = {rank: each.signal_name() for rank, each in failures.items() if each.exitcode < 0}
    # the launcher itself sends SIGTERM to those that are left
    for rank in sorted(signals, key=lambda rank: signals[rank] == "SIGTERM"):
        memory = " (usually memory was short)" if signals[rank] == "SIGKILL" else ""
        raise LostProcessError(
            f"rank {rank} (process {failures[rank].pid}) was ended by {signals[rank]}{memory}, and the others with it. "
            "The same command continues from the last checkpoint"
        )
    return max(failure.exitcode for failure in failures.values())
