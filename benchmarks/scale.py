"""Start-up time, memory and cost per sample of tar shards, from ten thousand samples to a million.

    python benchmarks/scale.py [--sizes 10000 100000 1000000] [--shard-size 5000] [--out runs/bench/scale.json]

Writes real shards of small JPEGs into a temporary folder (2.5 GB for a million), opens each set twice in processes of
their own with an empty cache between the sizes, splits it, walks a whole epoch's order and reads samples in that order.
Openings are in seconds of wall time, costs per sample in microseconds of processor time. Private memory is what the
system counts as anonymous: mapped pages are the system's cache.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from threetowers.data.open import split
from threetowers.data.order import Order
from threetowers.data.shards.source import open_shards
from threetowers.data.shards.write import ShardSample, write_shards

TABLES = {
    "rows": (
        "One set of shards in each row: seconds to write it, to open it a first and a second time and to "
        "split it, MB of its index and of private memory once opened and after an epoch's order, microseconds "
        "per sample for order, record and image, the size of the training part, and whether the order takes "
        "each sample once."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

NUM_IMAGES = 64  # pictures that the samples share; a comment makes each file different
READS = 20_000
COLUMNS = {
    "samples": "{:,}", "shards": "{:,}", "write_s": "{:.1f}", "first_open_s": "{:.2f}", "second_open_s": "{:.3f}",
    "split_s": "{:.3f}", "index_mb": "{:.1f}", "open_mb": "{:.1f}", "epoch_mb": "{:.1f}", "order_us": "{:.2f}",
    "record_us": "{:.2f}", "image_us": "{:.2f}", "each_once": "{}",
}  # fmt: skip


def samples(num: int) -> Iterator[ShardSample]:
    """Samples with captions of their own, and images whose pixels repeat but whose bytes do not."""
    images = []
    for seed in range(NUM_IMAGES):
        pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((24, 24)).save(buffer, "JPEG")
        images.append(buffer.getvalue())
    for index in range(num):
        caption = f"a small picture of colours, number {index} of a set that is large"
        image = images[index % NUM_IMAGES]
        comment = (
            f"{index:09d}".encode() * 40
        )  # long enough to reach the middle of the file, where images are compared
        segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
        yield ShardSample(f"{index:09d}", image[:2] + segment + image[2:], "jpg", (caption,))


def private_mb() -> float:
    """Anonymous memory of this process in megabytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024 / 1e6


def microseconds(work: Callable[[int], object], items: Sequence[int]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    for item in items:
        work(item)
    return (time.process_time() - start) / len(items) * 1e6


def epoch(order: Order) -> tuple[list[int], float, bool]:
    """The first samples of an epoch, the microseconds per position, and whether each sample came at most once."""
    seen = np.zeros(order.num_samples, dtype=np.uint8)

    def place(position: int) -> None:
        seen[order.index(position)] += 1

    cost = microseconds(place, range(order.epoch_samples))
    each_once = bool(seen.max() == 1 and int(seen.sum()) == order.epoch_samples)
    return [order.index(position) for position in range(min(READS, order.epoch_samples))], cost, each_once


def measure(folder: str) -> dict[str, Any]:
    """What one process sees of a set: the time to open it, its memory, and the cost of a sample."""
    before = private_mb()
    start = time.perf_counter()
    source = open_shards(folder)
    seconds = time.perf_counter() - start
    opened = private_mb()
    start = time.perf_counter()
    train, _, _ = split(source, val_fraction=0.01, test_fraction=0.01)
    split_seconds = time.perf_counter() - start
    chosen, order_us, each_once = epoch(Order(0, len(source), 64))
    epoch_mb = private_mb() - before
    record_us = microseconds(source.record, chosen)
    image_us = microseconds(source.image, chosen)
    return {
        "open_s": seconds,
        "split_s": split_seconds,
        "open_mb": opened - before,
        "epoch_mb": epoch_mb,
        "order_us": order_us,
        "record_us": record_us,
        "image_us": image_us,
        "train": len(train),
        "each_once": each_once,
    }


def in_own_process(folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", str(folder)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(result.stdout))


def one_size(num: int, shard_size: int) -> dict[str, Any]:
    """The row of one size; everything is written to a temporary folder and deleted."""
    with tempfile.TemporaryDirectory(prefix="threetowers-scale-") as name:
        folder, cache = Path(name) / "shards", Path(name) / "cache"
        os.environ["THREETOWERS_CACHE"] = str(cache)
        start = time.perf_counter()
        paths = write_shards(folder, samples(num), shard_size=shard_size)
        write_seconds = time.perf_counter() - start
        for path in paths:  # an hour old, as data is
            os.utime(path, (time.time() - 3600,) * 2)
        first, second = in_own_process(folder), in_own_process(folder)
        largest = max(file.stat().st_size for file in (cache / "index").iterdir())
    return {
        "samples": num,
        "shards": len(paths),
        "write_s": write_seconds,
        "first_open_s": first["open_s"],
        "second_open_s": second["open_s"],
        "index_mb": largest / 1e6,
        **{key: value for key, value in second.items() if key != "open_s"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--shard-size", type=int, default=5_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    rows = [one_size(num, args.shard_size) for num in args.sizes]
    table = [list(COLUMNS), *([form.format(row[name]) for name, form in COLUMNS.items()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
    if args.out:
        from threetowers.compare.machine import machine  # imports torch, which the measured processes do not

        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine(), "reads": READS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
