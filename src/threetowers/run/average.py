"""The average of several finished runs' weights, as a finished run.

    average_runs([Path("runs/start"), Path("runs/tuned")], (0.5, 0.5), Path("runs/between"))

Averages of runs that began at the same weights, such as a model and what was fine-tuned from it, are often better than
each of them (WiSE-FT, arXiv 2109.01903; model soups, arXiv 2203.05482). Runs that began at different random weights
have no common order of their units, and their average is in general worse than each of them.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from threetowers.errors import CheckpointError, UsageError
from threetowers.files import digest_file, write_whole
from threetowers.progress import warn
from threetowers.run.finished import read_description, read_weights
from threetowers.settings import read_config, write_config
from threetowers.towers.weights import write_safetensors

EQUAL = {
    "model_cfg": "the networks",
    "image": "the preprocessing of images",
    "tokenizer": "the tokenizer",
    "rows": "the objective, and with it the heads",
    "thirds": "the third towers",
}
"""Keys of model.json in which runs must agree, and what each describes."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def average_runs(runs: Sequence[Path], weights: Sequence[float], out: Path) -> Path:
    """Writes a run folder with Σ weight · weights of the runs, of towers, heads and scale alike; returns the folder.

    weights: one for each run, at least 0, with sum 1; none given means equal ones. Settings and data are those of the
    first run, and so are integers, such as the counts of BatchNorm. model.json lists all runs under `averaged`.

    Raises UsageError for weights that do not fit, for an `out` that holds something, and for runs that differ in what
    EQUAL lists. Raises CheckpointError for a run that is unfinished or damaged. Nothing is written then.
    """
    weights = _checked(weights, len(runs))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"--out {out}: something is there already; give another folder")
    described = [read_description(run) for run in runs]
    for run, other in zip(runs[1:], described[1:], strict=True):
        _check_equal(runs[0], described[0], run, other)
    config = read_config(runs[0] / "config.toml")
    if len({read_config(run / "config.toml").seed for run in runs}) > 1:
        warn(
            "these runs have different seeds. If they did not begin at the same weights, their average is hardly of use"
        )
    state = _average(runs, described, weights)

    made = out.absolute().parent / f".{out.name}.partial"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    try:
        write_safetensors(made / "model.safetensors", state)
        for name in TOKENIZER_FILES:
            if (runs[0] / name).is_file():
                shutil.copyfile(runs[0] / name, made / name)
        write_config(config, made / "config.toml")
        averaged = [
            {"run": str(run), "weight": weight, "sha256": each["sha256"]}
            for run, weight, each in zip(runs, weights, described, strict=True)
        ]
        written = {**described[0], "sha256": digest_file(made / "model.safetensors"), "averaged": averaged}
        write_whole(made / "model.json", json.dumps(written, indent=2))
        made.rename(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return out


def _checked(weights: Sequence[float], count: int) -> tuple[float, ...]:
    if count < 2:
        raise UsageError("average: give at least two run folders")
    if not weights:
        return (1 / count,) * count
    if len(weights) != count:
        raise UsageError(f"--weights: {len(weights)} for {count} runs; give one for each")
    if not all(weight >= 0 for weight in weights) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        listed = " ".join(f"{weight:g}" for weight in weights)
        raise UsageError(
            f"--weights {listed}: they must be at least 0, and their sum 1; it is {sum(weights):g}"
        )
    return tuple(weights)


def _check_equal(first: Path, described: dict[str, Any], run: Path, other: dict[str, Any]) -> None:
    """Raises UsageError that names what two runs differ in."""
    differing = [what for key, what in EQUAL.items() if _known(described, key) != _known(other, key)]
    if not differing and described["tokenizer"] != "open_clip":
        texts = [(each / "tokenizer.json").read_bytes() for each in (first, run)]
        differing = [EQUAL["tokenizer"]] if json.loads(texts[0]) != json.loads(texts[1]) else []
    if differing:
        raise UsageError(
            f"{run}: cannot be averaged with {first}, because {' and '.join(differing)} differ; average runs in which "
            "every weight has the same place and meaning"
        )


def _known(described: dict[str, Any], key: str) -> Any:
    """What model.json says under a key; of third towers who they are, and not where their files were."""
    if key != "thirds":
        return described[key]
    return [(third["view"], third["fingerprint"]) for third in described[key]]


def _average(
    runs: Sequence[Path], described: Sequence[dict[str, Any]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """The averaged tensors, in the types of the first run; sums are in fp64, and one run is in memory at a time."""
    first = read_weights(runs[0], described[0])
    total = {key: value.double() * weights[0] for key, value in first.items() if value.is_floating_point()}
    shapes = {key: value.shape for key, value in first.items()}
    for run, each, weight in zip(runs[1:], described[1:], weights[1:], strict=True):
        state = read_weights(run, each)
        if {key: value.shape for key, value in state.items()} != shapes:
            raise CheckpointError(f"{run}: its weights have other names or shapes than those of {runs[0]}")
        for key, value in total.items():
            value.add_(state[key].double(), alpha=weight)
    return {key: total[key].to(value.dtype) if key in total else value for key, value in first.items()}
