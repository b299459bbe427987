"""The runs of a comparison: which they are, and their training and evaluation.

Every method gets the same data, order, batch, steps and augmentation. Each tries the same learning rates with the
first seed; validation picks one of them, and the other seeds use it. A run that is finished is not repeated. Runs
train one after the other in this process, or side by side in processes of their own.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from threetowers.compare.claims import Key
from threetowers.compare.concurrency import Concurrency, choose
from threetowers.compare.side_by_side import Outcome, Shared, Stopped, side_by_side
from threetowers.config import CompareConfig, RunConfig
from threetowers.errors import CheckpointError, NonFiniteError, UsageError
from threetowers.evaluate.evaluation import SCHEMA, check_evaluation, evaluate_run, open_labelled
from threetowers.files import write_whole
from threetowers.objective.pairs import METHODS, Objective, method_label, objective
from threetowers.progress import duration
from threetowers.run.finished import changed_parts, describe_parts, read_description
from threetowers.run.pixels import pixels
from threetowers.run.setup import check_settings, describe_data, learned_tokenizers, open_data, prepare
from threetowers.run.thirds import captioned
from threetowers.towers.frozen.load import load_frozen
from threetowers.train.guards import StopRequest, differing_keys, holds_run
from threetowers.train.loop import train

DIVERGED = "diverged.txt"
"""In the folder of a trial whose training did not stay finite: the error."""
PRIMARY = "mean_r@1"
"""The retrieval metric that picks learning rates and ranks the methods."""


@dataclass(frozen=True)
class Job:
    """One run of the comparison.

    trial: whether it is one of several learning rates, of which one may fail.
    """

    method: str
    third: str
    seed: int
    lr: float
    config: RunConfig
    folder: Path
    trial: bool = False

    @property
    def key(self) -> Key:
        return self.method, self.third

    @property
    def label(self) -> str:
        """The method as the report names it, with its third tower when that has a name."""
        return method_label(self.method, "" if self.third == "third" else self.third)

    @property
    def name(self) -> str:
        """The run as the terminal names it."""
        return f"{self.label}, seed {self.seed}, lr {self.lr:g}"

    @property
    def steps(self) -> int:
        return self.config.steps

    def run(self, stop: StopRequest | None = None, *, max_minutes: float = 0.0) -> Outcome:
        """Trains and evaluates it, or continues it; arguments and errors as in `train`.

        A trial whose training does not stay finite is finished, and its score is 0.
        """
        try:
            trained = train(self.config, self.folder, max_minutes=max_minutes, stop=stop)
        except NonFiniteError as error:
            if not self.trial:
                raise
            write_whole(self.folder / DIVERGED, f"{error}\n")
            return Outcome(True, False, f"{error}\nThis learning rate counts as 0")
        text = evaluate_run(self.folder).text() if trained.finished else ""
        if text and self.trial:  # test figures would tempt to choose by them
            text = f"validation {PRIMARY} {self.score():.1%}"
        return Outcome(trained.finished, trained.stopped, text)

    @property
    def diverged(self) -> bool:
        """Whether it is a trial whose training did not stay finite."""
        return self.trial and (self.folder / DIVERGED).is_file()

    def score(self) -> float:
        """The validation metric that learning rates are chosen by."""
        return 0.0 if self.diverged else float(self.evaluation()["val"].get(PRIMARY, 0.0))

    def evaluation(self) -> dict[str, Any]:
        """The contents of evaluation.json."""
        values: dict[str, Any] = json.loads((self.folder / "evaluation.json").read_bytes())
        return values


Trials = dict[Key, dict[float, float]]
"""The validation metric of each learning rate that was tried with the first seed."""


def train_all(
    config: RunConfig, options: CompareConfig, out: Path, *, max_minutes: float = 0.0, jobs: int = 1
) -> tuple[list[Job], Trials, Concurrency] | None:
    """Trains and evaluates what is missing; returns the runs at the chosen learning rates, the trials, and how many
    runs trained at a time.

    Returns None when it was stopped on request. Arguments and errors as in `comparison.compare`.
    """
    thirds = named_thirds(config)
    keys = check_comparison(config, options, out)
    (out / "images").mkdir(parents=True, exist_ok=True)

    def job(key: Key, seed: int, lr: float) -> Job:
        return make_job(config, thirds, key, seed, lr, out)

    for key in keys:
        for seed in options.seeds:
            for lr in options.lrs:
                each = job(key, seed, lr)
                check_settings(each.config)
                objective(each.config)
                holds_run(each.folder, each.config)  # raises for one with other settings
    schedule, pace = _Schedule(keys, options, job), Pace(max_minutes)
    if schedule.waiting:
        print(schedule.plan(), flush=True)
    concurrency = choose(jobs, [each.config for each in schedule.waiting], out)
    if schedule.waiting and jobs != 1:
        print(concurrency.text(), flush=True)

    def begin(each: Job) -> None:
        schedule.num_begun += 1
        number = f"[{schedule.num_begun}/{schedule.num_trainings}]"
        print(f"{number} {each.name} ({duration(pace.so_far())} so far)", flush=True)

    try:
        if concurrency.jobs > 1 and schedule.waiting:
            make_shared(schedule.waiting)
            shared = Shared(concurrency.jobs, concurrency.threads, dict(learned_tokenizers), pixels())
            num_left = schedule.num_trainings - schedule.num_begun
            finished = side_by_side(
                schedule.waiting, shared, begin, num_left=num_left, max_minutes=pace.minutes_left()
            )
        else:
            finished = _one_after_the_other(schedule.waiting, begin, pace)
        for each in finished:
            schedule.note(each)
    except Stopped:
        return None
    return *schedule.results(), concurrency


def check_comparison(config: RunConfig, options: CompareConfig, out: Path) -> list[Key]:
    """The methods to compare, each with its third tower; says what the data is.

    Raises UsageError or DataError, before an hour of training, for a comparison that cannot be run.
    """
    check_settings(config)
    thirds = named_thirds(config)
    keys = _keys(options, thirds)
    print(describe_data(config), *check_evaluation(config), sep="\n", flush=True)
    _check_usable(config, options, thirds)
    _check_different(config, options, thirds, keys, out)
    return keys


class _Schedule:
    """Which runs there are, in which order they begin, and what the trials of learning rates gave.

    The trials come first, for all methods. The other seeds of a method wait until its rate is chosen.
    """

    def __init__(
        self, keys: list[Key], options: CompareConfig, job: Callable[[Key, int, float], Job]
    ) -> None:
        self.waiting: deque[Job] = deque()
        self.num_trainings = len(keys) * (len(options.lrs) + len(options.seeds) - 1)
        self.num_begun = 0
        """Of the runs that have begun or are done."""
        self._trials: Trials = {key: {} for key in keys}
        self._options, self._job = options, job
        trial = len(options.lrs) > 1
        self._add(replace(job(key, options.seeds[0], lr), trial=trial) for key in keys for lr in options.lrs)
        for key in keys:
            if len(options.lrs) == 1 or self._tried(key):
                self._add_seeds(key)

    def plan(self) -> str:
        """How many runs there are, why, and how many of them are done."""
        rates, seeds = len(self._options.lrs), len(self._options.seeds)
        each, more = "one learning rate", ", one seed" if seeds == 1 else f", {seeds} seeds"
        if rates > 1:
            each = f"{rates} learning rates"
        if rates > 1 and seeds > 1:
            more = f" with the first seed, then {seeds - 1} more at the best one"
        done = f"; {self.num_begun} are done" if self.num_begun else ""
        return f"{self.num_trainings} runs: {len(self._trials)} methods, each with {each}{more}{done}"

    def note(self, job: Job) -> None:
        """Takes note of a run that waited and has finished."""
        self._read(job)
        if job.seed == self._options.seeds[0] and len(self._options.lrs) > 1 and self._tried(job.key):
            self._add_seeds(job.key)

    def results(self) -> tuple[list[Job], Trials]:
        """The runs of every method and seed at the chosen learning rate, and the trials; all runs must be done."""
        jobs = [
            self._job(key, seed, self._chosen(key)) for key in self._trials for seed in self._options.seeds
        ]
        return jobs, {key: {lr: tried[lr] for lr in self._options.lrs} for key, tried in self._trials.items()}

    def _add(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            if is_done(job):
                self.num_begun += 1
                self._read(job)
            else:
                self.waiting.append(job)

    def _add_seeds(self, key: Key) -> None:
        self._add(self._job(key, seed, self._chosen(key)) for seed in self._options.seeds[1:])

    def _read(self, job: Job) -> None:
        if job.seed == self._options.seeds[0]:
            self._trials[job.key][job.lr] = job.score()
        if self._tried(job.key) and self._diverged(job.key):
            raise none_finite(job, self._options)

    def _tried(self, key: Key) -> bool:
        return len(self._trials[key]) == len(self._options.lrs)

    def _diverged(self, key: Key) -> bool:
        """Whether no learning rate can be chosen, because every trial failed."""
        trials = [replace(self._job(key, self._options.seeds[0], lr), trial=True) for lr in self._options.lrs]
        return len(trials) > 1 and all(trial.diverged for trial in trials)

    def _chosen(self, key: Key) -> float:
        lrs = self._options.lrs
        return lrs[0] if len(lrs) == 1 else max(lrs, key=lambda lr: self._trials[key][lr])


def none_finite(job: Job, options: CompareConfig) -> NonFiniteError:
    """For a method of which no learning rate can be chosen. job: any of its trials."""
    return NonFiniteError(
        f"{job.label}: the training did not stay finite with any of the learning rates "
        f"{', '.join(f'{lr:g}' for lr in options.lrs)}; give lower ones with --lrs"
    )


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
    """Raises UsageError for data without a choice of learning rates and towers that do not fit."""
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
        table = objective(
            make_job(config, thirds, (method, third), options.seeds[0], options.lrs[0], out).config
        )
        same = seen.setdefault((third, table), method)
        if same != method:
            raise UsageError(
                f"compare: {same} and {method} are the same with objective.weights = "
                f"{list(config.objective.weights or ())}. Leave out one of them, or give --objective.weights none, "
                "with which each method has its own"
            )


def make_job(config: RunConfig, thirds: dict[str, str], key: Key, seed: int, lr: float, out: Path) -> Job:
    """The run of a method with a third tower, in a folder of `out` that is named after it."""
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


class Pace:
    """How much time has passed and is left; a limit of 0 minutes is no limit."""

    def __init__(self, max_minutes: float) -> None:
        self._limit, self._start = 60 * max_minutes, time.monotonic()

    def so_far(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def minutes_left(self) -> float:
        """The limit for `train`: 0 when there is none, and above 0 when there is one."""
        return max(self._limit - self.so_far(), 1e-3) / 60 if self._limit else 0.0


def is_done(job: Job) -> bool:
    """Whether a job is trained, and evaluated as figures are counted now.

    Raises CheckpointError when that was on other data.
    """
    if job.diverged:
        return True
    if not (job.folder / "evaluation.json").is_file():
        return False
    parts = describe_parts(*open_data(job.config))
    changed = changed_parts(read_description(job.folder).get("data", {}), parts)
    if changed:
        raise CheckpointError(
            f"{job.folder}: the data has changed since this run was trained: {', '.join(changed)}. Put it back, or "
            "give another --out, so that all runs are compared on the same data"
        )
    differing = differing_keys(job.folder / "config.toml", job.config, all_keys=True)
    current = job.evaluation().get("schema") == SCHEMA
    return current and not any(key.startswith("classes:") for key in differing)


def _one_after_the_other(waiting: deque[Job], begin: Callable[[Job], None], pace: Pace) -> Iterator[Job]:
    """Runs the jobs that wait in this process, and yields each that has finished; more may be appended then.

    Raises Stopped when a run was stopped on request.
    """
    while waiting:
        job = waiting.popleft()
        begin(job)
        outcome = job.run(max_minutes=pace.minutes_left())
        if outcome.finished:
            print("  " + outcome.text.replace("\n", "\n  "), flush=True)
            yield job
        if outcome.stopped:
            raise Stopped


def make_shared(jobs: Iterable[Job]) -> None:
    """Stores the frozen features that the jobs read, and makes room for their images, once for all processes."""
    for job in {job.key: job for job in jobs}.values():
        setup = prepare(job.config, job.folder)
        setup.reader()
        for source in (setup.val, setup.test, open_labelled(job.config)):
            if source is not None and len(source):
                setup.thirds.stores(source)
                setup.kept_views(source)
