"""What the towers of finished runs know: how alike their views are, where they are right, and how they got there.

`analyse` measures on the test data of the runs and writes analysis.json, with the small pictures that it names, into a
folder of its own. `report.analysis` makes a page of it. `analysed_run` measures a single run; what several runs say
together is here.
"""

import json
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from threetowers.compare.analysed_run import Analysed, analyse_run
from threetowers.errors import DataError, UsageError
from threetowers.evaluate.agreement import LEAST_RUNS, correlation, count
from threetowers.evaluate.similarity import Representation
from threetowers.evaluate.statistics import t_interval
from threetowers.files import write_whole
from threetowers.run.finished import read_description

SCHEMA = 1
MEASURES = ("1 − κ", "rescued", "1 − CKA")
"""Of how much a frozen tower and the main pair disagree."""


def analyse(folders: Sequence[Path], out: Path) -> Path:
    """Measures what the towers of finished runs know, and writes analysis.json into `out`; returns the path of `out`.

    A run without an evaluation is evaluated first. All runs must have the same test data. Raises CheckpointError for a
    run that is unfinished or whose data or third tower has changed, DataError for runs of different test data and for
    less than 4 captioned test images, UsageError for no runs and for a run that is given twice.

        write_analysis(analyse([Path("runs/baseline"), Path("runs/3t")], Path("runs/analysis")))
    """
    names = _names(folders)
    _check_same_data(folders, names)
    (out / "images").mkdir(parents=True, exist_ok=True)
    runs: list[Analysed] = []
    for folder, name in zip(folders, names, strict=True):
        print(f"[{len(runs) + 1}/{len(folders)}] {name}", flush=True)
        runs.append(analyse_run(folder, name, out))
        if not torch.equal(runs[0].index, runs[-1].index):
            raise DataError(
                f"{folder}: other test images could be read than for {folders[0]}; evaluate both runs again"
            )
    sample = next(iter(runs[0].views.values()))
    result = {
        "schema": SCHEMA,
        "title": f"What the towers of {names[0] if len(runs) == 1 else f'{len(runs)} runs'} know",
        "created": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "num_images": len(runs[0].index),
        "num_pairs": len(sample.features),
        "neighbours": sample.k,
        "runs": [run.figures for run in runs],
        "references": (compared := _references(runs)),
        "methods": _methods(compared),
        "between": _between(runs),
        "prediction": _prediction(runs),
    }
    write_whole(out / "analysis.json", json.dumps(result, indent=1, ensure_ascii=False))
    return out


# Which runs, and whether they can be compared


def _names(folders: Sequence[Path]) -> list[str]:
    """A name for each run: the folder's own, with the folder above it where two would be the same."""
    paths = [folder.resolve() for folder in folders]
    if not paths:
        raise UsageError("analyse: name at least one finished run folder")
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise UsageError(f"analyse: {folder} is given twice")
    short = [path.name for path in paths]
    return [path.name if short.count(path.name) == 1 else f"{path.parent.name}/{path.name}" for path in paths]


def _check_same_data(folders: Sequence[Path], names: Sequence[str]) -> None:
    tests = [read_description(folder)["data"]["test"] for folder in folders]
    for name, test in zip(names, tests, strict=True):
        if test["fingerprint"] != tests[0]["fingerprint"]:
            raise DataError(
                f"{name} and {names[0]} were trained with different test data ({test['images']:,} and "
                f"{tests[0]['images']:,} images). Representations can be compared on the same images only: analyse "
                "these runs separately, each with an --out of its own"
            )


# What the runs say together


def _references(runs: Sequence[Analysed]) -> list[dict[str, Any]]:
    """How alike img, txt and a frozen tower's own features are, for each run.

    A run is compared with its own frozen towers. A run without any is compared with those of all runs.
    """
    every: dict[str, tuple[str, Representation]] = {}
    for run in runs:
        for tower in run.towers:
            every.setdefault(tower.fingerprint, (tower.name, run.views[tower.view]))
    rows: list[dict[str, Any]] = []
    for run in runs:
        img, txt = run.views["img"], run.views["txt"]
        plain = {"run": run.name, "method": run.method, "label": run.label, "img-txt": img.similarity(txt)}
        for fingerprint in dict.fromkeys(tower.fingerprint for tower in run.towers) or every:
            name, own = every[fingerprint]
            beside = {"img-reference": img.similarity(own), "txt-reference": txt.similarity(own)}
            rows.append({**plain, "reference": name, **beside})
        if not every:
            rows.append({**plain, "reference": None})
    return rows


def _methods(compared: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of `_references` by method and frozen tower: the mean over runs, and its interval for several."""
    groups: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for row in compared:
        groups.setdefault((row["label"], row["reference"]), []).append(row)
    found = []
    for (label, reference), rows in groups.items():
        for pair in ("img-txt", "img-reference", "txt-reference"):
            for metric in ("cka", "overlap"):
                values = [row[pair][metric] for row in rows if pair in row and row[pair][metric] is not None]
                if not values:
                    continue
                mean, low, high = t_interval(values) if len(values) > 1 else (values[0], None, None)
                found.append({
                    "label": label, "method": rows[0]["method"], "reference": reference, "pair": pair,
                    "metric": metric, "num": len(values), "mean": mean, "low": low, "high": high,
                })  # fmt: skip
    return found


def _between(runs: Sequence[Analysed]) -> list[dict[str, Any]]:
    """For every two runs, how alike their image and text views are, and how alike the errors of their main pairs."""
    rows = []
    for a, b in combinations(runs, 2):
        pairs = zip(a.ranks.hits(), b.ranks.hits(), strict=True)
        kappas = [kappa for first, second in pairs if (kappa := count(first, second).kappa()) is not None]
        rows.append({
            "a": a.name, "b": b.name,
            "img": a.views["img"].similarity(b.views["img"]), "txt": a.views["txt"].similarity(b.views["txt"]),
            "kappa": float(np.mean(kappas)) if kappas else None,
        })  # fmt: skip
    return rows


def _prediction(runs: Sequence[Analysed]) -> dict[str, Any]:
    """Whether disagreement goes with the gain of a combination, over runs: the points, and their correlations.

    There are no correlations with fewer points than `least`.
    """
    points = [point for run in runs for point in run.points]
    correlations = []
    for measure in MEASURES:
        known = [(value, point) for point in points if (value := _disagreement(point, measure)) is not None]
        for gain in ("gain", "gain_over_better"):
            gains = [point["gain"]["mean"] if gain == "gain" else point[gain] for _, point in known]
            found = correlation([value for value, _ in known], gains)
            if found is not None:
                correlations.append({"measure": measure, "gain": gain, **found._asdict()})
    return {"least": LEAST_RUNS, "points": points, "correlations": correlations}


def _disagreement(point: dict[str, Any], measure: str) -> float | None:
    if measure == "rescued":
        return float(point["rescued"])
    value = point["kappa" if measure == "1 − κ" else "cka"]
    return None if value is None else 1 - value
