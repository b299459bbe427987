"""The cost of one checkpoint a minute while ViT-B-32 (151 M parameters) trains, and the time to continue a run.

    python benchmarks/checkpoint.py [--rounds 2] [--minute 60] [--out runs/bench/checkpoint.json]

A small batch is stepped for a minute with a save at its beginning, written in the loop or in a thread, in turn; lost is
the time that the loop stood still and what steps took longer meanwhile. Then `threetowers train` is stopped and started
again, from the command to its first step. Each checkpoint holds weights and both moments, 1.8 GB, hashed and synced.
About six minutes on two cores.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from measure import write
from step import random_batch
from threetowers.compare.machine import machine
from threetowers.config import PairConfig, RunConfig
from threetowers.model import build
from threetowers.run.allocator import keep_freed_memory
from threetowers.train import checkpoint
from threetowers.train.log import RunLog
from threetowers.train.optim import adamw
from threetowers.train.saver import Saver

TABLES = {
    "rows": (
        "One minute of training with one save in each row: the share of the minute that was `lost`, the "
        "seconds that the loop stood still, the seconds until the checkpoint was written, and the seconds of "
        "an undisturbed step."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

MODEL, BATCH, TOKENS = "ViT-B-32", 8, 24


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

    def minute(self, seconds: float, saver: Saver, folder: Path, number: int) -> dict[str, float]:
        """Saves once and steps on; the share of the time lost, against this minute's own undisturbed steps.

        Lost is the time that the loop stood still, and what steps took longer while the thread was writing.
        """
        begin = time.perf_counter()
        saver.save(number, self.model, self.optimizer, {})
        stood = time.perf_counter() - begin
        done = folder / f"step-{number:08d}"
        meanwhile: list[float] = []
        quiet: list[float] = []
        while (start := time.perf_counter()) - begin < seconds:
            times = quiet if done.exists() else meanwhile
            self.step()
            times.append(time.perf_counter() - start)
        saver.wait()
        plain = statistics.median(quiet)
        longer = sum(meanwhile) - plain * len(meanwhile)
        return {
            "lost": (stood + longer) / seconds,
            "stood_still_seconds": stood,
            "written_in_seconds": stood + sum(meanwhile),
            "seconds_per_step": plain,
        }


def saving(training: Training, folder: Path, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """The minutes with a save in the loop and in a thread, in turn, after the save that a run begins with."""
    rows = []
    for _ in range(3):
        training.step()
    savers = {
        name: Saver(folder / name, 2, RunLog(folder), {}, background=name == "in a thread")
        for name in ("in the loop", "in a thread")
    }
    for saver in savers.values():
        saver.save(0, training.model, training.optimizer, {}, final=True)
    for number in range(1, rounds + 1):
        for name, saver in savers.items():
            rows.append(
                {"save": name, "round": number} | training.minute(seconds, saver, folder / name, number)
            )
    return rows


def resume_seconds(folder: Path) -> dict[str, float]:
    """Seconds from the command to the first step, of a fresh run and of a continued one."""
    rows = ["path,caption"]
    for index in range(32):
        Image.effect_noise((64, 64), 50).convert("RGB").save(folder / f"{index}.png")
        rows.append(f"{index}.png,picture number {index}")
    (folder / "captions.csv").write_text("\n".join(rows), encoding="utf-8")
    run = folder / "run"
    words = (
        f"train vit-b-32 --data {folder / 'captions.csv'} --method baseline --precision fp32 --batch-size {BATCH} "
        f"--steps 1000 --log-every-steps 1 --inputs.workers 0 --max-minutes 0.0001 --out {run}"
    ).split()
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
        keep_freed_memory()  # as `train` does
        training = Training()
        rows = saving(training, Path(name), arguments.rounds, arguments.minute)
        del training
    for row in rows:
        print(
            f"{row['save']}: lost {row['lost']:.1%} of a minute, stood still {row['stood_still_seconds']:.1f} s, "
            f"written in {row['written_in_seconds']:.1f} s, {row['seconds_per_step']:.2f} s a step",
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
