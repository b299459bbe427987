"""The forecasts of `advise` beside full runs: how often they name the winner, and how often their intervals hold.

    python benchmarks/forecasts.py [--seeds 101 102 103] [--thirds matched mismatched] [--study DIR] [--out FILE]

A comparison is one seed of the study of the claims with one of its third towers. The pilots see the world and the third
tower of that seed, which `threetowers reproduce` leaves in the folder of the study. The full runs are those of the
committed records: each method at the learning rate that the study tuned, with the validation metric after its last
step. `advise` knows none of that, and tries three learning rates of its own. Pilots that are done are not repeated.
"""

import argparse
from pathlib import Path
from typing import Any

from measure import write
from threetowers.compare.advise import advise
from threetowers.compare.machine import machine
from threetowers.config import CompareConfig, Method
from threetowers.errors import UsageError
from threetowers.reproduce.plan import FULL, Unit
from threetowers.reproduce.records import read_records
from threetowers.reproduce.tasks import Places

TABLES = {
    "rows": (
        "By comparison and method: the forecast of validation mean R@1 with its 95 % interval and the chance of "
        "leading, and the `full` run's figure."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""
METHODS: tuple[Method, ...] = ("baseline", "lit", "3t", "3t-main")
LRS = (1e-3, 2e-3, 4e-3)
METRIC = "val/mean_r@1"


def full_runs(records: Path, third: str, seed: int) -> dict[str, float]:
    """The metric of each method's full run, of those that have a record."""
    found = {}
    for record in read_records(records).values():
        own = record.settings
        beside = own["part"] == "main" and own["seed"] == seed and own["third"] in ("", third)
        if beside and own["label"] in METHODS and METRIC in record.metrics:
            found[str(own["label"])] = record.metrics[METRIC]
    return found


def compared(
    places: Places, records: Path, third: str, seed: int, out: Path, steps: int
) -> list[dict[str, Any]]:
    """The rows of one comparison; raises UsageError where a full run is missing."""
    full = full_runs(records, third, seed)
    missing = [method for method in METHODS if method not in full]
    if missing:
        raise UsageError(
            f"{records}: no record of {', '.join(missing)} for {third}, seed {seed}; run `make claims`"
        )
    unit = Unit("main", "3t-main", "3t-main", third, seed, steps)
    world = places.world(seed, unit.num_train)
    spec = places.third(third, seed, FULL.tuning_seed)
    config = unit.config(LRS[0], str(world), spec, str(places.embeddings), {})
    options = CompareConfig(methods=METHODS, seeds=(0, 1), lrs=LRS)
    advice = advise(config, options, out)
    assert advice is not None, "nothing asked it to stop"
    rows = []
    for each in advice["methods"]:
        found = each["forecast"]
        rows.append(
            {
                "third": third, "seed": seed, "method": each["method"], "forecast": found["value"],
                "low": found["low"], "high": found["high"], "leads": found["leads"], "full": full[each["method"]],
                "holds": found["low"] <= full[each["method"]] <= found["high"],
            }
        )  # fmt: skip
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Comparisons, those whose winner was named, the points lost by the others, and the intervals that hold."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["third"], row["seed"]), []).append(row)
    named = [max(group, key=lambda row: row["leads"]) for group in groups.values()]
    best = [max(row["full"] for row in group) for group in groups.values()]
    lost = [most - row["full"] for most, row in zip(best, named, strict=True)]
    return {
        "comparisons": len(groups),
        "winner_named": sum(points == 0 for points in lost),
        "mean_points_lost": 100 * sum(lost) / len(lost),
        "mean_chance_said": sum(row["leads"] for row in named) / len(named),
        "intervals": len(rows),
        "intervals_that_hold": sum(row["holds"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--thirds", nargs="+", default=["matched", "mismatched"])
    parser.add_argument("--study", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--records", type=Path, default=Path("docs/claims/runs"))
    parser.add_argument("--steps", type=int, default=FULL.steps)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/forecasts.json"))
    arguments = parser.parse_args()
    places = Places(arguments.study, arguments.records)
    rows = []
    for third in arguments.thirds:
        for seed in arguments.seeds:
            folder = arguments.out.parent / "forecasts" / f"{third}-seed{seed}"
            rows += compared(places, arguments.records, third, seed, folder, arguments.steps)
    print(f"{'third':<12} {'seed':>5} {'method':<10} {'forecast':>9} {'95 %':>16} {'leads':>6} {'full':>7}")
    for row in rows:
        between = f"{row['low']:.3f} to {row['high']:.3f}"
        print(
            f"{row['third']:<12} {row['seed']:>5} {row['method']:<10} {row['forecast']:>9.3f} {between:>16} "
            f"{row['leads']:>6.2f} {row['full']:>7.3f}"
        )
    found = summary(rows)
    print(", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    write(arguments.out, {"machine": machine("cpu"), "rows": rows, **found})


if __name__ == "__main__":
    main()
