"""Two source trees side by side: do they train to the same bits, and does one continue what the other has begun?

    git worktree add ../before COMMIT
    python benchmarks/commits.py --before ../before/src [--after src] [--steps 30] [--out runs/bench/commits.json]

Every run is `threetowers train` in a process of its own, one thread each, on pictures and towers made here. The trained
weights are compared bit by bit, the evaluations value by value. Then the tree after continues or reads what the tree
before has written: a run that stopped at a checkpoint, a store of embeddings, a comparison and a finished run. About
seven minutes on two cores.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf
from transformers import BertConfig, BertModel, BertTokenizerFast

from measure import write
from threetowers.compare.machine import machine

TABLES = {
    "rows": (
        "Each `case` under both trees: whether the trained weights have the `same weights` bit by bit and the "
        "`same evaluation`, and whether the tree after takes up what the tree before has written (`works`)."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220), "yellow": (230, 210, 40)}
NUM_PHOTOS = 160
CHECKPOINT_STEPS = 10

CASES: dict[str, str] = {
    "baseline": "--method baseline",
    "LiT": "--method lit",
    "LiT without projection": "--method lit --objective.lit-projection False",
    "unlocked LiT": "--method lit-unlocked",
    "3T, stored": "",
    "3T, live": "--inputs.third-view same",
    "3T, three stored views": "--inputs.stored-views 3",
    "3T, third tower of texts": "--third hf-text:{text}",
    "3T, two third towers": "--third a=timm:local-dir:{tower} b=timm:local-dir:{other}",
    "3T, sigmoid, a scale per row": "--objective.kind sigmoid --objective.scale per-row",
    "3T, duplicates masked, flips": "--inputs.mask-duplicates True --inputs.flip True",
    "3T regression, cosine": "--method 3t-regression",
    "3T regression, mse": "--method 3t-regression --objective.regression mse",
    "3T, micro-batches": "--micro-batch-size 7",
    "3T, micro-batches, live": "--micro-batch-size 7 --inputs.third-view same",
    "3T, bf16 autocast": "--precision bf16-autocast",
    "3T, bf16 autocast, micro-batches": "--precision bf16-autocast --micro-batch-size 7",
    "3T, ViT, patch dropout, activations again": "{vit} --grad-checkpointing True",
    "3T, two workers": "--inputs.workers 2",
}
"""The flags of each run beside BASE, by name."""

BASE = (
    "--third timm:local-dir:{tower} --batch-size 16 --log-every-steps 10 --device cpu "
    "--inputs.workers 0 --inputs.val-fraction 0.1 --inputs.test-fraction 0.1 --pair.embed-dim 24"
)
VIT = """preset = "tiny"
[pair]
embed_dim = 24
[pair.vision]
image_size = 32
patch_size = 8
layers = 2
width = 32
head_width = 16
patch_dropout = 0.5
"""


def make_photos(folder: Path) -> Path:
    """A table of coloured squares with two captions each."""
    folder.mkdir()
    random = np.random.default_rng(0)
    with (folder / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "caption_0", "caption_1"])
        for index in range(NUM_PHOTOS):
            colour, place = list(COLOURS)[index % 4], ("left", "right")[index // 4 % 2]
            pixels = random.integers(0, 60, (40, 48, 3)).astype(np.uint8)
            left = 4 if place == "left" else 28
            pixels[13:27, left : left + 14] = COLOURS[colour]
            Image.fromarray(pixels).save(folder / f"{index:03d}.png")
            table.writerow(
                [f"{index:03d}.png", f"a {colour} square {index % 23}", f"{colour} at the {place}"]
            )
    return folder / "captions.csv"


def make_tower(folder: Path, seed: int) -> None:
    """A timm network with random weights in timm's local format."""
    torch.manual_seed(seed)
    model = timm.create_model("test_convnext2", num_classes=7)
    model.pretrained_cfg.update(
        input_size=(3, 48, 48), mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4), crop_pct=1.0
    )
    save_for_hf(model, str(folder), safe_serialization=True)


def make_text_tower(folder: Path) -> None:
    """A small BERT with random weights, and a tokenizer of the words in the captions."""
    folder.mkdir()
    words = ["a", "square", "at", "the", "left", "right", *COLOURS, *map(str, range(23))]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *words]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(words) + 5,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    BertModel(config).save_pretrained(folder)


def command_line(tree: Path, words: list[str], place: Path) -> str:
    """Runs the command line of a source tree in a folder and returns what it printed; raises when it failed."""
    environment = os.environ | {
        "PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "THREETOWERS_CACHE": str(place / "cache"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "threetowers.cli", *words],
        cwd=place, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{tree}: {' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def same_weights(a: Path, b: Path) -> bool:
    """Whether two finished runs hold the same tensors, bit by bit."""
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def same_json(a: Path, b: Path) -> bool:
    """Whether two JSON files hold the same values but for paths of runs."""
    first, second = (json.loads(path.read_text()) for path in (a, b))
    first.pop("clip_benchmark", None), second.pop("clip_benchmark", None)
    return bool(first == second)


class Trial:
    """The files of one comparison, and the command lines of both trees over them."""

    def __init__(self, place: Path, trees: Mapping[str, Path], steps: int) -> None:
        self.place, self.trees, self.steps = place, trees, steps
        self.photos = make_photos(place / "photos")
        make_tower(place / "tower", 5)
        make_tower(place / "other", 6)
        make_text_tower(place / "text")
        (place / "vit.toml").write_text(VIT)
        self.names = {name: str(place / name) for name in ("tower", "other", "text")}

    def words(self, flags: str, out: str, *, verb: str = "train") -> list[str]:
        start = "vit.toml" if "{vit}" in flags else "tiny"
        flags = f"{BASE} {flags.replace('{vit}', '')}".format(**self.names)
        own = ["--steps", str(self.steps), "--checkpoint-every-steps", str(CHECKPOINT_STEPS)]
        return [verb, start, "--data", str(self.photos), "--out", out, *own, *_last_wins(flags.split())]

    def train(self, tree: str, flags: str, out: str) -> Path:
        command_line(self.trees[tree], self.words(flags, out), self.place)
        return self.place / out

    def same_bits(self, number: int, flags: str) -> dict[str, bool]:
        """Whether both trees train to the same weights and measure the same."""
        folders = [self.train(tree, flags, f"{tree}-{number}/run") for tree in ("before", "after")]
        return {
            "same weights": same_weights(*folders),
            "same evaluation": same_json(*(folder / "evaluation.json" for folder in folders)),
        }


def _last_wins(flags: list[str]) -> list[str]:
    """Flags in which a later value replaces an earlier one of the same name."""
    values: dict[str, list[str]] = {}
    for word in flags:
        if word.startswith("--"):
            values[name := word] = []
        else:
            values[name].append(word)
    return [word for name, words in values.items() for word in (name, *words)]


def continued_run(trial: Trial) -> bool:
    """A run of the tree before, cut back to its last but one checkpoint and continued by the tree after."""
    whole = trial.train("before", "--inputs.flip True", "whole/run")
    part = trial.place / "part" / "run"
    shutil.copytree(whole, part)
    shutil.copytree(trial.place / "whole" / "embeddings", trial.place / "part" / "embeddings")
    newest = sorted((part / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    for name in ("model.json", "model.safetensors", "evaluation.json", "features.safetensors"):
        (part / name).unlink()
    printed = trial.train("after", "--inputs.flip True", "part/run")
    events = (printed / "events.log").read_text()
    return same_weights(whole, part) and "continuing from step" in events


def store_read(trial: Trial) -> bool:
    """A store that the tree before embedded, used by the tree after; its file stays as it was."""
    tower = f"timm:local-dir:{trial.names['tower']}"
    words = ["embed", "--tower", tower, "--data", str(trial.photos), "--out", "store", "--device", "cpu"]
    command_line(trial.trees["before"], words, trial.place)
    written = (trial.place / "store" / "features.safetensors").read_bytes()
    runs = [trial.train(tree, "--embeddings store", f"{tree}-store/run") for tree in ("before", "after")]
    made = [
        str(path) for tree in ("before", "after") for path in trial.place.glob(f"{tree}-store/embeddings/*")
    ]
    command_line(trial.trees["after"], words, trial.place)  # finds its own work done
    same = (trial.place / "store" / "features.safetensors").read_bytes() == written
    return same and not made and same_weights(*runs)


def finished_run_read(trial: Trial) -> bool:
    """A finished run of the tree before, evaluated and exported by the tree after as by the tree before."""
    run = trial.train("before", "", "finished/run")
    shutil.copy(run / "evaluation.json", trial.place / "evaluation.json")
    command_line(trial.trees["after"], ["evaluate", str(run)], trial.place)
    for tree in ("before", "after"):
        command_line(trial.trees[tree], ["export", str(run), "--out", f"export-{tree}"], trial.place)
    exports = [
        load_file(trial.place / f"export-{tree}" / "open_clip_model.safetensors")
        for tree in ("before", "after")
    ]
    same = all(torch.equal(exports[0][key], exports[1][key]) for key in exports[0])
    return same and same_json(trial.place / "evaluation.json", run / "evaluation.json")


def comparison_continued(trial: Trial) -> bool:
    """A comparison of the tree before, given a second seed by the tree after: nothing finished is done again."""
    flags = "--methods baseline lit 3t --lrs 1e-3"
    words = trial.words(flags, "compared", verb="compare")
    command_line(trial.trees["before"], [*words, "--seeds", "0"], trial.place)
    runs = sorted((trial.place / "compared" / "runs").iterdir())
    before = {run.name: (run / "model.json").stat().st_mtime_ns for run in runs}
    first = json.loads((trial.place / "compared" / "compare.json").read_text())
    printed = command_line(trial.trees["after"], [*words, "--seeds", "0"], trial.place)
    again = json.loads((trial.place / "compared" / "compare.json").read_text())
    command_line(trial.trees["after"], [*words, "--seeds", "0", "1"], trial.place)
    after = {run.name: (run / "model.json").stat().st_mtime_ns for run in runs}
    kept = all(
        first[key] == again[key] for key in ("results", "summary", "claims", "combination", "per_class")
    )
    return before == after and kept and "report:" in printed


TAKEN_UP: dict[str, Callable[[Trial], bool]] = {
    "a run and its checkpoint, continued to the same bits": continued_run,
    "a store, found and used to the same bits": store_read,
    "a finished run, evaluated and exported alike": finished_run_read,
    "a comparison, continued with another seed": comparison_continued,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--before", type=Path, required=True, help="src folder of the tree that is taken as given"
    )
    parser.add_argument("--after", type=Path, default=Path(__file__).resolve().parents[1] / "src")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", nargs="*", help="parts of the names of cases")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/commits.json"))
    arguments = parser.parse_args()
    trees = {"before": arguments.before, "after": arguments.after}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        trial = Trial(Path(name).resolve(), trees, arguments.steps)

        def told(case: str, outcome: Mapping[str, bool]) -> None:
            rows.append({"case": case, **outcome})
            print(f"{case:<58} " + ", ".join(f"{k}: {v}" for k, v in outcome.items()), flush=True)

        def wanted(case: str) -> bool:
            return not arguments.only or any(part in case for part in arguments.only)

        for number, (case, flags) in enumerate(CASES.items()):
            if wanted(case):
                told(case, trial.same_bits(number, flags))
        for case, check in TAKEN_UP.items():
            if wanted(case):
                told(case, {"works": check(trial)})
    write(arguments.out, {"machine": machine(), "steps": arguments.steps, "rows": rows})
    good = all(value is not False for row in rows for value in row.values())
    print("all equal" if good else "not equal: see above")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
