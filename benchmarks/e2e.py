"""Training from the command line, end to end: `threetowers train` beside `open_clip_train.main` on the same tar shards.

    python benchmarks/e2e.py [--device cpu] [--rounds 2] [--seconds 12] [--all] [--out runs/bench/e2e.json]

Under eight minutes on two slow cores. Every contender is a process of its own with its own loader workers: it reads
JPEGs and captions from the shards, crops, tokenises, and trains the same open_clip model with the same batch size and
schedule. Rounds take the contenders in turn. A run is timed from here, by when its steps appear in its log: the first
are the warm-up, those of the next `--seconds` count, waiting for data included, and then the run is ended. Its own
account of these steps must agree. The third tower's features are stored beforehand and timed apart. open_clip runs as
its defaults have it, without clipping; ours clips, as its defaults have it. `amp`, the default precision of open_clip,
is fp16 and made for GPUs: on a CPU it takes no part.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import save_for_hf

from loader import PACKAGES, samples
from measure import write
from threetowers.compare.machine import machine
from threetowers.data.shards.write import write_shards

TABLES = {
    "rows": (
        "One run of each contender: `samples per second` over the counted `steps`, the share of the time "
        "spent `waiting for data`, the seconds from the command to the first step, the largest memory of all "
        "processes (`tree mb`) and of the trainer alone, `spread`, the fastest round divided by the slowest, "
        "and the `ratio` to open_clip in its faster precision."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

NUM_SHARDS = 8
WARM_UP, LEAST_STEPS = 2, 3  # steps that do not count, and how many do at the least
AHEAD = 4  # batches that each of our workers may have ready; open_clip's have 2
POLL_SECONDS = 0.05
PATIENCE_SECONDS = 300.0
AGREEMENT = 0.05
LR_WARM_UP = 10  # steps
OPEN_CLIP_PRECISIONS = {"cpu": ("amp_bf16", "fp32"), "cuda": ("amp", "amp_bf16", "fp32")}
OPEN_CLIP_STEP = re.compile(r"Train Epoch: .*?Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+),.* Loss: ([\d.]+)")
PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1e6


class Step(NamedTuple):
    """A step in a trainer's own log: seconds since some beginning, the share of it spent waiting for data, the loss."""

    seconds: float
    waiting: float
    loss: float


@dataclass(frozen=True)
class Contender:
    """A command line, the log that gets a line at every step, and how to read that."""

    name: str
    precision: str
    command: tuple[str, ...]
    log: str
    read: Callable[[str], list[Step]]


@dataclass
class Seen:
    """One run seen from outside: when it began and when each step appeared, and its largest memory in MB.

    tree_mb: the sum over its processes, in which pages that they share count for each. trainer_mb: the first alone.
    """

    began: float
    appeared: list[float] = field(default_factory=list)
    tree_mb: float = 0.0
    trainer_mb: float = 0.0


def our_steps(text: str) -> list[Step]:
    rows = [json.loads(line) for line in text.splitlines()]
    return [Step(row["seconds"], row["data/wait"], row["train/loss"]) for row in rows]


def open_clip_steps(text: str) -> list[Step]:
    steps: list[Step] = []
    for found in OPEN_CLIP_STEP.finditer(text):
        waited, took, loss = map(float, found.groups())
        steps.append(Step(took + (steps[-1].seconds if steps else 0.0), waited / took, loss))
    return steps


def contenders(options: argparse.Namespace, place: Path) -> list[Contender]:
    """open_clip in its precisions, ours without and with the third tower."""
    steps = options.samples // options.batch_size
    shared = {"--batch-size": options.batch_size, "--device": options.device}
    theirs = shared | {
        "--model": options.model,
        "--train-data": place / "shards" / f"{{00000..{NUM_SHARDS - 1:05d}}}.tar",
        "--dataset-type": "webdataset",
        "--train-num-samples": options.samples,
        "--epochs": 1,
        "--warmup": LR_WARM_UP,
        "--workers": options.open_clip_workers,
        "--log-every-n-steps": 1,
        "--save-frequency": 0,
        "--logs": "logs",
        "--name": "run",
    }
    ours = shared | {
        "--pair.model": options.model,
        "--data": place / "shards",
        "--steps": steps,
        "--optim.warmup-steps": LR_WARM_UP,
        "--inputs.workers": options.workers,
        "--inputs.decoder": options.decoder,
        "--inputs.val-fraction": 0,
        "--inputs.test-fraction": 0,
        "--log-every-steps": 1,
        "--eval-every-steps": 0,
        "--checkpoint-every-steps": 1_000_000,
        "--out": "run",
    }
    three = {
        "--method": "3t",
        "--third": f"timm:local-dir:{place / 'third'}",
        "--third-precision": "bf16",
        "--embeddings": place / "store",
    }
    found = []
    for precision in OPEN_CLIP_PRECISIONS[options.device]:
        command = (sys.executable, "-m", "open_clip_train.main", *flags(theirs, precision))
        found.append(Contender("open_clip CLIP", precision, command, "logs/run/out.log", open_clip_steps))
    chosen = [("CLIP", "bf16-autocast"), ("3T stored", "bf16-autocast"), ("CLIP", "fp32")]
    for method, precision in [*chosen, ("3T stored", "fp32")] if options.all else chosen:
        settings = ours | ({"--method": "baseline"} if method == "CLIP" else three)
        command = (program(), "train", "vit-b-32", *flags(settings, precision))
        found.append(Contender(f"ours {method}", precision, command, "run/metrics.jsonl", our_steps))
    return found


def flags(settings: dict[str, Any], precision: str) -> Iterator[str]:
    for key, value in {**settings, "--precision": precision}.items():
        yield from (key, str(value))


def program() -> str:
    """The installed command, as a user calls it."""
    return str(Path(sysconfig.get_path("scripts")) / "threetowers")


def watch(
    contender: Contender, environment: dict[str, str], seconds: float, most: int
) -> tuple[Seen, list[Step]]:
    """Runs a contender until enough of its steps have counted, and ends it.

    most: steps after which its workers may have made every batch, and leave the cores to the trainer.
    """
    with tempfile.TemporaryDirectory(prefix="threetowers-e2e-run-") as name:
        folder = Path(name)
        log = folder / contender.log
        with (folder / "console").open("wb") as console:
            process = subprocess.Popen(
                contender.command,
                cwd=folder,
                env=environment,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        seen = Seen(time.monotonic())
        try:
            while not enough(seen.appeared, seconds):
                time.sleep(POLL_SECONDS)
                now = time.monotonic()
                silent = now - (seen.appeared[-1] if seen.appeared else seen.began)
                if process.poll() is not None or silent > PATIENCE_SECONDS:
                    tail = (folder / "console").read_text(errors="replace")[-2000:]
                    raise SystemExit(
                        f"{contender.name}, {contender.precision}: ended or stuck after {len(seen.appeared)} steps; "
                        f"if it ran out of data, raise --samples or lower --seconds. Its last words:\n{tail}"
                    )
                steps = contender.read(whole_lines(log))
                seen.appeared += [now] * (len(steps) - len(seen.appeared))
                look_at_memory(seen, process.pid)
        finally:
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(process.pid, signal.SIGKILL)  # the trainer with its workers
            process.wait()
    if len(steps) > most:
        raise SystemExit(f"{contender.name}: its workers were done before the end; raise --samples")
    return seen, steps


def enough(appeared: list[float], seconds: float) -> bool:
    counted = len(appeared) - WARM_UP
    return counted >= LEAST_STEPS and appeared[-1] - appeared[WARM_UP - 1] >= seconds


def whole_lines(path: Path) -> str:
    """The text of a file that is being written, up to its last end of line."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return text[: text.rfind("\n") + 1]


def look_at_memory(seen: Seen, trainer: int) -> None:
    sizes = {process: resident_mb(process) for process in tree(trainer)}
    seen.tree_mb = max(seen.tree_mb, sum(sizes.values()))
    seen.trainer_mb = max(seen.trainer_mb, sizes.get(trainer, 0.0))


def tree(process: int) -> Iterator[int]:
    """A process and all that came from it."""
    yield process
    try:
        children = [
            int(child)
            for thread in Path(f"/proc/{process}/task").iterdir()
            for child in (thread / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return
    for child in children:
        yield from tree(child)


def resident_mb(process: int) -> float:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE_MB
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


def store_features(options: argparse.Namespace, place: Path, environment: dict[str, str]) -> float:
    """Makes a third tower of random weights and stores its features; the seconds of the command."""
    torch.manual_seed(0)
    save_for_hf(
        timm.create_model(options.third, num_classes=0), str(place / "third"), safe_serialization=True
    )
    settings = {
        "--tower": f"timm:local-dir:{place / 'third'}",
        "--data": place / "shards",
        "--out": place / "store",
        "--workers": options.workers,
        "--device": options.device,
    }
    start = time.monotonic()
    subprocess.run(
        [program(), "embed", *flags(settings, "bf16")], check=True, env=environment, capture_output=True
    )
    return time.monotonic() - start


def result_of(seen: Seen, steps: list[Step], batch_size: int) -> dict[str, Any]:
    """The figures of one run; raises SystemExit when the run's own log tells another story."""
    count = len(steps) - WARM_UP
    own = count * batch_size / (steps[-1].seconds - steps[WARM_UP - 1].seconds)
    rate = count * batch_size / (seen.appeared[-1] - seen.appeared[WARM_UP - 1])
    if abs(own / rate - 1) > AGREEMENT:
        raise SystemExit(f"{rate:.1f} samples/s seen from outside, {own:.1f} by the run's own log")
    return {
        "samples_per_second": rate,
        "by_its_own_log": own,
        "steps": count,
        "waiting_for_data": sum(step.waiting for step in steps[WARM_UP:]) / count,
        "seconds_to_first_step": seen.appeared[0] - seen.began,
        "tree_mb": seen.tree_mb,
        "trainer_mb": seen.trainer_mb,
        "losses": [step.loss for step in steps],
    }


def row_of(contender: Contender, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The best run of a contender, how far the runs lie apart, and the largest memory of any."""
    best = max(runs, key=lambda run: float(run["samples_per_second"]))
    rates = [run["samples_per_second"] for run in runs]
    return {
        "contender": contender.name,
        "precision": contender.precision,
        **best,
        "spread": max(rates) / min(rates),
        "tree_mb": max(run["tree_mb"] for run in runs),
        "trainer_mb": max(run["trainer_mb"] for run in runs),
        "rounds": rates,
        "command": shlex.join((Path(contender.command[0]).name, *contender.command[1:])),
    }


def show(rows: list[dict[str, Any]]) -> None:
    columns = ("samples/s", "ratio", "spread", "steps", "waiting", "start s", "tree MB", "trainer MB", "loss")
    print(f"{'contender':<26}" + "".join(f"{column:>12}" for column in columns))
    for row in rows:
        cells = (
            f"{row['samples_per_second']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['spread']:.2f}",
            f"{row['steps']}",
            f"{row['waiting_for_data']:.1%}",
            f"{row['seconds_to_first_step']:.1f}",
            f"{row['tree_mb']:.0f}",
            f"{row['trainer_mb']:.0f}",
            f"{row['losses'][0]:.2f}→{row['losses'][-1]:.2f}",
        )
        print(f"{row['contender'] + ', ' + row['precision']:<26}" + "".join(f"{cell:>12}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=list(OPEN_CLIP_PRECISIONS), default="cpu")
    parser.add_argument("--model", default="ViT-S-32")
    parser.add_argument(
        "--third", default="vit_small_patch32_224", help="a timm name; its weights are random"
    )
    parser.add_argument("--samples", type=int, default=1536)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="of ours")
    parser.add_argument("--open-clip-workers", type=int, default=2)
    parser.add_argument("--decoder", choices=["pillow", "simplejpeg"], default="pillow", help="of ours")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="that the counted steps take at the least"
    )
    parser.add_argument("--all", action="store_true", help="3T in fp32 too")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/e2e.json"))
    options = parser.parse_args()
    most = options.samples // options.batch_size - AHEAD * max(options.workers, options.open_clip_workers)
    if most < WARM_UP + LEAST_STEPS:
        parser.error(f"--samples {options.samples}: too few for the warm-up and {LEAST_STEPS} steps")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    with tempfile.TemporaryDirectory(prefix="threetowers-e2e-") as name:
        place = Path(name)
        environment = os.environ | {"THREETOWERS_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1"}
        write_shards(place / "shards", samples(options.samples), shard_size=-(-options.samples // NUM_SHARDS))
        embedding = store_features(options, place, environment)
        print(
            f"stored {options.samples} images of {options.third} in {embedding:.1f} s, start-up included",
            flush=True,
        )
        taking_part = contenders(options, place)
        runs: dict[int, list[dict[str, Any]]] = {number: [] for number in range(len(taking_part))}
        for _ in range(options.rounds):
            for number, contender in enumerate(taking_part):
                seen, steps = watch(contender, environment, options.seconds, most)
                runs[number].append(result_of(seen, steps, options.batch_size))
    rows = [row_of(contender, runs[number]) for number, contender in enumerate(taking_part)]
    theirs = [row for row in rows if row["contender"].startswith("open_clip")]
    reference = max(theirs, key=lambda row: float(row["samples_per_second"]))
    for row in rows:
        row["ratio"] = row["samples_per_second"] / reference["samples_per_second"]
        row["command"] = row["command"].replace(str(place), ".")
    show(rows)
    print(f"the ratios are to open_clip's faster precision, {reference['precision']}")
    result = {
        "machine": machine(options.device),
        "versions": versions,
        "options": vars(options),
        "embedding_seconds": embedding,
        "reference": reference["precision"],
        "rows": rows,
    }
    write(options.out, result)


if __name__ == "__main__":
    main()
