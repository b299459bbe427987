"""Stored embeddings: rows per second of random sorted batches from our store, parquet and npy files in a tar.

    python benchmarks/store.py [--rows 200000] [--width 768] [--batch-size 4096] [--rounds 5] [--out FILE.json]

Every side hands on float32 tensors [B, P] of the same fp16 numbers, from files that the page cache holds. Tar and
parquet are also read in file order, their best case; a tar cannot be read in any other. Rounds
take turns in this process.
"""

import argparse
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped, import-not-found]
import torch
import webdataset
from pyarrow import parquet
from torch import Tensor

from threetowers.compare.machine import machine
from threetowers.store.read import FEATURES_FILE, FIXED, Contents, Store, layout

TABLES = {
    "rows": (
        "Random or ordered batches from each format: `rows per second`, how many times as fast ours is, and "
        "`spread`, the fastest round divided by the slowest."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

TAR_ROWS = 20_000  # enough to time, since it is the slowest by far
PACKAGES = ("webdataset", "pyarrow", "torch", "numpy")


def write_store(folder: Path, features: np.ndarray) -> Store:
    """Our store with these features, without a tower that computes them."""
    n, width = features.shape
    contents = Contents("benchmark", "image", width, "fp16", FIXED, n, n)
    plan = layout(contents)
    arrays = {"ids": np.arange(n, dtype=np.uint64), "features": features, "usable": np.ones(n, dtype=bool)}
    with (folder / FEATURES_FILE).open("wb") as file:
        file.write(plan.header)
        for key, slot in plan.slots.items():
            file.seek(slot.offset)
            file.write(arrays[key].tobytes())
    return Store(folder, contents)


def write_tar(path: Path, features: np.ndarray) -> None:
    with webdataset.TarWriter(str(path)) as tar:
        for index, row in enumerate(features[:TAR_ROWS]):
            tar.write({"__key__": f"{index:09d}", "npy": row})


def write_parquet(path: Path, features: np.ndarray) -> None:
    """fp16 as fixed-size binary, groups of 1,024 rows, uncompressed: the form that reads fastest of those tried."""
    width = features.shape[1]
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(2 * width), len(features), [None, pa.py_buffer(features.tobytes())]
    )
    table = pa.table({"features": column})
    parquet.write_table(table, path, row_group_size=1024, compression="none", use_dictionary=False)


def as_tensor(table: Any, width: int) -> Tensor:
    """A parquet table's only column as float32 [B, P]."""
    column = table.column("features").combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    flat = np.frombuffer(column.buffers()[1], dtype=np.float16)
    start = column.offset * width
    block = flat[start : start + len(column) * width]
    return torch.from_numpy(block.reshape(-1, width).astype(np.float32))


def random_parquet(file: Any, rows: np.ndarray, width: int) -> Tensor:
    """The row groups that hold the rows, decoded, and the rows taken from them."""
    groups = np.unique(rows // 1024)
    table = file.read_row_groups(groups.tolist())
    at = np.searchsorted(groups, rows // 1024) * 1024 + rows % 1024
    return as_tensor(table.take(pa.array(at)), width)


def tar_batches(path: Path, batch_size: int) -> Iterator[Tensor]:
    data = iter(webdataset.WebDataset(str(path), shardshuffle=False).decode().to_tuple("npy"))
    while rows := [row for (row,) in islice(data, batch_size)]:
        yield torch.from_numpy(np.stack(rows).astype(np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/store.json"))
    arguments = parser.parse_args()
    n, width, size = arguments.rows, arguments.width, arguments.batch_size
    rng = np.random.default_rng(0)
    features = rng.standard_normal((n, width), dtype=np.float32).astype(np.float16)
    batches = [np.sort(rng.choice(n, size, replace=False)) for _ in range(max(1, n // size))]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = write_store(folder, features)
        write_tar(folder / "features.tar", features)
        write_parquet(folder / "features.parquet", features)
        file = parquet.ParquetFile(folder / "features.parquet", memory_map=True)
        assert torch.equal(store.rows(batches[0]), random_parquet(file, batches[0], width))
        tar_head = next(tar_batches(folder / "features.tar", size))
        assert torch.equal(tar_head, torch.from_numpy(features[: len(tar_head)].astype(np.float32)))
        contenders: dict[str, Callable[[], Iterator[Tensor]]] = {
            "threetowers store, random": lambda: map(store.rows, batches),
            "parquet, random": lambda: (random_parquet(file, rows, width) for rows in batches[:4]),
            "parquet, file order": lambda: (
                as_tensor(pa.Table.from_batches([part]), width) for part in file.iter_batches(size)
            ),
            "webdataset npy, file order": lambda: tar_batches(folder / "features.tar", size),
        }
        rates: dict[str, list[float]] = {contender: [] for contender in contenders}
        for round_number in range(arguments.rounds + 1):
            for contender, make in contenders.items():
                start = time.perf_counter()
                done = sum(len(block) for block in make())
                if round_number:
                    rates[contender].append(done / (time.perf_counter() - start))
    ours = max(rates["threetowers store, random"])
    rows = [
        {
            "contender": contender,
            "rows_per_second": max(values),
            "ours_is_faster": ours / max(values),
            "spread": max(values) / min(values),
        }
        for contender, values in rates.items()
    ]
    print(f"{'contender':<28} {'rows/s':>12} {'ours is faster':>15} {'fastest/slowest':>16}")
    for row in rows:
        numbers = f"{row['rows_per_second']:>12,.0f} {row['ours_is_faster']:>15.2f} {row['spread']:>16.2f}"
        print(f"{row['contender']:<28} {numbers}")
    result = {"machine": machine(), "versions": versions, "options": vars(arguments), "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1, default=str))
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
