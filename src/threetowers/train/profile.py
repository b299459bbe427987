"""Where the time of each training step goes: seconds by phase, and a trace of a few steps for a viewer.

    with Profile(device, first=0, last=100) as profile:
        for batch in fetched(batches, profile.phase):
            with profile.phase("forward"):
                ...
            profile.step_done()
    print(profile.write(folder))

Without a profile the same code takes `no_phase`, which hands out one shared context that does nothing.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from threetowers.files import write_whole, writing_aside

SCHEMA = 1
WARM_UP = 3  # steps of a call that are slower than those after them: memory is found, kernels are chosen
TRACED = 10  # steps
TABLE, TRACE = "profile.json", "trace.json.gz"
PHASES = {
    "data": "waiting for the batch, or reading it where there are no workers; copying it to the device",
    "third": "frozen towers that run while the model trains; next to nothing where their features are stored",
    "forward": "the image and the text tower; with micro-batches, both times",
    "loss": "heads, views and the rows of the objective",
    "backward": "gradients; with checkpointed activations, computing these again",
    "optimiser": "adding up the gradients of several processes, clipping, moving the weights, clearing the gradients",
    "log": "reading the loss from the device, metrics.jsonl, the progress line",
    "validation": "retrieval on the validation data",
    "checkpoint": "copying the weights, and writing them unless a thread does",
    "other": "the rest of the step",
}
"""What a step consists of, in its order. Each moment of a step belongs to one phase."""

T = TypeVar("T")
Phase = Callable[[str], AbstractContextManager[Any]]
"""The context in which the work of a phase is done."""
_NOTHING = nullcontext()


def no_phase(name: str) -> AbstractContextManager[None]:
    """The context of every phase where nothing is profiled."""
    return _NOTHING


def fetched(items: Iterable[T], phase: Phase) -> Iterator[T]:
    """The items; waiting for each is the phase `data`."""
    iterator = iter(items)
    while True:
        with phase("data"):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


class Profile:
    """Measures the steps of one call of `train`, from step `first` to step `last` at most.

    The first WARM_UP steps are not counted, and of the next TRACED the operators are recorded. All others are measured;
    in a short call fewer are traced, so that one is measured in any case. On CUDA each phase begins and ends by waiting
    for the device, since its time would otherwise be counted where the result is read.
    """

    def __init__(self, device: torch.device, first: int, last: int) -> None:
        self._device, self._first = device, first
        self._warm_up = max(min(WARM_UP, last - first - 1), 0)
        self._num_traced = min(TRACED, (last - first - self._warm_up) // 2)
        self._done = self._measured = 0
        self._phase = "other"
        # the clock at the start of the step and at the last charge; below 0 between two steps
        self._begin = self._mark = -1.0
        self._step: dict[str, float] = {}
        self._seconds = 0.0
        self._phases = {name: {"seconds": 0.0, "longest": 0.0, "steps": 0} for name in PHASES}
        self._tracer: torch.profiler.profile | None = None
        self._tracing = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_trace()

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """The context in which time counts as that of the phase; what is inside another phase is not that one's."""
        return torch.profiler.record_function(name) if self._tracing else self._timed(name)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        outer = self._phase
        self._charge(outer)
        self._phase = name
        try:
            yield
        finally:
            self._charge(name)
            self._phase = outer

    def _charge(self, name: str) -> None:
        """Counts the time since the last call as that of the phase."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._mark < 0:
            self._begin = now
        else:
            self._step[name] = self._step.get(name, 0.0) + now - self._mark
        self._mark = now

    def step_done(self) -> None:
        """Ends a step. The next one begins with its first phase; what happens in between belongs to none."""
        if not self._tracing:
            self._charge("other")
            if self._done >= self._warm_up:
                self._count()
        self._step, self._mark = {}, -1.0
        self._done += 1
        if self._done == self._warm_up and self._num_traced:
            self._start_trace()
        elif self._done == self._warm_up + self._num_traced:
            self._stop_trace()

    def _count(self) -> None:
        self._measured += 1
        self._seconds += self._mark - self._begin
        for name, seconds in self._step.items():
            phase = self._phases[name]
            phase["seconds"] += seconds
            phase["longest"] = max(phase["longest"], seconds)
            phase["steps"] += 1

    def _start_trace(self) -> None:
        # otherwise the tracer writes lines of its own to the terminal
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._tracer = torch.profiler.profile(activities=kinds)
        self._tracer.start()
        self._tracing = True

    def _stop_trace(self) -> None:
        if self._tracing and self._tracer is not None:
            self._tracing = False
            self._tracer.stop()

    def write(self, folder: Path) -> str:
        """Writes profile.json and trace.json.gz, in place of those of earlier calls; returns the table as text.

        A call that ends before a step could be measured leaves neither file, and the text says so.
        """
        for name in (TABLE, TRACE):
            (folder / name).unlink(missing_ok=True)
        if not self._measured:
            return (
                f"--profile: nothing is measured, since the call ended after {self._done} steps; the first "
                f"{self._warm_up + self._num_traced} only warm up or are traced"
            )
        if self._tracer is not None:
            with tempfile.TemporaryDirectory() as scratch, writing_aside(folder / TRACE) as temporary:
                packed = Path(scratch) / TRACE
                self._tracer.export_chrome_trace(str(packed))
                shutil.copyfile(packed, temporary)
        described = self.as_dict()
        write_whole(folder / TABLE, json.dumps(described, indent=2))
        return text_table(described)

    def as_dict(self) -> dict[str, Any]:
        """The contents of profile.json: by phase, the seconds in all measured steps and what the phase is."""
        cuda = self._device.type == "cuda"
        return {
            "schema": SCHEMA,
            "device": torch.cuda.get_device_name(self._device) if cuda else "cpu",
            "waits_for_device": cuda,
            "first_step": self._first + 1,
            "steps": {
                "measured": self._measured,
                "warm_up": min(self._warm_up, self._done),
                "traced": self._done - self._measured - min(self._warm_up, self._done),
            },
            "seconds": self._seconds,
            "phases": {name: {"what": what, **self._phases[name]} for name, what in PHASES.items()},
        }


def text_table(described: dict[str, Any]) -> str:
    """The contents of profile.json as a table for the terminal, in milliseconds per measured step."""
    steps, seconds = described["steps"], described["seconds"]
    measured = steps["measured"]
    lines = [
        f"where the time of a step went: {measured:,} steps measured on {described['device']}, from step "
        f"{described['first_step']:,} on",
        f"{'phase':<12}{'ms per step':>12}{'share':>9}{'longest ms':>13}{'in steps':>11}",
    ]
    lines += [
        f"{name:<12}{1e3 * phase['seconds'] / measured:>12,.2f}{phase['seconds'] / seconds:>9.1%}"
        f"{1e3 * phase['longest']:>13,.2f}{phase['steps']:>11,}"
        for name, phase in described["phases"].items()
        if phase["steps"]
    ]
    lines.append(f"{'together':<12}{1e3 * seconds / measured:>12,.2f}{1:>9.1%}")
    left_out = f"not counted: {steps['warm_up']} steps to warm up"
    lines.append(left_out + (f", {steps['traced']} steps traced in {TRACE}" if steps["traced"] else ""))
    if described["waits_for_device"]:
        lines.append("each phase waited for the device, so that a step took longer than without --profile")
    return "\n".join(lines)
