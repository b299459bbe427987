"""What the benchmarks of the training step share: interleaved rounds, and one table with its JSON."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from threetowers.compare.machine import machine

WARM_UPS = 2


def interleaved(
    steps: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm_ups: int = WARM_UPS
) -> dict[str, list[float]]:
    """Seconds of every step in each round; a round takes each contender once, in turn, after the warm-ups."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + warm_ups):
        for name, step in steps.items():
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            if round_number >= warm_ups:
                times[name].append(time.perf_counter() - start)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best(times: list[float], device: torch.device) -> float:
    """The fastest on a CPU, where noise only adds; the median on a GPU."""
    return sorted(times)[len(times) // 2] if device.type == "cuda" else min(times)


def report(
    times: Mapping[str, list[float]],
    samples: int,
    reference: str,
    device: torch.device,
    out: Path,
    **settings: Any,
) -> dict[str, float]:
    """Prints and writes samples per second and ratios to `reference`; returns samples per second by contender."""
    rates = {name: samples / best(values, device) for name, values in times.items()}
    print(f"{'contender':<46} {'samples/s':>10} {'ratio':>7} {'slowest/fastest':>16}")
    rows = []
    for name, rate in rates.items():
        spread = max(times[name]) / min(times[name])
        rows.append(
            {
                "contender": name,
                "samples_per_second": rate,
                "ratio": rate / rates[reference],
                "spread": spread,
            }
        )
        print(f"{name:<46} {rate:>10.1f} {rate / rates[reference]:>7.2f} {spread:>16.2f}")
    write(out, {"machine": machine(device.type), "reference": reference, **settings, "rows": rows})
    return rates


def write(out: Path, result: Mapping[str, Any]) -> None:
    """Writes a benchmark's result as JSON and says where."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")
    print(f"written: {out}")
