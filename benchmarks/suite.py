"""One suite under CLIP_benchmark and under ours: the same exported model, the same files, the figures side by side.

    python benchmarks/suite.py [--run RUN | --steps 250] [--python PYTHON] [--out FILE]

Makes ten small data sets in CLIP_benchmark's webdataset layout: scikit-learn's 1,797 digits, and of the built-in world
its objects, its scenes, six attributes as class sets of their own, and its captions for retrieval. The run, or a
baseline that is trained for so many steps, is exported for open_clip. CLIP_benchmark's own command evaluates it
unmodified, one process for each data set; `threetowers evaluate` evaluates the same folder as one suite. PYTHON is an
interpreter in which clip_benchmark and what it imports are installed (1.6.2 needs numpy below 2.4); without it, this
one. Where it is not installed its column stays empty.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from measure import write
from threetowers.compare.machine import machine
from threetowers.data.open import open_source
from threetowers.evaluate.suite.rows import CLIP_BENCHMARK
from threetowers.evaluate.suite.run import evaluate_suite
from threetowers.evaluate.suite.sets import read_suite
from threetowers.export.open_clip import export_open_clip
from threetowers.recipes import PRESETS
from threetowers.run.setup import world
from threetowers.train.loop import train
from threetowers.world.attributes import ATTRIBUTES

TABLES = {"rows": "By data set and metric: the value of CLIP_benchmark, ours, and the difference."}
"""The sentence that docs/benchmarks.md puts before each table."""
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
TASKS = {"retrieval": "zeroshot_retrieval", "zero_shot": "zeroshot_classification"}


def make_sets(root: Path) -> None:
    """Writes the data sets below a folder, each `wds_NAME_test`."""
    digits = load_digits()
    pictures = (
        (_png(Image.fromarray((image * 255 / 16).astype(np.uint8)).resize((32, 32))), str(label))
        for image, label in zip(digits.images, digits.target.tolist(), strict=True)
    )
    _write(
        root / "wds_digits_test",
        pictures,
        [str(label) for label in range(10)],
        ["a photo of the number {c}."],
    )
    folder = world()
    for kind in ("objects", "scenes"):
        source = open_source(str(folder / kind / "test"))
        rows = ((source.image(i), str(source.record(i).label)) for i in range(len(source)))
        _write(root / f"wds_shapes-{kind}_test", rows, source.class_names, source.templates)
    for name, attribute in ATTRIBUTES.items():
        source = open_source(str(folder / attribute.kind / "test"))
        labels = attribute.of(np.array([source.record(i).label for i in range(len(source))])).tolist()
        rows = ((source.image(i), str(labels[i])) for i in range(len(source)))
        _write(root / f"wds_shapes-{name}_test", rows, attribute.class_names, attribute.templates)
    source = open_source(str(folder / "test"))
    captioned = ((source.image(i), "\n".join(source.record(i).captions)) for i in range(len(source)))
    _write(root / "wds_retrieval-shapes_test", captioned, (), ())


def _png(image: Image.Image) -> bytes:
    with io.BytesIO() as file:
        image.convert("RGB").save(file, "PNG")
        return file.getvalue()


def _write(
    folder: Path, rows: Iterable[tuple[bytes, str]], classes: Sequence[str], templates: Sequence[str]
) -> None:
    (folder / "test").mkdir(parents=True)
    ending = "cls" if classes else "txt"
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for index, (image, text) in enumerate(rows):
            for suffix, data in (("png", image), (ending, text.encode())):
                member = tarfile.TarInfo(f"s{index:07d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (folder / "test" / "nshards.txt").write_text("1")
    if classes:
        (folder / "classnames.txt").write_text("\n".join(classes))
        places = [template.replace("{}", "{c}") for template in templates]
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(places))
    else:
        (folder / "dataset_type.txt").write_text("retrieval")


def trained(folder: Path, steps: int) -> Path:
    """A baseline on the built-in world."""
    config = replace(PRESETS["shapes"](), method="baseline", third=(), steps=steps, eval_every_steps=0)
    train(config, folder)
    return folder


def of_clip_benchmark(
    python: str, exported: Path, name: str, root: Path, task: str, out: Path
) -> dict[str, float]:
    """The metrics that CLIP_benchmark's own command writes for a data set."""
    command = [
        python, "-W", "ignore", "-c", "from clip_benchmark.cli import main; main()", "eval",
        "--model", f"local-dir:{exported}", "--pretrained", "", "--dataset", f"wds/{name}",
        "--dataset_root", str(root / "wds_{dataset_cleaned}_test"), "--task", task, "--output", str(out),
        "--num_workers", "0", "--no_amp", "--recall_k", "1", "5", "10",
    ]  # fmt: skip
    subprocess.run(command, check=True, **QUIET)
    metrics: dict[str, float] = json.loads(out.read_bytes())["metrics"]
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/suite.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        make_sets(root / "sets")
        run = arguments.run or trained(root / "run", arguments.steps)
        exported = export_open_clip(run, root / "exported")
        installed = subprocess.run(
            [arguments.python, "-W", "ignore", "-c", "import clip_benchmark.cli"], **QUIET
        )
        if installed.returncode:
            print(f"clip_benchmark cannot be imported by {arguments.python}; its column stays empty")
        sets = read_suite(str(root / "sets"))
        found = evaluate_suite(str(exported), sets, root / "ours")
        ours = {
            value["dataset"]: value["metrics"]
            for path in (root / "ours" / CLIP_BENCHMARK).iterdir()
            for value in [json.loads(path.read_bytes())]
        }
        rows: list[dict[str, Any]] = []
        print(f"\n{'data':<20} {'metric':<26} {'CLIP_benchmark':>15} {'ours':>10} {'difference':>11}")
        for row in found:
            if row.task not in TASKS:
                continue
            out = root / f"{row.data.replace('/', '-')}.json"
            theirs: dict[str, float] = {}
            if not installed.returncode:
                theirs = of_clip_benchmark(
                    arguments.python, exported, row.data, root / "sets", TASKS[row.task], out
                )
            for metric, own in ours[row.data].items():
                value = theirs.get(metric)
                difference = None if value is None else own - value
                rows.append(
                    {"data": row.data, "n": row.n, "metric": metric, "clip_benchmark": value, "ours": own,
                     "difference": difference}
                )  # fmt: skip
                shown = "" if value is None else f"{value:.6f}"
                apart = "" if difference is None else f"{difference:.1e}"
                print(f"{row.data:<20} {metric:<26} {shown:>15} {own:>10.6f} {apart:>11}", flush=True)
    differences = [abs(row["difference"]) for row in rows if row["difference"] is not None]
    worst = max(differences, default=None)
    print(f"largest difference of {len(differences)} figures: {worst}")
    write(arguments.out, {"machine": machine("cpu"), "rows": rows, "largest_difference": worst})


if __name__ == "__main__":
    main()
