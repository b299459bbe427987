"""Training on small images with and without decoded images kept in memory.

    python benchmarks/kept.py [--rounds 1] [--out runs/bench/kept.json]

5,000 RGBA PNGs (ten passes) and 85,000 RGB PNGs (three passes) of 64 × 64 pixels, the towers of the preset `tiny`, two
loader workers, batches of 256: `train` with `--inputs.keep-pixels True` and False takes turns. The final weights are
compared.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

from measure import write
from threetowers.compare.machine import machine
from threetowers.config import Method
from threetowers.recipes import PRESETS
from threetowers.train.loop import train

TABLES = {
    "rows": (
        "Steps per second and the share of time spent `waiting` for data in the first pass and in later ones; `ratio`, "
        "the steps per second of the later passes to those without keeping; and whether the weights have the `same "
        "bits`."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

SETS = {"RGBA": (5_000, 10), "RGB": (85_000, 3)}  # by mode: pictures, passes
METHODS: tuple[Method, ...] = ("baseline", "3t")
BATCH, SIDE = 256, 64


def write_icons(folder: Path, mode: str, num: int) -> None:
    """Smooth random PNGs, and captions of six words out of 200."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["image,caption"]
    for number in range(num):
        small = rng.integers(0, 256, (8, 8, len(mode)), dtype=np.uint8)
        icon = Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        icon.save(folder / f"{number:06d}.png", compress_level=1)
        words = " ".join(f"w{word}" for word in rng.integers(0, 200, 6))
        lines.append(f"{number:06d}.png,{words}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")


def measure(
    data: Path, method: Method, steps: int, first: int, keep: bool, third: str, out: Path
) -> dict[str, Any]:
    """Steps per second and waiting in the first pass, of `first` steps, and after it."""
    config = PRESETS["tiny"]()
    inputs = replace(config.inputs, val_fraction=0.01, test_fraction=0.01, workers=2, keep_pixels=keep)
    config = replace(
        config, method=method, third=(third,) if method == "3t" else (), data=str(data), steps=steps, batch_size=BATCH,
        log_every_steps=1, inputs=inputs, embeddings=str(out.parent / "embeddings"),
    )  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    train(config, out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/loss" in row]
    found: dict[str, Any] = {}
    for name, part in (("first", rows[min(2, first - 1) : first]), ("later", rows[first:])):
        found[f"{name} pass"] = 1 / statistics.mean(BATCH / row["examples_per_second"] for row in part)
        found[f"{name} waiting"] = statistics.mean(row["data/wait"] for row in part)
    found["weights"] = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--share", type=float, default=1.0, help="of the pictures")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/kept.json"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        torch.manual_seed(0)
        tower = Path(name) / "tower"
        timm.models.save_for_hf(
            timm.create_model("test_convnext2", num_classes=10), tower, safe_serialization=True
        )
        for mode in options.sets:
            num, passes = int(SETS[mode][0] * options.share), SETS[mode][1]
            data = Path(name) / mode
            write_icons(data, mode, num)
            first = int(num * 0.98) // BATCH
            for method in METHODS:
                found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
                for _ in range(options.rounds):
                    for keep, results in found.items():
                        third = f"timm:local-dir:{tower}"
                        results.append(
                            measure(data, method, first * passes, first, keep, third, Path(name) / "run")
                        )
                same = len({result["weights"] for results in found.values() for result in results}) == 1
                plain = statistics.median(result["later pass"] for result in found[False])
                for keep, results in found.items():
                    numbers = {
                        key: statistics.median(result[key] for result in results)
                        for key in ("first pass", "first waiting", "later pass", "later waiting")
                    }
                    rows.append({
                        "pictures": f"{num:,} {mode}", "method": method, "kept": keep, **numbers,
                        "ratio": numbers["later pass"] / plain, "same bits": same,
                    })  # fmt: skip
                    print(rows[-1], flush=True)
    write(options.out, {"machine": machine("cpu"), "rounds": options.rounds, "rows": rows})


if __name__ == "__main__":
    main()
