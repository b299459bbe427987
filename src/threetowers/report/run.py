"""The report of one run: `report.html` in its folder, out of what training and evaluation have written there."""

import json
import tomllib
from pathlib import Path
from typing import Any

from threetowers.errors import DataError
from threetowers.files import write_whole
from threetowers.objective.pairs import METHODS, method_label
from threetowers.report.page import document, training
from threetowers.report.phases import time_split
from threetowers.report.plots import draw_plots, measured_once
from threetowers.report.tables import (
    Compare,
    definitions,
    finite,
    join,
    percent,
    read_curves,
    result_table,
    tag,
)


def write_run_report(folder: Path) -> Path:
    """Writes report.html into the folder of a run, finished or not; returns the page's path.

    Raises DataError when the folder holds no run, or files that cannot be used.
    """
    config, evaluation = _config(folder), _evaluation(folder)
    run = _as_comparison(config, evaluation)
    curves, problems = read_curves(folder, run)
    found = finite((evaluation.get("test") or {}).get("mean_r@1"))
    headline = "This run has no evaluation yet."
    if found is not None:
        headline = f"{percent(found)} % mean R@1 on {evaluation.get('num_test', '?')} test images."
    opening = join(tag("h1", run["title"]), tag("p", headline, class_="headline"))
    sections = [
        ("results", "Results on the test data, in percent", result_table(run) if run["summary"] else None),
        (
            "training",
            "Training",
            training(run, draw_plots(run, curves), problems, measured_once(run, curves)),
        ),
        ("time", "Where the time of a step went", time_split(folder)),
        ("settings", "Settings", definitions(run["settings"].items())),
    ]
    page = folder / "report.html"
    write_whole(page, document(run["title"], opening, sections))
    return page


def _as_comparison(config: dict[str, Any], evaluation: dict[str, Any]) -> Compare:
    """A run as a comparison of one method, which is what tables and plots are made of."""
    method = str(config.get("method", "?"))
    named = {"method": method, "third": "", "label": method_label(method)}
    settings = {
        "data": config.get("data"),
        "third tower": ", ".join(map(str, config.get("third", ()))),
        "steps": config.get("steps"),
        "batch size": config.get("batch_size"),
        "weights of the rows": _weights(method, config.get("objective", {})),
        "learning rate": config.get("optim", {}).get("lr"),
        "precision": config.get("precision"),
        "seed": config.get("seed"),
    }
    return {
        "title": f"{named['label']} on {config.get('data')}",
        "methods": [named],
        "runs": [{**named, "path": "."}],
        "summary": [
            {**named, "task": task, "metric": metric, "mean": value}
            for section, task in (("test", "retrieval"), ("zero_shot", "zero_shot"))
            for metric, value in (evaluation.get(section) or {}).items()
        ],
        "settings": {name: str(value) for name, value in settings.items() if value not in (None, "")},
    }


def _weights(method: str, options: dict[str, Any]) -> str | None:
    """The weights that the run gives its rows, with their schedule; None for a method of a single row."""
    entry = next((entry for name, entry in METHODS.items() if name == method), None)
    if entry is None or not entry.third_beside:
        return None
    start, end = (_numbers(options.get(name)) for name in ("weights", "weights_end"))
    kind = options.get("weights_schedule", "constant")
    return f"{start} → {end} ({kind})" if end else start


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:.3g}" for value in values) if isinstance(values, list) else ""


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder}: is neither the folder of a run (it has no config.toml) nor of a comparison (compare.json)"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _evaluation(folder: Path) -> dict[str, Any]:
    path = folder / "evaluation.json"
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}). Run `threetowers evaluate {folder}` again"
        ) from None
    return values if isinstance(values, dict) else {}
