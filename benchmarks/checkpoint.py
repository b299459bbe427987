"""What checkpoints cost: one a minute while ViT-B-32 (151 M parameters) trains, and how soon a run goes on.

    python benchmarks/checkpoint.py [--rounds 2] [--minute 60] [--out runs/bench/checkpoint.json]

Steps of a small batch are counted over a minute without a save, with one written in the loop, and with one written in
a thread; the three take turns. Then `threetowers train` is stopped and started again, from the command to its first
step. Each checkpoint holds weights and both moments, 1.8 GB, hashed and synced. About eight minutes on two cores.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from measure import write
from step import random_batch
from threetowers.compare import machine
from threetowers.config import PairConfig, RunConfig
from threetowers.model import build
from threetowers.train import checkpoint
from threetowers.train.log import RunLog
from threetowers.train.optim import adamw
from threetowers.train.saver import Saver

MODEL, BATCH, TOKENS = "ViT-B-32", 8, 24
MODES = {"no save": None, "in the loop": False, "in a thread": True}


class Training:
    """ViT-B-32 and its optimiser, stepped on one batch."""

    def __init__(self) -> None:
        pair = PairConfig(model=MODEL)
        self.model, _ = build(RunConfig(method="baseline", pair=pair), {}, {"vocab_size": 49_408})
        self.model.train()
        self.optimizer = adamw(self.model, RunConfig().optim)
        self.pixels, self.tokens = random_batch(BATCH, torch.device("cpu"))

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        feats = self.model.features(pixels=self.pixels, tokens=self.tokens[:, :TOKENS])
        loss, _ = self.model.loss(feats)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def minute(self, seconds: float, save: Callable[[], None] | None) -> tuple[float, float]:
        """Steps per second with a save at the beginning, and how long the loop stood still for it."""
        start, steps, stood = time.perf_counter(), 0, 0.0
        if save is not None:
            save()
            stood = time.perf_counter() - start
        while (now := time.perf_counter()) - start < seconds:
            self.step()
            steps += 1
        return steps / (now - start), stood


def saving(training: Training, folder: Path, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Rates in each mode; lost: the share of the steps that a mode loses, by the best minute of each."""
    rates: dict[str, list[float]] = {name: [] for name in MODES}
    stood: dict[str, list[float]] = {name: [] for name in MODES}
    for _ in range(3):
        training.step()
    for number in range(rounds):
        for name, background in MODES.items():
            saver = Saver(folder / name, 2, RunLog(folder), {}, background=bool(background))

            def save(saver: Saver = saver, step: int = number) -> None:
                saver.save(step, training.model, training.optimizer, {})

            rate, still = training.minute(seconds, None if background is None else save)
            saver.wait()
            rates[name].append(rate)
            stood[name].append(still)
    plain = max(rates["no save"])
    return [
        {
            "saves": name,
            "steps_per_second": max(values),
            "lost": 1 - max(values) / plain,
            "stood_still_seconds": min(stood[name]),
            "spread": max(values) / min(values),
        }
        for name, values in rates.items()
    ]


def resume_seconds(folder: Path) -> dict[str, float]:
    """Seconds from the command to the first step, of a fresh run and of a continued one."""
    rows = ["path,caption"]
    for index in range(32):
        Image.effect_noise((64, 64), 50).convert("RGB").save(folder / f"{index}.png")
        rows.append(f"{index}.png,picture number {index}")
    (folder / "captions.csv").write_text("\n".join(rows), encoding="utf-8")
    run = folder / "run"
    words = ["train", "tiny", "--data", str(folder / "captions.csv"), "--method", "baseline", "--pair.model", MODEL,
             "--pair.tokenizer", "open_clip", "--batch-size", str(BATCH), "--steps", "1000", "--log-every-steps", "1",
             "--inputs.workers", "0", "--max-minutes", "0.0001", "--out", str(run)]  # fmt: skip
    found = {}
    for name in ("fresh", "continued"):
        before = time.time()
        metrics = run / "metrics.jsonl"
        done = subprocess.Popen(
            [sys.executable, "-c", "from threetowers.cli import main; main()", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        known = metrics.read_text().count("\n") if metrics.is_file() else 0
        while done.poll() is None:
            if metrics.is_file() and metrics.read_text().count("\n") > known:
                found[name] = time.time() - before
                break
            time.sleep(0.05)
        output, _ = done.communicate(timeout=300)
        if done.returncode != 75:
            raise SystemExit(output.decode())
    found["verified and loaded"] = _load_seconds(run / "checkpoints")
    return found


def _load_seconds(root: Path) -> float:
    training = Training()
    start = time.perf_counter()
    found = checkpoint.find(root)
    assert found is not None
    checkpoint.restore(found, training.model, training.optimizer)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minute", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/checkpoint.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        training = Training()
        rows = saving(training, Path(name), arguments.rounds, arguments.minute)
        del training
    for row in rows:
        print(
            f"{row['saves']:<12} {row['steps_per_second']:6.2f} steps/s, lost {row['lost']:6.1%}, "
            f"stood still {row['stood_still_seconds']:.1f} s, fastest/slowest {row['spread']:.2f}",
            flush=True,
        )
    with tempfile.TemporaryDirectory() as name:
        started = resume_seconds(Path(name))
    print("command to first step: " + ", ".join(f"{key} {value:.1f} s" for key, value in started.items()))
    result = {
        "machine": machine(),
        "model": MODEL,
        "minute": arguments.minute,
        "rows": rows,
        "first_step": started,
    }
    write(arguments.out, result)


if __name__ == "__main__":
    main()
