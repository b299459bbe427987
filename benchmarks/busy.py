"""Training beside a busy process: how long threads wait actively at a barrier.

    python benchmarks/busy.py [--rounds 3] [--seconds 5] [--out runs/bench/busy.json]

GNU OpenMP's threads spin at every barrier. While another process has one of the cores, the others spin until the kernel
gives that core back. `GOMP_SPINCOUNT` says after how many turns a thread sleeps instead; `threetowers` sets SPINS where
the user has set nothing. Fresh processes train a small convolutional network with all cores: alone, beside a Python
loop, and beside another such training. Settings take turns.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from threetowers.cli import SPINS

TABLES = {
    "rows": (
        "Median `steps per second` beside nothing, a Python loop or another training, the `ratio` to the default of "
        "GNU OpenMP in the same place, and `spread`, the fastest round divided by the slowest."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    f"GOMP_SPINCOUNT={SPINS}": {"GOMP_SPINCOUNT": str(SPINS)},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
BESIDE = ("nothing", "a Python loop", "another training")


def steps(seconds: float) -> float:
    """Steps per second of this process."""
    import timm
    import torch

    from threetowers.run.allocator import keep_freed_memory

    keep_freed_memory()
    torch.manual_seed(0)
    model = timm.create_model("test_convnext2", num_classes=64)
    optimizer = torch.optim.AdamW(model.parameters())
    images = torch.randn(64, 3, 64, 64)
    done, start = -2, time.perf_counter()
    while done < 1 or time.perf_counter() - start < seconds:
        if done == 0:
            start = time.perf_counter()
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1
    return done / (time.perf_counter() - start)


def measured(setting: dict[str, str], beside: str, seconds: float) -> float:
    """Steps per second in a fresh process, while another one is busy."""
    plain = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    busy = None
    if beside == "a Python loop":
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    elif beside == "another training":
        command = [sys.executable, __file__, "--work", "100000"]
        busy = subprocess.Popen(command, env=plain | {"OMP_NUM_THREADS": "1"})
    try:
        command = [sys.executable, __file__, "--work", str(seconds)]
        result = subprocess.run(command, env=plain | setting, check=True, stdout=subprocess.PIPE, text=True)
    finally:
        if busy is not None:
            busy.kill()
            busy.wait()
    return float(result.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/busy.json"))
    parser.add_argument("--work", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(steps(options.work))
        return
    rates: dict[tuple[str, str], list[float]] = {(where, name): [] for where in BESIDE for name in SETTINGS}
    for _ in range(options.rounds):
        for where, name in rates:
            rates[where, name].append(measured(SETTINGS[name], where, options.seconds))
    rows: list[dict[str, Any]] = []
    for (where, name), values in rates.items():
        rate, default = statistics.median(values), statistics.median(rates[where, "default"])
        rows.append({
            "beside": where, "setting": name, "steps per second": rate, "ratio": rate / default,
            "spread": max(values) / min(values),
        })  # fmt: skip
        print(f"{where:<18} {name:<26} {rate:>7.2f} steps/s {rate / default:>6.2f}")

    from measure import write
    from threetowers.compare.machine import machine

    write(options.out, {"machine": machine("cpu"), "rounds": options.rounds, "rows": rows})


if __name__ == "__main__":
    main()
