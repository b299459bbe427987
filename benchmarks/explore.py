"""How fast the page of `explore` answers: queries a second over many images, and a move of α.

    python benchmarks/explore.py [--sizes 10000 100000] [--width 512] [--queries 200] [--clients 1 8] [--out FILE]

N images with made-up unit vectors, asked over HTTP on loopback, as the page asks: 12 answers in JSON. `main pair` is a
run without a third tower, `combination` a run with one, whose vectors are twice as wide. Each query is another image of
the N, so that no tower takes part: a typed text costs its text tower's forward in addition, once. `α moves` are the
same query with another α each time, one after the other. Server and clients share one process and its cores. The second
table is one query without HTTP: the plain product and `topk` that the page uses, beside `evaluate/search.py`, which is
made for many queries at a time; `same` says whether both name the same images.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import torch
from torch import Tensor

from measure import best, interleaved, write
from threetowers.compare.machine import machine
from threetowers.data.source import Record, Source
from threetowers.evaluate.search import top_k
from threetowers.explore.explorer import Explorer
from threetowers.explore.gallery import Features, Gallery
from threetowers.explore.listen import Listener
from threetowers.explore.models import Model
from threetowers.explore.nearest import exact
from threetowers.explore.server import application
from threetowers.objective.losses import unit

TABLES = {
    "rows": (
        "Answers a second (`per second`) over `N` images with so many `clients` asking at a time, and the `median ms` "
        "and `slowest ms` (95 of 100 are faster) that each waits."
    ),
    "search": (
        "One query without HTTP: `ms`, their `ratio` to the plain product, and whether the answers are the `same`."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""
ANSWERS = 12


class Numbered:
    """A source of N images that cannot be read, each with one caption."""

    name, fingerprint, class_names = "made up", "0" * 64, ()

    def record(self, index: int) -> Record:
        return Record(f"{index}.jpg", (f"caption number {index}",))


def vectors(num: int, width: int, seed: int) -> Tensor:
    """Unit vectors fp32 [N, D]."""
    return unit(torch.randn(num, width, generator=torch.Generator().manual_seed(seed)))


def explorer(num: int, width: int, third: bool) -> Explorer:
    """The page's models and gallery, with made-up vectors."""
    systems = ("main", "third") if third else ("main",)
    run = SimpleNamespace(described={"method": "3t" if third else "baseline"}, scale=100.0)
    model = cast(Model, SimpleNamespace(folder=Path("run"), label="run", run=run, systems=systems))
    images = {name: vectors(num, width, place) for place, name in enumerate(systems)}
    texts = {name: vectors(1, width, 9) for name in systems}
    index = torch.arange(num)
    gallery = Gallery("made up", cast(Source, Numbered()), index.tolist(), ["a caption"], [0])
    return Explorer([model], gallery, [Features(images, texts, index)])


@contextmanager
def served(asked: Explorer) -> Iterator[str]:
    """A server of this process on a free port of loopback; gives its address."""
    ports: Queue[int] = Queue()
    server = Listener(application(asked, [Path("run")]), "127.0.0.1", 0, ports.put)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield f"http://127.0.0.1:{ports.get(timeout=60)}/api/search"
    finally:
        server.should_exit = True
        thread.join()


def answers(address: str, bodies: list[dict[str, Any]], clients: int) -> tuple[float, list[float]]:
    """Answers a second, and the seconds that each took."""
    connections = [httpx2.Client(timeout=120) for _ in range(clients)]
    own = threading.local()

    def ask(body: dict[str, Any]) -> float:
        if not hasattr(own, "client"):
            own.client = connections.pop()
        start = time.perf_counter()
        own.client.post(address, json=body).raise_for_status()
        return time.perf_counter() - start

    kept = list(connections)
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, bodies[: 2 * clients]))
        start = time.perf_counter()
        times = list(pool.map(ask, bodies))
        seconds = time.perf_counter() - start
    for client in kept:
        client.close()
    return len(bodies) / seconds, times


def row(contender: str, num: int, clients: int, measured: tuple[float, list[float]]) -> dict[str, Any]:
    rate, times = measured
    slowest = sorted(times)[int(0.95 * len(times))]
    found = {
        "contender": contender, "N": num, "clients": clients, "per second": rate,
        "median ms": 1e3 * statistics.median(times), "slowest ms": 1e3 * slowest,
    }  # fmt: skip
    print("  ".join(f"{value:.1f}" if isinstance(value, float) else str(value) for value in found.values()))
    return found


def measure(num: int, width: int, queries: int, clients: list[int]) -> list[dict[str, Any]]:
    rows = []
    for contender, third in (("main pair", False), ("combination", True)):
        asked = explorer(num, width, third)
        different = [{"image": i * 7919 % num, "alpha": 0.5, "k": ANSWERS} for i in range(queries)]
        moves = [{"image": 0, "alpha": i / queries, "k": ANSWERS} for i in range(queries)]
        with served(asked) as address:
            rows += [row(contender, num, each, answers(address, different, each)) for each in clients]
            if third:
                rows.append(row("α moves", num, 1, answers(address, moves, 1)))
    return rows


def searched(num: int, width: int, rounds: int) -> list[dict[str, Any]]:
    """One query by the plain product and by the exact search of many."""
    candidates, query = vectors(num, width, 0), vectors(1, width, 1)
    times = interleaved(
        {
            "product and topk": lambda: exact(query, candidates, ANSWERS),
            "top_k": lambda: top_k(query, candidates, ANSWERS),
        },
        rounds, torch.device("cpu"),
    )  # fmt: skip
    rows = [row for _, row in exact(query, candidates, ANSWERS)[0]]
    same = rows == top_k(query, candidates, ANSWERS)[1][0].tolist()
    ours = best(times["product and topk"], torch.device("cpu"))
    return [
        {"contender": name, "N": num, "ms": 1e3 * min(each), "ratio": min(each) / ours, "same": same}
        for name, each in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/explore.json"))
    options = parser.parse_args()
    rows = [
        row for num in options.sizes for row in measure(num, options.width, options.queries, options.clients)
    ]
    search = [row for num in options.sizes for row in searched(num, options.width, options.rounds)]
    for each in search:
        print(
            "  ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in each.values())
        )
    write(options.out, {"machine": machine("cpu"), "width": options.width, "rows": rows, "search": search})


if __name__ == "__main__":
    main()
