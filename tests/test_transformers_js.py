"""transformers.js computes the run's vectors with the folder of an ONNX export."""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kit.clip import clip_folder
from kit.runs import TINY_PAIR, Config, with_vit
from kit.sentences import sentence_encoder
from threetowers.config import RunConfig, StartConfig
from threetowers.export.onnx import export_onnx
from threetowers.run.finished import load_run
from threetowers.train.loop import train

JAVASCRIPT = Path(__file__).parent / "javascript"

pytestmark = [
    pytest.mark.slow,  # two graphs are traced for each run
    pytest.mark.skipif(
        shutil.which("node") is None or not (JAVASCRIPT / "node_modules").exists(),
        reason="needs Node.js and transformers.js; `make test-slow` installs the latter where npm is found",
    ),
]

TEXTS = [
    "a red square at the top left",
    "Ein Größenvergleich, sehr lang " * 9,
    "",
    "the  bottom\nright is blue",
]


def own_vocabulary(config: RunConfig, _: Path) -> RunConfig:
    return with_vit(config, layers=1)


def open_clips_vocabulary(config: RunConfig, _: Path) -> RunConfig:
    return replace(config, pair=replace(config.pair, tokenizer="open_clip"))


def looks_at_padding(config: RunConfig, _: Path) -> RunConfig:
    return replace(config, pair=replace(config.pair, text={**TINY_PAIR.text, "no_causal_mask": True}))


def starts_from_sentences(config: RunConfig, folder: Path) -> RunConfig:
    return replace(config, start=StartConfig(text=f"hf-text:{sentence_encoder(folder / 'encoder')}"))


def starts_from_clip(config: RunConfig, folder: Path) -> RunConfig:
    clip = f"hf:{clip_folder(folder / 'clip')}"
    return replace(config, start=StartConfig(image=clip, text=clip))


VARIANTS: dict[str, Callable[[RunConfig, Path], RunConfig]] = {
    "own vocabulary": own_vocabulary,
    "open_clip's vocabulary": open_clips_vocabulary,
    "a text tower that looks at its padding": looks_at_padding,
    "a sentence encoder": starts_from_sentences,
    "a CLIPModel": starts_from_clip,
}


def pictures(folder: Path, *sizes: tuple[int, int]) -> list[Path]:
    """Smooth images of the given heights and widths, as photographs are."""
    paths = []
    for index, (height, width) in enumerate(sizes):
        coarse = np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        paths.append(folder / f"{index}.png")
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(paths[-1])
    return paths


def javascript(folder: Path, images: list[Path], dtype: str = "fp32") -> dict[str, torch.Tensor]:
    """What transformers.js computes of TEXTS and images with an exported folder."""
    request, answer = folder.parent / "request.json", folder.parent / "answer.json"
    padding: Any = True if "padding: true" in (folder / "README.md").read_text("utf-8") else "max_length"
    request.write_text(
        json.dumps(
            {"folder": str(folder), "dtype": dtype, "padding": padding, "texts": TEXTS,
             "images": [str(path) for path in images]}
        )
    )  # fmt: skip
    done = subprocess.run(
        ["node", "vectors.mjs", request, answer], cwd=JAVASCRIPT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return {name: torch.tensor(value) for name, value in json.loads(answer.read_text()).items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_js_computes_the_vectors_of_the_run(
    name: str, tiny_config: Config, tmp_path: Path
) -> None:
    train(VARIANTS[name](tiny_config(steps=2), tmp_path), tmp_path / "run")
    export_onnx(tmp_path / "run", tmp_path / "exported", quantize=True)
    ours = load_run(tmp_path / "run")
    spec = ours.architecture.image
    size = spec.resize_size or spec.size  # a shorter side of this length is only cropped
    images = pictures(tmp_path, (size, size), (size, size), (size, size + 8), (70, 50))
    found = javascript(tmp_path / "exported", images)
    torch.testing.assert_close(found["texts"], ours.encode_text(TEXTS), rtol=0, atol=1e-5)
    expected = ours.encode_image(images)
    torch.testing.assert_close(found["images"][:3], expected[:3], rtol=0, atol=1e-5)
    assert (found["images"][3] @ expected[3]) > 0.999, "sharp resizes with other rounding than Pillow"
    rough = javascript(tmp_path / "exported", images, dtype="q8")
    assert (rough["texts"] * found["texts"]).sum(dim=1).min() > 0.98
    assert not torch.equal(rough["texts"], found["texts"])
