"""Time to quality: seconds until a validation R@1 is reached, by `threetowers train` and by `open_clip_train.main`.

    python examples/real/corpora.py icons --num 90000
    python examples/real/corpora.py towers
    python benchmarks/quality.py [--data data/icons-90000] [--third timm:local-dir:data/towers/lite0] [--steps 1600]
                                 [--lrs 5e-4 1e-3 2e-3] [--every 100] [--out runs/bench/quality.json]

About two hours on two quiet cores. Both train the same open_clip towers on the same shards with the same batches,
schedule and optimiser, each with every learning rate; a contender is judged by its best one. Every run is a process of
its own, and its clock starts with its command: start-up, the third tower's features and our own validations count.
open_clip saves a checkpoint where ours validates, and its checkpoints are evaluated afterwards, by the same code as
ours, which does not count. The target is open_clip's best R@1. Its towers are registered by
`open_clip.add_model_config`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import tomli_w
import torch
from PIL import Image

from e2e import flags, program
from measure import write
from threetowers.compare.machine import machine
from threetowers.config import PairConfig
from threetowers.data.open import splits
from threetowers.data.source import Source
from threetowers.data.tokenize import OpenClipTokenizer
from threetowers.evaluate.retrieval import ranks_from_features, recalls
from threetowers.model import Architecture
from threetowers.run.finished import FinishedRun
from threetowers.towers.pair import build_image_tower, build_text_tower, image_spec
from threetowers.towers.weights import load_strictly

TABLES = {
    "rows": (
        "Of each contender with its best `lr`: the `seconds` after which its validation R@1 is that of `target`, "
        "open_clip's best; their `ratio` to open_clip's; its own `best` R@1; and the seconds of the whole run."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""
PAIR: dict[str, Any] = {
    "embed_dim": 128,
    "custom_text": True,
    "vision_cfg": {"timm_model_name": "test_convnext2", "timm_pool": "", "image_size": 64},
    "text_cfg": {"context_length": 32, "vocab_size": 49_408, "width": 128, "heads": 4, "layers": 2},
}
LAUNCH = (
    "import sys, open_clip; open_clip.add_model_config(sys.argv.pop(1)); "
    "from open_clip_train.main import main; main(sys.argv[1:])"
)
BATCH, WARM_UP = 128, 50
Curve = list[tuple[float, float]]
"""Seconds since the command, and validation R@1."""


def ours(name: str, options: argparse.Namespace, lr: float, folder: Path) -> tuple[Curve, float]:
    """Trains with a method of ours; the curve and the seconds of the whole command."""
    method = name.removeprefix("ours ")
    third = [options.third] if method != "baseline" else []
    settings = {
        "data": str(options.data), "method": method, "third": third, "steps": options.steps, "batch_size": BATCH,
        "eval_every_steps": options.every, "checkpoint_every_steps": 1_000_000, "log_every_steps": options.every,
        "device": "cpu", "inputs": {"workers": 1, "crop_scale": [0.9, 1.0]}, "start": {"image_size": 64},
        "optim": {"lr": lr, "warmup_steps": WARM_UP, "weight_decay": 0.2},
        "pair": {"embed_dim": PAIR["embed_dim"], "vision": PAIR["vision_cfg"], "text": PAIR["text_cfg"]},
    }  # fmt: skip
    (folder / "run.toml").write_text(tomli_w.dumps(settings))
    command = [program(), "train", str(folder / "run.toml"), "--out", str(folder / "run")]
    seen: list[float] = []
    log = folder / "run" / "metrics.jsonl"
    start = time.monotonic()
    with (folder / "console").open("wb") as console:
        process = subprocess.Popen(command, stdout=console, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.2)
            seen += [time.monotonic() - start] * (len(validations(log)) - len(seen))
    check(process, folder)
    total = time.monotonic() - start
    values = validations(log)
    seen += [total] * (len(values) - len(seen))
    return list(zip(seen, values, strict=True)), total


def validations(log: Path) -> list[float]:
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [row["val/mean_r@1"] for row in rows if "val/mean_r@1" in row]


def theirs(options: argparse.Namespace, lr: float, folder: Path, val: Source) -> tuple[Curve, float]:
    """Trains with open_clip_train, an epoch being as many steps as lie between two validations of ours."""
    (folder / "tiny.json").write_text(json.dumps(PAIR))
    shards = sorted((options.data / "train").glob("*.tar"))
    settings = {
        "--model": "tiny", "--train-data": "::".join(map(str, shards)), "--dataset-type": "webdataset",
        "--train-num-samples": options.every * BATCH, "--epochs": options.steps // options.every, "--warmup": WARM_UP,
        "--batch-size": BATCH, "--lr": lr, "--wd": 0.2, "--beta2": 0.98, "--eps": 1e-6, "--workers": 1,
        "--save-frequency": 1, "--logs": folder / "logs", "--name": "run", "--device": "cpu",
        "--log-every-n-steps": options.every,
    }  # fmt: skip
    command = [sys.executable, "-c", LAUNCH, str(folder / "tiny.json"), *flags(settings, "fp32")]
    start, began = time.monotonic(), time.time()
    with (folder / "console").open("wb") as console:
        process = subprocess.Popen(command, stdout=console, stderr=subprocess.STDOUT)
        process.wait()
    total = time.monotonic() - start
    check(process, folder)
    saved = sorted(
        (folder / "logs" / "run" / "checkpoints").glob("epoch_*.pt"), key=lambda path: path.stat().st_mtime
    )
    return [(path.stat().st_mtime - began, evaluate(path, val)) for path in saved], total


def evaluate(path: Path, val: Source) -> float:
    """The mean R@1 on validation of a checkpoint of open_clip_train, by the code that evaluates ours."""
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    towers = {"visual": build_image_tower(PAIR, 0), "text": build_text_tower(PAIR, 0)}
    for prefix, tower in towers.items():
        part = {
            key.removeprefix(f"{prefix}."): value
            for key, value in state.items()
            if key.startswith(f"{prefix}.")
        }
        load_strictly(tower, part, path)
        tower.eval()
    pair = FinishedRun(
        img=towers["visual"], txt=towers["text"], architecture=Architecture(PAIR, image_spec(PAIR, PairConfig())),
        tokenizer=OpenClipTokenizer(PAIR["text_cfg"]["context_length"]), scale=1.0, heads={}, described={},
        device=torch.device("cpu"),
    )  # fmt: skip
    texts = [(index, caption) for index in range(len(val)) for caption in val.record(index).captions]
    groups = {
        caption: number for number, caption in enumerate(dict.fromkeys(caption for _, caption in texts))
    }
    images = pair.encode_image([Image.open(BytesIO(val.image(index))) for index in range(len(val))])
    ranks = ranks_from_features(
        images, pair.encode_text([caption for _, caption in texts]), torch.tensor([index for index, _ in texts]),
        torch.tensor([groups[caption] for _, caption in texts]),
    )  # fmt: skip
    return recalls(ranks)["mean_r@1"]


def check(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    if process.returncode:
        tail = (folder / "console").read_text(errors="replace")[-2000:]
        raise SystemExit(f"{folder.name} ended with {process.returncode}. Its last words:\n{tail}")


def reached(curve: Curve, target: float) -> float | None:
    return next((seconds for seconds, value in curve if value >= target), None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data/icons-90000"))
    parser.add_argument("--third", default="timm:local-dir:data/towers/lite0")
    parser.add_argument("--methods", nargs="+", default=["baseline", "lit", "3t", "3t-main", "3t-main-warm"])
    parser.add_argument("--steps", type=int, default=1_600)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--lrs", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/quality.json"))
    options = parser.parse_args()
    options.data = options.data.resolve()
    _, val, _ = splits(str(options.data))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    names = ["open_clip", *(f"ours {method}" for method in options.methods)]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for lr in options.lrs:
        for name in names:
            with tempfile.TemporaryDirectory(prefix="threetowers-quality-") as place:
                folder = Path(place)
                curve, total = (
                    theirs(options, lr, folder, val)
                    if name == "open_clip"
                    else ours(name, options, lr, folder)
                )
            runs[name].append({"lr": lr, "curve": curve, "total": total})
            print(
                f"{name}, lr {lr:g}: best R@1 {max(value for _, value in curve):.1%}, {total:.0f} s",
                flush=True,
            )
    target = max(value for run in runs["open_clip"] for _, value in run["curve"])
    rows = []
    for name, tried in runs.items():
        times = [(reached(run["curve"], target), run) for run in tried]
        best = max(value for run in tried for _, value in run["curve"])
        found = min(
            ((seconds, run) for seconds, run in times if seconds is not None),
            default=None,
            key=lambda t: t[0],
        )
        run = found[1] if found else max(tried, key=lambda run: max(value for _, value in run["curve"]))
        rows.append({
            "contender": name, "lr": run["lr"], "target": target, "seconds": found[0] if found else "never",
            "best": best, "whole run": run["total"],
        })  # fmt: skip
    first = rows[0]["seconds"]
    for row in rows:
        row["ratio"] = row["seconds"] / first if isinstance(row["seconds"], float) else ""
        print(row)
    write(
        options.out,
        {
            "machine": machine("cpu"),
            "data": options.data.name,
            "steps": options.steps,
            "rows": rows,
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
