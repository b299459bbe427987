"""From a finished run to its record."""

from pathlib import Path
from typing import Any

from threetowers.compare.attributes import known_attributes
from threetowers.compare.figures import (
    MAIN_SYSTEM,
    Evaluated,
    ends_equal,
    measure,
    metric_rows,
    score_average,
)
from threetowers.compare.machine import machine
from threetowers.compare.runs import PRIMARY, Job
from threetowers.compare.showcase import third_checks
from threetowers.config import RunConfig
from threetowers.evaluate.evaluation import evaluate_run
from threetowers.objective.pairs import METHODS
from threetowers.reproduce.plan import Unit
from threetowers.reproduce.records import Record, pack, within
from threetowers.run.finished import FinishedRun, load_run
from threetowers.settings import as_plain
from threetowers.towers.frozen.base import num_parameters
from threetowers.towers.weights import read_safetensors


def settings_of(unit: Unit, lr: float) -> dict[str, Any]:
    """The settings that a record is found by."""
    return {
        "part": unit.part, "label": unit.label, "method": unit.method, "third": unit.third, "seed": unit.seed,
        "lr": lr, "steps": unit.steps, "num_train": unit.num_train, "size": unit.size,
    }  # fmt: skip


def diverged(unit: Unit, lr: float, folder: Path, error: Exception) -> Record:
    """The record of a unit whose training did not stay finite; it has no metrics, and counts as 0 in a choice."""
    return Record(
        settings_of(unit, lr),
        {},
        described={"diverged": within(folder.parents[1], str(error)), "machine": machine("cpu")},
    )


def tuning_record(unit: Unit, config: RunConfig, folder: Path) -> Record:
    """The record of a trial: the validation metric after the last step. Nothing else is looked at."""
    rows = metric_rows(folder)
    value = next(row[f"val/{PRIMARY}"] for row in reversed(rows) if f"val/{PRIMARY}" in row)
    described = _described(config, folder, load_run(folder))
    return Record(settings_of(unit, config.optim.lr), {f"val/{PRIMARY}": value}, described=described)


def evaluated(unit: Unit, config: RunConfig, folder: Path) -> Evaluated:
    """A finished run with what its evaluation writes, which is made now if it is missing."""
    if not (folder / "evaluation.json").is_file() or not (folder / "features.safetensors").is_file():
        evaluate_run(folder)
    job = Job(unit.method, unit.third, unit.seed, config.optim.lr, config, folder)
    return Evaluated(job, job.evaluation(), read_safetensors(folder / "features.safetensors"))


def full_record(
    unit: Unit, config: RunConfig, folder: Path, world: Path, baseline: Evaluated | None = None
) -> Record:
    """The record of a finished run.

    world: the folder of its data; attributes are measured where that is the built-in world. baseline: the run of the
    same seed with which a LiT is averaged as control.
    """
    run = evaluated(unit, config, folder)
    measured = measure(run)
    finished = load_run(folder)
    metrics = {f"val/{PRIMARY}": run.evaluation["val"][PRIMARY], **measured.metrics}
    if (world / "world.json").is_file():
        known = known_attributes(finished, world)
        metrics |= {f"attribute/{name}": value for name, value in known.zero_shot.items()}
        metrics |= {f"probe/{name}": value for name, value in known.probe.items()}
    hits: dict[str, Any] = {}
    if MAIN_SYSTEM in measured.ranks:
        i2t, t2i = measured.ranks[MAIN_SYSTEM].hits()
        hits |= {"i2t": pack(i2t), "t2i": pack(t2i)}
    if measured.class_hits is not None:
        hits["classes"] = pack(measured.class_hits)
    checks = {"ends": ends_equal(run)} if run.combination else {}
    method = METHODS[unit.method]
    if method.third_beside:
        checks |= third_checks(folder)._asdict()
    control = score_average(baseline, run).figures() if baseline is not None else None
    described = _described(config, folder, finished) | {
        "num_trainable": finished.described["num_trainable"],
        "num_main": num_parameters(finished.img) + num_parameters(finished.txt),
    }
    return Record(
        settings_of(unit, config.optim.lr), metrics, run.combination, control, hits, checks, described
    )


def _described(config: RunConfig, folder: Path, finished: FinishedRun) -> dict[str, Any]:
    rows = metric_rows(folder)
    seconds, curve = 0.0, []
    for row in rows:
        seconds = row.get("seconds", seconds)
        if f"val/{PRIMARY}" in row:
            curve.append([row["step"], seconds, row[f"val/{PRIMARY}"]])
    return {
        "seconds": max(row["seconds"] for row in rows if "seconds" in row),
        "curve": curve,
        "scale": finished.scale,
        "config": within(folder.parents[1], as_plain(config)),
        "machine": machine("cpu"),
    }
