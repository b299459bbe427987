"""Runs the command line and injects one fault into its N-th save, at a chosen point of it.

    python -m kit.faults POINT KIND N train run.toml --out r

POINT: where, out of POINTS. KIND: kill (SIGKILL, as from outside), full (ENOSPC), error (EIO), short (a file that ends
early and says nothing). The product has no switches for this; its own functions are wrapped here.
"""

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from threetowers.files import sync_to_disk
from threetowers.train import checkpoint
from threetowers.train.tensor_file import write_tensors

POINTS = (
    "model.safetensors",
    "optim.safetensors",
    "state.json",
    "MANIFEST.json",
    "sync file",
    "sync folder",
    "rename",
    "sync parent",
    "remove old",
)
KINDS = ("kill", "full", "error", "short")


class Fault:
    """Strikes once, in the N-th save, when the point comes by."""

    def __init__(self, point: str, kind: str, number: int) -> None:
        self.point, self.kind, self.number = point, kind, number
        self.saves = 0
        self.struck = False

    def at(self, point: str, path: Any, do: Callable[[], Any]) -> Any:
        """Does what was asked for, or what the fault makes of it."""
        if point != self.point or self.saves != self.number or self.struck:
            return do()
        self.struck = True
        print(f"fault: {self.kind} at {point}", flush=True)
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "short":
            result = do()
            if Path(path).is_file():
                os.truncate(path, Path(path).stat().st_size // 2)
            return result
        code = errno.ENOSPC if self.kind == "full" else errno.EIO
        raise OSError(code, os.strerror(code), str(path))


def install(fault: Fault) -> None:
    """Wraps what a save calls."""
    save, tensors_to, sync = checkpoint.save, write_tensors, sync_to_disk
    write, rename, remove = Path.write_bytes, os.rename, shutil.rmtree

    def counted(*arguments: Any, **options: Any) -> Any:
        fault.saves += 1
        return save(*arguments, **options)

    def saved(path: Path, tensors: Any, metadata: Any) -> Any:
        return fault.at(path.name, path, lambda: tensors_to(path, tensors, metadata))

    def written(path: Path, content: bytes) -> int:
        return fault.at(path.name, path, lambda: write(path, content))  # type: ignore[no-any-return]

    def synced(path: Path) -> None:
        kind = "file" if path.is_file() else "parent" if path.name == "checkpoints" else "folder"
        fault.at(f"sync {kind}", path, lambda: sync(path))

    def removed(path: Path, *arguments: Any, **options: Any) -> None:
        point = "remove old" if path.name.startswith("step-") else ""
        fault.at(point, path, lambda: remove(path, *arguments, **options))

    def renamed(old: Path, new: Path) -> None:
        fault.at("rename", old, lambda: rename(old, new))

    for owner, name, wrapped in (
        (checkpoint, "save", counted),
        (checkpoint, "write_tensors", saved),
        (checkpoint, "sync_to_disk", synced),
        (Path, "write_bytes", written),
        (os, "rename", renamed),
        (shutil, "rmtree", removed),
    ):
        setattr(owner, name, wrapped)


if __name__ == "__main__":
    point, kind, number, *words = sys.argv[1:]
    install(Fault(point, kind, int(number)))
    sys.argv[1:] = words
    from threetowers.cli import main

    main()
