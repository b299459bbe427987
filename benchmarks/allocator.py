"""Speed of a small image tower with and without `keep_freed_memory`, in fresh processes that take turns.

python benchmarks/allocator.py [--rounds 3] [--batch-size 128] [--out runs/bench/allocator.json]
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from measure import write
from threetowers.compare.machine import machine

TABLES = {
    "rows": (
        "Forward and backward passes with the allocator as it is (plain) and with freed memory kept: `images "
        "per second`, the median of the rounds, and their `ratio` to plain."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

PROGRAM = """
import sys, time, timm, torch
from threetowers.run.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
model, images = timm.create_model("test_nfnet", num_classes=0), torch.randn(int(sys.argv[2]), 3, 32, 32)
times = []
for _ in range(8):
    start = time.perf_counter()
    model(images).sum().backward()
    times.append(time.perf_counter() - start)
print(len(images) / min(times[2:]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/allocator.json"))
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {"plain": [], "kept": []}
    for _ in range(arguments.rounds):
        for name, values in rates.items():
            command = [sys.executable, "-c", PROGRAM, name, str(arguments.batch_size)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            values.append(float(done.stdout))
    plain = statistics.median(rates["plain"])
    rows = []
    for name, values in rates.items():
        middle = statistics.median(values)
        rows.append({"memory": name, "images_per_second": middle, "ratio": middle / plain})
        print(f"{name:<6} {' '.join(f'{value:7.0f}' for value in values)} images/s")
    print(f"ratio of medians {statistics.median(rates['kept']) / plain:.2f}")
    write(arguments.out, {"machine": machine(), "batch_size": arguments.batch_size, "rows": rows})


if __name__ == "__main__":
    main()
