"""Training on real files: complete runs, stopped and continued runs, and bad data."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import threetowers
from kit.runs import Config, assert_same_weights, rows, weights
from threetowers.config import InputConfig, ObjectiveConfig, OptimConfig
from threetowers.errors import CheckpointError, DataError, NonFiniteError, UsageError
from threetowers.evaluate.evaluation import evaluate_run
from threetowers.objective.pairs import METHODS, resolved
from threetowers.run.finished import load_run
from threetowers.settings import read_config, write_config
from threetowers.train import checkpoint, loop
from threetowers.train.loop import train
from threetowers.train.saver import Saver


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_evaluates_and_loads(method: str, tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config(method=method)
    out = tmp_path / "run"
    assert train(config, out).finished
    for name in (
        "config.toml",
        "metrics.jsonl",
        "events.log",
        "model.safetensors",
        "model.json",
        "tokenizer.json",
    ):
        assert (out / name).is_file(), name
    assert read_config(out / "config.toml") == resolved(config)
    last = [row for row in rows(out) if "train/loss" in row][-1]
    named = {name for name in last if name.startswith("train/loss/")}
    wanted = {"train/loss/img-txt"}
    if method.startswith("3t"):
        wanted |= {"train/loss/img-third", "train/loss/txt-third"}
    assert named == wanted
    assert {"train/lr", "train/scale", "data/wait", "examples_per_second", "train/grad_norm"} <= last.keys()
    assert any("val/mean_r@1" in row for row in rows(out))
    evaluation = evaluate_run(out)
    assert set(evaluation.sections["test"]) >= {"i2t_r@1", "t2i_r@10", "mean_r@1"}
    assert bool(evaluation.sections["combination"]) == (method.startswith("3t") and method != "3t-regression")
    model = threetowers.load(str(out))
    keys = weights(out).keys()
    assert not any(key.startswith("third") and key != "third_norms" for key in keys), "never the third tower"
    images = [Image.new("RGB", (50, 40), "red")]
    vectors = model.encode_image(images)
    assert vectors.shape[0] == 1 and float(vectors.norm()) == pytest.approx(1.0, abs=1e-5)
    scores = model.score(images * 2, ["a red square", "the top left is blue", "x"])
    assert scores.shape == (2, 3) and scores.abs().max() <= 1.0001


def test_the_resolved_config_alone_repeats_the_run(tiny_config: Config, tmp_path: Path) -> None:
    train(tiny_config(), tmp_path / "a")
    train(read_config(tmp_path / "a" / "config.toml"), tmp_path / "b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_learning_happens(tiny_config: Config, tmp_path: Path) -> None:
    train(tiny_config(steps=40, optim=OptimConfig(lr=3e-3, warmup_steps=5)), tmp_path / "run")
    losses = [row["train/loss"] for row in rows(tmp_path / "run") if "train/loss" in row]
    assert losses[-1] < 0.75 * losses[0]


def test_workers_do_not_change_what_is_seen(tiny_config: Config, tmp_path: Path) -> None:
    inputs = tiny_config().inputs
    train(tiny_config(), tmp_path / "none")
    train(tiny_config(inputs=replace(inputs, workers=2)), tmp_path / "two")
    assert_same_weights(tmp_path / "none", tmp_path / "two")


def test_a_run_stopped_between_checkpoints_continues_to_the_same_bits(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(steps=9, checkpoint_every_steps=4)
    train(config, tmp_path / "whole")
    save = Saver.save

    def save_and_die(self: Saver, step: int, *arguments: Any, **options: Any) -> None:
        save(self, step, *arguments, **options)
        if step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Saver, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "torn")
    monkeypatch.undo()
    assert train(config, tmp_path / "torn").finished
    assert_same_weights(tmp_path / "whole", tmp_path / "torn")
    steps = [row["step"] for row in rows(tmp_path / "torn") if "train/loss" in row]
    assert steps == [row["step"] for row in rows(tmp_path / "whole") if "train/loss" in row], "no row twice"


def test_a_killed_process_continues_to_the_same_bits(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config(steps=60, checkpoint_every_steps=5, batch_size=8)
    write_config(config, tmp_path / "run.toml")
    command = [sys.executable, "-m", "threetowers.cli", "train", str(tmp_path / "run.toml"), "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment, capture_output=True)
    process = subprocess.Popen([*command, str(tmp_path / "torn")], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "torn").glob("checkpoints/step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "torn" / "model.json").exists()
    done = subprocess.run([*command, str(tmp_path / "torn")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "continuing from step" in (tmp_path / "torn" / "events.log").read_text()
    assert_same_weights(tmp_path / "whole", tmp_path / "torn")


def test_sigterm_saves_and_exits_with_75(tiny_config: Config, tmp_path: Path) -> None:
    write_config(tiny_config(steps=100_000, checkpoint_every_steps=10**6), tmp_path / "run.toml")
    command = [
        sys.executable,
        "-m",
        "threetowers.cli",
        "train",
        str(tmp_path / "run.toml"),
        "--out",
        str(tmp_path / "r"),
    ]
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "r" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "continues" in output
    begun, stopped = sorted(path.name for path in (tmp_path / "r" / "checkpoints").glob("step-*"))
    assert begun == "step-00000000" < stopped


def test_a_damaged_checkpoint_is_passed_over_by_name_and_never_silently_replaced_by_a_fresh_start(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(steps=9, checkpoint_every_steps=3)
    out = tmp_path / "run"
    monkeypatch.setattr(loop, "save_run", lambda *_: None)  # dies just before it is finished
    train(config, out)
    monkeypatch.undo()
    newest, older = checkpoint.checkpoints(out / "checkpoints")
    path = newest / "optim.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    found = checkpoint.find(out / "checkpoints")
    assert found is not None and found.folder == older and "optim.safetensors" in found.passed_over[0]
    (older / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="--fresh"):
        train(config, out)
    assert train(config, out, fresh=True).finished


def test_a_folder_of_another_run_is_refused_by_key(tiny_config: Config, tmp_path: Path) -> None:
    train(tiny_config(steps=2), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.001 → 0\.5.*--out"):
        train(tiny_config(steps=2, optim=OptimConfig(lr=0.5, warmup_steps=2)), tmp_path / "run")
    assert train(tiny_config(steps=2, log_every_steps=1), tmp_path / "run").finished, "logging may differ"


def test_non_finite_steps_are_skipped_counted_and_end_the_run_with_the_samples_named(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from threetowers.model import ThreeTowers

    real, calls = ThreeTowers.loss, {"poisoned": {2, 4}, "count": 0}

    def poisoned(self: ThreeTowers, *arguments: object, **options: bool) -> object:
        total, parts = real(self, *arguments, **options)  # type: ignore[arg-type]
        calls["count"] += 1  # type: ignore[operator]
        return (total * float("nan") if calls["count"] in calls["poisoned"] else total), parts  # type: ignore[operator]

    monkeypatch.setattr(ThreeTowers, "loss", poisoned)
    train(tiny_config(), tmp_path / "two")
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "two").values())
    assert (tmp_path / "two" / "events.log").read_text().count("the step is skipped") == 2
    calls["poisoned"] = set(range(1000))
    with pytest.raises(NonFiniteError, match=r"5 steps in a row.*\.png"):
        train(tiny_config(), tmp_path / "all")


def test_real_photos_of_every_kind_with_every_bad_row_named(
    timm_tower: str, tiny_config: Config, tmp_path: Path
) -> None:
    """JPEG, PNG and WebP of odd sizes and modes train; a corrupt, a missing and a captionless file are named."""
    folder = tmp_path / "mixed photos"
    folder.mkdir()
    rng = np.random.default_rng(1)
    lines = ["file;beschreibung"]
    kinds = [("RGB", "jpg"), ("L", "png"), ("P", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("RGB", "webp"),
             ("I;16", "png"), ("RGBA", "webp")]  # fmt: skip
    for index in range(48):
        mode, ending = kinds[index % len(kinds)]
        width, height = 17 + 13 * (index % 5), 23 + 7 * (index % 7)
        name = f"Bild {index} – Größe.{ending}"
        if mode == "I;16":
            image = Image.fromarray(rng.integers(0, 65536, (height, width)).astype(np.uint16))
        else:
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
        exif = Image.Exif()
        exif[0x0112] = 1 + index % 8
        options: dict[str, Any] = {"exif": exif} if ending != "png" else {}
        image.save(folder / name, **options)
        lines.append(f"{name};ein Bild mit der Nummer {index}")
    (folder / "kaputt.jpg").write_bytes((folder / "Bild 0 – Größe.jpg").read_bytes()[:60])
    lines += ["kaputt.jpg;ein kaputtes Bild", "fehlt.png;ein fehlendes Bild", "Bild 1 – Größe.png;"]
    (folder / "leer.png").write_bytes((folder / "Bild 1 – Größe.png").read_bytes())
    lines.append("leer.png;")
    (folder / "captions.csv").write_text("\n".join(lines), encoding="utf-8")
    config = tiny_config(
        data=str(folder / "captions.csv"),
        third=(timm_tower,),
        steps=8,
        inputs=InputConfig(workers=0, max_bad_share=0.2, val_fraction=0.1, test_fraction=0.1),
    )
    assert train(config, tmp_path / "run").finished
    named = {
        (Path(row["id"]).name, row["reason"])
        for row in map(json.loads, (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines())
    }
    assert {name for name, _ in named} >= {"kaputt.jpg", "fehlt.png", "leer.png"}
    strict = replace(config, inputs=replace(config.inputs, max_bad_share=0.01))
    with pytest.raises(DataError, match=r"fehlt\.png"):
        train(strict, tmp_path / "strict")


def test_no_usable_sample_is_an_error_at_once(tiny_config: Config, tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("path,caption\na.png,\nb.png,x\n")
    with pytest.raises(DataError, match="no sample in it can be used"):
        train(tiny_config(data=str(tmp_path / "captions.csv")), tmp_path / "run")


def test_the_live_augmented_view_of_a_third_tower_trains(tiny_config: Config, tmp_path: Path) -> None:
    inputs = replace(tiny_config().inputs, third_view="same")
    assert train(tiny_config(inputs=inputs), tmp_path / "live").finished
    train(tiny_config(), tmp_path / "stored")
    live, stored = weights(tmp_path / "live"), weights(tmp_path / "stored")
    assert not torch.equal(live["heads.third@img.weight"], stored["heads.third@img.weight"])


def test_duplicates_are_counted_and_masking_changes_the_loss(tiny_config: Config, tmp_path: Path) -> None:
    """Equal captions, of which each photo has one, repeat within a batch."""
    train(tiny_config(), tmp_path / "plain")
    train(tiny_config(inputs=replace(tiny_config().inputs, mask_duplicates=True)), tmp_path / "masked")
    counted = [row["data/duplicate_captions"] for row in rows(tmp_path / "plain") if "train/loss" in row]
    assert max(counted) > 0
    first = [rows(tmp_path / name)[0]["train/loss"] for name in ("plain", "masked")]
    assert first[1] < first[0]


def test_freezing_by_name_keeps_weights_and_an_idle_pattern_is_an_error(
    tiny_config: Config, tmp_path: Path
) -> None:
    optim = replace(tiny_config().optim, freeze=("txt.token_embedding.*",))
    train(tiny_config(steps=2), tmp_path / "two")
    train(tiny_config(optim=optim), tmp_path / "frozen")
    from threetowers.towers.pair import build_text_tower

    finished = load_run(tmp_path / "frozen")
    start = build_text_tower(finished.architecture.model_cfg, 0).state_dict()["token_embedding.weight"]
    assert torch.equal(weights(tmp_path / "frozen")["txt.token_embedding.weight"], start)
    assert not torch.equal(weights(tmp_path / "two")["txt.token_embedding.weight"], start)
    with pytest.raises(UsageError, match=r"txt\.nothing"):
        train(tiny_config(optim=replace(optim, freeze=("txt.nothing*",))), tmp_path / "idle")


def test_sigmoid_and_scale_per_row_train(tiny_config: Config, tmp_path: Path) -> None:
    options = ObjectiveConfig(kind="sigmoid", scale="per-row")
    assert train(tiny_config(objective=options), tmp_path / "run").finished
    assert weights(tmp_path / "run")["log_scale"].shape == (3,)
    assert "train/scale/img-third" in rows(tmp_path / "run")[0]


def test_a_changed_weights_file_is_refused(tiny_config: Config, tmp_path: Path) -> None:
    train(tiny_config(steps=2), tmp_path / "run")
    path = tmp_path / "run" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"no model\.json"):
        load_run(tmp_path)


@pytest.mark.parametrize("precision", ["bf16-autocast", "bf16-autocast"])
def test_bf16_towers_train_with_fp32_losses(precision: str, tiny_config: Config, tmp_path: Path) -> None:
    assert train(tiny_config(precision=precision), tmp_path / "bf16").finished
    train(tiny_config(), tmp_path / "fp32")
    low, high = (rows(tmp_path / name)[0]["train/loss"] for name in ("bf16", "fp32"))
    assert low != high and low == pytest.approx(high, rel=0.05)
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "bf16").values())


def test_both_towers_start_from_given_weights_and_what_does_not_fit_is_refused(
    tiny_config: Config, tmp_path: Path
) -> None:
    from threetowers.export.open_clip import export_open_clip
    from threetowers.run.setup import prepare

    train(tiny_config(), tmp_path / "first")
    exported = export_open_clip(tmp_path / "first", tmp_path / "exported") / "open_clip_model.safetensors"
    pair = replace(tiny_config().pair, weights=str(exported))
    run = prepare(tiny_config(pair=pair), tmp_path / "second")
    trained = weights(tmp_path / "first")
    for key, value in run.model.state_dict().items():
        if key.startswith(("img.", "txt.")):
            assert torch.equal(value, trained[key]), key
    with pytest.raises(CheckpointError, match="wrong shape"):
        prepare(tiny_config(pair=replace(pair, embed_dim=20)), tmp_path / "third")
    with pytest.raises(UsageError, match=r"pair\.weights"):
        prepare(tiny_config(method="lit-unlocked", pair=pair), tmp_path / "fourth")


def test_a_first_try_that_failed_does_not_claim_its_folder(tiny_config: Config, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="batch_size"):
        train(tiny_config(batch_size=5000), tmp_path / "run")
    assert train(tiny_config(), tmp_path / "run").finished


def test_evaluating_on_other_classes_leaves_the_runs_own_figures(tiny_config: Config, tmp_path: Path) -> None:
    train(tiny_config(method="baseline"), tmp_path / "run")
    evaluate_run(tmp_path / "run")
    before = (tmp_path / "run" / "evaluation.json").read_bytes()
    classes = tmp_path / "classes"
    for name in ("red", "blue"):
        (classes / name).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (40, 40), name).save(classes / name / f"{index}.png")
    assert evaluate_run(tmp_path / "run", classes=str(classes)).sections["zero_shot"]
    assert (tmp_path / "run" / "evaluation.json").read_bytes() == before
