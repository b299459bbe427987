"""The curves of a run, finished or not, from its metrics.jsonl."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from threetowers.config import RunConfig
from threetowers.errors import CheckpointError
from threetowers.objective.pairs import METHODS, method_label
from threetowers.settings import read_config

POINTS = 400
"""Of a curve at most."""


def check_run(folder: Path) -> None:
    """Raises CheckpointError for a folder that holds no run, finished or not."""
    if not (folder / "config.toml").is_file():
        raise CheckpointError(
            f"{folder}: there is no run here, since it has no config.toml; give the --out of a train command, or the "
            "folder of a comparison"
        )


def is_finished(folder: Path) -> bool:
    """Whether a run has left the model that `load_run` reads."""
    return (folder / "model.json").is_file()


def run_label(folder: Path, config: RunConfig) -> str:
    """A run's method and its third towers as reports name them; those of a comparison have its names."""
    if not METHODS[config.method].needs_third:
        return method_label(config.method)
    short = ", ".join(_short(view, spec) for view, spec in config.thirds().items())
    return method_label(config.method, _named_by_comparison(folder) or short)


def _named_by_comparison(folder: Path) -> str:
    """The name of the third tower in the comparison that a run is part of; empty without one."""
    place = folder.resolve().parent.parent
    try:
        runs = json.loads((place / "compare.json").read_bytes())["runs"]
        return next((str(run["third"]) for run in runs if place / run["path"] == folder.resolve()), "")
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _short(view: str, spec: str) -> str:
    """The name that the settings give a frozen tower, or the end of what they say it is."""
    own = view.removeprefix("third").removeprefix("_")
    return own or spec.rstrip("/").replace(":", "/").rpartition("/")[2]


def curves(folder: Path) -> dict[str, Any]:
    """What the page draws of a run: its name and label, `finished`, `steps` of the whole training and `metrics`.

    metrics: by metric path a list of [step, value] with at most POINTS entries, the last one always among them. Values
    that are not finite are left out.
    """
    config = read_config(folder / "config.toml")
    found: dict[str, list[list[float]]] = {}
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        try:
            row = json.loads(line)
            step = float(row.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # a line that is being written
        for name, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, []).append([step, float(value)])
    return {
        "name": folder.name,
        "label": run_label(folder, config),
        "finished": is_finished(folder),
        "steps": config.steps,
        "metrics": {name: thinned(points) for name, points in sorted(found.items())},
    }


def colours(methods: Sequence[str]) -> list[int]:
    """A number for each run's colour: its method's place in the list of methods, as in reports.

    Of several runs of a method the first has that colour. The others take those of methods that are not there, and then
    the method's own again, by numbers that are higher by multiples of the list's length.

    >>> colours(["3t", "baseline", "3t"])
    [3, 0, 7]
    """
    names = [str(name) for name in METHODS]
    free = [place for place, name in enumerate(names) if name not in methods]
    found: list[int] = []
    for method in methods:
        own = names.index(method)
        if own in found and free:
            own = free.pop()
        while own in found:
            own += len(names)
        found.append(own)
    return found


def thinned(points: list[list[float]]) -> list[list[float]]:
    """Every n-th point, with the smallest n that leaves at most POINTS, and the last one.

    >>> len(thinned([[float(i), 0.0] for i in range(1000)])), thinned([[1.0, 2.0]])
    (334, [[1.0, 2.0]])
    """
    stride = max(1, math.ceil(len(points) / (POINTS - 1)))
    return points[:-1][::stride] + points[-1:]
