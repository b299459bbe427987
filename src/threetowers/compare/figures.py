"""The contents of compare.json, collected from finished runs."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from threetowers.compare.attributes import known_attributes
from threetowers.compare.claims import Exact, Key, Measured, claims
from threetowers.compare.concurrency import Concurrency
from threetowers.compare.machine import machine
from threetowers.compare.runs import PRIMARY, Job, Trials, named_thirds
from threetowers.compare.showcase import inference_rate, showcase, third_checks
from threetowers.compare.suites import suite_figures
from threetowers.config import CompareConfig, RunConfig
from threetowers.data.overlap import shared_captions
from threetowers.evaluate.combine import Pair, Sweep, combine, sweep
from threetowers.evaluate.retrieval import Ranks, System, ranks_from_features
from threetowers.evaluate.statistics import bootstrap_interval, t_interval
from threetowers.objective.pairs import METHODS, method_label, objective
from threetowers.run.finished import load_run
from threetowers.run.setup import open_data
from threetowers.run.thirds import load_thirds
from threetowers.towers.frozen.base import FrozenTower, num_parameters
from threetowers.towers.frozen.load import pretraining
from threetowers.towers.weights import read_safetensors

SCHEMA = 2
MAIN = ("img", "txt")
MAIN_SYSTEM = "main"
"""The name of the main pair among the systems of `Measured.ranks`."""
SIDES = {"images": ("third@txt", "txt@third"), "texts": ("img@third", "third@img")}
"""The image and the text view of the third tower read through the heads, by what the tower reads."""


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A job with what its evaluation wrote. control: the sweep between the baseline and the LiT of the same seed."""

    job: Job
    evaluation: dict[str, Any] = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False)
    control: Sweep | None = None

    @property
    def combination(self) -> dict[str, Any] | None:
        """The evaluation's sweep over α; None for a method without a combination."""
        sweeps: dict[str, dict[str, Any]] = self.evaluation["combination"]
        return next(iter(sweeps.values()), None)

    def system(self, views: tuple[str, str] = MAIN, part: str = "test") -> System:
        return System(*(self.tensors[f"{part}/{view}"] for view in views))

    def answers(self, part: str = "test") -> tuple[Tensor, Tensor]:
        """The image of each text, and the same number for equal texts, int64 [number of texts] both."""
        return self.tensors[f"{part}/text_image"], self.tensors[f"{part}/text_group"]

    def side_views(self) -> tuple[str, str]:
        """The views of the third tower read through the heads."""
        described = json.loads((self.job.folder / "model.json").read_text(encoding="utf-8"))
        return SIDES[described["thirds"][0]["reads"]]


def collect(
    config: RunConfig,
    options: CompareConfig,
    jobs: list[Job],
    trials: Trials,
    concurrency: Concurrency,
    out: Path,
) -> dict[str, Any]:
    """compare.json from the finished runs; the images that it names are written into `out`."""
    print("comparing", flush=True)
    evaluated = _with_controls([
        Evaluated(job, job.evaluation(), read_safetensors(job.folder / "features.safetensors")) for job in jobs
    ])  # fmt: skip
    runs: dict[Key, dict[int, Measured]] = {}
    for each in evaluated:
        runs.setdefault(each.job.key, {})[each.job.seed] = measure(each)
    forms = list(dict.fromkeys(job.method for job in jobs if METHODS[job.config.method].is_3t))
    train, val, test = open_data(config)
    first = [each for each in evaluated if each.job.seed == options.seeds[0]]
    shown = [(each.job.method, each.job.third, each.job.label, each.tensors) for each in first]
    return {
        "schema": SCHEMA,
        "title": options.title,
        "data": config.data,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "machine": machine(jobs[0].config.device),
        "settings": {
            "steps": config.steps,
            "batch_size": config.batch_size,
            "seeds": list(options.seeds),
            "lrs": list(options.lrs),
            "lr_seed": options.seeds[0],
            "jobs": concurrency.jobs,
            "threads": concurrency.threads,
            "num_train": len(train),
            "num_val": len(val),
            "num_test": len(test),
            "shared_captions": f"{shared_captions(train, test):.1%}",
            "weights": _weights(jobs),
            "repeated_captions": _shares(first[0].evaluation["repeated_captions"]) or None,
            "primary": f"retrieval/{PRIMARY}",
            "margin": options.margin,
        },
        "thirds": [_third(view, tower) for view, tower in load_thirds(config, torch.device("cpu")).items()],
        "methods": [
            _describe(each.job, trials[each.job.key], [job for job in jobs if job.key == each.job.key])
            for each in first
        ],
        "results": _results(jobs, runs),
        "summary": _summary(runs),
        "claims": claims(runs, list(named_thirds(config)), forms, _exact(evaluated), options.margin),
        "combination": [_combination_row(each) for each in evaluated if each.combination],
        "per_class": _per_class(evaluated),
        "attributes": _attributes(first) if config.data == "shapes" else [],
        **suite_figures(jobs, config.suite, out),
        "runs": [
            {"method": j.method, "third": j.third, "seed": j.seed, "lr": j.lr, "path": str(j.folder.relative_to(out))}
            for j in jobs
        ],
        **showcase(shown, train, test, out),
    }  # fmt: skip


def _third(view: str, tower: FrozenTower) -> dict[str, Any]:
    """What a third tower is, and what it was trained on where that is known."""
    return {
        "name": view.removeprefix("third_"),
        "spec": tower.spec,
        "num_parameters": num_parameters(tower.module),
        "width": tower.width,
        "image": tower.image.as_dict() if tower.reads == "images" else None,
        "pretrained": pretraining(tower.spec),
    }


def _weights(jobs: list[Job]) -> str | None:
    """The weights of the rows of each method that has several."""
    tables = {job.method: objective(job.config) for job in jobs}
    several = [f"{method_label(name)} {t.weighting()}" for name, t in tables.items() if len(t.rows) > 1]
    return "; ".join(several) or None


def _shares(by_part: dict[str, float]) -> str:
    return ", ".join(f"{'validation' if part == 'val' else part} {by_part[part]:.1%}" for part in by_part)


def _with_controls(evaluated: list[Evaluated]) -> list[Evaluated]:
    """Adds to every run with a combination the same sweep between two independent runs, a baseline and a LiT."""
    runs = {(each.job.key, each.job.seed): each for each in evaluated}
    result = []
    for each in evaluated:
        base = runs.get((("baseline", ""), each.job.seed))
        lit = runs.get((("lit", each.job.third), each.job.seed))
        control = None
        if each.combination and base is not None and lit is not None:
            control = score_average(base, lit)
        result.append(Evaluated(each.job, each.evaluation, each.tensors, control))
    return result


def score_average(base: Evaluated, lit: Evaluated) -> Sweep:
    """The control of a combination: the same sweep between two independent runs on the same data."""
    val, test = (
        Pair(base.system(part=part), lit.system(part=part), *base.answers(part)) for part in ("val", "test")
    )
    return sweep(val, test)


def measure(run: Evaluated) -> Measured:
    """A run's metrics, and the test ranks that a bootstrap draws from."""
    metrics = {f"retrieval/{name}": value for name, value in run.evaluation["test"].items()}
    metrics |= {f"zero_shot/{name}": value for name, value in run.evaluation["zero_shot"].items()}
    ranks: dict[str, Ranks] = {}
    if "test/img" in run.tensors:
        ranks[MAIN_SYSTEM] = ranks_from_features(*run.system(), *run.answers())
    swept = run.combination
    if swept:
        metrics[f"combination/{PRIMARY}"] = swept["chosen"]
        if run.control:
            metrics[f"control/{PRIMARY}"] = run.control.chosen
            ranks["control"] = run.control.ranks[run.control.index]
        metrics[f"third/{PRIMARY}"] = swept["ends"][1]
        ranks["combination"], ranks["third"] = combine(_own_pair(run), [swept["alpha"], 1.0])
    class_ranks = run.tensors.get("classes/rank")
    class_hits = None if class_ranks is None else (class_ranks < 1).numpy()
    return Measured(metrics, ranks, swept["alpha"] if swept else None, class_hits)


def _own_pair(run: Evaluated) -> Pair:
    """The main pair and the third tower read through the heads, on test data."""
    return Pair(run.system(), run.system(run.side_views()), *run.answers())


def _exact(evaluated: Sequence[Evaluated]) -> Exact:
    """The checks of every run; those of the third tower, of each that has one beside two towers of its own."""
    methods = [(each.job, METHODS[each.job.config.method]) for each in evaluated]
    beside = [job for job, method in methods if method.third_beside]
    checks = [third_checks(job.folder) for job in beside]
    return Exact(
        [ends_equal(each) for each in evaluated if each.combination],
        [check.identical for check in checks],
        [check.untouched for check in checks],
    )


def ends_equal(run: Evaluated) -> bool:
    """Whether α = 0 and α = 1 give exactly what evaluating the main pair alone and the third tower alone gives."""
    pair, swept = _own_pair(run), run.combination
    assert swept is not None
    ends = combine(pair, [0.0, 1.0])
    alone = [ranks_from_features(*system, *run.answers()) for system in (pair.main, pair.side)]
    same = (torch.equal(a.i2t, b.i2t) and torch.equal(a.t2i, b.t2i) for a, b in zip(ends, alone, strict=True))
    return all(same) and swept["ends"][0] == run.evaluation["test"][PRIMARY]


def _combination_row(run: Evaluated) -> dict[str, Any]:
    swept, control = run.combination, run.control
    assert swept is not None
    return {
        "method": run.job.method,
        "third": run.job.third,
        "seed": run.job.seed,
        "metric": PRIMARY,
        **{name: swept[name] for name in ("alphas", "val", "test", "alpha", "chosen")},
        "control": control.figures() if control else None,
        "ends": dict(zip(("main", "third"), swept["ends"], strict=True)),
        "references": dict(zip(("baseline", "lit"), control.ends, strict=True)) if control else {},
    }


def _results(jobs: list[Job], runs: dict[Key, dict[int, Measured]]) -> list[dict[str, Any]]:
    rows = []
    for job in jobs:
        for path, value in runs[job.key][job.seed].metrics.items():
            task, _, metric = path.partition("/")
            rows.append({"method": job.method, "third": job.third, "seed": job.seed, "task": task, "metric": metric,
                         "value": value})  # fmt: skip
    return rows


def _summary(runs: dict[Key, dict[int, Measured]]) -> list[dict[str, Any]]:
    """Mean and 95 % interval of each method and metric: t over seeds, or with one seed a bootstrap over queries."""
    rows: list[dict[str, Any]] = []
    for (method, third), by_seed in runs.items():
        measured = list(by_seed.values())
        for path in measured[0].metrics:
            task, _, metric = path.partition("/")
            values = [run.metrics[path] for run in measured]
            mean, low, high = _interval(values, measured[0], path)
            rows.append({"method": method, "third": third, "task": task, "metric": metric, "num_seeds": len(values),
                         "mean": mean, "low": low, "high": high})  # fmt: skip
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        column = row["task"], row["metric"]
        best[column] = max(row["mean"], best.get(column, row["mean"]))
    return [row | {"best": row["mean"] == best[row["task"], row["metric"]]} for row in rows]


def _interval(values: list[float], run: Measured, path: str) -> tuple[float, float | None, float | None]:
    if len(values) > 1:
        return t_interval(values)
    task, _, metric = path.partition("/")
    if path == "zero_shot/top1" and run.class_hits is not None:
        interval = bootstrap_interval(run.class_hits)
        return values[0], interval.low, interval.high
    ranks = run.ranks.get("main" if task == "retrieval" else task)
    if metric != PRIMARY or ranks is None or ranks.num_independent() < 2:
        return values[0], None, None
    interval = bootstrap_interval(ranks.hits(), images=ranks.images())
    return values[0], interval.low, interval.high


def _per_class(evaluated: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Zero-shot accuracy by class, mean over seeds."""
    by_class: dict[tuple[str, str, str], list[float]] = {}
    for run in evaluated:
        for name, value in run.evaluation["per_class"].items():
            by_class.setdefault((*run.job.key, name), []).append(value)
    return [
        {"method": method, "third": third, "class": name, "value": sum(values) / len(values)}
        for (method, third, name), values in by_class.items()
    ]


def _attributes(evaluated: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Zero-shot accuracy of each attribute of the built-in world, of the runs of one seed."""
    return [
        {"method": run.job.method, "third": run.job.third, "attribute": name, "value": value}
        for run in evaluated
        for name, value in known_attributes(load_run(run.job.folder), probe=False).zero_shot.items()
    ]


def _describe(job: Job, trials: dict[float, float], same: list[Job]) -> dict[str, Any]:
    """A method's settings and cost; times are means over its runs, rates medians over the logged steps."""
    finished = load_run(job.folder)
    logs = [metric_rows(each.folder) for each in same]
    rates = sorted(row["examples_per_second"] for log in logs for row in log if "examples_per_second" in row)
    seconds = [max(row["seconds"] for row in log if "seconds" in row) for log in logs]
    num_inference = num_parameters(finished.img) + num_parameters(finished.txt)
    return {
        "method": job.method,
        "third": job.third,
        "label": job.label,
        "lr": job.lr,
        "lr_trials": {f"{lr:g}": value for lr, value in trials.items()},
        "trainable_params": finished.described["num_trainable"],
        "inference_params": num_inference,
        "third_at_inference": METHODS[job.config.method].image == "third",
        "train_seconds": sum(seconds) / len(seconds),
        "examples_per_second": rates[len(rates) // 2],
        "inference_images_per_second": inference_rate(finished),
    }


def metric_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
