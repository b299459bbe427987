"""Which method for my data: short pilots of each on growing parts of it, and a forecast for the whole.

A pilot trains on n of the images for as many passes as the whole training makes. The forecast is a straight line
through the logit of the validation metric over log2(n), fitted for each method by least squares; its interval is that
of a new value at the full number of images (the textbook's prediction interval), with one residual variance for all
methods, since each has few pilots. The chance that a method leads comes from draws of these predictions. It is a
forecast from a line: a method whose curve bends beyond the pilots is not where the line says.

    advise(config, options, Path("runs/advise"))
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import special, stats

from threetowers.compare.claims import Key
from threetowers.compare.figures import metric_rows
from threetowers.compare.machine import machine
from threetowers.compare.runs import (
    PRIMARY,
    Job,
    Pace,
    check_comparison,
    is_done,
    make_job,
    make_shared,
    named_thirds,
    none_finite,
)
from threetowers.config import CompareConfig, RunConfig
from threetowers.errors import UsageError
from threetowers.files import write_whole
from threetowers.objective.pairs import method_label
from threetowers.progress import duration
from threetowers.run.setup import open_data

SCHEMA = 1
FILE = "advice.json"
SHARES = (1 / 8, 1 / 4, 1 / 2)
"""Of the training images, in the pilots."""
SURE = 0.9
"""The chance of leading from which on a method is recommended without a second one beside it."""
_LEAST_STEPS = 20
_DRAWS = 20_000


class Pilot(NamedTuple):
    """A finished pilot: what it trained on and for how long, its validation metric and its seconds of training."""

    images: int
    steps: int
    seed: int
    score: float
    seconds: float


class Forecast(NamedTuple):
    """A method's metric at the full number of images, as shares: the line's value, its 95 % interval, and the chance
    that no other method is better. slope: of the line, in logits for each doubling of the images."""

    value: float
    low: float
    high: float
    leads: float
    slope: float


def advise(
    config: RunConfig, options: CompareConfig, out: Path, *, max_minutes: float = 0.0
) -> dict[str, Any] | None:
    """Trains the pilots that are missing in `out` and returns the contents of advice.json; None when it was stopped.

    config: of the full training. Of the learning rates of `options` each method tries all with the smallest pilot and
    keeps the best. Raises UsageError for data that is too small for pilots and whatever training raises.
    """
    if config.embeddings is None:
        config = replace(config, embeddings=str(out / "embeddings"))
    thirds = named_thirds(config)
    keys = check_comparison(config, options, out)
    train, val, _ = open_data(config)
    sizes = pilot_sizes(len(train), config.batch_size)
    pace = Pace(max_minutes)
    whole = (make_job(config, thirds, key, options.seeds[0], options.lrs[0], out) for key in keys)
    make_shared(whole)  # of which the pilots read parts
    total = len(keys) * (len(options.lrs) + len(sizes) * len(options.seeds) - 1)
    done: list[Job] = []
    results: dict[Key, list[Pilot]] = {}
    chosen: dict[Key, float] = {}

    def run(key: Key, images: int, seed: int, lr: float) -> Job | None:
        job = make_job(at_size(config, images, len(train)), thirds, key, seed, lr, out / f"{images}-images")
        job = replace(job, trial=images == sizes[0] and len(options.lrs) > 1)
        done.append(job)
        if not is_done(job):
            number = f"[{len(done)}/{total}]"
            so_far = duration(pace.so_far())
            print(f"{number} {job.name}, {images:,} images ({so_far} so far)", flush=True)
            if not job.run(max_minutes=pace.minutes_left()).finished:
                return None
        return job

    for key in keys:
        trials = {}
        for lr in options.lrs:
            job = run(key, sizes[0], options.seeds[0], lr)
            if job is None:
                return None
            trials[lr] = job
        if all(job.diverged for job in trials.values()):
            raise none_finite(trials[options.lrs[0]], options)
        chosen[key] = max(trials, key=lambda lr: trials[lr].score())
        results[key] = [_pilot(trials[chosen[key]], sizes[0])]
    for images in sizes:
        for key in keys:
            for seed in options.seeds:
                if (images, seed) == (sizes[0], options.seeds[0]):
                    continue
                job = run(key, images, seed, chosen[key])
                if job is None:
                    return None
                results[key].append(_pilot(job, images))
    found = forecasts(results, len(train), len(val))
    advice = _described(config, options, results, found, chosen, len(train), len(val))
    write_whole(out / FILE, json.dumps(advice, indent=1, ensure_ascii=False))
    return advice


def pilot_sizes(num_train: int, batch_size: int) -> list[int]:
    """The numbers of images of the pilots, each of at least two batches; raises UsageError for fewer than two sizes."""
    sizes = [size for share in SHARES if (size := round(num_train * share)) >= 2 * batch_size]
    if len(sizes) < 2:
        needed = math.ceil(2 * batch_size / SHARES[1])
        raise UsageError(
            f"advise: {num_train:,} images to train on are too few for pilots with batches of {batch_size}; {needed:,} "
            "are needed. Give a smaller --batch-size, or find out with `threetowers compare` itself"
        )
    return sizes


def at_size(config: RunConfig, images: int, num_train: int) -> RunConfig:
    """The configuration of a pilot: so many images, and as many passes over them as the whole training makes."""
    share = images / num_train
    steps = max(round(config.steps * share), min(_LEAST_STEPS, config.steps))
    warmup = min(round(config.optim.warmup_steps * share), steps)
    return replace(
        config, steps=steps, optim=replace(config.optim, warmup_steps=warmup),
        inputs=replace(config.inputs, train_images=images),
    )  # fmt: skip


def _pilot(job: Job, images: int) -> Pilot:
    seconds = max((row["seconds"] for row in metric_rows(job.folder) if "seconds" in row), default=0.0)
    return Pilot(images, job.steps, job.seed, job.score(), seconds)


def forecasts(pilots: dict[Key, list[Pilot]], num_train: int, num_val: int) -> dict[Key, Forecast]:
    """Each method's forecast at `num_train` images.

    num_val: of the images that the metric was measured on; a share of 0 or 1 of these is taken as half a query away
    from it. Raises UsageError for pilots of one size or without a residual, from which no interval follows.
    """
    fits: dict[Key, tuple[float, float, float]] = {}
    squares, freedom = 0.0, 0
    for key, rows in pilots.items():
        x = np.log2([row.images for row in rows]) - math.log2(num_train)
        y = special.logit(np.clip([row.score for row in rows], 0.25 / num_val, 1 - 0.25 / num_val))
        if len(set(x)) < 2:
            raise UsageError("advise: the pilots of a method need at least two numbers of images")
        design = np.column_stack([np.ones_like(x), x])
        solution, *_ = np.linalg.lstsq(design, y, rcond=None)
        residual = y - design @ solution
        squares, freedom = squares + float(residual @ residual), freedom + len(y) - 2
        variance = np.linalg.inv(design.T @ design)[0, 0]  # of the line at the full number, where x is 0
        fits[key] = float(solution[0]), 1 + float(variance), float(solution[1])
    if freedom < 1:
        raise UsageError(
            "advise: two pilots for each method leave no residual to judge a forecast by; add --seeds"
        )
    spread = math.sqrt(squares / freedom)
    quantile = float(stats.t.ppf(0.975, freedom))
    generator = np.random.default_rng(0)
    draws = np.stack([
        value + spread * math.sqrt(factor) * generator.standard_t(freedom, _DRAWS) for value, factor, _ in fits.values()
    ])  # fmt: skip
    leads = np.bincount(draws.argmax(axis=0), minlength=len(fits)) / _DRAWS
    found = {}
    for (key, (value, factor, slope)), lead in zip(fits.items(), leads.tolist(), strict=True):
        half = quantile * spread * math.sqrt(factor)
        low, middle, high = (float(special.expit(each)) for each in (value - half, value, value + half))
        found[key] = Forecast(middle, low, high, lead, slope)
    return found


def recommendation(
    found: dict[Key, Forecast],
    pilots: dict[Key, list[Pilot]],
    hours: dict[Key, float],
    num_train: int,
    several: bool,
) -> str:
    """One paragraph: what to train, how sure that is, what it costs, and what it rests on."""

    def name(key: Key) -> str:
        return method_label(key[0], key[1] if several else "")

    ranked = sorted(found, key=lambda key: found[key].leads, reverse=True)
    first, second = ranked[0], ranked[1] if len(ranked) > 1 else None
    best = found[first]
    span = f"{_whole(best.value)} mean R@1 (95 % interval {_whole(best.low)} to {_whole(best.high)})"
    sizes = sorted({row.images for row in pilots[first]})
    seeds = len({row.seed for row in pilots[first]})
    num = sum(map(len, pilots.values()))
    basis = (
        f"This rests on {num} pilots on {sizes[0]:,} to {sizes[-1]:,} of the images, with {seeds} "
        f"seed{'s' if seeds > 1 else ''} each, and on the assumption that each method goes on growing as it did in "
        "them. Only validation images were looked at."
    )
    if second is None or best.leads >= SURE:
        return (
            f"Train {name(first)}. On all {num_train:,} images it is forecast to reach {span}, and to lead with a "
            f"chance of {_chance(best.leads)}. Training takes about {duration(3600 * hours[first])}. {basis}"
        )
    close = [key for key in ranked if found[key].leads >= 1 - SURE]
    together = duration(3600 * sum(hours[key] for key in close))
    return (
        f"The pilots do not settle it. {name(first)} leads with a chance of {_chance(best.leads)} and is forecast to "
        f"reach {span}; {name(second)} leads with a chance of {_chance(found[second].leads)}. Compare "
        f"{' and '.join(map(name, close))} in full, which takes about {together} for one seed of each. {basis}"
    )


def _whole(share: float) -> str:
    return f"{100 * share:.0f} %"


def _chance(share: float) -> str:
    """A share of draws, of which there are too few to tell the last percent from certainty."""
    return "more than 99 %" if share > 0.99 else _whole(share)


def _described(
    config: RunConfig, options: CompareConfig, pilots: dict[Key, list[Pilot]], found: dict[Key, Forecast],
    chosen: dict[Key, float], num_train: int, num_val: int,
) -> dict[str, Any]:  # fmt: skip
    several = len(named_thirds(config)) > 1
    hours = {}
    for key, rows in pilots.items():
        largest = max(rows, key=lambda row: row.images)
        hours[key] = largest.seconds / largest.steps * config.steps / 3600
    return {
        "schema": SCHEMA,
        "data": config.data,
        "metric": f"val/{PRIMARY}",
        "num_train": num_train,
        "num_val": num_val,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "seeds": list(options.seeds),
        "machine": machine(config.device),
        "methods": [
            {
                "method": key[0],
                "third": key[1],
                "label": method_label(key[0], key[1] if several else ""),
                "lr": chosen[key],
                "hours": hours[key],
                "pilots": [row._asdict() for row in rows],
                "forecast": found[key]._asdict(),
            }
            for key, rows in pilots.items()
        ],
        "advice": recommendation(found, pilots, hours, num_train, several),
    }
