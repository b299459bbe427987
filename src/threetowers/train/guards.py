"""Guards of a run: stop requests, one trainer per folder, finite steps, bad samples, and a folder's own settings."""

import contextlib
import fcntl
import json
import math
import os
import platform
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from threetowers.config import RunConfig
from threetowers.errors import BadSample, CheckpointError, DataError
from threetowers.files import HELD
from threetowers.objective.pairs import resolved
from threetowers.paths import under
from threetowers.progress import warn_once
from threetowers.settings import as_plain, read_config
from threetowers.train import checkpoint

MAY_DIFFER = {
    "log_every_steps", "trackers", "keep_checkpoints", "inputs.workers", "checkpoint_every_steps", "background_saves",
    "classes", "inputs.max_bad_share", "inputs.keep_pixels", "shard",
}  # fmt: skip
"""Keys that change neither what is seen nor what is computed, so a run may continue with others."""
_OF_VALIDATION = {"eval_every_steps", "suite", "suite_images"}
"""Keys that may differ too where no `keep_best` chooses among the validations."""


class StopRequest:
    """Turns SIGINT, SIGTERM, SIGUSR1 and a time limit into a flag while the block lasts; the second SIGINT interrupts.

    minutes: how long until a stop is requested; 0 is never.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, minutes: float = 0.0) -> None:
        self._deadline = time.monotonic() + 60 * minutes if minutes else math.inf
        self._signalled = False
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self._signalled or time.monotonic() >= self._deadline

    def request(self) -> None:
        """Requests a stop from within the program; it does not count as a first SIGINT."""
        self._deadline = -math.inf

    def __enter__(self) -> "StopRequest":
        with contextlib.suppress(ValueError):  # not the main thread: whoever runs it there has the signals
            self._before = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Keeps a second trainer out of a run folder, as long as this process lives.

    Where the file system has no locks, it only says so. Raises CheckpointError that names the process which has it.
    """
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by loader workers
        except OSError as error:
            if error.errno in HELD:
                file.seek(0)
                raise CheckpointError(
                    f"{folder}: process {file.read().strip() or 'of another machine'} is training in this folder. "
                    "Wait for it, stop it, or give another --out"
                ) from None
            warn_once(
                f"{folder}: this file system has no locks ({error.strerror}), so nothing keeps a second run out of the "
                "folder; start none there"
            )
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield


class FiniteGuard:
    """Keeps steps whose loss or gradient is not finite from the weights, without waiting for the device.

    The optimiser skips a step by itself where `found_inf` is 1; which were skipped is read when it suits.
    """

    def __init__(self, in_row: int = 0) -> None:
        self._flags: list[Tensor] = []
        self._steps: list[tuple[int, Tensor]] = []
        self.in_row = in_row
        """Steps skipped in a row, up to the last that was read."""

    def watch(self, step: int, samples: Tensor, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 when the step must be skipped, else 0.0, on the device. samples: int64 [B], the batch's."""
        flag = (~(torch.isfinite(loss) & torch.isfinite(norm))).float()
        self._flags.append(flag)
        self._steps.append((step, samples))
        return flag

    def skipped(self) -> Iterator[tuple[int, Tensor]]:
        """Step and samples of each step skipped since the last call, `in_row` as of it; waits for the device."""
        flags = torch.stack(self._flags).tolist() if self._flags else []
        steps, self._flags, self._steps = self._steps, [], []
        for flag, (step, samples) in zip(flags, steps, strict=True):
            self.in_row = self.in_row + 1 if flag else 0
            if flag:
                yield step, samples


class BadSamples:
    """Counts unusable samples by reason, names each once in bad_samples.jsonl, and stops above a share.

    num_samples: of the training data; its share is known after one pass, and guessed before that. writes: whether this
    process names them in the file.
    """

    MIN_SEEN = 1_000  # below this many samples a guess says little

    def __init__(self, folder: Path, max_share: float, num_samples: int, writes: bool = True) -> None:
        self._path, self._writes = folder / "bad_samples.jsonl", writes
        self._max_share, self._num_samples = max_share, num_samples
        self._unusable: set[str] = set()
        self._named: set[tuple[str, str]] = set()
        self._reasons: Counter[str] = Counter()
        self._seen = self._met = 0
        if self._path.is_file():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    self._named.add((row["id"], row["reason"]))
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue  # a line torn by a kill; the sample is named again when it is met

    def add(self, problems: Iterable[BadSample], seen: int = 0) -> None:
        """Takes note of problems among `seen` samples read; raises DataError above the allowed share."""
        self._seen += seen
        for problem in problems:
            if seen:
                self._met += 1
                self._unusable.add(problem.id)
            self._reasons[problem.reason] += 1
            if self._writes and (problem.id, problem.reason) not in self._named:
                self._named.add((problem.id, problem.reason))
                with self._path.open("a", encoding="utf-8") as file:
                    row = {"id": problem.id, "reason": problem.reason, "detail": problem.detail}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        bad, total = self._share()
        if bad > self._max_share * total:
            examples = ", ".join(sorted(self._unusable)[:3])
            raise DataError(
                f"{bad} of {total} samples could not be used, for example {examples}; inputs.max_bad_share = "
                f"{self._max_share:g} allows fewer. {self._path} names them and says why; mend them or leave them out"
            )

    def _share(self) -> tuple[int, int]:
        """How many samples of how many cannot be used; 0 of 0 as long as too few have been seen."""
        if self._seen >= self._num_samples:
            return len(self._unusable), self._num_samples
        return (self._met, self._seen) if self._seen >= self.MIN_SEEN else (0, 0)

    def state(self) -> dict[str, Any]:
        """The counters, for a checkpoint."""
        unusable = sorted(self._unusable)
        return {"seen": self._seen, "met": self._met, "reasons": dict(self._reasons), "unusable": unusable}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on counting from a checkpoint's counters."""
        self._seen, self._met = int(state["seen"]), int(state["met"])
        self._reasons, self._unusable = Counter(state["reasons"]), set(state["unusable"])

    def counts(self) -> dict[str, int]:
        return {f"data/bad/{reason}": count for reason, count in sorted(self._reasons.items())}


def holds_run(folder: Path, config: RunConfig) -> bool:
    """Whether the folder holds a run of this configuration, finished or not.

    A first try that failed before its first checkpoint is none. Raises CheckpointError for a run with other settings.
    """
    path = folder / "config.toml"
    claimed = (folder / "model.json").is_file() or bool(checkpoint.checkpoints(folder / "checkpoints"))
    if not (path.is_file() and claimed):
        return False
    differing = differing_keys(path, config)
    if differing:
        raise CheckpointError(
            f"{folder} holds a run with other settings ({', '.join(differing)}). Give another --out, "
            "or --fresh to replace it"
        )
    return True


def differing_keys(path: Path, config: RunConfig, *, all_keys: bool = False) -> list[str]:
    """The keys, as `key: there → here`, in which a run folder's config.toml and a configuration differ.

    all_keys: also those that may differ in a run that continues.
    """
    before, config = resolved(read_config(path)), resolved(config)
    there, here = (_flat(under(as_plain(each), Path.cwd())) for each in (before, config))
    chooses = before.keep_best is not None or config.keep_best is not None
    may_differ = MAY_DIFFER if chooses else MAY_DIFFER | _OF_VALIDATION
    return [
        f"{key}: {there.get(key)!r} → {here.get(key)!r}"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and (all_keys or key not in may_differ)
    ]


def _flat(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
    return flat
