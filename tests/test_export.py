"""open_clip computes the same embeddings from an exported run as we do."""

import importlib
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from kit.runs import Config, with_vit
from threetowers import cli
from threetowers.errors import CheckpointError, UsageError
from threetowers.export.formats import ALSO, FORMATS, formats_help
from threetowers.export.open_clip import export_open_clip
from threetowers.run.finished import load_run
from threetowers.towers.frozen.load import load_frozen
from threetowers.train.loop import train

TEXTS = [
    "a red square at the top left",
    "Ein Größenvergleich, sehr lang " * 9,
    "",
    "the  bottom\nright is blue",
]


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        for w, h in ((48, 48), (60, 37), (31, 90))
    ]


@pytest.mark.parametrize("method", ["baseline", "3t", "lit", "lit-unlocked"])
def test_open_clip_computes_the_same_embeddings(method: str, tiny_config: Config, tmp_path: Path) -> None:
    """Same images and texts through open_clip's own transform and tokenizer: the unit vectors agree to 1e-6."""
    train(tiny_config(method=method, steps=3), tmp_path / "run")
    folder = export_open_clip(tmp_path / "run", tmp_path / "exported")
    with safe_open(folder / "open_clip_model.safetensors", "pt") as file:
        assert {key.split(".")[0] for key in file.keys()} == {"visual", "text", "logit_scale"}  # noqa: SIM118
    ours = load_run(tmp_path / "run")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    assert torch.equal(tokenizer(TEXTS), ours.tokenizer(TEXTS))
    spec = ours.architecture.image
    exact = spec.resize_size in (
        0,
        spec.size,
    )  # open_clip has no place for a centre crop out of a larger image
    images = pictures() if exact else [image.resize((spec.size, spec.size)) for image in pictures()]
    with torch.no_grad():
        text = model.encode_text(tokenizer(TEXTS), normalize=True)
        image = model.encode_image(torch.stack([transform(picture) for picture in images]), normalize=True)
    torch.testing.assert_close(text, ours.encode_text(TEXTS), rtol=0, atol=1e-6)
    if exact:
        torch.testing.assert_close(image, ours.encode_image(images), rtol=0, atol=1e-6)
    else:
        from threetowers.data.transforms import normalise
        from threetowers.objective.losses import unit

        pixels = torch.stack(
            [torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy()) for picture in images]
        )
        with torch.no_grad():
            torch.testing.assert_close(image, unit(ours.img(normalise(pixels, spec))), rtol=0, atol=1e-6)
    assert model.logit_scale.exp().item() == pytest.approx(ours.scale, rel=1e-6)


def test_a_finished_run_can_be_the_third_tower_of_another(tiny_config: Config, tmp_path: Path) -> None:
    train(tiny_config(method="baseline", steps=2), tmp_path / "first")
    tower = load_frozen(f"file:{tmp_path / 'first'}")
    assert tower.width == 24
    config = tiny_config(third=(f"file:{tmp_path / 'first'}",), steps=2)
    assert train(config, tmp_path / "second").finished
    lit = tiny_config(method="lit", third=(f"file:{tmp_path / 'first'}",), steps=2)
    train(lit, tmp_path / "lit")
    export_open_clip(tmp_path / "lit", tmp_path / "exported")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'exported'}")
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        ours = load_run(tmp_path / "lit").img(pixels)
        torch.testing.assert_close(model.eval().encode_image(pixels), ours, rtol=1e-5, atol=1e-6)


def test_clips_own_vocabulary_survives_the_round_trip(tiny_config: Config, tmp_path: Path) -> None:
    from dataclasses import replace

    pair = replace(tiny_config().pair, tokenizer="open_clip")
    train(tiny_config(method="baseline", steps=1, pair=pair), tmp_path / "run")
    folder = export_open_clip(tmp_path / "run", tmp_path / "exported")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    ours = load_run(tmp_path / "run")
    with torch.no_grad():
        text = model.eval().encode_text(tokens, normalize=True)
    torch.testing.assert_close(text, ours.encode_text(TEXTS), rtol=0, atol=1e-6)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path in it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


SLOW = ("onnx", "onnx-int8")  # tracing takes seconds


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FORMATS]
)
def test_every_format_loads_by_its_own_expression_and_is_the_main_pair(
    name: str, tiny_config: Config, tmp_path: Path
) -> None:
    train(with_vit(tiny_config(steps=2)), tmp_path / "run")  # towers that every format can express
    form = FORMATS[name]
    folder = form.write(tmp_path / "run", tmp_path / "out")
    assert folder == tmp_path / "out"
    expression = form.how_to_load(folder)
    assert str(folder) in expression and "{" not in expression
    library = expression.partition(".")[0]
    assert eval(expression, {library: importlib.import_module(library)}) is not None
    written = contents(folder)
    assert set(form.files) <= written.keys() <= {*form.files, *ALSO}, "what `push` sends"
    form.write(tmp_path / "run", tmp_path / "out")
    assert contents(folder) == written, "the same bytes again"
    assert [*tmp_path.glob(".*"), *folder.rglob(".*")] == [], "nothing of the writing is left"
    for other, foreign in FORMATS.items():
        if other != name and (name, other) != ("onnx", "onnx-int8"):  # which writes all that onnx does
            with pytest.raises(UsageError, match=r"out: this folder holds another model \("):
                foreign.write(tmp_path / "run", folder)
    with pytest.raises(UsageError, match=r"run: this folder holds another model \(model\.json\)"):
        form.write(tmp_path / "run", tmp_path / "run")
    assert contents(folder) == written, "no other model is overwritten"
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert not any("third" in key or "head" in key.split(".")[0] for key in tensors.keys())  # noqa: SIM118


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_refuses_an_unfinished_run_and_writes_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.json"):
        FORMATS[name].write(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_the_command_line_names_every_format(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{name}: {FORMATS[name].help}" in formats_help()
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", "--help"])
    assert not stop.value.code and f"{name}:" in capsys.readouterr().out
