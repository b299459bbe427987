"""JPEG bytes to the 224-pixel training crop on one core, beside open_clip's own training transform.

    python benchmarks/decode.py [--sizes 500x375 640x480 1600x1200] [--images 32] [--rounds 6] [--out FILE.json]

Every round takes each contender in turn through the same images in this process, reading them by the same source; the
ratio is of the fastest rounds. open_clip hands on normalised floats; we hand on uint8, and the device normalises, so
one contender of ours normalises on this core too. `difference` is the mean absolute one to our Pillow pixels, of 255.
"""

import argparse
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.transform import image_transform
from PIL import Image

from threetowers.compare.machine import machine
from threetowers.config import InputConfig
from threetowers.data.loader import augmented_views
from threetowers.data.open import open_source
from threetowers.data.order import hash64
from threetowers.data.source import Source
from threetowers.data.transforms import ImageSpec, normalise

TABLES = {
    "rows": (
        "JPEG bytes to a training crop, for each image `size`: `images per second`, their `ratio` to those of "
        "open_clip, `spread`, the slowest round divided by the fastest, and the mean `difference` to our "
        "Pillow pixels, of 255."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SPEC = ImageSpec(224, MEAN, STD)
PACKAGES = ("open_clip_torch", "torchvision", "pillow", "simplejpeg")
PLAIN = InputConfig(crop_scale=(0.9, 1.0))
OURS = {
    "threetowers pillow": PLAIN,
    "threetowers pillow, draft": replace(PLAIN, draft=True),
    "threetowers simplejpeg": replace(PLAIN, decoder="simplejpeg"),
    "threetowers simplejpeg, draft": replace(PLAIN, decoder="simplejpeg", draft=True),
}


def write_photos(folder: Path, size: tuple[int, int], count: int) -> None:
    """JPEGs with large shapes, fine texture and noise, about as many bytes a pixel as photographs have."""
    for index in range(count):
        rng = np.random.default_rng(index)
        pixels = np.zeros((size[1], size[0], 3))
        for cells, weight in ((5, 0.6), (20, 0.25), (80, 0.15)):
            coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            pixels += weight * np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=float)
        pixels += rng.normal(0, 3, pixels.shape)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        image.save(folder / f"{index:04d}.jpg", quality=87)
        (folder / f"{index:04d}.txt").write_text("a picture")


def contenders(source: Source) -> dict[str, Callable[[int], Any]]:
    """Functions from an image's index to what its loader hands on."""
    transform = image_transform(224, is_train=True, mean=MEAN, std=STD)

    def open_clip(index: int) -> Any:
        return transform(Image.open(BytesIO(source.image(index))))

    def ours(inputs: InputConfig) -> Callable[[int], np.ndarray]:
        return lambda index: augmented_views(source, index, "x", hash64(index), inputs, {"img": SPEC})["img"]

    pillow = ours(PLAIN)

    def normalised(index: int) -> torch.Tensor:
        return normalise(torch.from_numpy(pillow(index).copy())[None], SPEC)

    mine: dict[str, Callable[[int], Any]] = {name: ours(inputs) for name, inputs in OURS.items()}
    return {"open_clip, training transform": open_clip, **mine, "threetowers pillow, normalised": normalised}


def measure(size: tuple[int, int], count: int, rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        write_photos(Path(name), size, count)
        source = open_source(name)
        functions = contenders(source)
        times: dict[str, list[float]] = {contender: [] for contender in functions}
        for round_number in range(rounds + 1):
            for contender, function in functions.items():
                start = time.perf_counter()
                for index in range(count):
                    function(index)
                if round_number:
                    times[contender].append(time.perf_counter() - start)
        plain = [functions["threetowers pillow"](index).astype(int) for index in range(count)]
        differences = {
            contender: float(
                np.mean([np.abs(functions[contender](i) - pixels).mean() for i, pixels in enumerate(plain)])
            )
            for contender in OURS
        }
    reference = min(next(iter(times.values())))
    return [
        {
            "size": f"{size[0]}x{size[1]}",
            "contender": contender,
            "images_per_second": count / min(values),
            "ratio": reference / min(values),
            "spread": max(values) / min(values),
            "difference": differences.get(contender),
        }
        for contender, values in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["500x375", "640x480", "1600x1200"])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/decode.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(
        f"{'size':<10} {'contender':<31} {'images/s':>9} {'ratio':>6} {'slowest/fastest':>16} {'difference':>11}"
    )
    rows: list[dict[str, Any]] = []
    for text in arguments.sizes:
        width, _, height = text.partition("x")
        for row in measure((int(width), int(height)), arguments.images, arguments.rounds):
            rows.append(row)
            difference = "" if row["difference"] is None else f"{row['difference']:.2f}"
            print(
                f"{row['size']:<10} {row['contender']:<31} {row['images_per_second']:>9.0f} {row['ratio']:>6.2f} "
                f"{row['spread']:>16.2f} {difference:>11}",
                flush=True,
            )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(), "versions": versions, "rows": rows}, indent=1))
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
