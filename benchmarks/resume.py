"""Killed inside an epoch and resumed: final weights beside an uninterrupted run's, bit by bit, under three trainers.

    python benchmarks/resume.py [--quick] [--out runs/bench/resume.json]

Hugging Face's Trainer, Lightning and ours train a small image-text pair with dropout on the same 96 pictures, three
epochs of six steps. A SIGKILL ends the process in its sixth or twelfth step and another resumes, with the settings that
each project documents for that; the matrix crosses that with workers, augmentation and gradient accumulation. Each
uninterrupted run is done twice: a trainer that does not repeat itself cannot be judged. A second table damages the
newest checkpoint between death and resume. The rivals' part, resume_rivals.py, is one torch module, augmented as is
usual, with torchvision's transforms in the dataset. The contenders with a plus add what a user can: Lightning the
stateful loader of `torchdata` (left out when that is not installed) and then random states kept through documented
hooks, Hugging Face's a seed for each sample. Ours trains its own model, which drops patches, and accumulates with the
loss of the whole batch. Every process is a fork with one thread. Takes about five minutes, less than one with --quick.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from measure import write
from resume_rivals import (
    BATCH,
    EPOCHS,
    LR,
    RESUMED,
    SAVE_EVERY,
    SEED,
    Cell,
    train_hf,
    train_lightning,
)
from threetowers.compare.machine import machine
from threetowers.config import InputConfig, OptimConfig, PairConfig, RunConfig
from threetowers.errors import ThreeTowersError
from threetowers.towers.weights import read_safetensors
from threetowers.train import loop

TABLES = {
    "summary": (
        "All runs of each contender with its `settings`: how many were killed and resumed (`cells`), how many "
        "of these ended with weights `identical` to those of the uninterrupted run, and the `largest "
        "difference` of a weight."
    ),
    "rows": (
        "One killed and resumed run in each row: when it was killed and with which settings, the step it "
        "resumed from, and how its final weights compare with those of the uninterrupted run."
    ),
    "damage": (
        "One resume from a damaged checkpoint in each row: the `damage`, the step it `resumed from`, the step "
        "of the `newest` checkpoint, the largest difference to the weights of the uninterrupted run, the "
        "`outcome`, and what the trainer `said`."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

PICTURES = 96
STEPS = EPOCHS * PICTURES // BATCH
DEATHS = {1: 5, 2: 11}
"""Steps done when the kill comes, by epoch; no epoch ends there or at the checkpoint before."""
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "lightning", "torchdata")
FORK = multiprocessing.get_context("fork")
"""A process of its own without the seconds that a fresh import takes."""
Row = dict[str, Any]
MATRIX = [Cell(*values) for values in itertools.product(DEATHS, (0, 2), (False, True), (1, 2))]
HEAD = "epoch workers augment accumulate"
QUICK = [Cell(1, 0, False, 1), Cell(2, 2, True, 2)]
Train = Callable[[Cell, Path, Path, int | None], None]
"""Trains a cell in a run folder on a table, from its newest checkpoint if there is one; dies after that many steps."""


@dataclass(frozen=True)
class Contender:
    """A trainer, where it keeps its newest checkpoint, and what it is given so that it resumes exactly."""

    name: str
    settings: str
    train: Train
    newest: Callable[[Path], tuple[int, Path]]
    """Step of the newest checkpoint in a run folder, and its file with the weights."""
    optimizer: str | None
    """Name of the optimiser's file beside it; None when all is in one file."""


def write_pictures(folder: Path) -> Path:
    """A table of captions over PNG files of coloured noise."""
    rng = np.random.default_rng(SEED)
    rows = ["path,caption"]
    for index in range(PICTURES):
        pixels = rng.integers(0, 60, (40, 40, 3)) + rng.integers(0, 190, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:02d}.png")
        rows.append(f"{index:02d}.png,picture {index} of noise")
    table = folder / "captions.csv"
    table.write_text("\n".join(rows), encoding="utf-8")
    return table


def train_ours(cell: Cell, table: Path, folder: Path, death: int | None) -> None:
    vision: dict[str, Any] = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    text: dict[str, Any] = {"context_length": 16, "width": 32, "heads": 2, "layers": 1}
    crops = (0.4, 1.0) if cell.augmented else (1.0, 1.0)
    inputs = InputConfig(val_fraction=0.0, test_fraction=0.0, workers=cell.workers, crop_scale=crops)
    config = RunConfig(
        data=str(table),
        method="baseline",
        steps=STEPS,
        batch_size=BATCH,
        micro_batch_size=BATCH // cell.accumulation if cell.accumulation > 1 else 0,
        seed=SEED,
        checkpoint_every_steps=SAVE_EVERY,
        device="cpu",
        pair=PairConfig(vision=vision | {"patch_dropout": 0.4}, text=text, tokenizer="trained"),
        inputs=replace(inputs, flip=cell.augmented),
        optim=OptimConfig(lr=LR, warmup_steps=2),
    )
    real = loop.learning_rate  # type: ignore[attr-defined]

    def rate(step: int, *rest: Any) -> Any:
        if step == death:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(step, *rest)

    with patch.object(loop, "learning_rate", rate):
        loop.train(config, folder)
    starts = re.findall(r"continuing from step (\d+)", (folder / "events.log").read_text(encoding="utf-8"))
    (folder / RESUMED).write_text(starts[-1] if starts else "0")


def newest_folder(pattern: str, folder: Path) -> tuple[int, Path]:
    steps = {int(path.name.rpartition("-")[2]): path for path in folder.glob(pattern)}
    return max(steps), steps[max(steps)] / "model.safetensors"


def newest_file(folder: Path) -> tuple[int, Path]:
    """Lightning's; its saves are over when the next step begins."""
    return max(DEATHS.values()) // SAVE_EVERY * SAVE_EVERY, folder / "last.ckpt"


def contenders() -> list[Contender]:
    every = f"every_n_train_steps={SAVE_EVERY}, save_top_k=-1, save_last=True"
    plain = f'seed_everything(workers=True), ModelCheckpoint({every}), deterministic=True, ckpt_path="last"'
    hf = f'save_strategy="steps", save_steps={SAVE_EVERY}, seed, data_seed, full_determinism=True, '
    hf += "ignore_data_skip=False, model_init, resume_from_checkpoint=True"
    seeds = f"{hf}, own seed for each epoch and sample"
    at = partial(newest_folder, "checkpoint-*")
    found = [
        Contender("HF Trainer", hf, train_hf, at, "optimizer.pt"),
        Contender("HF + own seeds", seeds, partial(train_hf, seeded=True), at, "optimizer.pt"),
        Contender("Lightning", plain, train_lightning, newest_file, None),
    ]
    if importlib.util.find_spec("torchdata"):
        stateful = partial(train_lightning, stateful=True)
        states = partial(train_lightning, stateful=True, states=True)
        loader = f"{plain}, StatefulDataLoader"
        hooks = f"{loader}, own Dataset.state_dict and Callback.state_dict"
        found.append(Contender("L. + loader", loader, stateful, newest_file, None))
        found.append(Contender("L. + own states", hooks, states, newest_file, None))
    else:
        print("torchdata is not installed: Lightning's stateful variants are left out")
    ours = f"checkpoint_every_steps={SAVE_EVERY}"
    at = partial(newest_folder, "checkpoints/step-*")
    return [*found, Contender("threetowers", ours, train_ours, at, "optim.safetensors")]


def run(contender: Contender, cell: Cell, table: Path, folder: Path, death: int | None = None) -> int:
    """Trains in a process of its own, which writes what it says to log.txt; returns its exit code."""
    folder.mkdir(exist_ok=True)

    def body() -> None:
        code = 1
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                contender.train(cell, table, folder, death)
                code = 0
            except ThreeTowersError as error:
                print(error, flush=True)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)

    process = FORK.Process(target=body)
    process.start()
    end = time.monotonic() + 300
    # join() would also wait for the orphaned workers of a killed process, which notice its death seconds later
    while process.exitcode is None and time.monotonic() < end:
        time.sleep(0.01)
    if process.exitcode is None:
        process.kill()
        process.join()
        return 1
    return process.exitcode


def difference(a: Path, b: Path) -> float | None:
    """The largest difference between two runs' final weights; None when each bit is the same."""
    first, second = (read_safetensors(folder / "model.safetensors") for folder in (a, b))
    if first.keys() != second.keys():
        return float("inf")
    changed = [key for key in first if first[key].numpy().tobytes() != second[key].numpy().tobytes()]
    return max(((first[key] - second[key]).abs().max().item() for key in changed), default=None)


def last_line(folder: Path) -> str:
    lines = (folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()
    return lines[-1] if lines else "no word"


def started_from(folder: Path) -> int:
    return int((folder / RESUMED).read_text())


def uninterrupted(contender: Contender, cell: Cell, table: Path, folder: Path) -> str:
    """Makes the run of a set-up twice, unless that is done; says what is wrong with it."""
    again = folder.with_name(f"{folder.name}-again")
    for each in (folder, again):
        if not each.exists() and run(contender, cell, table, each) != 0:
            return f"failed uninterrupted: {last_line(each)}"
    return "" if difference(folder, again) is None else "does not repeat itself"


def resume(contender: Contender, cell: Cell, table: Path, root: Path) -> Row:
    """Kills a run and resumes it: a row of the matrix."""
    whole, torn = root / cell.setup(), root / "torn"
    row: Row = {"contender": contender.name, **asdict(cell)}
    wrong = uninterrupted(contender, cell, table, whole)
    if wrong:
        return row | {"outcome": wrong}
    shutil.rmtree(torn, ignore_errors=True)
    if run(contender, cell, table, torn, DEATHS[cell.epoch]) != -signal.SIGKILL:
        return row | {"outcome": f"failed before the kill: {last_line(torn)}"}
    if run(contender, cell, table, torn) != 0:
        return row | {"outcome": f"failed: {last_line(torn)}"}
    largest = difference(whole, torn)
    outcome = "identical" if largest is None else f"differ {largest:.1e}"
    return row | {"outcome": outcome, "max_abs_diff": largest or 0.0, "resumed_from": started_from(torn)}


def flip_a_bit(path: Path) -> None:
    """Changes one mantissa bit in the middle of the largest weight of a checkpoint's file."""
    if path.suffix == ".ckpt":
        weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    else:
        weights = read_safetensors(path)
    content = bytearray(path.read_bytes())
    largest = max(weights.values(), key=Tensor.numel).numpy().tobytes()
    content[content.index(largest) + len(largest) // 8 * 4 + 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


NO_OPTIMIZER = "optimiser file missing"
DAMAGES: dict[str, Callable[[Path, str | None], None]] = {
    "none": lambda weights, optimizer: None,
    "one bit of a weight flipped": lambda weights, optimizer: flip_a_bit(weights),
    "weights file cut in half": lambda weights, optimizer: cut_in_half(weights),
    NO_OPTIMIZER: lambda weights, optimizer: (weights.parent / str(optimizer)).unlink(),
}


def said(folder: Path) -> set[str]:
    """The lines of a run's log, without figures."""
    lines = (folder / "log.txt").read_text(encoding="utf-8").splitlines()
    return {re.sub(r"[\d.e+-]+", "", line).strip() for line in lines}


def damaged(contender: Contender, table: Path, root: Path) -> list[Row]:
    """What a resume makes of each kind of damage to the newest checkpoint."""
    cell, torn = Cell(max(DEATHS), 0, False, 1), root / "torn"
    rows: list[Row] = []
    usual: set[str] = set()
    for name, damage in DAMAGES.items():
        row: Row = {"contender": contender.name, "damage": name}
        if name == NO_OPTIMIZER and contender.optimizer is None:
            rows.append(row | {"outcome": "(one file)"})
            continue
        shutil.rmtree(torn, ignore_errors=True)
        run(contender, cell, table, torn, DEATHS[cell.epoch])
        newest, weights = contender.newest(torn)
        damage(weights, contender.optimizer)
        if run(contender, cell, table, torn) != 0:
            rows.append(row | {"outcome": "noticed, stopped", "said": last_line(torn)})
            continue
        largest = difference(root / cell.setup(), torn)
        row |= {"resumed_from": started_from(torn), "newest": newest, "max_abs_diff": largest or 0.0}
        usual = usual or said(torn)
        if name == "none":
            outcome = "resumed"
        elif row["resumed_from"] < newest:
            outcome = "noticed, older used"
        else:
            row["said"] = sorted(said(torn) - usual)
            outcome = "loaded, with a word" if row["said"] else "loaded silently"
        rows.append(row | {"outcome": outcome + (", identical" if largest is None else ", differs")})
    return rows


def show(rows: list[Row], names: list[str], head: str, key: Callable[[Row], str]) -> None:
    """One line for each distinct key, one column for each contender."""
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        table.setdefault(key(row), {})[row["contender"]] = row["outcome"][:30]
    width = 2 + max(len(text) for line in table.values() for text in (*line.values(), *names))
    print(head + "".join(f"{name:>{width}}" for name in names))
    for left, line in table.items():
        print(f"{left:<{len(head)}}" + "".join(f"{line[name]:>{width}}" for name in names))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two cells of sixteen, no damage")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/resume.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    cells, found, begun = QUICK if arguments.quick else MATRIX, contenders(), time.monotonic()
    rows: list[Row] = []
    harmed: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        os.environ["THREETOWERS_CACHE"] = str(Path(name, "cache"))
        table = write_pictures(Path(name))
        for number, contender in enumerate(found):
            print(f"{contender.name}: {contender.settings}", flush=True)
            root = Path(name, str(number))
            root.mkdir()
            rows += [resume(contender, cell, table, root) for cell in cells]
            if not arguments.quick and "+" not in contender.name:  # the others' checkpoints are the same
                harmed += damaged(contender, table, root)
    names = [contender.name for contender in found]
    print(
        "\nkilled inside an epoch and resumed: final weights against the uninterrupted run's, largest difference"
    )
    show(rows, names, HEAD, lambda row: str(Cell(*(row[name] for name in Cell.__annotations__))))
    summary = []
    for contender in found:
        mine = [row for row in rows if row["contender"] == contender.name]
        count = sum(row["outcome"] == "identical" for row in mine)
        print(f"{contender.name}: {count} of {len(mine)} identical")
        largest = max((row.get("max_abs_diff", 0.0) for row in mine), default=0.0)
        counts = {"cells": len(mine), "identical": count, "largest_difference": largest}
        summary.append({"contender": contender.name, "settings": contender.settings} | counts)
    if harmed:
        print(
            "\nthe newest checkpoint damaged between death and resume: what the resume did, and the final weights"
        )
        plain = [each for each in names if "+" not in each]
        show(harmed, plain, f"{'damage':<28}", lambda row: str(row["damage"]))
    result = {
        "machine": machine(),
        "versions": versions,
        "seconds": round(time.monotonic() - begun),
        "summary": summary,
        "rows": rows,
        "damage": harmed,
    }
    write(arguments.out, result)


if __name__ == "__main__":
    main()
