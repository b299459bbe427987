"""The runs of a comparison: which they are, and their training and evaluation.

Every method gets the same data, order, batch, steps and augmentation. Each tries the same learning rates with the
first seed; validation picks one of them, and the other seeds use it. A run that is finished is not repeated.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from threetowers.compare.claims import Key
from threetowers.config import CompareConfig, RunConfig
from threetowers.errors import CheckpointError, UsageError
from threetowers.evaluate.evaluation import SCHEMA, check_evaluation, evaluate_run
from threetowers.objective.pairs import METHODS, Objective, method_label, objective
from threetowers.progress import duration
from threetowers.run.finished import changed_parts, describe_parts, read_description
from threetowers.run.setup import check_settings, describe_data, open_data
from threetowers.run.thirds import captioned
from threetowers.towers.frozen.load import load_frozen
from threetowers.train.guards import differing_keys, holds_run
from threetowers.train.loop import train

PRIMARY = "mean_r@1"
"""The retrieval metric that picks learning rates and ranks the methods."""


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

    @property
    def label(self) -> str:
        """The method as the report names it, with its third tower when that has a name."""
        return method_label(self.method, "" if self.third == "third" else self.third)

    def evaluation(self) -> dict[str, Any]:
        """The contents of evaluation.json."""
        values: dict[str, Any] = json.loads((self.folder / "evaluation.json").read_bytes())
        return values


Trials = dict[Key, dict[float, float]]
"""The validation metric of each learning rate that was tried with the first seed."""


def train_all(
    config: RunConfig, options: CompareConfig, out: Path, *, max_minutes: float = 0.0
) -> tuple[list[Job], Trials] | None:
    """Trains and evaluates what is missing; returns the runs at the chosen learning rates, and the trials.

    Returns None when it was stopped on request. Arguments and errors as in `comparison.compare`.
    """
    check_settings(config)
    thirds = named_thirds(config)
    keys = _keys(options, thirds)
    print(describe_data(config), *check_evaluation(config), sep="\n", flush=True)
    _check_usable(config, options, thirds)
    (out / "images").mkdir(parents=True, exist_ok=True)
    _check_different(config, options, thirds, keys, out)
    for key in keys:
        for seed in options.seeds:
            for lr in options.lrs:
                job = _job(config, thirds, key, seed, lr, out)
                check_settings(job.config)
                objective(job.config)
                holds_run(job.folder, job.config)  # raises for one with other settings
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
            trials[key][lr] = job.evaluation()["val"].get(PRIMARY, 0.0)
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
    """The third towers to compare, by name; a single one without a name is called `third`."""
    return {view.removeprefix("third_"): spec for view, spec in config.thirds().items()}


def _keys(options: CompareConfig, thirds: dict[str, str]) -> list[Key]:
    if not options.methods or not options.seeds or not options.lrs:
        raise UsageError("compare: at least one method, one seed and one learning rate are needed")
    for name, values in (("methods", options.methods), ("seeds", options.seeds), ("lrs", options.lrs)):
        if len(set(values)) != len(values):
            raise UsageError(f"compare: --{name} names one twice: {', '.join(map(str, values))}")
    without_third = [method for method in options.methods if not METHODS[method].needs_third]
    if not thirds and len(without_third) < len(options.methods):
        raise UsageError(
            "compare: the methods need a frozen tower: --third timm:NAME, or several as NAME=SPEC, "
            "for example matched=file:runs/objects"
        )
    keys: list[Key] = [(method, "") for method in without_third]
    return keys + [
        (method, third) for third in thirds for method in options.methods if method not in without_third
    ]


def _check_usable(config: RunConfig, options: CompareConfig, thirds: dict[str, str]) -> None:
    """Raises, before an hour of training, for data without a choice of learning rates and towers that do not fit."""
    if len(options.lrs) > 1 and not captioned(open_data(config)[1]):
        raise UsageError(
            "compare: there is no validation data to choose a learning rate on. Give --inputs.val-fraction above 0, "
            "or one value for --lrs"
        )
    lit = [method for method in options.methods if METHODS[method].image != "own"]
    for name, spec in thirds.items():
        tower = load_frozen(spec, name, features=config.third_features, precision=config.third_precision)
        if lit and tower.reads == "texts":
            raise UsageError(
                f"compare: the image tower of {' and '.join(lit)} is the third tower, and {spec!r} reads texts. Leave "
                "out what cannot use it: --methods baseline 3t"
            )


def _check_different(
    config: RunConfig, options: CompareConfig, thirds: dict[str, str], keys: list[Key], out: Path
) -> None:
    """Raises UsageError for two methods that are one, as 3t and 3t-main are where the settings give the weights."""
    seen: dict[tuple[str, Objective], str] = {}
    for method, third in keys:
        table = objective(_job(config, thirds, (method, third), options.seeds[0], options.lrs[0], out).config)
        same = seen.setdefault((third, table), method)
        if same != method:
            raise UsageError(
                f"compare: {same} and {method} are the same with objective.weights = "
                f"{list(config.objective.weights or ())}. Leave out one of them, or give --objective.weights none, "
                "with which each method has its own"
            )


def _job(config: RunConfig, thirds: dict[str, str], key: Key, seed: int, lr: float, out: Path) -> Job:
    method, third = key
    name = "-".join([method, *([third] if third else []), f"seed{seed}", f"lr{lr:g}"])
    own = replace(
        config,
        method=method,  # type: ignore[arg-type]
        third=(thirds[third],) if third else (),
        seed=seed,
        embeddings=str(out / "embeddings") if config.embeddings is None else config.embeddings,
        optim=replace(config.optim, lr=lr),
    )
    return Job(method, third, seed, lr, own, out / "runs" / name)


class _Pace:
    """How many trainings there are, and how much time has passed and is left; a limit of 0 minutes is no limit."""

    def __init__(self, total: int, max_minutes: float) -> None:
        self.total, self._limit, self._start = total, 60 * max_minutes, time.monotonic()

    def so_far(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def minutes_left(self) -> float:
        """The limit for `train`: 0 when there is none, and above 0 when there is one."""
        return max(self._limit - self.so_far(), 1e-3) / 60 if self._limit else 0.0


def _run(job: Job, done: int, pace: _Pace) -> bool:
    """Trains and evaluates a job unless that is done; False when training was stopped on request."""
    evaluated = (job.folder / "evaluation.json").is_file()
    # figures of another schema were counted in another way
    current = evaluated and job.evaluation().get("schema") == SCHEMA
    if evaluated:
        parts = describe_parts(*open_data(job.config))
        changed = changed_parts(read_description(job.folder).get("data", {}), parts)
        if changed:
            raise CheckpointError(
                f"{job.folder}: the data has changed since this run was trained: {', '.join(changed)}. Put it back, or "
                "give another --out, so that all runs are compared on the same data"
            )
    differing = differing_keys(job.folder / "config.toml", job.config, all_keys=True) if evaluated else []
    if current and not any(key.startswith("classes:") for key in differing):
        return True
    print(
        f"[{done}/{pace.total}] {job.label}, seed {job.seed}, lr {job.lr:g} ({duration(pace.so_far())} so far)",
        flush=True,
    )
    trained = train(job.config, job.folder, max_minutes=pace.minutes_left())
    if trained.finished:
        print("  " + evaluate_run(job.folder).text().replace("\n", "\n  "), flush=True)
    return not trained.stopped
