"""What must hold of the processes that train one model: equal shares of the batch, equal data, and equal weights."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from threetowers.config import RunConfig
from threetowers.data.kept import new_memory
from threetowers.data.workers import share_workers
from threetowers.errors import CheckpointError, UsageError
from threetowers.processes import Processes
from threetowers.progress import be_quiet, say, send_warnings
from threetowers.run.pixels import Pixels, share_pixels
from threetowers.run.setup import Setup
from threetowers.settings import config_hash
from threetowers.train.checkpoint import Restored


def check_divisible(config: RunConfig, processes: int) -> None:
    """Raises UsageError for a batch that cannot be cut into equal shares, which the whole batch's loss needs."""
    size = config.batch_size
    if processes < 1:
        raise UsageError(f"processes: {processes} is out of range; it must be 1 or more")
    if size % processes:
        near = sorted({size // processes * processes, (size // processes + 1) * processes} - {0})
        raise UsageError(
            f"batch_size: {size} samples cannot be shared equally by {processes} processes; give "
            + " or ".join(f"--batch-size {each}" for each in near)
        )


def check_shares(setup: Setup, processes: Processes) -> None:
    """Raises UsageError for a run whose result would depend on the number of processes."""
    if processes.size == 1:
        return
    check_divisible(setup.config, processes.size)
    setup.model.train()
    if any(isinstance(module, _BatchNorm) and module.training for module in setup.model.modules()):
        raise UsageError(
            "a trained tower has BatchNorm that follows each batch, and each process would see the statistics of its "
            "own share; give --start.batchnorm frozen, another tower, or one process"
        )


def share_machine(processes: Processes) -> None:
    """Gives this process its share of loader workers and of the memory for decoded images.

    All but the first show neither progress nor warnings, which would be those of the first, until `speak_of_own`.
    """
    if not processes.first:
        be_quiet()
        send_warnings(lambda text, again: None)
    if processes.local_size > 1:
        share_workers(processes.local_size)
        share_pixels(Pixels(new_memory(processes.local_size)))


def speak_of_own(processes: Processes) -> None:
    """From now on the warnings of this process are its own, and say so."""
    if not processes.first:
        send_warnings(lambda text, again: say(f"rank {processes.rank}: {text}"))


def check_equal(processes: Processes, setup: Setup, found: Restored | None) -> None:
    """Raises CheckpointError, in every process, where one starts with other settings, data or weights than rank 0.

    found: the verified checkpoint that the run continues from. The weights are those that the model was built with,
    before it is cut up.
    """
    if processes.size == 1:
        return
    own = {
        "checkpoint": None if found is None else [found.step, found.digest],
        "settings": config_hash(setup.config),
        "training data": setup.train.fingerprint,
        "torch": torch.__version__,
        "weights": _digest(setup.model.state_dict()),
    }
    first, *others = processes.exchange(own)
    for rank, other in enumerate(others, start=1):
        differing = [key for key in own if other[key] != first[key]]
        if differing:
            raise CheckpointError(
                f"rank {rank} starts with other {', '.join(differing)} than rank 0. All processes need the same "
                "command, data and package versions, and a run folder that all of them see"
            )


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> Any:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
