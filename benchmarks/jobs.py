"""A comparison one run after the other and side by side: wall clock of `threetowers compare`.

    python benchmarks/jobs.py [--steps 60] [--seeds 0 1 2] [--jobs 1 2] [--rounds 2] [--out runs/bench/jobs.json]

Baseline, LiT and 3T on the built-in world with the `shapes` preset, all seeds with one learning rate, evaluations and
start-up included. Each contender is a fresh command in a fresh folder; the frozen features are stored before. Settings
take turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import write
from threetowers.compare.machine import machine

TABLES = {
    "rows": (
        "Median `seconds` of the whole comparison with so many runs at a time, the `ratio` of the first row's to "
        "them, and `spread`, the slowest round divided by the fastest."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

METHODS = ("baseline", "lit", "3t")


def compared(folder: Path, words: list[str]) -> float:
    """Seconds of a comparison in a folder that does not exist yet."""
    command = [sys.executable, "-m", "threetowers.cli", "compare", "shapes", "--lrs", "2e-3"]
    command += ["--third", "matched=shapes:matched", "--embeddings", str(folder.parent / "embeddings")]
    start = time.perf_counter()
    subprocess.run([*command, "--out", str(folder), *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--jobs", type=int, nargs="+", default=[1, 2], help="runs at a time; 0 is compare's own choice"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/jobs.json"))
    arguments = parser.parse_args()
    seeds = [str(seed) for seed in arguments.seeds]
    times: dict[int, list[float]] = {jobs: [] for jobs in arguments.jobs}
    settings: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compared(folder / "stores", ["--steps", "1", "--methods", "lit", "3t", "--jobs", "1"])
        for round_number in range(arguments.rounds):
            for jobs, seconds in times.items():
                out = folder / f"{jobs}-{round_number}"
                words = ["--steps", str(arguments.steps), "--methods", *METHODS, "--seeds", *seeds]
                seconds.append(compared(out, [*words, "--jobs", str(jobs)]))
                settings[jobs] = json.loads((out / "concurrency.json").read_text(encoding="utf-8"))
                print(f"--jobs {jobs}: {seconds[-1]:.0f} s", flush=True)
    first = statistics.median(times[arguments.jobs[0]])
    rows = [
        {
            "--jobs": jobs, "runs at a time": settings[jobs]["jobs"], "threads": settings[jobs]["threads"],
            "seconds": statistics.median(seconds), "ratio": first / statistics.median(seconds),
            "spread": max(seconds) / min(seconds),
        }
        for jobs, seconds in times.items()
    ]  # fmt: skip
    write(
        arguments.out,
        {
            "machine": machine("cpu"), "steps": arguments.steps, "runs": len(METHODS) * len(seeds),
            "rounds": arguments.rounds, "rows": rows,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
