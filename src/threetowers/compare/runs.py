"""Which method wins on this data: trains and evaluates several on equal terms, and writes what report/ shows.

Every method gets the same data, order, batch, steps and augmentation. Each tries the same learning rates with the
first seed; validation picks one, and the other seeds use it. What is finished is not done again.
"""

import json
import os
import platform
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from threetowers.compare.claims import Key, Measured, claims
from threetowers.compare.showcase import identical_without_third, inference_rate, showcase
from threetowers.config import CompareConfig, RunConfig
from threetowers.errors import CheckpointError, UsageError
from threetowers.evaluate.combine import Pair, Sweep, sweep
from threetowers.evaluate.evaluation import evaluate_run, sweep_figures
from threetowers.evaluate.retrieval import Ranks, System, ranks_from_features
from threetowers.evaluate.statistics import bootstrap_interval, t_interval
from threetowers.objective.pairs import METHODS, method_label
from threetowers.progress import duration
from threetowers.run.finished import load_run
from threetowers.run.setup import captioned, check_settings, describe_data, open_data
from threetowers.towers.frozen.load import load_frozen
from threetowers.towers.frozen.text import FrozenTextTower
from threetowers.towers.weights import read_safetensors
from threetowers.train.guards import differing_keys
from threetowers.train.loop import train

SCHEMA = 1
PRIMARY = "mean_r@1"


@dataclass(frozen=True)
class Job:
    """One run of the comparison."""

    method: str
    third: str
    seed: int
    lr: float
    config: RunConfig
    folder: Path

    @property
    def key(self) -> Key:
        return self.method, self.third


Trials = dict[Key, dict[float, float]]
"""The validation figure of each learning rate tried with the first seed."""


def compare(
    config: RunConfig, options: CompareConfig, out: Path, *, max_minutes: float = 0.0
) -> dict[str, Any] | None:
    """Runs the comparison in `out` and returns compare.json's contents; None when it was stopped on request.

    config: what the runs share; its third towers are compared one by one, by the names given to them. Raises
    UsageError for a comparison that cannot be run, and whatever training raises.
    """
    trained = train_all(config, options, out, max_minutes=max_minutes)
    if trained is None:
        return None
    result = _collect(config, options, named_thirds(config), *trained, out)
    partial = out / ".compare.json.partial"
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    partial.replace(out / "compare.json")
    return result


def train_all(
    config: RunConfig, options: CompareConfig, out: Path, *, max_minutes: float = 0.0
) -> tuple[list[Job], Trials] | None:
    """Trains and evaluates what of the comparison is not done yet; the jobs that count, and the trials behind them."""
    check_settings(config)
    thirds = named_thirds(config)
    keys = _keys(options, thirds)
    print(describe_data(config), flush=True)
    if len(options.lrs) > 1 and not captioned(open_data(config)[1]):
        raise UsageError(
            "compare: there is no validation data to choose a learning rate on. Give --inputs.val-fraction above 0, "
            "or one value for --lrs"
        )
    for name, spec in thirds.items():
        # a tower that cannot be used should say so before an hour of training
        tower = load_frozen(spec, name, features=config.third_features, precision=config.third_precision)
        lit = [method for method in options.methods if METHODS[method].image != "own"]
        if lit and isinstance(tower, FrozenTextTower):
            raise UsageError(
                f"compare: the image tower of {' and '.join(lit)} is the third tower, and {spec!r} reads texts. Leave "
                "out what cannot use it: --methods baseline 3t"
            )
    out.mkdir(parents=True, exist_ok=True)
    trials: Trials = {}
    chosen: dict[Key, float] = {}
    num_trainings = len(keys) * (len(options.lrs) + len(options.seeds) - 1)
    pace, done = _Pace(num_trainings, max_minutes), 0
    for key in keys:
        trials[key] = {}
        for lr in options.lrs:
            done += 1
            job = _job(config, thirds, key, options.seeds[0], lr, out)
            if not _run(job, done, pace):
                return None
            trials[key][lr] = _evaluation(job)["val"].get(PRIMARY, 0.0)
        chosen[key] = max(options.lrs, key=lambda lr: trials[key][lr])
    jobs = []
    for key in keys:
        for seed in options.seeds:
            job = _job(config, thirds, key, seed, chosen[key], out)
            if seed != options.seeds[0]:
                done += 1
                if not _run(job, done, pace):
                    return None
            jobs.append(job)
    return jobs, trials


def named_thirds(config: RunConfig) -> dict[str, str]:
    """The third towers to compare, by name; a lone one without a name is called `third`."""
    return {view.removeprefix("third_"): spec for view, spec in config.thirds().items()}


def _keys(options: CompareConfig, thirds: dict[str, str]) -> list[Key]:
    if not options.methods or not options.seeds or not options.lrs:
        raise UsageError("compare: at least one method, one seed and one learning rate are needed")
    for name, values in (("methods", options.methods), ("seeds", options.seeds), ("lrs", options.lrs)):
        if len(set(values)) != len(values):
            raise UsageError(f"compare: --{name} names one twice: {', '.join(map(str, values))}")
    alone = [method for method in options.methods if not METHODS[method].needs_third]
    if not thirds and len(alone) < len(options.methods):
        raise UsageError(
            "compare: the methods need a frozen tower: --third timm:NAME, or several as NAME=SPEC, "
            "for example matched=file:runs/objects"
        )
    keys: list[Key] = [(method, "") for method in alone]
    return keys + [(method, third) for third in thirds for method in options.methods if method not in alone]


def _job(config: RunConfig, thirds: dict[str, str], key: Key, seed: int, lr: float, out: Path) -> Job:
    method, third = key
    name = "-".join([method, *([third] if third else []), f"seed{seed}", f"lr{lr:g}"])
    own = replace(
        config,
        method=method,  # type: ignore[arg-type]
        third=(thirds[third],) if third else (),
        seed=seed,
        embeddings=str(out / "embeddings") if config.embeddings == "none" else config.embeddings,
        optim=replace(config.optim, lr=lr),
    )
    return Job(method, third, seed, lr, own, out / "runs" / name)


class _Pace:
    """How many trainings there are, when the first began, and how many minutes are left; 0 minutes are no limit."""

    def __init__(self, total: int, max_minutes: float) -> None:
        self.total, self._limit, self._started = total, 60 * max_minutes, time.monotonic()

    def so_far(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def minutes_left(self) -> float:
        """For `train`: 0 when there is no limit, and never 0 when there is one."""
        return max(self._limit - self.so_far(), 1e-3) / 60 if self._limit else 0.0


def _run(job: Job, done: int, pace: _Pace) -> bool:
    """Trains and evaluates a job unless that is done; False when it was stopped on request."""
    if (job.folder / "evaluation.json").is_file():
        differing = differing_keys(job.folder / "config.toml", job.config)
        if differing:
            raise CheckpointError(
                f"{job.folder} holds a run with other settings ({', '.join(differing)}). Give another --out"
            )
        return True
    print(
        f"[{done}/{pace.total}] {_label(job.key)}, seed {job.seed}, lr {job.lr:g} "
        f"({duration(pace.so_far())} so far)",
        flush=True,
    )
    trained = train(job.config, job.folder, max_minutes=pace.minutes_left())
    if trained.finished:
        print("  " + evaluate_run(job.folder).text().replace("\n", "\n  "), flush=True)
    return not trained.stopped


def _label(key: Key) -> str:
    method, third = key
    return method_label(method, "" if third == "third" else third)


def _evaluation(job: Job) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((job.folder / "evaluation.json").read_text(encoding="utf-8"))
    return values


def _metrics_rows(job: Job) -> list[dict[str, Any]]:
    lines = (job.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _collect(
    config: RunConfig,
    options: CompareConfig,
    thirds: dict[str, str],
    jobs: list[Job],
    trials: dict[Key, dict[float, float]],
    out: Path,
) -> dict[str, Any]:
    """compare.json from the finished runs."""
    print("comparing", flush=True)
    features = {(job.key, job.seed): read_safetensors(job.folder / "features.safetensors") for job in jobs}
    combination, sweeps = _combinations(jobs, features, thirds)
    runs: dict[Key, dict[int, Measured]] = {}
    for job in jobs:
        measured = _measure(job, features[job.key, job.seed], sweeps.get((job.key, job.seed), {}))
        runs.setdefault(job.key, {})[job.seed] = measured
    three = next((job for job in jobs if job.method == "3t"), None)
    ends_equal = all(
        _ends_equal(runs[key][seed], swept["combination"]) for (key, seed), swept in sweeps.items()
    )
    splits = open_data(config)
    first = [job for job in jobs if job.seed == options.seeds[0]]
    figures = showcase(
        [(job.method, job.third, _label(job.key), features[job.key, job.seed]) for job in first],
        splits[0],
        splits[2],
        out,
    )
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
            "num_train": len(splits[0]),
            "num_val": len(splits[1]),
            "num_test": len(splits[2]),
            "primary": f"retrieval/{PRIMARY}",
        },
        "methods": [_describe(job, trials[job.key], [j for j in jobs if j.key == job.key]) for job in first],
        "results": _results(jobs, runs),
        "summary": _summary(runs),
        "claims": claims(runs, list(thirds), ends_equal, identical_without_third(three.folder) if three else None),
        "combination": combination,
        "per_class": _per_class(jobs),
        "runs": [
            {"method": j.method, "third": j.third, "seed": j.seed, "lr": j.lr, "path": str(j.folder.relative_to(out))}
            for j in jobs
        ],
        **figures,
    }  # fmt: skip


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on, and with which versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() and device != "cpu" else "cpu",
        "python": platform.python_version(),
        **{name: version(name) for name in ("threetowers", "torch", "timm", "open_clip_torch")},
    }


def _third_reads(job: Job) -> str:
    described = json.loads((job.folder / "model.json").read_text(encoding="utf-8"))
    return str(described["thirds"][0]["reads"])


def _systems(tensors: dict[str, Tensor], part: str, names: tuple[str, str]) -> System:
    return System(tensors[f"{part}/{names[0]}"], tensors[f"{part}/{names[1]}"])


MAIN = ("img", "txt")
SIDES = {"images": ("third@txt", "txt@third"), "texts": ("img@third", "third@img")}
"""The image and text views of the third tower read through the heads, by what the tower reads."""


def _combinations(
    jobs: list[Job], features: dict[tuple[Key, int], dict[str, Tensor]], thirds: dict[str, str]
) -> tuple[list[dict[str, Any]], dict[tuple[Key, int], dict[str, Sweep]]]:
    """The sweep over α of every 3T run, with the score average of baseline and LiT of the same seed as control."""
    rows, sweeps = [], {}
    for job in jobs:
        if job.method != "3t":
            continue
        own, side = features[job.key, job.seed], SIDES[_third_reads(job)]
        if not {f"{part}/{view}" for part in ("val", "test") for view in side} <= own.keys():
            continue
        swept = {"combination": _sweep(own, MAIN, own, side)}
        base, lit = features.get((("baseline", ""), job.seed)), features.get((("lit", job.third), job.seed))
        if base is not None and lit is not None:
            swept["control"] = _sweep(base, MAIN, lit, MAIN)
        sweeps[job.key, job.seed] = swept
        figures = sweep_figures(swept["combination"])
        ends = swept["combination"].ends
        references = {
            name: swept["control"].ends[i] for i, name in enumerate(("baseline", "lit")) if "control" in swept
        }
        rows.append({
            "third": job.third,
            "seed": job.seed,
            "metric": PRIMARY,
            **{name: figures[name] for name in ("alphas", "val", "test", "alpha", "chosen")},
            "control": sweep_figures(swept["control"]) if "control" in swept else None,
            "ends": {"main": ends[0], "third": ends[1]},
            "references": references,
        })  # fmt: skip
    return rows, sweeps


def _sweep(
    a: dict[str, Tensor], a_views: tuple[str, str], b: dict[str, Tensor], b_views: tuple[str, str]
) -> Sweep:
    """α between two systems, chosen on validation and reported on test; each is given by features and view names."""
    val, test = (
        Pair(_systems(a, part, a_views), _systems(b, part, b_views), a[f"{part}/text_image"])
        for part in ("val", "test")
    )
    return sweep(val, test)


def _measure(job: Job, tensors: dict[str, Tensor], swept: dict[str, Sweep]) -> Measured:
    """A run's figures and the test ranks that a bootstrap draws from."""
    evaluation = _evaluation(job)
    metrics = {f"retrieval/{name}": value for name, value in evaluation["test"].items()}
    metrics |= {f"zero_shot/{name}": value for name, value in evaluation["zero_shot"].items()}
    ranks: dict[str, Ranks] = {}
    if "test/img" in tensors:
        ranks["main"] = ranks_from_features(*_systems(tensors, "test", MAIN), tensors["test/text_image"])
    for name, each in swept.items():
        metrics[f"{name}/{PRIMARY}"] = each.chosen
        ranks[name] = each.ranks[each.index]
    alpha = None
    if "combination" in swept:
        alpha = swept["combination"].alpha
        metrics[f"third/{PRIMARY}"] = swept["combination"].ends[1]
        ranks["third"] = swept["combination"].ranks[-1]
    class_ranks = tensors.get("classes/rank")
    return Measured(metrics, ranks, alpha, None if class_ranks is None else (class_ranks < 1).numpy())


def _ends_equal(run: Measured, swept: Sweep) -> bool:
    """Whether α = 0 gave exactly what evaluating the main pair alone gave, and α = 1 the third tower's own ranks."""
    main, third = swept.ranks[0], swept.ranks[-1]
    return (
        swept.ends[0] == run.metrics[f"retrieval/{PRIMARY}"]
        and torch.equal(main.i2t, run.ranks["main"].i2t)
        and torch.equal(third.i2t, run.ranks["third"].i2t)
    )


def _results(jobs: list[Job], runs: dict[Key, dict[int, Measured]]) -> list[dict[str, Any]]:
    rows = []
    for job in jobs:
        for path, value in runs[job.key][job.seed].metrics.items():
            task, _, metric = path.partition("/")
            rows.append({"method": job.method, "third": job.third, "seed": job.seed, "task": task, "metric": metric,
                         "value": value})  # fmt: skip
    return rows


def _summary(runs: dict[Key, dict[int, Measured]]) -> list[dict[str, Any]]:
    """Mean and 95 % interval per method and metric: t over seeds, or with one seed a bootstrap over queries."""
    rows: list[dict[str, Any]] = []
    for key, by_seed in runs.items():
        measured = list(by_seed.values())
        for path in measured[0].metrics:
            task, _, metric = path.partition("/")
            values = [run.metrics[path] for run in measured]
            row = {
                "method": key[0],
                "third": key[1],
                "task": task,
                "metric": metric,
                "num_seeds": len(values),
            }
            rows.append(
                row | dict(zip(("mean", "low", "high"), _interval(values, measured[0], path), strict=True))
            )
    tops = [
        max(r["mean"] for r in rows if (r["task"], r["metric"]) == (row["task"], row["metric"]))
        for row in rows
    ]
    return [row | {"best": row["mean"] == top} for row, top in zip(rows, tops, strict=True)]


def _interval(values: list[float], run: Measured, path: str) -> tuple[float, float | None, float | None]:
    if len(values) > 1:
        return t_interval(values)
    task, _, metric = path.partition("/")
    if path == "zero_shot/top1" and run.class_hits is not None:
        interval = bootstrap_interval(run.class_hits)
        return values[0], interval.low, interval.high
    ranks = run.ranks.get("main" if task == "retrieval" else task)
    if metric != PRIMARY or ranks is None:
        return values[0], None, None
    interval = bootstrap_interval(ranks.hits(), images=ranks.images())
    return values[0], interval.low, interval.high


def _per_class(jobs: list[Job]) -> list[dict[str, Any]]:
    """Zero-shot accuracy by class, mean over seeds."""
    by_class: dict[tuple[str, str, str], list[float]] = {}
    for job in jobs:
        for name, value in _evaluation(job)["per_class"].items():
            by_class.setdefault((job.method, job.third, name), []).append(value)
    return [
        {"method": method, "third": third, "class": name, "value": sum(values) / len(values)}
        for (method, third, name), values in by_class.items()
    ]


def _describe(job: Job, trials: dict[float, float], same: list[Job]) -> dict[str, Any]:
    """A method's settings and cost; times are means over its runs, rates medians over the logged steps."""
    finished = load_run(job.folder)
    rows = [row for j in same for row in _metrics_rows(j) if "examples_per_second" in row]
    rates = sorted(row["examples_per_second"] for row in rows)
    seconds = [max(row["seconds"] for row in _metrics_rows(j) if "seconds" in row) for j in same]
    return {
        "method": job.method,
        "third": job.third,
        "label": _label(job.key),
        "lr": job.lr,
        "lr_trials": {f"{lr:g}": value for lr, value in trials.items()},
        "trainable_params": finished.described["num_trainable"],
        "inference_params": sum(
            p.numel() for tower in (finished.img, finished.txt) for p in tower.parameters()
        ),
        "third_at_inference": METHODS[job.config.method].image == "third",
        "train_seconds": sum(seconds) / len(seconds),
        "examples_per_second": rates[len(rates) // 2],
        "inference_images_per_second": inference_rate(finished),
    }
