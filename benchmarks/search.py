"""Exact search for the best candidates beside faiss's flat index and beside a product with torch.topk.

    python benchmarks/search.py [--candidates 200000] [--queries 1024] [--width 512] [--k 10] [--rounds 3] [--out FILE]

`ours` is `evaluate/search.py`, `faiss` an IndexFlatIP that holds the candidates already (`pip install faiss-cpu`; left
out where it is not installed), `product` an fp32 product and torch.topk over blocks of candidates. `clusters` are
vectors around a thousand centres, as captions of a few subjects are. `offset` have a mean of half their length, as
features of a trained tower often do. Contenders take turns in this process, with as many threads for faiss as torch
has. Recall is the share of the best of a search in fp64 that is found, with its order left aside.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from measure import interleaved, write
from threetowers.compare.machine import machine
from threetowers.evaluate.search import BLOCK, top_k
from threetowers.objective.losses import unit

TABLES = {
    "rows": (
        "`seconds` of the fastest round, their `ratio` to ours, `spread`, the slowest round divided by the fastest, "
        "and `recall` against a search in fp64."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""
KINDS = ["plain", "clusters", "offset"]
_ROWS = 20_000  # candidates at a time in fp64


def features(kind: str, num: int, width: int, generator: torch.Generator) -> Tensor:
    """Unit vectors fp32 [N, D]; those of a kind are alike from call to call, so that queries resemble candidates."""
    shared = torch.Generator().manual_seed(1)
    noise = torch.randn(num, width, generator=generator)
    if kind == "clusters":
        centres = torch.randn(1000, width, generator=shared)
        return unit(centres[torch.randint(0, 1000, (num,), generator=generator)] + 0.5 * noise)
    if kind == "offset":
        return unit(torch.randn(width, generator=shared) + noise)
    return unit(noise)


def product(queries: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Indices of the k best by fp32 scores, int64 [Q, k]."""
    best = torch.full((len(queries), k), -torch.inf)
    index = torch.zeros(len(queries), k, dtype=torch.int64)
    for start in range(0, len(candidates), BLOCK):
        scores = queries @ candidates[start : start + BLOCK].T
        found = torch.topk(scores, min(k, scores.shape[1]), dim=1)
        both = torch.cat([best, found.values], dim=1)
        best, places = torch.topk(both, k, dim=1)
        index = torch.cat([index, found.indices + start], dim=1).gather(1, places)
    return index


def in_fp64(queries: Tensor, candidates: Tensor, k: int) -> Tensor:
    best, index = (
        torch.empty(len(queries), 0, dtype=torch.float64),
        torch.empty(len(queries), 0, dtype=torch.int64),
    )
    for start in range(0, len(candidates), _ROWS):
        scores = queries.double() @ candidates[start : start + _ROWS].double().T
        numbers = torch.arange(start, start + scores.shape[1]).expand_as(scores)
        best, places = torch.topk(torch.cat([best, scores], dim=1), min(k, start + scores.shape[1]), dim=1)
        index = torch.cat([index, numbers], dim=1).gather(1, places)
    return index


def faiss_flat(candidates: Tensor, k: int) -> Callable[[Tensor], Tensor] | None:
    """A search of faiss with the candidates in its index; None where faiss is not installed."""
    if importlib.util.find_spec("faiss") is None:
        return None
    faiss: Any = importlib.import_module("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(candidates.shape[1])
    index.add(candidates.numpy())
    return lambda queries: torch.from_numpy(index.search(queries.numpy(), k)[1])


def recall(found: Tensor, expected: Tensor) -> float:
    return float((found[:, :, None] == expected[:, None, :]).any(2).double().mean())


def measure(kind: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    candidates = features(kind, options.candidates, options.width, generator)
    queries = features(kind, options.queries, options.width, generator)
    k = options.k
    contenders: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: top_k(queries, candidates, k)[1],
        "product": lambda: product(queries, candidates, k),
    }
    flat = faiss_flat(candidates, k)
    if flat is not None:
        contenders["faiss"] = lambda: flat(queries)
    expected = in_fp64(queries, candidates, k)
    times = interleaved(contenders, options.rounds, torch.device("cpu"), warm_ups=1)
    rows = []
    for name, seconds in times.items():
        row = {
            "features": kind, "contender": name, "seconds": min(seconds), "ratio": min(seconds) / min(times["ours"]),
            "spread": max(seconds) / min(seconds), "recall": recall(contenders[name](), expected),
        }  # fmt: skip
        print("  ".join(f"{value:.3f}" if isinstance(value, float) else f"{value}" for value in row.values()))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--candidates", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/search.json"))
    options = parser.parse_args()
    rows = [row for kind in KINDS for row in measure(kind, options)]
    settings = {name: getattr(options, name) for name in ("candidates", "queries", "width", "k", "rounds")}
    write(options.out, {"machine": machine("cpu"), **settings, "rows": rows})


if __name__ == "__main__":
    main()
