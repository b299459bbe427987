"""From the records of the study to its tables, figures and verdicts, as study.json holds them; nothing is trained."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict
from typing import Any

from threetowers.compare.claims import TWICE, Exact, GridCell, Measured, Runs, claims
from threetowers.compare.runs import PRIMARY
from threetowers.compare.towers import recipe
from threetowers.evaluate.statistics import paired_difference, t_interval
from threetowers.files import write_whole
from threetowers.objective.pairs import METHODS, method_label
from threetowers.recipes import PRESETS
from threetowers.reproduce.plan import ABLATIONS, GROWTH_METHODS, TUNED_THIRDS, Protocol, units
from threetowers.reproduce.records import Record, of_part, read_records
from threetowers.reproduce.study import learning_rates, trials_of
from threetowers.reproduce.tasks import Places
from threetowers.towers.frozen import built_in
from threetowers.world.attributes import ATTRIBUTES

SCHEMA = 1
SCORE = f"retrieval/{PRIMARY}"
COLUMNS = (
    SCORE, "retrieval/i2t_r@1", "retrieval/t2i_r@1", "zero_shot/top1", f"combination/{PRIMARY}", f"third/{PRIMARY}",
    f"control/{PRIMARY}",
)  # fmt: skip
"""The metrics of the table of methods."""

Stats = dict[str, Any]
"""mean, low, high and num of a metric over seeds; the ends are None with one seed."""


def summary(protocol: Protocol, records: Mapping[str, Record]) -> dict[str, Any]:
    """The contents of study.json."""
    every = list(records.values())
    main = of_part(every, "main")
    chosen, open_edges = learning_rates(protocol, every)
    progress = _progress(protocol, records)
    finished = {row["part"] for row in progress if row["done"] == row["total"]}
    return {
        "schema": SCHEMA,
        "title": "The claims of Three Towers on the built-in world",
        "created": time.strftime("%Y-%m-%d"),
        "protocol": asdict(protocol) | {"batch_size": PRESETS["shapes"]().batch_size},
        "machines": _machines(every),
        "progress": progress,
        "learning_rates": _rates(every, chosen),
        "open_edges": open_edges,
        "diverged": sorted(name for name, record in records.items() if record.diverged),
        "claims": _claims(protocol, every, finished),
        "methods": _methods(main),
        "sweeps": _sweeps(main),
        "attributes": _attributes(main),
        "towers": _towers(protocol, every),
        "growth": _growth(of_part(every, "growth")),
        "ablations": _ablations(of_part(every, "ablations"), main),
        "budgets": _budgets(of_part(every, "budgets"), main),
    }


def write_summary(protocol: Protocol, places: Places) -> dict[str, Any]:
    """Writes study.json beside the records, and returns its contents."""
    study = summary(protocol, read_records(places.records))
    write_whole(places.page / "study.json", json.dumps(study, indent=1, ensure_ascii=False) + "\n")
    return study


def _machines(records: Iterable[Record]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        machine = record.described.get("machine")
        if machine:
            found.setdefault(str(sorted(machine.items())), dict(machine))
    return list(found.values())


def _progress(protocol: Protocol, records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """How many units of each part have records."""
    rows = []
    for part in protocol.parts:
        names = [unit.name for unit in units(protocol, part)]
        rows.append({"part": part, "done": sum(name in records for name in names), "total": len(names)})
    return rows


def _rates(records: Sequence[Record], chosen: Mapping[tuple[str, str], float]) -> list[dict[str, Any]]:
    rows = []
    for (label, third), tried in trials_of(records).items():
        best = chosen[label, third]
        rows.append({
            "label": label, "third": third, "lr": best, "on_edge": len(tried) > 1 and best in (min(tried), max(tried)),
            "tried": {f"{lr:g}": tried[lr] for lr in sorted(tried)},
        })  # fmt: skip
    return rows


def measured_runs(main: Iterable[Record]) -> dict[tuple[str, str], dict[int, Measured]]:
    """The figures of the main part by label and third tower, then seed; the controls stand with the forms of 3T."""
    main = [record for record in main if not record.diverged]
    controls = {
        (record.settings["third"], record.settings["seed"]): record.control["chosen"]
        for record in main
        if record.control
    }
    runs: dict[tuple[str, str], dict[int, Measured]] = {}
    for record in main:
        label, third, seed = (record.settings[key] for key in ("label", "third", "seed"))
        metrics = dict(record.metrics)
        if record.combination and (third, seed) in controls:
            metrics[f"control/{PRIMARY}"] = controls[third, seed]
        alpha = record.combination["alpha"] if record.combination else None
        runs.setdefault((label, third), {})[seed] = Measured(metrics, {}, alpha)
    return runs


def _claims(protocol: Protocol, records: Sequence[Record], finished: Set[str]) -> list[dict[str, Any]]:
    """The verdicts; none before all runs of the main part are there, and none on growth before all of its runs are.

    A verdict that is read while seeds are missing is one of many looks at the same test. A method with fewer than two
    seeds is left out, since one is never a test.
    """
    if "main" not in finished:
        return []
    found = measured_runs(of_part(records, "main"))
    runs: Runs = {key: by_seed for key, by_seed in found.items() if len(by_seed) > 1}
    if not runs:
        return []
    checks = [record.checks for record in records if record.checks]
    exact = Exact(*(
        [check[name] for check in checks if name in check] for name in ("ends", "identical", "untouched")
    ))  # fmt: skip
    thirds = [third for third in TUNED_THIRDS if ("lit", third) in runs]
    forms = [method for method in protocol.methods if METHODS[method].is_3t]
    cells = {third: _cells(records, third) for third in TUNED_THIRDS if "growth" in finished}
    grids = {third: own for third, own in cells.items() if len({cell.seed for cell in own}) > 1}
    rows = claims(runs, thirds, forms, exact, protocol.margin, grids)
    # twice the steps are trained with the matched tower alone
    return [row for row in rows if row["third"] != TUNED_THIRDS[1] or "twice the cost" not in row["text"]]


def _cells(records: Iterable[Record], third: str) -> list[GridCell]:
    """The gap 3T − LiT of every seed, size and number of images for which both are there."""
    scores: dict[tuple[Any, ...], dict[str, tuple[float, float]]] = {}
    for record in of_part(records, "growth"):
        at = record.settings
        if at["third"] == third and not record.diverged:
            key = at["size"], at["num_train"], at["seed"]
            scores.setdefault(key, {})[at["method"]] = record.metrics[SCORE], record.described["num_main"]
    lit, form = GROWTH_METHODS
    return [
        GridCell(found[form][1], num_train, seed, found[form][0] - found[lit][0])
        for (_, num_train, seed), found in sorted(scores.items())
        if len(found) == len(GROWTH_METHODS)
    ]


def _stats(values: Sequence[float]) -> Stats:
    if len(values) < 2:
        return {"mean": values[0], "low": None, "high": None, "num": 1}
    mean, low, high = t_interval(values)
    return {"mean": mean, "low": low, "high": high, "num": len(values)}


def label_of(label: str, third: str = "") -> str:
    """How tables name a unit's label: the method's own label, or what differs."""
    words = label.split(" ")
    name = method_label(words[0].removesuffix(TWICE))
    if words[0].endswith(TWICE):
        name += ", twice the steps"
    if name == words[0].removesuffix(TWICE) and words[0] not in METHODS:
        name = label
    elif len(words) > 1:
        name += " " + " ".join(words[1:])
    return f"{name} ({third})" if third else name


def _methods(main: Sequence[Record]) -> list[dict[str, Any]]:
    rows = []
    for (label, third), by_seed in measured_runs(main).items():
        metrics = {
            name: _stats([run.metrics[name] for run in by_seed.values()])
            for name in COLUMNS
            if all(name in run.metrics for run in by_seed.values())
        }
        alphas = [run.alpha for run in by_seed.values() if run.alpha is not None]
        records = [
            r for r in main if (r.settings["label"], r.settings["third"]) == (label, third) and not r.diverged
        ]
        rows.append({
            "label": label, "name": label_of(label), "third": third, "metrics": metrics, "alphas": alphas,
            "lr": records[0].settings["lr"],
            "seconds": sum(r.described["seconds"] for r in records) / len(records),
            "scale": sum(r.described["scale"] for r in records) / len(records),
            "num_main": records[0].described["num_main"], "num_trainable": records[0].described["num_trainable"],
        })  # fmt: skip
    return rows


def _sweeps(main: Sequence[Record]) -> list[dict[str, Any]]:
    """The mean curve over α of each method with a combination, and of the score average of baseline and LiT."""
    curves: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in main:
        at = record.settings
        if record.combination and at["label"] == at["method"]:
            curves.setdefault((at["label"], at["third"]), []).append(record.combination)
        if record.control:
            curves.setdefault(("control", at["third"]), []).append(record.control)
    return [
        {
            "label": label, "third": third, "alphas": sweeps[0]["alphas"],
            "test": [sum(column) / len(sweeps) for column in zip(*(each["test"] for each in sweeps), strict=True)],
            "chosen": [each["alpha"] for each in sweeps],
        }
        for (label, third), sweeps in curves.items()
    ]  # fmt: skip


def _attributes(main: Sequence[Record]) -> list[dict[str, Any]]:
    """Zero-shot accuracy and probe of each attribute, by method and third tower."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in main:
        if not record.diverged and record.settings["label"] == record.settings["method"]:
            groups.setdefault((record.settings["label"], record.settings["third"]), []).append(record)
    return [
        {
            "label": label, "name": label_of(label), "third": third,
            **{
                task: {name: _stats([r.metrics[f"{task}/{name}"] for r in records]) for name in ATTRIBUTES}
                for task in ("attribute", "probe")
            },
        }
        for (label, third), records in groups.items()
    ]  # fmt: skip


def _towers(protocol: Protocol, records: Sequence[Record]) -> list[dict[str, Any]]:
    """What each third tower is, its accuracy on its own labels, and the probes of its features, over seeds."""
    rows = []
    own, used = of_part(records, "towers"), [*of_part(records, "main"), *of_part(records, "ablations")]
    for name in dict.fromkeys(record.settings["third"] for record in used if record.settings["third"]):
        found = [record for record in own if record.settings["third"] == name]
        row: dict[str, Any] = {
            "name": name,
            "summary": recipe(name).summary,
            "steps": recipe(name).config.steps,
        }
        if not found and not protocol.own_towers:
            described = built_in.card(name)
            row["own"] = _stats([described["val/top1"]])
            row["probes"] = {key: _stats([value]) for key, value in described["probes"].items()}
        elif found:
            row["own"] = _stats([record.metrics["own/top1"] for record in found])
            row["probes"] = {
                key: _stats([record.metrics[f"probe/{key}"] for record in found])
                for key in ATTRIBUTES
                if all(f"probe/{key}" in record.metrics for record in found)
            }
        rows.append(row)
    return rows


def _growth(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Each cell of the grid: both methods and the gap between them, over seeds."""
    rows = []
    for third in TUNED_THIRDS:
        gaps: dict[tuple[float, float], list[float]] = {}
        for cell in _cells(records, third):
            gaps.setdefault((cell.size, cell.data), []).append(cell.gap)
        rows += [
            {"third": third, "num_main": size, "num_train": data, "gap": _stats(values)}
            for (size, data), values in sorted(gaps.items())
        ]
    return rows


def _differences(records: Iterable[Record], reference: Mapping[int, float]) -> list[dict[str, Any]]:
    """Each label's score, and its difference to a reference with the same seeds."""
    groups: dict[tuple[str, str], dict[int, float]] = {}
    for record in records:
        if not record.diverged:
            key = record.settings["label"], record.settings["third"]
            groups.setdefault(key, {})[record.settings["seed"]] = record.metrics[SCORE]
    rows = []
    for (label, third), scores in groups.items():
        seeds = sorted(scores.keys() & reference.keys())
        row = {"label": label, "name": label_of(label, third), "score": _stats(list(scores.values()))}
        if len(seeds) > 1:
            values = paired_difference([scores[seed] for seed in seeds], [reference[seed] for seed in seeds])
            row["difference"] = values._asdict()
        rows.append(row)
    return rows


def _scores(main: Iterable[Record], label: str, third: str) -> dict[int, float]:
    return {
        record.settings["seed"]: record.metrics[SCORE]
        for record in main
        if not record.diverged and (record.settings["label"], record.settings["third"]) == (label, third)
    }


def _ablations(records: Sequence[Record], main: Sequence[Record]) -> list[dict[str, Any]]:
    """3T with one thing changed, and its difference to 3T; also methods of the main part that differ in one thing."""
    reference = _scores(main, "3t", TUNED_THIRDS[0])
    seeds = {record.settings["seed"] for record in records}
    same = [
        record
        for record in main
        if record.settings["third"] == TUNED_THIRDS[0]
        and record.settings["label"] in ("3t", "3t-main", "3t-regression")
        and record.settings["seed"] in seeds
    ]
    if not records:
        return []
    order = {label: place for place, label in enumerate(ABLATIONS)}
    rows = _differences([*same, *records], reference)
    return sorted(rows, key=lambda row: order.get(row["label"], -1))


def _budgets(records: Sequence[Record], main: Sequence[Record]) -> list[dict[str, Any]]:
    """The methods with more steps, each beside the baseline of as many steps."""
    rows = []
    for steps in sorted({record.settings["steps"] for record in records}):
        own = [record for record in records if record.settings["steps"] == steps]
        reference = _scores(own, f"baseline {steps}", "")
        rows += [row | {"steps": steps} for row in _differences(own, reference)]
    if rows:
        seeds = {record.settings["seed"] for record in records}
        first = [
            record
            for record in main
            if record.settings["seed"] in seeds
            and record.settings["label"] in ("baseline", "lit", "3t", "3t-main")
            and record.settings["third"] in ("", TUNED_THIRDS[1])
        ]
        steps = first[0].settings["steps"] if first else 0
        rows = [row | {"steps": steps} for row in _differences(first, _scores(first, "baseline", ""))] + rows
    return rows
