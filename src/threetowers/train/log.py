"""What a run writes about itself: metrics.jsonl for programs, events.log for people."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from threetowers.files import write_whole
from threetowers.model import ThreeTowers
from threetowers.objective.pairs import Objective
from threetowers.processes import Processes
from threetowers.progress import warn
from threetowers.train.step import StepResult
from threetowers.train.trackers import Trackers

TAIL = 16_384
"""Bytes that hold the last rows of metrics.jsonl."""


class RunLog:
    """Appends to a run folder's metrics.jsonl and events.log.

    trackers: what gets the metrics besides. writes: whether this process does; of several that train together one
    writes, and the others say nothing but what concerns them alone.
    """

    def __init__(self, folder: Path, trackers: Trackers | None = None, *, writes: bool = True) -> None:
        self._trackers = trackers
        self._metrics = folder / "metrics.jsonl"
        self._events = folder / "events.log"
        self._writes = writes

    def rewind(self, step: int) -> None:
        """Drops the metrics of steps after `step`, and a line torn by a kill, so that a continued run repeats none."""
        if not (self._writes and self._metrics.is_file()):
            return
        kept = [
            line for line in self._metrics.read_text(encoding="utf-8").splitlines() if _step(line) <= step
        ]
        write_whole(self._metrics, "".join(f"{line}\n" for line in kept))

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """One row: the step and the values by metric path."""
        if not self._writes:
            return
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._trackers:
            self._trackers.log(step, values)

    def close(self) -> None:
        """Closes the trackers."""
        if self._trackers:
            self._trackers.close()

    def event(self, text: str) -> None:
        """One line with the time; also shown on the terminal by whoever calls, never here."""
        if not self._writes:
            return
        with self._events.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def warn(self, text: str) -> None:
        """An event that the user should see at once."""
        if self._writes:
            self.event(text)
            warn(text)

    def warn_of_own(self, text: str) -> None:
        """As `warn`, of something that the other processes know nothing about."""
        self.event(text)
        warn(text)


def last_step(folder: Path) -> int:
    """The last step in a run folder's metrics.jsonl, 0 where there is none; reads the end of the file."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - TAIL, 0))
            steps = [_step(line) for line in file.read().splitlines()]
    except FileNotFoundError:
        return 0
    return int(max((step for step in steps if step < float("inf")), default=0))


def _step(line: str | bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        return float("inf")


def weight_metrics(table: Objective, weights: Sequence[float]) -> dict[str, float]:
    """The weights of the rows at a step, by metric path; none where they follow no schedule."""
    if table.schedule is None:
        return {}
    return {f"train/weight/{row.name}": weight for row, weight in zip(table.rows, weights, strict=True)}


def step_metrics(model: ThreeTowers, result: StepResult, processes: Processes) -> dict[str, float]:
    """The numbers of a step over the batches of all processes, by metric path; waits for the device."""
    image_ids, caption_ids = processes.gather([result.batch.image_ids, result.batch.caption_ids])
    gathered = processes.gather(list(result.feats.values()))
    feats = dict(zip(result.feats, gathered, strict=True))
    own = processes.own(len(image_ids)) if processes.size > 1 else slice(None)
    accuracies = model.accuracies(feats, image_ids, caption_ids, own)
    values = {"train/loss": result.loss.item()}
    values |= {f"train/loss/{name}": value.item() for name, value in result.rows.items()}
    values |= {
        f"train/accuracy/{name}": (processes.add(value) / processes.size).item()
        for name, value in accuracies.items()
    }
    if len(model.log_scale) == 1:
        values["train/scale"] = model.scale().item()
    else:
        values |= {
            f"train/scale/{row.name}": model.scale(i).item() for i, row in enumerate(model.objective.rows)
        }
    for what, ids in (("images", image_ids), ("captions", caption_ids)):
        values[f"data/duplicate_{what}"] = float(len(ids) - len(torch.unique(ids)))
    return values


def summary(row: dict[str, float]) -> str:
    """A row of metrics as the progress line shows it."""
    losses = " ".join(
        f"{name.removeprefix('train/loss/')} {value:.2f}"
        for name, value in row.items()
        if name.startswith("train/loss/")
    )
    return f"loss {row['train/loss']:.3f} ({losses}), waiting for data {row['data/wait']:.0%}"


class Clock:
    """Where the time of the steps since the last report goes. before: seconds that earlier processes took."""

    def __init__(self, before: float) -> None:
        self._mark = time.monotonic()
        self._begin = self._mark - before
        self._waited = self._worked = 0.0
        self._examples = 0

    def data_ready(self) -> None:
        now = time.monotonic()
        self._waited, self._mark = self._waited + now - self._mark, now

    def step_done(self, examples: int) -> None:
        now = time.monotonic()
        self._worked, self._mark = self._worked + now - self._mark, now
        self._examples += examples

    def lap(self) -> None:
        """Starts waiting for the next batch; what was done since the step (validation, saving) counts as neither."""
        self._mark = time.monotonic()

    def seconds(self) -> float:
        """Since the run began, over all its processes."""
        return time.monotonic() - self._begin

    def rates(self) -> dict[str, float]:
        total = max(self._waited + self._worked, 1e-9)
        values = {
            "seconds": self.seconds(),
            "examples_per_second": self._examples / total,
            "data/wait": self._waited / total,
        }
        self._waited = self._worked = 0.0
        self._examples = 0
        return values
