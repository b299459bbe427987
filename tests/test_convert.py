"""Foreign checkpoints: what is in them comes out as safetensors, and nothing in them runs."""

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from kit.runs import Config
from kit.towers import image_tower
from threetowers.cli import main
from threetowers.commands.convert import convert
from threetowers.config import PairConfig
from threetowers.errors import CheckpointError, UsageError
from threetowers.run.setup import prepare
from threetowers.towers.frozen.load import load_frozen


class Evil:
    """Runs a command when it is unpickled by whoever does that."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("inside", [False, True])
def test_code_in_a_checkpoint_is_refused_by_name_and_not_run(
    inside: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, marker = tmp_path / "evil.pt", tmp_path / "ran"
    content = {"weight": torch.ones(2), "hook": Evil(marker)}
    if inside:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))  # as torch writes it
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(path), "--out", str(tmp_path / "out.safetensors")])
    message = capsys.readouterr().err
    assert ended.value.code == 3 and "nothing in it was run" in message and "Traceback" not in message
    assert not marker.exists() and [p.name for p in tmp_path.iterdir()] == ["evil.pt"]
    torch.load(path, weights_only=False) if inside else pickle.loads(path.read_bytes())
    assert marker.exists(), "the file is as evil as it should be"


def test_a_trainers_checkpoint_of_open_clip_starts_a_pair(tiny_config: Config, tmp_path: Path) -> None:
    """open_clip_train's file: weights under state_dict, each name behind `module.`, CLIP's older layout."""
    model = _small_clip()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(
        {"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"lr": 0.1}}, tmp_path / "epoch_3.pt"
    )
    done = convert(tmp_path / "epoch_3.pt", tmp_path / "clip.safetensors")
    assert "'module.' taken off every name" in done.text() and "CustomTextCLIP" in done.text()
    pair = PairConfig(
        embed_dim=24,
        vision={"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
        text={"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        weights=str(tmp_path / "clip.safetensors"),
    )
    run = prepare(tiny_config(method="baseline", pair=pair), tmp_path / "run")
    assert run.model.img is not None
    tokens = torch.randint(1, 400, (3, 16))
    tokens[:, -1] = 49407
    from threetowers.towers.pair import encode_text

    with torch.no_grad():
        torch.testing.assert_close(
            encode_text(run.model.txt, tokens), model.encode_text(tokens), rtol=0, atol=1e-6
        )
        pixels = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(
            run.model.img.eval()(pixels), model.eval().encode_image(pixels), rtol=0, atol=1e-6
        )
    with pytest.raises(
        CheckpointError, match=r"threetowers convert .*epoch_3\.pt --out epoch_3\.safetensors"
    ):
        prepare(
            tiny_config(method="baseline", pair=replace(pair, weights=str(tmp_path / "epoch_3.pt"))), tmp_path
        )


def _small_clip() -> Any:
    from open_clip.model import CLIP

    torch.manual_seed(0)
    return CLIP(
        24,
        {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
        {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    )


def test_weights_of_timm_come_through_unchanged(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=5)
    torch.save({"model_ema": model.state_dict(), "args": None}, tmp_path / "vit.pth")
    for spec in ("timm:test_vit@", "open_clip:ViT-B-32@"):
        with pytest.raises(CheckpointError, match="threetowers convert"):
            load_frozen(f"{spec}{tmp_path / 'vit.pth'}")
    convert(tmp_path / "vit.pth", tmp_path / "vit.safetensors")
    tower = image_tower(f"timm:test_vit@{tmp_path / 'vit.safetensors'}")
    pixels = torch.randint(0, 256, (2, 3, tower.image.size, tower.image.size), dtype=torch.uint8)
    assert tower(pixels).shape == (2, model.num_features)
    read = load_file(tmp_path / "vit.safetensors")
    assert all(torch.equal(value, read[name]) for name, value in model.state_dict().items())


def test_shared_and_strided_tensors_and_what_is_left_out(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": base, "b": base, "c": base.T, "epoch": 3}, tmp_path / "x.pt")
    done = convert(tmp_path / "x.pt", tmp_path / "x.safetensors")
    read = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], value) for name, value in (("a", base), ("b", base), ("c", base.T)))
    assert (
        done.num_tensors == 3 and done.num_parameters == 36 and "left out, no tensors: epoch" in done.text()
    )


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "program.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.ones(1000)}, whole)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "text.bin").write_text("hello")
    (tmp_path / "nothing.ckpt").write_bytes(b"")
    for name, words in (
        ("program.pt", "TorchScript"),
        ("list.pt", "holds a list"),
        ("empty.pt", "its keys: epoch"),
        ("cut.pt", "cut.pt: "),
        ("text.bin", "text.bin: "),
        ("nothing.ckpt", "nothing.ckpt: "),
        ("missing.pt", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=words):
            convert(tmp_path / name, tmp_path / "out.safetensors")
    with pytest.raises(UsageError, match="is there already"):
        convert(whole, whole)
    with pytest.raises(UsageError, match=r"end in \.safetensors"):
        convert(whole, tmp_path / "out.bin")
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".*"))
