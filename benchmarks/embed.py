"""Embedding with a frozen image tower: ours beside a plain loop with open_clip, from memory and from tar shards.

    python benchmarks/embed.py [--device cpu] [--images 128] [--rounds 2] [--out runs/bench/embed.json]

Five minutes on two slow cores. The tower is open_clip's ViT-B-32 with random weights, the same for all. From memory,
the plain loop has float tensors ready, as open_clip's transform leaves them, and ours has uint8 pixels, which it
normalises. From shards, both read, decode and resize JPEGs of 256 × 256 pixels: the plain loop with webdataset, workers
and open_clip's transform, ours as `threetowers embed` does (as many workers on a GPU, threads on a CPU), up to the
finished store on the disk; the fingerprint of the tower, which a command takes once, is not counted. Autocast keeps the
weights that it has cast only outside of inference_mode, so the plain loop has its autocast under no_grad too.
Contenders take turns in this process, ratios are to the fastest plain loop of the same kind, and all features are
compared with those of the plain fp32 loop.
"""

import argparse
import copy
import importlib.metadata
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import webdataset as wds
from torch import Tensor, nn

from loader import MEAN, PACKAGES, STD, samples
from measure import best, interleaved, write
from threetowers.compare.machine import machine
from threetowers.data.decode import decode
from threetowers.data.open import open_source
from threetowers.data.shards.write import write_shards
from threetowers.data.source import Source
from threetowers.data.transforms import ImageSpec, fixed_view
from threetowers.run.setup import pick_device
from threetowers.store.embed import write_store
from threetowers.towers.frozen.base import FrozenTower

TABLES = {
    "rows": (
        "Features of the same images: `images per second`, their `ratio` to the fastest plain loop of the "
        "same kind, `spread`, the slowest round divided by the fastest, and the `least cosine` of an image's "
        "features to those of the plain fp32 loop."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

MODEL, WIDTH = "ViT-B-32", 512
SPEC = ImageSpec(224, MEAN, STD)
TRUTH = "memory: open_clip, fp32, inference_mode"
Embed = Callable[[], Tensor]
"""Embeds every image and returns the features float32 [N, 512]."""


def plain_loop(
    visual: nn.Module,
    batches: Callable[[], Iterable[Tensor]],
    device: torch.device,
    dtype: torch.dtype | None,
    mode: Callable[[], AbstractContextManager[Any]],
) -> Tensor:
    """The loop that a user writes; batches: of normalised images float32 [B, 3, 224, 224]."""
    with mode(), torch.autocast(device.type, dtype) if dtype else nullcontext():
        return torch.cat([visual(images.to(device)).float().cpu() for images in batches()])


def shard_batches(
    shards: list[Path], transform: Callable[[Any], Tensor], batch_size: int, workers: int
) -> Iterator[Tensor]:
    """Batches of images out of webdataset; its workers take a shard each, and turns."""
    data = wds.WebDataset([str(path) for path in shards], shardshuffle=False)
    data = data.decode("pilrgb").to_tuple("jpg").map_tuple(transform).batched(batch_size, partial=True)
    for (images,) in wds.WebLoader(data, batch_size=None, num_workers=workers):
        yield images


def our_loop(tower: FrozenTower, batches: list[Tensor], device: torch.device) -> Tensor:
    """batches: of uint8 pixels [B, 3, 224, 224]."""
    return torch.cat([tower(pixels.to(device)).cpu() for pixels in batches])


def our_batches(source: Source, batch_size: int) -> list[Tensor]:
    views = [
        fixed_view(decode(source.image(index), source.record(index).id), SPEC) for index in range(len(source))
    ]
    return [
        torch.from_numpy(np.stack(views[start : start + batch_size]))
        for start in range(0, len(views), batch_size)
    ]


class OurStore:
    """Makes a new store of a source at every call."""

    def __init__(self, tower: FrozenTower, source: Source, place: Path, device: torch.device) -> None:
        self._tower, self._source, self._place, self._device = tower, source, place, device
        self._fingerprints = tower.fingerprints()
        self._number = itertools.count()

    def __call__(self, batch_size: int, workers: int) -> Tensor:
        store = write_store(
            self._tower,
            self._source,
            self._place / f"{self._tower.precision}-{next(self._number)}",
            self._device,
            fingerprints=self._fingerprints,
            batch_size=batch_size,
            workers=workers,
        )
        assert store is not None  # there are no other parts
        return store.rows(np.arange(len(self._source)))


def contenders(
    images: int, batch_size: int, workers: int, device: torch.device, place: Path
) -> dict[str, Embed]:
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms(MODEL)
    visual = model.visual.eval().to(device)  # autocast keeps no cast of a weight that takes no gradient
    shards = write_shards(place / "shards", samples(images), shard_size=-(-images // max(workers, 1)))
    source = open_source(str(place / "shards"))
    floats, pixels = list(shard_batches(shards, transform, batch_size, 0)), our_batches(source, batch_size)
    towers = [
        FrozenTower("third", "benchmark", copy.deepcopy(visual), WIDTH, SPEC, None, precision=precision)
        for precision in ("fp32", "bf16")
    ]
    plain = partial(plain_loop, visual, lambda: floats, device)
    found: dict[str, Embed] = {
        TRUTH: partial(plain, None, torch.inference_mode),
        "memory: open_clip, autocast, inference_mode": partial(plain, torch.bfloat16, torch.inference_mode),
        "memory: open_clip, autocast, no_grad": partial(plain, torch.bfloat16, torch.no_grad),
    }
    found |= {
        f"memory: ours, {tower.precision}": partial(our_loop, tower, pixels, device) for tower in towers
    }
    read = partial(shard_batches, shards, transform, batch_size, workers)
    found |= {
        "shards: open_clip, fp32, inference_mode": partial(
            plain_loop, visual, read, device, None, torch.inference_mode
        ),
        "shards: open_clip, autocast, no_grad": partial(
            plain_loop, visual, read, device, torch.bfloat16, torch.no_grad
        ),
    }
    for tower in towers:
        store = OurStore(tower, source, place / "stores", device)
        found[f"shards: ours, {tower.precision}"] = partial(store, batch_size, workers)
    return found


def kept(embed: Embed, results: dict[str, Tensor], name: str) -> Callable[[], None]:
    def run() -> None:
        results[name] = embed()

    return run


def likeness(features: Tensor, truth: Tensor) -> float:
    """The smallest cosine of an image's features with the true ones, both without what all images have in common.

    webdataset's order of batches is its own, so the nearest image counts.
    """
    a, b = (nn.functional.normalize(each - truth.mean(0), dim=-1) for each in (features, truth))
    return float((a @ b.T).max(dim=1).values.min())


def rows_of(
    times: Mapping[str, list[float]], results: Mapping[str, Tensor], images: int, device: torch.device
) -> list[dict[str, Any]]:
    rates = {name: images / best(values, device) for name, values in times.items()}
    rows = []
    for name, rate in rates.items():
        kind = name.partition(":")[0]
        plain = max(value for other, value in rates.items() if other.startswith(f"{kind}: open_clip"))
        rows.append(
            {
                "contender": name,
                "images_per_second": rate,
                "ratio": rate / plain,
                "spread": max(times[name]) / min(times[name]),
                "least_cosine": likeness(results[name], results[TRUTH]),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/embed.json"))
    options = parser.parse_args()
    device = pick_device(options.device)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    results: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory(prefix="threetowers-embed-") as name:
        taking_part = contenders(options.images, options.batch_size, options.workers, device, Path(name))
        steps = {each: kept(embed, results, each) for each, embed in taking_part.items()}
        times = interleaved(steps, options.rounds, device)
    rows = rows_of(times, results, options.images, device)
    print(f"{'contender':<46} {'images/s':>10} {'ratio':>7} {'slowest/fastest':>16} {'least cosine':>13}")
    for row in rows:
        print(
            f"{row['contender']:<46} {row['images_per_second']:>10.1f} {row['ratio']:>7.2f} {row['spread']:>16.2f} "
            f"{row['least_cosine']:>13.6f}"
        )
    result = {
        "machine": machine(device.type),
        "versions": versions,
        "options": vars(options),
        "model": MODEL,
        "rows": rows,
    }
    write(options.out, result)


if __name__ == "__main__":
    main()
