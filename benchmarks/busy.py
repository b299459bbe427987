"""Training and embedding beside a busy process: how long threads wait actively at a barrier, and how many there are.

    python benchmarks/busy.py [--rounds 2] [--seconds 6] [--out runs/bench/busy.json]

GNU OpenMP's threads spin at every barrier. While another process has one of the cores, the others spin until the kernel
gives that core back. `GOMP_SPINCOUNT` says after how many turns a thread sleeps instead; `threetowers` sets SPINS where
the user has set nothing. Fresh processes take training steps of LiT and 3T (the towers of the preset `shapes`, loader
workers included), or embed 320 × 240 JPEGs with `tf_efficientnet_lite0`: alone, beside a Python loop, and beside a
training on one thread. Settings take turns.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from threetowers.cli import SPINS
from threetowers.config import Method

TABLES = {
    "rows": (
        "Of each `work` the median `rate` (training steps or images per second) beside nothing, a Python loop or "
        "another training; `of quiet`, its ratio to ours beside nothing; `ratio` to the default of GNU OpenMP in the "
        "same place; and `spread`, the fastest round divided by the slowest."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

OURS = f"ours, GOMP_SPINCOUNT={SPINS}"
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    OURS: {"GOMP_SPINCOUNT": str(SPINS)},
    "ours, one thread": {"GOMP_SPINCOUNT": str(SPINS), "OMP_NUM_THREADS": "1"},
}
METHODS: dict[str, Method] = {"LiT": "lit", "3T": "3t"}
WORKS = (*METHODS, "embed")
BESIDE = ("nothing", "a Python loop", "another training")
NUM_PHOTOS, EMBED_TOWER, THIRD = 2_000, "tf_efficientnet_lite0", "test_convnext2"


def make_inputs(folder: Path) -> None:
    """Photos with captions, two towers of random weights, and the stored features of the smaller one."""
    import timm
    import torch

    from pieces import write_photos

    write_photos(folder / "photos", NUM_PHOTOS)
    torch.manual_seed(0)
    for name in (EMBED_TOWER, THIRD):
        timm.models.save_for_hf(
            timm.create_model(name, num_classes=10), folder / name, safe_serialization=True
        )
    for method in METHODS.values():
        train_steps(folder, method, 0.1)


def train_steps(folder: Path, method: Method, seconds: float) -> float:
    """Training steps per second."""
    from threetowers.data.loader import batches
    from threetowers.recipes import PRESETS
    from threetowers.run.setup import prepare
    from threetowers.train.step import TrainingStep

    config = PRESETS["shapes"]()
    config = replace(
        config, method=method, third=(f"timm:local-dir:{folder / THIRD}",), data=str(folder / "photos"),
        classes=None, steps=10**6, inputs=replace(config.inputs, workers=2),
    )  # fmt: skip
    setup = prepare(config, folder / "runs" / method)
    step = TrainingStep(config, setup.model, setup.device, setup.thirds.features)
    done, start = -3, time.perf_counter()
    for batch in batches(setup.reader(), 0, 10**5):
        step(batch, lr=1e-4)
        done += 1
        if done == 0:
            start = time.perf_counter()
        if done > 0 and time.perf_counter() - start > seconds:
            break
    return done / (time.perf_counter() - start)


def embedded(folder: Path, seconds: float) -> float:
    """Images per second, from JPEGs to a store; about as many as take that long on a quiet machine."""
    from array import array

    from threetowers.data.open import open_source
    from threetowers.data.source import Subset
    from threetowers.run.setup import pick_device
    from threetowers.store.embed import write_store
    from threetowers.towers.frozen.load import load_frozen

    device, source = pick_device("cpu"), open_source(str(folder / "photos"))
    tower = load_frozen(f"timm:local-dir:{folder / EMBED_TOWER}", "third")
    with tempfile.TemporaryDirectory() as name:
        for label, num in (("first", 32), ("timed", max(64, int(60 * seconds)))):
            start = time.perf_counter()
            part = Subset(source, array("q", range(num)), label)
            write_store(tower, part, Path(name) / label, device)
    return num / (time.perf_counter() - start)


def measured(folder: Path, work: str, setting: dict[str, str], beside: str, seconds: float) -> float:
    """The rate in a fresh process, while another one is busy."""
    plain = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    }
    busy = None
    if beside == "a Python loop":
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    elif beside == "another training":
        command = [sys.executable, "-c", BUSY_TRAINING]
        busy = subprocess.Popen(command, env=plain | {"OMP_NUM_THREADS": "1"})
    try:
        command = [sys.executable, __file__, "--work", work, str(folder), str(seconds)]
        result = subprocess.run(command, env=plain | setting, check=True, stdout=subprocess.PIPE, text=True)
    finally:
        if busy is not None:
            busy.kill()
            busy.wait()
    return float(result.stdout.split()[-1])


BUSY_TRAINING = """
import timm, torch
model = timm.create_model("test_convnext2", num_classes=64)
images = torch.randn(64, 3, 64, 64)
while True:
    model(images).square().mean().backward()
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/busy.json"))
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--beside", nargs="+", choices=BESIDE, default=list(BESIDE))
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work, folder, seconds = options.work
        inputs, limit = Path(folder), float(seconds)
        print(embedded(inputs, limit) if work == "embed" else train_steps(inputs, METHODS[work], limit))
        return
    rates: dict[tuple[str, str, str], list[float]] = {
        (work, where, name): [] for work in options.works for where in options.beside for name in SETTINGS
    }
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        for _ in range(options.rounds):
            for (work, where, name), found in rates.items():
                found.append(measured(Path(folder), work, SETTINGS[name], where, options.seconds))
    rows: list[dict[str, Any]] = []
    for (work, where, name), values in rates.items():
        rate = statistics.median(values)
        quiet, default = rates[work, options.beside[0], OURS], rates[work, where, "default"]
        rows.append({
            "work": work, "beside": where, "setting": name, "rate": rate, "of quiet": rate / statistics.median(quiet),
            "ratio": rate / statistics.median(default), "spread": max(values) / min(values),
        })  # fmt: skip
        print(
            f"{work:<6} {where:<18} {name:<26} {rate:>7.2f}/s {rows[-1]['of quiet']:>6.2f} {rows[-1]['ratio']:>6.2f}"
        )

    from measure import write
    from threetowers.compare.machine import machine

    write(options.out, {"machine": machine("cpu"), "rounds": options.rounds, "rows": rows})


if __name__ == "__main__":
    main()
