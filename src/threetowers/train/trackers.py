"""Experiment trackers that get a run's metrics beside metrics.jsonl; none is opened unless the configuration names it.

A tracker is opened with the run's folder and configuration, gets every row of metrics, and is closed at the end. One
that fails while training is dropped with a warning, because metrics.jsonl has everything it would have got.
"""

import importlib
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from threetowers.config import RunConfig
from threetowers.errors import UsageError
from threetowers.files import write_whole
from threetowers.progress import warn
from threetowers.settings import as_plain, did_you_mean

PROJECT = "threetowers"
ID = "tracker_id"
"""The file of a run folder by which trackers know a run that continues."""


class Tracker(Protocol):
    """What takes the metrics of a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """A row: the values by metric path, after so many steps."""
        ...

    def close(self) -> None:
        """Writes what is still in memory."""
        ...


class TensorBoard:
    """Event files in the run folder's `tensorboard`, for `tensorboard --logdir`."""

    def __init__(self, folder: Path, config: RunConfig, step: int) -> None:
        import_tracker("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        # what earlier processes wrote of later steps, which are taken again, is not shown
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases; its own variables, such as WANDB_MODE=offline and WANDB_PROJECT, hold."""

    def __init__(self, folder: Path, config: RunConfig, step: int) -> None:
        wandb = import_tracker("wandb")
        settings = wandb.Settings(silent=True, console="off")
        self._run: Any = wandb.init(
            project=None if "WANDB_PROJECT" in os.environ else PROJECT, name=folder.name, id=run_id(folder),
            dir=str(folder), config=as_plain(config), resume="allow", settings=settings,
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")  # its own counter cannot go back to a checkpoint

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Hugging Face's trackio, whose data stay on this machine unless TRACKIO_SPACE_ID names a place."""

    def __init__(self, folder: Path, config: RunConfig, step: int) -> None:
        trackio = import_tracker("trackio")
        name = f"{folder.name}-{run_id(folder)}"
        self._run: Any = trackio.init(
            PROJECT, name=name, config=as_plain(config), resume="allow", embed=False
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, RunConfig, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
"""Every tracker by the name that `trackers` of a configuration takes."""


class Trackers:
    """Those that a configuration names; with none, nothing is done.

    step: how many steps are done already. Raises UsageError for an unknown name and for a package that is missing.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: RunConfig, step: int) -> None:
        check_trackers(names)
        self._open: dict[str, Tracker] = {name: TRACKERS[name](folder, config, step) for name in names}

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Gives the numbers among the values to every tracker."""
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        self._each(lambda tracker: tracker.log(step, numbers))

    def close(self) -> None:
        """Closes every tracker."""
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                do(tracker)
            except Exception as error:  # whatever another package raises must not end hours of training
                warn(
                    f"{name} failed and gets no more metrics of this run; metrics.jsonl has them all: {error}"
                )
                del self._open[name]


def check_trackers(names: Sequence[str]) -> None:
    """Raises UsageError for a name that is no tracker's, and for a package that is missing."""
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"trackers: no tracker {name!r}{did_you_mean(name, TRACKERS)}")
        import_tracker(name)


def import_tracker(name: str) -> Any:
    """A tracker's package; raises UsageError with the remedy where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"trackers: {name} cannot be imported ({error}); install it with: pip install 'threetowers[{name}]'"
        ) from None


def run_id(folder: Path) -> str:
    """What trackers know the run by, the same after it was continued."""
    path = folder / ID
    if not path.is_file():
        write_whole(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8").strip()
