"""Does bf16 learn as well as fp32, and is it faster: 3T on the built-in world in each precision, over seeds.

    python benchmarks/precision.py [--seeds 0 1 2] [--steps 250] [--device cpu] [--out runs/bench/precision.json]

Mean R@1 of validation after training, its 95 % t-interval over seeds, the seed-paired difference to fp32, and samples
per second (median of the logged steps; the precisions take turns). About ten minutes on two cores.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from measure import write
from threetowers.compare.machine import machine
from threetowers.config import RunConfig
from threetowers.evaluate.statistics import t_interval
from threetowers.recipes import PRESETS
from threetowers.train.loop import train

TABLES = {
    "rows": (
        "Validation after training in each `precision`: the `values` of the seeds, their `mean`, training "
        "`samples per second`, the 95 % `interval` of the mean, and the seed-paired `difference` to fp32 as "
        "mean, low and high."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

PRECISIONS: tuple[Literal["fp32", "bf16-autocast"], ...] = get_args(get_type_hints(RunConfig)["precision"])
METRIC = "val/mean_r@1"


def measured(folder: Path) -> tuple[float, float]:
    """The last validation of a run, and its median rate."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, float]] = [json.loads(line) for line in lines]
    rates = [row["examples_per_second"] for row in rows if "examples_per_second" in row]
    return [row[METRIC] for row in rows if METRIC in row][-1], statistics.median(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=Path("runs/precision"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench/precision.json"))
    arguments = parser.parse_args()
    preset = PRESETS["shapes"]()
    base = replace(preset, third=("shapes:matched",), steps=arguments.steps, device=arguments.device)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in PRECISIONS}
    for seed in arguments.seeds:
        for precision in PRECISIONS:
            folder = arguments.folder / f"{precision}-{seed}-{arguments.steps}"
            train(replace(base, seed=seed, precision=precision), folder)
            found[precision].append(measured(folder))
    rows: list[dict[str, Any]] = []
    for name, runs in found.items():
        values, rates = zip(*runs, strict=True)
        paired = [value - plain for value, plain in zip(values, [v for v, _ in found["fp32"]], strict=True)]
        row: dict[str, Any] = {"precision": name, "values": values, "mean": statistics.mean(values),
                               "samples_per_second": statistics.median(rates)}  # fmt: skip
        if len(values) > 1:
            row["interval"] = t_interval(list(values))[1:]
            row["difference"] = t_interval(paired)
        rows.append(row)
        spread = (
            f" [{100 * row['interval'][0]:.1f}, {100 * row['interval'][1]:.1f}]" if len(values) > 1 else ""
        )
        gap = " ".join(f"{100 * value:+.1f}" for value in row.get("difference", ()))
        print(
            f"{name:<14} {METRIC} {100 * row['mean']:.1f}{spread}, minus fp32 (mean, low, high) {gap}, "
            f"{row['samples_per_second']:.0f} samples/s"
        )
    result = {
        "machine": machine(arguments.device),
        "metric": METRIC,
        "steps": arguments.steps,
        "seeds": arguments.seeds,
        "rows": rows,
    }
    write(arguments.out, result)


if __name__ == "__main__":
    main()
