"""A finished run in the format of another library, and what weights of eight bits cost in retrieval."""

import json
import sys
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from threetowers.commands.arguments import ExportArguments
from threetowers.data.source import Source, Subset
from threetowers.data.tokenize import Tokenizer
from threetowers.errors import DataError, UsageError
from threetowers.evaluate.retrieval import ranks_of, recalls
from threetowers.evaluate.suite.features import Part, TowerFeatures, captioned
from threetowers.evaluate.suite.target import Target
from threetowers.export.formats import FORMATS
from threetowers.export.onnx import open_graph
from threetowers.run.finished import FinishedRun, load_run
from threetowers.run.setup import open_data
from threetowers.settings import did_you_mean, read_config
from threetowers.towers.frozen.base import FrozenTower

MOST_IMAGES = 1000
"""Test images on which the loss is measured at most."""


def export(arguments: ExportArguments) -> str:
    """Writes a run in the format that the arguments name; returns a line that says how to load it.

    Raises UsageError for a format that does not exist, and what the format raises.
    """
    run, to, alpha = arguments.run, arguments.to, arguments.alpha
    if to not in FORMATS:
        raise UsageError(f"--to: {to!r} is no format{did_you_mean(to, FORMATS)}")
    form = FORMATS[to]
    if not alpha:
        folder = form.write(run, arguments.out)
    elif form.combine is not None:
        folder = form.combine(run, arguments.out, alpha)
    else:
        raise UsageError(
            f"--alpha: a model of {to} has one image tower, and the convex combination two; export --to onnx"
        )
    if to == "onnx-int8":
        try:
            print(f"checked: {quantization_loss(run, folder)}", file=sys.stderr)
        except (DataError, UsageError) as error:
            print(f"note: the loss in retrieval could not be measured: {error}", file=sys.stderr)
    return f"written to {folder}, where README.md shows its use. Load it with {form.how_to_load(folder)}"


def quantization_loss(run: Path, folder: Path) -> str:
    """A line about retrieval on the run's test images with the graphs of a folder, and with those of eight bits.

    At most the first MOST_IMAGES are taken. Raises DataError or UsageError when the run's data are not there any more,
    or hold no captioned test images.
    """
    *_, test = open_data(read_config(run / "config.toml"))
    if len(test) > MOST_IMAGES:
        test = Subset(test, array("q", range(MOST_IMAGES)), test.name)
    finished = load_run(run)
    exact = _recalls(finished, folder, "", test)
    rough = _recalls(finished, folder, "_quantized", test)
    changes = (
        f"{name} {exact[name]:.1%} → {rough[name]:.1%} ({100 * (rough[name] - exact[name]):+.1f} points)"
        for name in ("i2t_r@1", "t2i_r@1", "mean_r@1")
    )
    return f"eight bits in retrieval on {len(test):,} test images: {', '.join(changes)}"


class _Graph(nn.Module):
    """An ONNX graph of one input and one output."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.graph = open_graph(path)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.graph(inputs)


class _Padded:
    """A main tokenizer whose texts keep their padding, since not every text graph takes shorter ones."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self._tokenizer(texts)

    def lengths(self, tokens: Tensor) -> Tensor:
        return tokens.new_full((len(tokens),), tokens.shape[1])

    def as_dict(self) -> dict[str, Any]:
        return {}


def _recalls(finished: FinishedRun, folder: Path, suffix: str, test: Source) -> dict[str, float]:
    """Retrieval with the two graphs whose names end in the suffix."""
    image, text = (_Graph(folder / "onnx" / f"{name}_model{suffix}.onnx") for name in ("vision", "text"))
    width = json.loads((folder / "config.json").read_text(encoding="utf-8"))["projection_dim"]
    spec = finished.architecture.image
    target = Target(
        str(folder),
        FrozenTower("img", str(folder), image, width, spec),
        FrozenTower("txt", str(folder), text, width, _Padded(finished.tokenizer)),
        finished.scale,
    )
    with tempfile.TemporaryDirectory() as store:
        return recalls(ranks_of(captioned(TowerFeatures(target, Path(store)), Part("run", "test", test))))
