"""onnxruntime computes the same embeddings from an exported run as we do, or the export is refused."""

import contextlib
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer

from kit.runs import TINY_PAIR, Config, with_vit
from threetowers.commands import export as commands
from threetowers.commands.arguments import ExportArguments
from threetowers.commands.export import quantization_loss
from threetowers.config import RunConfig
from threetowers.data.tokenize import OpenClipTokenizer
from threetowers.data.transforms import normalise
from threetowers.errors import CheckpointError, UsageError
from threetowers.evaluate.evaluation import evaluate_run
from threetowers.export import onnx as export
from threetowers.export.onnx import export_onnx
from threetowers.export.towers import main_encoders
from threetowers.export.transformers import export_transformers
from threetowers.objective.losses import unit
from threetowers.run.finished import FinishedRun, load_run
from threetowers.train.loop import train

TEXTS = [
    "a red square at the top left",
    "Ein Größenvergleich, sehr lang " * 9,
    "",
    "the  bottom\nright is blue",
]


def with_pair(config: RunConfig, vision: dict[str, Any], **text: Any) -> RunConfig:
    return replace(config, pair=replace(config.pair, vision=vision, text={**config.pair.text, **text}))


@pytest.fixture
def run(folder: Path, tiny_config: Config) -> Path:
    """A finished run of open_clip's own towers with a vocabulary of its own, trained once."""
    if not (folder / "run").exists():
        train(with_vit(tiny_config(steps=2), layers=1), folder / "run")
    return folder / "run"


@pytest.fixture
def exported(run: Path, folder: Path) -> Path:
    """Its export with graphs of eight bits; what was said is in said.txt beside it."""
    out = folder / "exported"
    if not out.exists():
        with contextlib.redirect_stderr(io.StringIO()) as said:
            export_onnx(run, out, quantize=True)
        (folder / "said.txt").write_text(said.getvalue(), encoding="utf-8")
    return out


def computed(folder: Path, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """What a graph gives, by the names that transformers.js knows."""
    takes, gives = {"vision": ("pixel_values", "image_embeds"), "text": ("input_ids", "text_embeds")}[name]
    session = onnxruntime.InferenceSession(folder / "onnx" / f"{name}_model.onnx")
    return torch.from_numpy(session.run([gives], {takes: inputs.numpy()})[0])


def pixels(finished: FinishedRun, batch: int) -> torch.Tensor:
    spec = finished.architecture.image
    shape = (batch, 3, spec.size, spec.size)
    return normalise(
        torch.from_numpy(np.random.default_rng(batch).integers(0, 256, shape, dtype=np.uint8)), spec
    )


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def batch_norm(config: RunConfig) -> RunConfig:
    config = with_pair(config, {"timm_model_name": "test_resnet", "timm_pool": "", "image_size": 32})
    return replace(config, method="baseline", third=(), pair=replace(config.pair, tokenizer="open_clip"))


def looks_at_padding(config: RunConfig) -> RunConfig:
    return with_pair(replace(config, method="lit"), TINY_PAIR.vision, no_causal_mask=True)


VARIANTS: dict[str, Callable[[RunConfig], RunConfig]] = {
    "BatchNorm and open_clip's vocabulary": batch_norm,
    "LiT and a text tower that looks at its padding": looks_at_padding,
}


@pytest.mark.slow  # two graphs are traced for each
@pytest.mark.parametrize("name", VARIANTS)
def test_onnxruntime_computes_the_same_embeddings(name: str, tiny_config: Config, tmp_path: Path) -> None:
    train(VARIANTS[name](tiny_config(steps=2)), tmp_path / "run")
    folder = export_onnx(tmp_path / "run", tmp_path / "exported")
    ours = load_run(tmp_path / "run")
    tokens = ours.tokenizer(TEXTS)
    with torch.no_grad():
        for batch in (1, 3, 4):
            images = pixels(ours, batch)
            close(computed(folder, "vision", images), unit(ours.img(images)))
            close(computed(folder, "text", tokens[:batch]), ours.encode_text(TEXTS[:batch]))


def test_the_graphs_take_any_batch_and_any_length_of_text(run: Path, exported: Path) -> None:
    finished = load_run(run)
    tokens = finished.tokenizer(TEXTS)
    lengths = finished.tokenizer.lengths(tokens).tolist()
    assert lengths[2] == 2 and lengths[1] == tokens.shape[1] == 16
    for row, length in enumerate(lengths):
        for n in {length, min(length + 1, 16), 16}:
            close(
                computed(exported, "text", tokens[row : row + 1, :n]),
                finished.encode_text(TEXTS[row : row + 1]),
            )
    found = computed(exported, "text", tokens)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    cut = tokens.clone()
    cut[1, -1] = tokens[1, 5]  # transformers.js cuts a long text anywhere, and its end token with it
    close(computed(exported, "text", cut), finished.encode_text(TEXTS))
    for name in ("vision", "text"):
        graph = onnx.load(exported / "onnx" / f"{name}_model.onnx")
        onnx.checker.check_model(graph)
        assert [each.version for each in graph.opset_import if each.domain == ""] == [export.OPSET]
        (taken,), (given,) = graph.graph.input, graph.graph.output
        axes = [axis.dim_param or axis.dim_value for axis in taken.type.tensor_type.shape.dim]
        assert axes == (["batch", 3, 32, 32] if name == "vision" else ["batch", "sequence"])
        assert [axis.dim_param or axis.dim_value for axis in given.type.tensor_type.shape.dim] == [
            "batch",
            24,
        ]
        assert b".py" not in graph.SerializeToString(), "no paths of who exported it"


def test_the_tokenizer_and_the_preprocessing_beside_the_graphs_are_those_of_the_run(
    run: Path, exported: Path, tmp_path: Path
) -> None:
    finished = load_run(run)
    tokenizer = Tokenizer.from_file(str(exported / "tokenizer.json"))
    tokenizer.enable_padding(length=16, pad_id=0)
    assert [entry.ids for entry in tokenizer.encode_batch(TEXTS)] == finished.tokenizer(TEXTS).tolist()
    loaded = transformers.AutoTokenizer.from_pretrained(exported)
    ids = loaded(TEXTS, padding=True, truncation=True, return_tensors="pt")["input_ids"]
    close(computed(exported, "text", ids), finished.encode_text(TEXTS))
    beside = export_transformers(run, tmp_path / "transformers")
    settings = [json.loads((path / "preprocessor_config.json").read_text()) for path in (exported, beside)]
    assert settings[0] == settings[1]
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "clip" and config["projection_dim"] == 24
    assert np.exp(config["logit_scale_init_value"]) == pytest.approx(finished.scale)


def test_graphs_of_eight_bits_are_smaller_and_what_they_lose_is_said(run: Path, exported: Path) -> None:
    sizes = {
        str(path.relative_to(exported)): path.stat().st_size for path in exported.rglob("*") if path.is_file()
    }
    assert set(sizes) == {
        "README.md", "config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
        "onnx/text_model.onnx", "onnx/vision_model.onnx",
        "onnx/text_model_quantized.onnx", "onnx/vision_model_quantized.onnx",
    }  # fmt: skip
    said = (exported.parent / "said.txt").read_text(encoding="utf-8")
    for name in ("vision", "text"):
        assert sizes[f"onnx/{name}_model_quantized.onnx"] < sizes[f"onnx/{name}_model.onnx"]
        assert re.search(
            rf"{name}_model_quantized\.onnx computes vectors whose cosine with the run's is (1\.0|0\.9)", said
        )
        assert re.search(rf"computes the run's {name} vectors (to \d\.\de-\d\d|exactly)", said)
    finished = load_run(run)
    found = export.open_graph(exported / "onnx" / "text_model_quantized.onnx")(finished.tokenizer(TEXTS))
    cosines = (found * finished.encode_text(TEXTS)).sum(dim=1)
    assert 0.98 < cosines.min() < 1 - 1e-6, "it loses something, and not much"


def test_the_loss_of_eight_bits_in_retrieval_is_measured_on_the_runs_test_images(
    run: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def figures(line: str) -> dict[str, tuple[float, float]]:
        found = re.findall(r"(\S+) (\S+)% → (\S+)% \(", line)
        return {name: (float(exact), float(rough)) for name, exact, rough in found}

    line = quantization_loss(run, exported)
    evaluated = evaluate_run(run).sections["test"]
    assert set(figures(line)) == {"i2t_r@1", "t2i_r@1", "mean_r@1"}
    for name, (exact, _) in figures(line).items():
        assert exact == pytest.approx(100 * evaluated[name], abs=0.06)

    def all_the_same(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        graph = export.open_graph(path)
        return (
            (lambda inputs: graph(inputs)[:1].expand(len(inputs), -1)) if "quantized" in path.name else graph
        )

    monkeypatch.setattr(commands, "open_graph", all_the_same)
    for exact, rough in figures(quantization_loss(run, exported)).values():
        assert exact > 0 == rough, "ties count against the model"
    monkeypatch.setattr(commands, "MOST_IMAGES", 5)
    assert "retrieval on 5 test images" in quantization_loss(run, exported)


def test_without_its_data_a_run_is_exported_and_the_loss_is_said_not_to_be_measured(
    run: Path,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.toml"
    config.write_text(re.sub("^data = .*$", 'data = "/gone.csv"', config.read_text(), flags=re.MULTILINE))
    with_graphs_of(monkeypatch, exported)
    loading = commands.export(ExportArguments(run=tmp_path / "run", out=tmp_path / "out", to="onnx-int8"))
    assert "text_model_quantized.onnx" in loading and (tmp_path / "out" / "onnx").is_dir()
    said = capsys.readouterr().err
    assert "could not be measured: " in said and "/gone.csv" in said


def test_the_code_of_the_card_runs(run: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = exported.parent / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(photo)
    shutil.copy(photo, photo.with_suffix(".jpg"))
    monkeypatch.chdir(exported.parent)
    (code,) = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    close(torch.from_numpy(names["image"]), load_run(run).encode_image([photo]))
    close(torch.from_numpy(names["text"]), load_run(run).encode_text(["a photo"]))


def other_pixels(patch: pytest.MonkeyPatch, exported: Path) -> None:
    patch.setattr(export, "normalise", lambda pixels, spec: normalise(pixels, spec).flip(3))
    with_graphs_of(patch, exported)


def texts_not_cleaned(patch: pytest.MonkeyPatch, exported: Path) -> None:
    patch.setattr(export, "write_tokenizer", lambda tokenizer, folder: tokenizer.save(folder))
    with_graphs_of(patch, exported)


def with_graphs_of(patch: pytest.MonkeyPatch, exported: Path) -> None:
    """Tracing takes seconds, and these damages are not in the graphs."""
    patch.setattr(export, "_write_graph", lambda side, path: shutil.copy(exported / "onnx" / path.name, path))


@pytest.mark.parametrize(("damage", "what"), [(other_pixels, "vision"), (texts_not_cleaned, "text")])
def test_an_export_that_computes_other_vectors_fails_and_leaves_nothing(
    damage: Callable[[pytest.MonkeyPatch, Path], None],
    what: str,
    run: Path,
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    damage(monkeypatch, exported)
    with pytest.raises(CheckpointError, match=f"onnxruntime computes other {what} vectors"):
        export_onnx(run, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


class DependsOnValues(torch.nn.Module):
    """What no graph can express."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs if inputs.sum() > 0 else -inputs


def test_what_cannot_be_exported_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(export, "LARGEST", 1000)
        with pytest.raises(UsageError, match=r"vision tower has .* GiB of weights.*--to open_clip"):
            export_onnx(run, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(UsageError, match=r"needs onnxscript .*pip install 'threetowers\[onnx\]'"):
            export_onnx(run, tmp_path / "out")
    ones, batch = torch.ones(1, 3), torch.export.Dim("batch")
    side = export._Side("vision", DependsOnValues(), "pixels", "features", {0: batch}, [ones], ones)
    with pytest.raises(UsageError, match=r"torch cannot export the vision tower \(.*--to open_clip"):
        export._write_graph(side, tmp_path / "out.onnx")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_no_other_model_is_overwritten(run: Path, exported: Path, tmp_path: Path) -> None:
    beside = export_transformers(run, tmp_path / "transformers")
    before = (beside / "tokenizer.json").read_bytes()
    with pytest.raises(UsageError, match=r"another model \(model\.safetensors\)"):
        export_onnx(run, beside)
    with pytest.raises(UsageError, match=r"another model \(onnx\)"):
        export_transformers(run, exported)
    assert (beside / "tokenizer.json").read_bytes() == before
    with pytest.raises(UsageError, match=r"another model \(onnx/text_model_quantized\.onnx\)"):
        export_onnx(run, exported)


def test_open_clips_vocabulary_under_a_text_tower_that_looks_at_its_padding_is_refused(
    run: Path, exported: Path
) -> None:
    finished = load_run(run)
    text: Any = finished.txt
    text.attn_mask = None
    finished.tokenizer = OpenClipTokenizer(16)
    with pytest.raises(UsageError, match=r"depend on the padding.*--to open_clip"):
        export._text_side(finished, main_encoders(finished), exported)


def test_the_card_says_what_the_graphs_take(run: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    for words in ("[batch, 3, 32, 32]", "sequence of at most 16", "[batch, 24]", "Opset 18", "padding: true"):
        assert words in card
    assert f"times {load_run(run).scale:.4f}" in card and "{" + "folder}" not in card
