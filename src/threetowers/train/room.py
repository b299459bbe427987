"""What a run writes, and whether the disk can take it."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from threetowers.errors import CheckpointError
from threetowers.files import nearest_folder
from threetowers.run.setup import Setup


@dataclass(frozen=True)
class Room:
    """Bytes of one checkpoint, of the finished model and of the stored embeddings of all data."""

    checkpoint: int
    model: int
    stores: int


def room(setup: Setup) -> Room:
    """What a run of this configuration writes."""
    model = num_bytes(setup.model.state_dict())
    num_images = len(setup.train) + len(setup.val) + len(setup.test)
    stores = 0
    if not setup.thirds.live:
        stores = sum(2 * num_images * setup.thirds.towers[view].width for view in setup.thirds.used)
    return Room(model + 2 * trained_bytes(setup), model, stores)


def trained_bytes(setup: Setup) -> int:
    """Bytes of the parameters that train."""
    return sum(parameter.nbytes for parameter in setup.model.parameters() if parameter.requires_grad)


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def amount(size: float) -> str:
    """Bytes for people: 7.2 kB, 12.3 MB, 4.56 GB."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def check_room(folder: Path, needed: int) -> int:
    """The bytes that are free where the run will be; raises CheckpointError when they are fewer than `needed`."""
    there = nearest_folder(folder)
    free = shutil.disk_usage(there).free
    if needed > free:
        raise CheckpointError(
            f"{there}: the run needs {amount(needed)}, and {amount(free)} are free; make room, lower "
            "keep_checkpoints, or give --out and --embeddings on another disk"
        )
    return free
