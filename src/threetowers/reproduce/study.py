"""The study as one command: what is missing is run, in an order in which nothing waits, and records are kept.

It can be killed at any time. Finished units have records, and a unit that was begun continues from its checkpoint.
Records that were made on another machine count as well.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from threetowers.compare.concurrency import Concurrency
from threetowers.compare.runs import PRIMARY
from threetowers.compare.side_by_side import Stopped
from threetowers.errors import DataError
from threetowers.progress import duration
from threetowers.reproduce.plan import Protocol, Unit, chosen_parts, tuning_units, units
from threetowers.reproduce.records import Record, read_records
from threetowers.reproduce.runner import Runner
from threetowers.reproduce.tasks import Places, RunTask, TowerTask, render_world

RELATIVE_COST = {
    "baseline": 0.7,
    "lit": 0.35,
    "lit-unlocked": 0.7,
    "3t": 1.0,
    "3t-main": 1.0,
    "3t-regression": 0.9,
}
"""Of a training step, in steps of 3T; for the estimate before the start."""
SECONDS_AROUND = 15.0
"""What start, evaluation and record of a run take, for the estimate."""
TOWER_STEP = 0.9  # of a pretraining step, in steps of 3T

Chosen = dict[tuple[str, str], float]
"""The learning rate by label and third tower of the tuning units."""


def reproduce(
    protocol: Protocol, places: Places, *, only: Sequence[str] = (), jobs: int = 0, max_minutes: float = 0.0
) -> dict[str, Record] | None:
    """Runs what is missing of the study and returns all its records; None when it was stopped on request.

    only: claims and parts; all without. jobs: runs at a time, 0 takes what a trial finds fastest. max_minutes: stop
    after this long, to be continued. Raises UsageError and DataError as the runs do.
    """
    parts = chosen_parts(protocol, only)
    study = _Study(protocol, places, Runner(places.out, max_minutes))
    try:
        study.run(parts, jobs)
    except Stopped:
        return None
    return read_records(places.records)


def trials_of(records: Iterable[Record]) -> dict[tuple[str, str], dict[float, float]]:
    """The validation metric of each learning rate, by label and third tower; a trial that diverged counts as 0."""
    trials: dict[tuple[str, str], dict[float, float]] = {}
    for record in records:
        if record.settings["part"] == "tuning":
            key = record.settings["label"], record.settings["third"]
            trials.setdefault(key, {})[record.settings["lr"]] = record.metrics.get(f"val/{PRIMARY}", 0.0)
    return trials


def learning_rates(protocol: Protocol, records: Iterable[Record]) -> tuple[Chosen, list[float]]:
    """The best learning rate of every tuned label and third tower, and the rates by which the grid must be extended.

    A trial that diverged counts as 0. Where the best is the lowest or the highest of those tried, the next beyond it
    is asked for, up to the protocol's number of extensions on either side.
    """
    trials = trials_of(records)
    chosen = {key: max(sorted(tried), key=tried.__getitem__) for key, tried in trials.items()}
    low, high = min(protocol.lrs), max(protocol.lrs)
    wanted = []
    for key, best in chosen.items():
        tried = trials[key]
        if len(protocol.lrs) == 1 or not set(protocol.lrs) <= tried.keys():
            continue  # nothing is tuned, or the grid itself is not done
        for edge, factor in ((min(tried), 0.5), (max(tried), 2.0)):
            steps_beyond = round(abs(math.log2(edge / (low if factor < 1 else high))))
            if best == edge and steps_beyond < protocol.max_extensions:
                wanted.append(edge * factor)
    return chosen, sorted(set(wanted))


class _Study:
    """One call of `reproduce`."""

    def __init__(self, protocol: Protocol, places: Places, runner: Runner) -> None:
        self.protocol, self.places, self.runner = protocol, places, runner

    def run(self, parts: Sequence[str], jobs: int) -> None:
        """Makes the worlds that are missing, then the trials, then the third towers and all other runs."""
        protocol, places = self.protocol, self.places
        for folder in (places.out, places.records):
            folder.mkdir(parents=True, exist_ok=True)
        rest = [unit for part in parts if part != "tuning" for unit in units(protocol, part)]  # type: ignore[arg-type]
        tuning = [*tuning_units(protocol), *self._extension()] if "tuning" in parts else []
        missing = [unit for unit in (*tuning, *rest) if not self._is_done(unit)]
        towers = self._towers(missing)
        print(
            f"{len(missing):,} of {len(tuning) + len(rest):,} runs and {len(towers)} third towers are to be made"
        )
        if not missing:
            return
        worlds = [(unit.seed, unit.num_train) for unit in missing]
        seeds = sorted({protocol.tuning_seed, *(tower.seed for tower in towers)})
        for world in dict.fromkeys([*((seed, protocol.num_train) for seed in seeds), *worlds]):
            render_world(places, *world, protocol.num_eval)
        self._choose(jobs, missing, len(towers))
        self._tune(tuning)  # with the third towers of the package
        self.runner.run(towers, "third tower")
        self._runs(self._tasks(rest), "run")

    def _is_done(self, unit: Unit) -> bool:
        return self.places.record(unit.name).is_file()

    def _towers(self, missing: Iterable[Unit]) -> list[TowerTask]:
        """The towers of seeds that are needed and not on disk."""
        wanted = dict.fromkeys(
            TowerTask(self.places, unit.third, unit.seed, self.protocol.num_train)
            for unit in missing
            if unit.third and self._third(unit).startswith("file:")
        )
        return [t for t in wanted if not (t.folder / "pretrain.json").is_file() or not t.record.is_file()]

    def _third(self, unit: Unit) -> str:
        return self.places.third(unit.third, unit.seed, self.protocol.tuning_seed) if unit.third else ""

    def _choose(self, jobs: int, missing: Sequence[Unit], num_towers: int) -> None:
        """How many runs train at a time; says so, and how long all will take."""
        first = next((unit for unit in missing if unit.method == "3t" and unit.part == "tuning"), missing[0])
        trial = replace(first, seed=self.protocol.tuning_seed, num_train=self.protocol.num_train)
        self.runner.choose(
            jobs,
            self._task(trial, 1e-3).config,
            len(missing),
            lambda found: _estimate(missing, num_towers, found, self.places.out),
        )

    def _task(self, unit: Unit, lr: float) -> RunTask:
        data = self.places.world(unit.seed, unit.num_train)
        config = unit.config(
            lr, str(data), self._third(unit), str(self.places.embeddings), dict(self.protocol.smoke)
        )
        return RunTask(self.places, unit, config)

    def _tune(self, tuning: list[Unit]) -> None:
        """Runs the trials, and those by which the grid is extended until no best rate is on its edge."""
        waiting = tuning
        while waiting:
            self._runs([self._task(unit, unit.lr or 0.0) for unit in waiting], "trial")
            waiting = [unit for unit in self._extension() if not self._is_done(unit)]
            if waiting:
                said = ", ".join(f"{lr:g}" for lr in sorted({unit.lr or 0.0 for unit in waiting}))
                print(f"a best learning rate is on the edge of the grid: {said} is tried as well", flush=True)

    def _extension(self) -> list[Unit]:
        """The trials beyond the grid that the records ask for, of every label whose best rate is next to one."""
        chosen, lrs = learning_rates(self.protocol, read_records(self.places.records).values())
        return [
            unit
            for unit in tuning_units(self.protocol, lrs)
            if unit.lr in (chosen[unit.label, unit.third] * 2, chosen[unit.label, unit.third] / 2)
        ]

    def _tasks(self, rest: Sequence[Unit]) -> list[RunTask]:
        """The runs after the tuning, with their learning rates."""
        chosen, _ = learning_rates(self.protocol, read_records(self.places.records).values())
        if len(self.protocol.lrs) == 1:
            chosen = dict.fromkeys((unit.tuned for unit in rest), self.protocol.lrs[0])
        if lacking := sorted({unit.tuned for unit in rest if unit.lr is None} - chosen.keys()):
            named = ", ".join(" ".join(key).strip() for key in lacking)
            raise DataError(
                f"{self.places.records}: there is no learning rate for {named}; the part tuning chooses them"
            )
        tasks = [self._task(unit, unit.lr or chosen[unit.tuned]) for unit in rest]
        baselines = {
            task.unit.seed: task
            for task in tasks
            if task.unit.part == "main" and task.unit.method == "baseline"
        }
        return [
            replace(task, baseline=baselines.get(task.unit.seed))
            if task.unit.part == "main" and task.unit.method == "lit"
            else task
            for task in tasks
        ]

    def _runs(self, tasks: Iterable[RunTask], what: str) -> None:
        """The runs that have no record; the baselines that others are averaged with go first."""
        missing = [task for task in tasks if not task.record.is_file()]
        beside = [task.baseline for task in missing if task.baseline is not None]
        first = {task.name: task for task in beside if not task.has_features()}
        self.runner.run(list(first.values()), what)
        self.runner.run([task for task in missing if task.name not in first], what)


def _estimate(missing: Sequence[Unit], num_towers: int, found: Concurrency, out: Path) -> str:
    """How long the runs will take, from the step that the trial of their concurrency measured."""
    seconds = found.step_seconds
    if seconds is None:
        return "how long it takes is known after the first runs"
    steps = sum(RELATIVE_COST[unit.method] * unit.steps for unit in missing) + 1_000 * TOWER_STEP * num_towers
    total = steps * seconds + len(missing) * SECONDS_AROUND / found.jobs
    return f"about {duration(total)} on this machine, by a step of 3T of {1000 * seconds:.0f} ms; {out} is resumable"
