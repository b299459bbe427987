"""Ranks of both directions of retrieval beside one bare fp32 product of the same size, and beside ranks in fp64.

    python benchmarks/ranks.py [--kinds plain ties] [--sizes 5000 20000] [--width 512] [--rounds 2] [--out FILE]

N images with one text each. `product` is the matrix product of images and texts in fp32, 256 images at a time, thrown
away: it has every score that both directions need. `ours` is `evaluate/ranks.py`. `fp64` is
`retrieval.weighted_ranks` in both directions, which `ours` must equal; it runs up to --fp64-most. `plain` features are
noisy copies of random vectors, about half of which find their partner. `ties` has a hundred different vectors, so that
every score occurs very often. Contenders take turns in this process; memory is the rise of the highest resident size in
a process that makes the features and ranks once.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from measure import best, interleaved, write
from threetowers.compare.machine import machine
from threetowers.evaluate.ranks import both_ranks
from threetowers.evaluate.retrieval import BLOCK, weighted_ranks
from threetowers.objective.losses import unit

TABLES = {
    "rows": (
        "`seconds`, their `ratio` to the product, `spread`, the slowest round divided by the fastest, `extra MB` of "
        "memory beyond the features, and whether the ranks are the `same` as in fp64."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""
KINDS = ["plain", "ties"]


def features(kind: str, num: int, width: int) -> tuple[Tensor, Tensor]:
    """Unit vectors of images and of texts, fp32 [N, D]."""
    generator = torch.Generator().manual_seed(0)
    if kind == "ties":
        few = unit(torch.randint(-1, 2, (100, width), generator=generator).float())
        return few[torch.randint(0, 100, (num,), generator=generator)], few[torch.arange(num) % 100]
    image = unit(torch.randn(num, width, generator=generator))
    noise = torch.randn(num, width, generator=generator) / width**0.5
    return image, unit(image + 4.5 * noise)


def product(image: Tensor, text: Tensor) -> None:
    for start in range(0, len(image), BLOCK):
        image[start : start + BLOCK] @ text.T


def ours(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    return both_ranks([(image, text)], [(1.0,)], torch.arange(len(text)), BLOCK)


def in_fp64(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    own = torch.arange(len(text))
    return weighted_ranks([(image, text)], [(1.0,)], own, own), weighted_ranks(
        [(text, image)], [(1.0,)], own, own
    )


def highest_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1e3


def extra_mb(kind: str, num: int, width: int) -> float:
    """How far ranking raises the highest resident size of a fresh process."""
    command = [sys.executable, __file__, "--memory", kind, str(num), str(width)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(result.stdout.split()[-1])


def measure(kind: str, num: int, width: int, rounds: int, fp64_most: int) -> list[dict[str, Any]]:
    image, text = features(kind, num, width)
    contenders: dict[str, Callable[[], object]] = {
        "product": lambda: product(image, text),
        "ours": lambda: ours(image, text),
    }
    same: bool | str = ""
    if num <= fp64_most:
        contenders["fp64"] = lambda: in_fp64(image, text)
        same = all(torch.equal(a, b) for a, b in zip(ours(image, text), in_fp64(image, text), strict=True))
    times = interleaved(contenders, rounds, torch.device("cpu"), warm_ups=0)
    reference = best(times["product"], torch.device("cpu"))
    rows = []
    for label, seconds in times.items():
        row = {
            "features": kind, "N": num, "contender": label, "seconds": min(seconds), "ratio": min(seconds) / reference,
            "spread": max(seconds) / min(seconds), "extra MB": extra_mb(kind, num, width) if label == "ours" else "",
            "same": same if label == "ours" else "",
        }  # fmt: skip
        print("  ".join(f"{value:.2f}" if isinstance(value, float) else f"{value}" for value in row.values()))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5000, 20000])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--fp64-most", type=int, default=20000)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/ranks.json"))
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        image, text = features(options.memory[0], *map(int, options.memory[1:]))
        before = highest_mb()
        ours(image, text)
        print(highest_mb() - before)
        return
    rows = []
    for kind in options.kinds:
        for num in options.sizes:
            rows += measure(kind, num, options.width, options.rounds, options.fp64_most)
    write(
        options.out,
        {"machine": machine("cpu"), "width": options.width, "rounds": options.rounds, "rows": rows},
    )


if __name__ == "__main__":
    main()
