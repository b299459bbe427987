"""`threetowers validate` reports what training would meet; it trains nothing and writes nothing."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from kit.runs import Config
from threetowers import cli
from threetowers.commands import validate
from threetowers.config import RunConfig
from threetowers.errors import CheckpointError, DataError, NonFiniteError, UsageError
from threetowers.run.setup import assemble
from threetowers.settings import write_config


def report(config: RunConfig, folder: Path) -> str:
    return "\n".join(validate.validate(config, folder))


def files(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_sound_run_is_valid_and_nothing_is_written(tiny_config: Config, tmp_path: Path) -> None:
    before = files(tmp_path)
    text = report(tiny_config(), tmp_path / "run")
    assert files(tmp_path) == before
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "embeddings").exists()
    assert text.splitlines()[-1] == "valid"
    for part in (
        r"images to train on", r"0 bad \(0\.0%\)", r"shorter side 40 pixels", r"2\.0 per image",
        r"'a (\w+) square at the (\w+ \w+) \d+' → '<start> a \1 square at the \2", r"img: 3 × 32 × 32 → 24, [\d.]+ M",
        r"txt: 16 tokens → 24", r"third: 3 × 48 × 48 → \d+, [\d.]+ M parameters, frozen: timm:", r"head txt@third",
        r"step: loss \d+\.\d+ \(img-txt \d", r"memory: parameters .* moments", r"disk: 3 checkpoints",
        r"time: .* s a step", r"needs: about .* for 6 steps, .* to embed .* MB of disk \(.* free\)",
    ):  # fmt: skip
        assert re.search(part, text), part


@pytest.mark.parametrize("method", ["baseline", "lit", "lit-unlocked", "3t-regression"])
def test_every_method(method: str, tiny_config: Config, tmp_path: Path) -> None:
    assert report(tiny_config(method=method), tmp_path / "run").endswith("valid")


def test_the_step_is_the_first_of_training(tiny_config: Config, tmp_path: Path) -> None:
    """The batch, the features and the norms are real: with one fixed view of all data, the loss is training's."""
    import json

    from threetowers.train.loop import train

    config = tiny_config(method="baseline", steps=1, log_every_steps=1)
    found = re.search(r"step: loss ([\d.]+)", report(config, tmp_path / "run"))
    train(config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    loss = next(row["train/loss"] for row in rows if "train/loss" in row)
    assert found
    assert float(found[1]) == pytest.approx(loss, abs=6e-4)


def test_live_towers_and_micro_batches(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config(micro_batch_size=6)
    config = replace(config, inputs=replace(config.inputs, third_view="same", mask_duplicates=True))
    text = report(config, tmp_path / "run")
    assert "to embed" not in text
    assert text.endswith("valid")


def dirty(photos: Path, folder: Path, num_bad: int) -> Path:
    """The photos, some of them replaced by rubbish."""
    folder.mkdir()
    for index, path in enumerate(sorted(photos.parent.glob("*.png"))):
        (folder / path.name).write_bytes(b"<html>404</html>" if index < num_bad else path.read_bytes())
    (folder / "captions.csv").write_bytes(photos.read_bytes())
    return folder / "captions.csv"


def test_bad_images_are_listed_and_too_many_are_refused(
    photos: Path, tiny_config: Config, tmp_path: Path
) -> None:
    table = dirty(photos, tmp_path / "dirty", 30)
    config = tiny_config(data=str(table))
    lines: list[str] = []
    with pytest.raises(DataError, match=r"more than inputs.max_bad_share = 0.01 allows. not an image: \d+"):
        lines.extend(validate.validate(config, tmp_path / "run"))
    assert sum(": not an image" in line for line in lines) == 10
    assert any(re.search(r"and \d+ more", line) for line in lines)
    let_pass = replace(config, inputs=replace(config.inputs, max_bad_share=0.5))
    assert report(let_pass, tmp_path / "run").endswith("valid")


def test_shares_of_captions_are_what_they_are(tiny_config: Config, tmp_path: Path) -> None:
    rows = ["path,caption"]
    for index in range(40):
        Image.new("RGB", (40, 40), (index, 9, 9)).save(tmp_path / f"{index}.png")
        words = "a cat" if index % 4 == 0 else f"word{index} " * 30 if index % 4 == 1 else f"a dog {index}"
        rows.append(f"{index}.png,{words}")
    (tmp_path / "captions.csv").write_text("\n".join(rows), encoding="utf-8")
    config = tiny_config(data=str(tmp_path / "captions.csv"), method="baseline")
    config = replace(config, inputs=replace(config.inputs, val_fraction=0.0, test_fraction=0.0))
    text = report(config, tmp_path / "run")
    assert "25.0% are cut at the context length, 25.0% occur more than once" in text
    assert "--inputs.mask-duplicates True" in text
    masked = replace(config, inputs=replace(config.inputs, mask_duplicates=True))
    assert "--inputs.mask-duplicates" not in report(masked, tmp_path / "run")


def test_refusals(tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="batch_size"):
        report(tiny_config(batch_size=0), tmp_path)
    with pytest.raises(DataError, match="no such file"):
        report(tiny_config(data=str(tmp_path / "nothing.csv")), tmp_path)
    write_config(tiny_config(seed=5), tmp_path / "config.toml")
    assert report(tiny_config(), tmp_path).startswith("note: ")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        with pytest.raises(CheckpointError, match="make room"):
            report(tiny_config(), tmp_path)
    with monkeypatch.context() as patch:

        def spoilt(*arguments: object) -> object:
            run = assemble(*arguments)  # type: ignore[arg-type]
            with torch.no_grad():
                run.model.heads["txt@third"].get_parameter("weight").fill_(float("nan"))
            return run

        patch.setattr(validate, "assemble", spoilt)
        with pytest.raises(
            NonFiniteError, match=r"first step is not finite: .*txt-third nan.*the rows txt-third"
        ):
            report(tiny_config(), tmp_path)


def test_the_command(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["validate", "tiny", "--data", str(photos), "--method", "baseline", "--batch-size", "16"]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert not stop.value.code
    assert capsys.readouterr().out.splitlines()[-1] == "valid"
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--pair.weights", "nothing.safetensors"])
    assert stop.value.code == 3 or stop.value.code == 2
    assert "nothing.safetensors" in capsys.readouterr().err
