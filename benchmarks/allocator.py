"""What `keep_freed_memory` brings: steps of a small image tower with and without it, interleaved in fresh processes.

python benchmarks/allocator.py [--rounds 3]
"""

import argparse
import statistics
import subprocess
import sys

PROGRAM = """
import sys, time, timm, torch
from threetowers.run.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
model, images = timm.create_model("test_nfnet", num_classes=0), torch.randn(128, 3, 32, 32)
times = []
for _ in range(8):
    start = time.perf_counter()
    model(images).sum().backward()
    times.append(time.perf_counter() - start)
print(128 / min(times[2:]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {"plain": [], "kept": []}
    for _ in range(arguments.rounds):
        for name, values in rates.items():
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, check=True
            )
            values.append(float(done.stdout))
    for name, values in rates.items():
        print(f"{name:<6} {' '.join(f'{value:7.0f}' for value in values)} images/s")
    print(f"ratio of medians {statistics.median(rates['kept']) / statistics.median(rates['plain']):.2f}")


if __name__ == "__main__":
    main()
