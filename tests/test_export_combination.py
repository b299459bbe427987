"""The convex combination with the third tower as one model: one product of vectors is the combined score."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kit.runs import Config, with_vit
from kit.towers import timm_folder
from threetowers.commands.arguments import ExportArguments
from threetowers.commands.export import export
from threetowers.data.decode import decode
from threetowers.data.transforms import ImageSpec, fixed_view, normalise
from threetowers.errors import CheckpointError, UsageError
from threetowers.evaluate.evaluation import evaluate_run
from threetowers.export.formats import FORMATS
from threetowers.export.onnx import open_graph
from threetowers.export.towers import _geometry, combined_encoders, main_encoders
from threetowers.run.finished import load_run
from threetowers.run.setup import open_data
from threetowers.settings import read_config
from threetowers.towers.weights import read_safetensors
from threetowers.train.loop import train

TEXTS = ["a red square at the top left", "", "the bottom right is blue", "long " * 40]


def third_tower(folder: Path, seed: int) -> str:
    """A timm network that takes the main tower's pixels, but for mean and std."""
    return timm_folder(folder, seed, 32, 1.0, "bicubic")


@pytest.fixture
def run(folder: Path, tiny_config: Config) -> Path:
    if not (folder / "run").exists():
        spec = third_tower(folder / "tower", 5)
        train(with_vit(tiny_config(third=(spec,), steps=20), layers=1), folder / "run")
    return folder / "run"


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = ((48, 40), (33, 90), (32, 32))
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0])
def test_the_networks_compute_what_the_towers_compute_each_by_its_own_preprocessing(
    alpha: float, run: Path
) -> None:
    finished = load_run(run)
    encoders = combined_encoders(finished, run, alpha, "x")
    pixels = torch.from_numpy(
        np.stack([fixed_view(each, finished.architecture.image) for each in pictures()])
    )
    image = encoders.image(normalise(pixels, finished.architecture.image))
    torch.testing.assert_close(image, encoders.encode_image(pictures()), rtol=0, atol=1e-5)
    text = encoders.text(finished.tokenizer(TEXTS))
    torch.testing.assert_close(text, encoders.encode_text(TEXTS), rtol=0, atol=1e-5)
    assert image.shape == (3, 48) and text.shape == (4, 48) and encoders.width == 48
    torch.testing.assert_close(image.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(4))
    main = (1 - alpha) * finished.score(pictures(), TEXTS)  # type: ignore[arg-type]
    torch.testing.assert_close(image[:, :24] @ text[:, :24].T, main, rtol=0, atol=1e-5)


@pytest.mark.slow  # three networks are traced
def test_products_of_the_graphs_vectors_are_the_scores_that_the_evaluation_combines(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The evaluation encodes by another way: the model in training's form, and stored features of the third tower."""
    alpha = 0.3
    loading = export(ExportArguments(run=run, out=tmp_path / "out", to="onnx-int8", alpha=alpha))
    assert "text_model_quantized.onnx" in loading
    assert "eight bits in retrieval on" in capsys.readouterr().err
    evaluate_run(run)
    saved = read_safetensors(run / "features.safetensors")
    *_, test = open_data(read_config(run / "config.toml"))
    finished = load_run(run)
    records = [test.record(index) for index in saved["test/index"].tolist()]
    views = [
        fixed_view(decode(test.image(index), ""), finished.architecture.image)
        for index in saved["test/index"].tolist()
    ]
    pixels = normalise(torch.from_numpy(np.stack(views)), finished.architecture.image)
    texts = [caption for record in records for caption in record.captions]
    image = open_graph(tmp_path / "out" / "onnx" / "vision_model.onnx")(pixels)
    text = open_graph(tmp_path / "out" / "onnx" / "text_model.onnx")(finished.tokenizer(texts))
    main = saved["test/img"] @ saved["test/txt"].T
    side = saved["test/third@txt"] @ saved["test/txt@third"].T
    expected = (1 - alpha) * main + alpha * side
    torch.testing.assert_close(image @ text.T, expected, rtol=0, atol=2e-3)  # features are stored in fp16
    assert (image @ text.T - main).abs().max() > 0.05, "the third tower takes part"
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "at α = 0.3" in card and "runs both image towers" in card and "[batch, 48]" in card
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["projection_dim"] == 48


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_a_weight_outside_is_refused(alpha: float, run: Path) -> None:
    with pytest.raises(UsageError, match="a weight from 0 to 1 is needed"):
        combined_encoders(load_run(run), run, alpha, "--to onnx")


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.combine is None])
def test_a_format_with_one_image_tower_refuses_a_weight(name: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"--alpha: a model of {name} has one image tower.*--to onnx"):
        export(ExportArguments(run=run, out=tmp_path / "out", to=name, alpha=0.5))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["baseline", "lit", "3t-regression"])
def test_a_run_without_a_second_system_is_refused(method: str, tiny_config: Config, tmp_path: Path) -> None:
    train(tiny_config(method=method, steps=1), tmp_path / "run")
    with pytest.raises(UsageError, match=rf"this run \({method}\) has none of them; leave --alpha out"):
        combined_encoders(load_run(tmp_path / "run"), tmp_path / "run", 0.5, "--to onnx")


def test_two_third_towers_are_refused(
    run: Path, timm_tower: str, tiny_config: Config, tmp_path: Path
) -> None:
    spec = read_config(run / "config.toml").third[0]
    train(tiny_config(third=(f"a={spec}", f"b={timm_tower}"), steps=1), tmp_path / "run")
    with pytest.raises(UsageError, match=r"this run \(3t\) has 2 of them"):
        combined_encoders(load_run(tmp_path / "run"), tmp_path / "run", 0.5, "--to onnx")


def test_a_third_tower_with_other_pixels_is_refused(tiny_config: Config, tmp_path: Path) -> None:
    train(tiny_config(steps=1), tmp_path / "run")
    with pytest.raises(UsageError, match=r"takes other pixels than the main tower \(.*crop 48.*crop 32"):
        combined_encoders(load_run(tmp_path / "run"), tmp_path / "run", 0.5, "--to onnx")


def test_two_towers_take_the_same_pixels_whatever_their_mean_and_std_are() -> None:
    spec = ImageSpec(32, (0.5,) * 3, (0.5,) * 3)
    same: list[dict[str, Any]] = [{"mean": (0.1, 0.2, 0.3)}, {"std": (0.2,) * 3}, {"resize_size": 32}]
    for change in same:
        assert _geometry(replace(spec, **change)) == _geometry(spec)
    other: list[dict[str, Any]] = [
        {"size": 31}, {"resize_size": 36}, {"resize": "squash"}, {"interpolation": "bilinear"}, {"centre": "floor"},
    ]  # fmt: skip
    for change in other:
        assert _geometry(replace(spec, **change)) != _geometry(spec), change
    squashed = replace(spec, resize="squash")
    assert _geometry(replace(squashed, centre="floor")) == _geometry(squashed), "nothing is cropped"


def test_a_third_tower_that_was_exchanged_is_refused(
    folder: Path, tiny_config: Config, tmp_path: Path
) -> None:
    spec = third_tower(tmp_path / "tower", 5)
    train(with_vit(tiny_config(third=(spec,), steps=1), layers=1), tmp_path / "run")
    third_tower(tmp_path / "tower", 6)
    with pytest.raises(CheckpointError, match="is not the one that this run was trained with"):
        combined_encoders(load_run(tmp_path / "run"), tmp_path / "run", 0.5, "--to onnx")


def test_without_a_weight_the_encoders_are_the_main_pair(run: Path) -> None:
    finished = load_run(run)
    encoders = main_encoders(finished)
    assert encoders.width == 24 and encoders.remarks == ()
    torch.testing.assert_close(
        encoders.text(finished.tokenizer(TEXTS)), finished.encode_text(TEXTS), rtol=0, atol=1e-6
    )
