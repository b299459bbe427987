"""Our loader beside open_clip's webdataset pipeline on the same tar shards: samples per second after warm-up.

    python benchmarks/loader.py [--samples 6000] [--workers 2] [--batch-size 128] [--rounds 3] [--out FILE.json]

The shards hold generated JPEGs of 256 × 256 pixels and their captions. Both sides read, decode, crop to 224 with the
same ranges, tokenise with CLIP's vocabulary and batch; open_clip's also normalises to floats, ours hands on uint8.
Rounds take turns in this process; a round starts its workers, waits for the first batches, and counts the rest.
open_clip's pipeline is `open_clip_train.data.get_wds_dataset`, as it is; its vocabulary is its fast tokenizer's.
"""

import argparse
import importlib.metadata
import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import image_transform
from open_clip_train.data import get_wds_dataset
from PIL import Image

from threetowers.compare.machine import machine
from threetowers.config import InputConfig
from threetowers.data.loader import BatchReader, batches
from threetowers.data.open import open_source
from threetowers.data.order import Order
from threetowers.data.shards.write import ShardSample, write_shards
from threetowers.data.source import Source
from threetowers.data.tokenize import load_tokenizer
from threetowers.data.transforms import ImageSpec

TABLES = {
    "rows": (
        "An epoch after the warm-up: `samples per second`, their `ratio` to those of open_clip, and `spread`, "
        "the fastest round divided by the slowest."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WORDS = (
    "a",
    "the",
    "red",
    "blue",
    "small",
    "large",
    "dog",
    "cat",
    "house",
    "car",
    "on",
    "under",
    "near",
    "tree",
)
DISTINCT = 64  # different pictures; more of them would cost start-up time and change nothing
WARM_UP = 4  # batches
PACKAGES = ("open_clip_torch", "webdataset", "torch", "pillow", "simplejpeg")


def samples(count: int) -> Iterator[ShardSample]:
    files = []
    for index in range(DISTINCT):
        rng = np.random.default_rng(index)
        pixels = np.zeros((256, 256, 3))
        for cells, weight in ((5, 0.6), (40, 0.4)):
            coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            pixels += weight * np.asarray(coarse.resize((256, 256), Image.Resampling.BICUBIC), dtype=float)
        buffer = BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    rng = np.random.default_rng(0)
    for index in range(count):
        caption = " ".join(rng.choice(WORDS, size=10))
        yield ShardSample(f"{index:07d}", files[index % DISTINCT], "jpg", (f"{caption} {index}",))


def open_clip_batches(shards: list[Path], count: int, workers: int, batch_size: int) -> Iterator[int]:
    """The size of each batch of an epoch of open_clip's pipeline."""
    options = Namespace(
        train_data="::".join(map(str, shards)),
        train_num_samples=count,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        workers=workers,
        world_size=1,
        batch_size=batch_size,
    )
    transform = image_transform(224, is_train=True, mean=MEAN, std=STD)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    data = get_wds_dataset(options, transform, is_train=True, tokenizer=tokenizer)
    for images, _ in data.dataloader:
        yield len(images)


def our_batches(source: Source, inputs: InputConfig, batch_size: int, steps: int) -> Iterator[int]:
    order = Order(0, len(source), batch_size)
    tokenizer = load_tokenizer("open_clip", 77)
    reader = BatchReader(source, order, tokenizer, inputs, image=ImageSpec(224, MEAN, STD))
    for batch in batches(reader, 0, steps):
        yield len(batch.index)


def rate(stream: Iterator[int]) -> float:
    """Samples per second after the warm-up."""
    for _ in range(WARM_UP):
        next(stream)
    start = time.perf_counter()
    done = sum(stream)
    return done / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/loader.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    with tempfile.TemporaryDirectory() as name:
        shards = write_shards(name, samples(arguments.samples), shard_size=-(-arguments.samples // 8))
        source = open_source(name)
        steps = len(source) // arguments.batch_size
        plain = InputConfig(crop_scale=(0.9, 1.0), workers=arguments.workers)
        contenders: dict[str, Callable[[], Iterator[int]]] = {
            "open_clip, webdataset": lambda: open_clip_batches(
                shards, arguments.samples, arguments.workers, arguments.batch_size
            ),
            "threetowers": lambda: our_batches(source, plain, arguments.batch_size, steps),
            "threetowers, simplejpeg": lambda: our_batches(
                source, replace(plain, decoder="simplejpeg"), arguments.batch_size, steps
            ),
        }
        rates: dict[str, list[float]] = {contender: [] for contender in contenders}
        for _ in range(arguments.rounds):
            for contender, make in contenders.items():
                rates[contender].append(rate(make()))
    reference = max(next(iter(rates.values())))
    rows = [
        {
            "contender": contender,
            "samples_per_second": max(values),
            "ratio": max(values) / reference,
            "spread": max(values) / min(values),
        }
        for contender, values in rates.items()
    ]
    print(f"{'contender':<26} {'samples/s':>10} {'ratio':>7} {'fastest/slowest':>16}")
    for row in rows:
        print(
            f"{row['contender']:<26} {row['samples_per_second']:>10.0f} {row['ratio']:>7.2f} {row['spread']:>16.2f}"
        )
    result: dict[str, Any] = {
        "machine": machine(),
        "versions": versions,
        "options": vars(arguments),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1, default=str))
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
