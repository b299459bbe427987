"""A run with a timm network as image tower becomes a VisionTextDualEncoderModel of equal vectors, or is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import transformers

from kit.runs import Config
from test_export_transformers import TEXTS, close, image_vectors, pictures, text_vectors, with_floor
from threetowers.config import RunConfig
from threetowers.errors import CheckpointError, UsageError
from threetowers.evaluate.suite.target import open_target
from threetowers.export import dual_encoder
from threetowers.export.transformers import export_transformers
from threetowers.objective.losses import unit
from threetowers.run.finished import load_run
from threetowers.train.loop import train

Change = Callable[[RunConfig], RunConfig]


def with_vision(config: RunConfig, **vision: Any) -> RunConfig:
    return replace(config, pair=replace(config.pair, vision={"image_size": 32, "timm_pool": "", **vision}))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def run(folder: Path, tiny_config: Config) -> Path:
    """A finished run of a small ConvNeXt, trained once."""
    if not (folder / "run").exists():
        train(tiny_config(steps=1), folder / "run")
    return folder / "run"


@pytest.fixture
def exported(run: Path, folder: Path) -> Path:
    exported = folder / "exported"
    return exported if exported.exists() else export_transformers(run, exported)


def agrees(run: Path, exported: Path) -> None:
    """The vectors of transformers, and with them its scale, are those of the run."""
    ours = load_run(run)
    close(text_vectors(exported, TEXTS), ours.encode_text(TEXTS))
    side = ours.architecture.image.size
    images = pictures((side, side), (side + 16, side + 6), (31, 90), (side, side + 3))
    close(image_vectors(exported, images), with_floor(ours).encode_image(images))
    model = transformers.AutoModel.from_pretrained(exported).eval()
    assert type(model).__name__ == "VisionTextDualEncoderModel"
    assert model.logit_scale.exp().item() == pytest.approx(ours.scale, rel=1e-6)


def test_a_convolutional_network(run: Path, exported: Path) -> None:
    agrees(run, exported)
    config = json.loads((exported / "config.json").read_text())
    assert config["vision_config"]["architecture"] == "test_convnext2"
    assert config["text_config"]["eos_token_id"] == config["text_config"]["vocab_size"] - 1


def test_the_scores_are_those_of_the_run(run: Path, exported: Path) -> None:
    """The whole model, whose forward is another path than its two feature functions."""
    model = transformers.AutoModel.from_pretrained(exported).eval()
    images = pictures((32, 32), (64, 64))
    processor = transformers.AutoImageProcessor.from_pretrained(exported, backend="pil")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    inputs = dict(tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt"))
    with torch.no_grad():
        found = model(**inputs, **processor(images=images, return_tensors="pt")).logits_per_image
    ours = load_run(run)
    expected = ours.scale * ours.encode_image(images) @ ours.encode_text(TEXTS).T
    torch.testing.assert_close(found, expected, rtol=0, atol=ours.scale * 1e-5)


VARIANTS: dict[str, Change] = {
    "a ViT with its mean as output": lambda config: with_vision(
        config, timm_model_name="test_vit", timm_pool="avg", image_size=160
    ),
    "BatchNorm": lambda config: with_vision(config, timm_model_name="test_resnet"),
    "a warm start": lambda config: replace(config, method="3t-warm"),
    "LiT": lambda config: replace(config, method="lit"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_networks_and_methods(name: str, tiny_config: Config, tmp_path: Path) -> None:
    config = VARIANTS[name](tiny_config(steps=1, batch_size=4))
    train(config, tmp_path / "run")
    agrees(tmp_path / "run", export_transformers(tmp_path / "run", tmp_path / "exported"))


REFUSED: dict[str, tuple[Change, str]] = {
    "mlp": (
        lambda config: with_vision(config, timm_model_name="test_convnext2", timm_proj="mlp"),
        "test_convnext2 does not end in a linear projection",
    ),
    "bias": (
        lambda config: with_vision(config, timm_model_name="test_convnext2", timm_proj_bias=True),
        "test_convnext2 ends in a projection with a bias",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_is_refused_with_the_reason(name: str, tiny_config: Config, tmp_path: Path) -> None:
    change, reason = REFUSED[name]
    train(change(tiny_config(steps=1)), tmp_path / "run")
    with pytest.raises(
        UsageError, match=f"--to transformers: .*{reason}.*VisionTextDualEncoder.*--to open_clip"
    ):
        export_transformers(tmp_path / "run", tmp_path / "exported")
    assert not list(tmp_path.glob("*exported*"))


def test_a_network_that_timm_builds_otherwise_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_values(*arguments: Any, **more: Any) -> torch.nn.Module:
        network: torch.nn.Module = timm.create_model(*arguments, **more)
        network.register_forward_hook(lambda module, inputs, output: output + 1)
        return network

    def other_weights(*arguments: Any, **more: Any) -> torch.nn.Module:
        return torch.nn.Sequential(timm.create_model(*arguments, **more))

    finished = load_run(run)

    def rounded(*arguments: Any, **more: Any) -> torch.nn.Module:
        """The same network on another processor, with features of which some are much larger than others."""
        network: Any = timm.create_model(*arguments, **more)
        noise = 1e-5 * torch.randn(network.num_features, generator=torch.Generator().manual_seed(0))
        network.register_forward_hook(lambda *call: call[2] + noise * call[2].abs().mean())
        built: torch.nn.Module = network
        return built

    assert dual_encoder.network_arguments(finished) == {}
    monkeypatch.setattr(dual_encoder, "timm", SimpleNamespace(create_model=rounded))
    assert dual_encoder.network_arguments(finished) == {}
    for build in (other_values, other_weights):
        monkeypatch.setattr(dual_encoder, "timm", SimpleNamespace(create_model=build))
        assert dual_encoder.network_arguments(finished) is None
    with pytest.raises(UsageError, match=r"is built by timm\.create_model as another network"):
        export_transformers(run, tmp_path / "exported")


def test_an_export_that_computes_other_vectors_fails(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = dual_encoder.vision_weights

    def wrong(finished: Any) -> dict[str, torch.Tensor]:
        return {key: value.flip(0) if "proj" in key else value for key, value in right(finished).items()}

    monkeypatch.setattr("threetowers.export.transformers.vision_weights", wrong)
    with pytest.raises(CheckpointError, match="transformers computes other image vectors"):
        export_transformers(run, tmp_path / "exported")


def test_it_is_a_target_of_the_suite(run: Path, exported: Path) -> None:
    target = open_target(str(exported))
    with torch.no_grad():
        text = unit(target.text.module(target.text.inputs(TEXTS)))  # type: ignore[operator]
    close(text, load_run(run).encode_text(TEXTS))
    assert target.scale == pytest.approx(load_run(run).scale, rel=1e-6)


def test_sentence_transformers_computes_the_same(run: Path, exported: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(exported), device="cpu", processor_kwargs={"backend": "pil"})
    ours, images = load_run(run), pictures((32, 32), (60, 38))
    close(torch.from_numpy(model.encode(TEXTS, normalize_embeddings=True)), ours.encode_text(TEXTS))
    close(torch.from_numpy(model.encode(images, normalize_embeddings=True)), ours.encode_image(images))
