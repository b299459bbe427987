"""Embedding images of a folder on a CPU: ours beside the bare network at each batch size and a plain loop of timm.

    python benchmarks/pieces.py [--images 512] [--rounds 2] [--models NAME …] [--out runs/bench/pieces.json]

The networks have random weights. The JPEGs have 320 × 240 pixels. `bare` is the network on float tensors in memory, in
batches of one size. `timm loop` is what timm's documentation shows: its transform, a DataLoader with 2 workers and
batches of 256, features in fp32. It runs in this process, which keeps freed memory (`run/allocator.py`), and in fresh
processes with the allocator as it is. `ours` writes the store, reading, decoding and resizing included. Contenders in
this process take turns. The bits of the bare network's features are compared with those of the largest batch.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from measure import best, interleaved, write
from threetowers.compare.machine import machine
from threetowers.data.open import open_source
from threetowers.data.transforms import normalise
from threetowers.run.allocator import return_freed_memory
from threetowers.run.setup import pick_device
from threetowers.store.embed import write_store
from threetowers.towers.frozen.load import load_frozen

TABLES = {
    "rows": (
        "`images per second`, the `ratio` to the fastest bare network of the same model, `spread`, the slowest round "
        "divided by the fastest, and whether the features have the `same bits` as those of the largest batch."
    ),
    "memory": "MB of resident memory before and after a store was written, freed memory returned.",
}
"""The sentence that docs/benchmarks.md puts before each table."""

MODELS = ("tf_efficientnet_lite0", "vit_small_patch16_224")
SIZES = (64, 32, 16, 8, 4, 2)
BARE_IMAGES = 128
LOOP_BATCH, WORKERS = 256, 2


class Photos(Dataset[Tensor]):
    """The images of a folder through timm's transform."""

    def __init__(self, folder: Path, transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.transform = sorted(folder.glob("*.jpg")), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def write_photos(folder: Path, num: int) -> None:
    """Smooth random JPEGs with a caption each."""
    folder.mkdir()
    for index in range(num):
        pixels = np.random.default_rng(index).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((320, 240)).save(folder / f"{index:05d}.jpg", quality=85)
        (folder / f"{index:05d}.txt").write_text(f"photo {index}")


@torch.inference_mode()
def bare(network: nn.Module, images: Tensor, size: int) -> Tensor:
    return torch.cat([network(images[start : start + size]) for start in range(0, len(images), size)])


@torch.inference_mode()
def timm_loop(network: nn.Module, photos: Photos) -> Tensor:
    loader = DataLoader(photos, batch_size=LOOP_BATCH, num_workers=WORKERS)
    return torch.cat([network(images) for images in loader])


def plain_process(name: str, folder: Path) -> float:
    """Seconds of timm's loop in a fresh process."""
    command = [sys.executable, __file__, "--loop", name, str(folder)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(result.stdout.split()[-1])


def loop_alone(name: str, folder: Path) -> float:
    network = timm.create_model(name, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    start = time.perf_counter()
    timm_loop(network, Photos(folder, transform))
    return time.perf_counter() - start


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1e3


def measure(
    name: str, folder: Path, scratch: Path, rounds: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of one model, and the memory before and after."""
    device = pick_device("cpu")
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0).eval()
    timm.models.save_for_hf(network, scratch / name, safe_serialization=True)
    tower = load_frozen(f"timm:local-dir:{scratch / name}", "third")
    config = timm.data.resolve_model_data_config(network)
    photos = Photos(folder, timm.data.create_transform(**config, is_training=False))
    images = normalise(torch.randint(0, 256, (BARE_IMAGES, 3, 224, 224), dtype=torch.uint8), tower.image)
    source, numbers = open_source(str(folder)), iter(range(10**6))
    fingerprints = tower.fingerprints()

    def ours() -> None:
        out = scratch / f"{name}-{next(numbers)}"
        write_store(tower, source, out, device, fingerprints=fingerprints)
        return_freed_memory()

    before = resident_mb()
    ours()
    memory = {"model": name, "before": before, "after": resident_mb()}
    contenders: dict[str, Callable[[], object]] = {
        f"bare, batches of {size}": partial(bare, network, images, size)
        for size in SIZES
        if size <= BARE_IMAGES
    }
    contenders |= {"timm loop": partial(timm_loop, network, photos), "ours": ours}
    times = interleaved(contenders, rounds, device, warm_ups=0)
    times["timm loop, plain process"] = [plain_process(name, folder) for _ in range(rounds)]
    truth = bare(network, images, SIZES[0])
    counts = {label: BARE_IMAGES if label.startswith("bare") else len(photos) for label in times}
    rates = {label: counts[label] / best(seconds, device) for label, seconds in times.items()}
    fastest = max(rate for label, rate in rates.items() if label.startswith("bare"))
    rows = []
    for label, rate in rates.items():
        size = int(label.rpartition(" ")[2]) if label.startswith("bare") else 0
        rows.append({
            "model": name, "contender": label, "images per second": rate, "ratio": rate / fastest,
            "spread": max(times[label]) / min(times[label]),
            "same bits": torch.equal(bare(network, images, size), truth) if size else "",
        })  # fmt: skip
        print(f"{name:<24} {label:<24} {rate:>8.1f} images/s {rate / fastest:>6.2f} {rows[-1]['same bits']}")
    return rows, memory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("runs/bench/pieces.json"))
    parser.add_argument("--loop", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        print(loop_alone(options.loop[0], Path(options.loop[1])))
        return
    rows: list[dict[str, Any]] = []
    memory: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "photos"
        write_photos(folder, options.images)
        for model in options.models:
            found, resident = measure(model, folder, Path(name), options.rounds)
            rows += found
            memory.append(resident)
            print(
                f"{model:<24} resident {resident['before']:.0f} MB before, {resident['after']:.0f} MB after"
            )
    result = {
        "machine": machine("cpu"), "images": options.images, "rounds": options.rounds, "timm": timm.__version__,
        "rows": rows, "memory": memory,
    }  # fmt: skip
    write(options.out, result)


if __name__ == "__main__":
    main()
