"""Damaged checkpoints, numbers that are not finite, bad data, full disks and time limits, in one process."""

import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kit.runs import Config, assert_same_weights, events, interrupt_at, logged, poisoned, weights
from threetowers.config import RunConfig
from threetowers.data import loader, workers
from threetowers.errors import CheckpointError, DataError, NonFiniteError, UsageError
from threetowers.run.setup import prepare
from threetowers.towers.weights import read_safetensors
from threetowers.train import checkpoint, loop, session
from threetowers.train.guards import BadSamples, FiniteGuard
from threetowers.train.loop import train


def unfinished(config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies just before it is finished, its checkpoints written."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_run", lambda *_: None)
        train(config, folder)


# Checkpoint files


def test_a_thousand_damages_of_checkpoint_files_are_all_noticed(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(tiny_config(steps=6, checkpoint_every_steps=3), tmp_path / "run", monkeypatch)
    root = tmp_path / "run" / "checkpoints"
    newest, older = checkpoint.checkpoints(root)[:2]
    whole = {path.name: path.read_bytes() for path in newest.iterdir()}
    draw, kinds = random.Random(0), {"flip": 0, "truncate": 0, "delete": 0}
    for _ in range(1000):
        name, kind = draw.choice(sorted(whole)), draw.choice(sorted(kinds))
        data = bytearray(whole[name])
        if kind == "delete":
            (newest / name).unlink()
        else:
            if kind == "flip":
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            else:
                del data[draw.randrange(len(data)) :]
            (newest / name).write_bytes(data)
        kinds[kind] += 1
        found = checkpoint.find(root)
        assert found is not None and found.folder == older, (name, kind)
        assert newest.name in found.passed_over[0]
        (aside,) = root.glob("damaged-*")
        shutil.rmtree(aside)
        newest.mkdir()
        for other, content in whole.items():
            (newest / other).write_bytes(content)
    assert min(kinds.values()) > 250 and checkpoint.find(root).folder == newest  # type: ignore[union-attr]


def test_a_damaged_folder_is_set_aside_and_the_run_goes_on_to_the_same_bits(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(steps=9, checkpoint_every_steps=3)
    train(config, tmp_path / "whole")
    unfinished(config, tmp_path / "torn", monkeypatch)
    newest = checkpoint.checkpoints(tmp_path / "torn" / "checkpoints")[0]
    (newest / "state.json").write_text("{}")
    train(config, tmp_path / "torn")
    assert_same_weights(tmp_path / "whole", tmp_path / "torn")
    assert (newest.parent / f"damaged-{newest.name}").is_dir() and "continuing from step 6" in events(
        tmp_path / "torn"
    )
    assert "passed over a checkpoint: step-00000009" in capfd.readouterr().err


def test_other_data_than_before_is_refused(
    tiny_config: Config, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos.parent, folder)
    config = tiny_config(data=str(folder / photos.name))
    unfinished(config, tmp_path / "run", monkeypatch)
    table = folder / photos.name
    table.write_text(table.read_text().replace("a red square", "a crimson square"))
    from threetowers.run import setup as prepare_module

    prepare_module._open_splits.cache_clear()
    with pytest.raises(CheckpointError, match="training data is not what it was"):
        train(config, tmp_path / "run")


def test_another_number_of_threads_is_said(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    unfinished(tiny_config(), tmp_path / "run", monkeypatch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    train(tiny_config(), tmp_path / "run")
    assert "may differ from an uninterrupted run's: threads 1 → 7" in capfd.readouterr().err


# Saving


@pytest.mark.parametrize("background", [True, False])
def test_saving_in_a_thread_or_in_the_loop_is_the_same(
    background: bool, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(steps=9, checkpoint_every_steps=2)
    train(config, tmp_path / "whole")
    config = replace(config, background_saves=background)
    interrupt_at(7, config, tmp_path / "torn")
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "torn" / "checkpoints")] == [
        "step-00000006",
        "step-00000004",
    ]
    train(config, tmp_path / "torn")
    assert_same_weights(tmp_path / "whole", tmp_path / "torn")


def test_a_disk_without_room_ends_the_run_before_it_begins_and_several_failed_saves_end_it_later(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(
            CheckpointError, match=r"step 0 could not be saved: .*MB are needed, 0 MB are free"
        ):
            train(tiny_config(method="baseline"), tmp_path / "full")
    real, saves = checkpoint.save, []

    def save(*arguments: Any, **options: Any) -> Path:
        saves.append(arguments[1])
        if len(saves) > 2:
            raise OSError(5, "Input/output error", "disk")
        return real(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(CheckpointError, match=r"Input/output error.*the last one is step-00000002"):
        train(tiny_config(steps=30, checkpoint_every_steps=2), tmp_path / "run")
    assert saves == [0, 2, 4, 6, 8] and capfd.readouterr().err.count("Training goes on") == 2


def test_what_dead_processes_left_is_swept(tiny_config: Config, tmp_path: Path) -> None:
    stale = tmp_path / "run" / "checkpoints" / ".partial-1-00000002"
    stale.mkdir(parents=True)
    train(tiny_config(), tmp_path / "run")
    assert not stale.exists()


# Numbers


@pytest.mark.parametrize("num", [1, 5, 50])
def test_poisoned_batches(
    num: int, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad step is skipped; after five the run returns to a checkpoint; after three returns it ends with an error."""
    config, run = tiny_config(steps=20, checkpoint_every_steps=4, log_every_steps=1), tmp_path / "run"
    monkeypatch.setattr(loop, "batches", poisoned(set(range(6, 6 + num))))
    if num == 50:
        with pytest.raises(NonFiniteError, match=r"after 3 returns.*\.png"):
            train(config, run)
        found = checkpoint.find(run / "checkpoints")
        assert found is not None and found.step == 4
        kept = read_safetensors(found.folder / "model.safetensors")
        assert all(value.isfinite().all() for value in kept.values())
        assert events(run).count("back to the checkpoint of step 4") == 3
        return
    train(config, run)
    assert all(value.isfinite().all() for value in weights(run).values())
    assert events(run).count("the step is skipped") == num
    assert events(run).count("back to the checkpoint of step 4") == num // 5
    assert sorted(logged(run)) == list(range(1, 21)), "every step is logged once"
    # a run that is interrupted after the return takes the same batches
    interrupt_at(15, config, tmp_path / "torn")
    train(config, tmp_path / "torn")
    assert_same_weights(run, tmp_path / "torn")


def test_a_step_that_is_not_finite_changes_no_weight_and_no_moment() -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    guard = FiniteGuard()
    for step, factor in enumerate((1.0, float("nan"), float("inf"), 1.0)):
        before = [p.detach().clone() for p in layer.parameters()]
        moments = [value.clone() for s in optimizer.state.values() for value in s.values()]
        optimizer.zero_grad()
        loss = layer(torch.ones(4, 3)).square().sum() * factor
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.found_inf = guard.watch(step, torch.arange(4), loss.detach(), norm)  # type: ignore[attr-defined]
        optimizer.step()
        kept = all(torch.equal(p, q) for p, q in zip(layer.parameters(), before, strict=True))
        assert kept == (factor != 1.0)
        if factor != 1.0:
            after = [value for s in optimizer.state.values() for value in s.values()]
            assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert [step for step, _ in guard.skipped()] == [1, 2] and guard.in_row == 0


# Validation decides


def test_the_finished_run_holds_the_best_weights_and_patience_ends_it(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.1, 0.5, 0.3, 0.2, 0.9])
    monkeypatch.setattr(loop, "validate", lambda *_: {"val/mean_r@1": next(values)})
    config = tiny_config(
        steps=20, eval_every_steps=2, checkpoint_every_steps=1, keep_best="val/mean_r@1", patience=2
    )
    config = replace(config, keep_checkpoints=1)
    trained = train(config, tmp_path / "run")
    assert trained.finished and trained.step == 8, "two validations without a better one"
    best = read_safetensors(tmp_path / "run" / "checkpoints" / "step-00000004" / "model.safetensors")
    last = read_safetensors(tmp_path / "run" / "checkpoints" / "step-00000008" / "model.safetensors")
    finished = weights(tmp_path / "run")
    assert all(torch.equal(value, finished[key]) for key, value in best.items())
    assert not all(torch.equal(value, finished[key]) for key, value in last.items())
    assert train(config, tmp_path / "run").finished, "and a finished run stays as it is"


def test_a_metric_that_no_validation_gives_is_refused_before_training(
    tiny_config: Config, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"val/mean_r@1"):
        train(tiny_config(keep_best="val/mean_r1", eval_every_steps=2), tmp_path / "run")
    for changes, key in (({"patience": 2}, "keep_best"), ({"keep_best": "val/mean_r@1"}, "eval-every-steps")):
        with pytest.raises(UsageError, match=key):
            prepare(tiny_config(**changes), tmp_path / "run")


# Time and data


def test_a_time_limit_saves_and_the_next_call_continues(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config(steps=9)
    train(config, tmp_path / "whole")
    calls = 0
    while not train(config, tmp_path / "torn", max_minutes=1e-6).finished:
        calls += 1
    assert calls == 8
    assert_same_weights(tmp_path / "whole", tmp_path / "torn")


def test_a_slow_reader_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "STALL_SECONDS", 0.1)
    said: list[str] = []

    class Slow:
        _workers: tuple[()] = ()

        def __next__(self) -> int:
            time.sleep(0.35)
            return 1

        def _shutdown_workers(self) -> None:
            pass

        kill = _shutdown_workers

    with workers._Watch(Slow(), said.append) as watch:
        assert watch.next() == 1
    assert 1 <= len(said) <= 3 and "no batch for" in said[0]


def test_a_mistake_in_the_data_comes_out_of_a_worker_as_it_is(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: loader.BatchReader, positions: range) -> loader.Batch:
        raise DataError("photos.csv: row 7: no such thing")

    monkeypatch.setattr(loader.BatchReader, "__getitem__", broken)
    config = tiny_config(inputs=replace(tiny_config().inputs, workers=2))
    with pytest.raises(DataError) as caught:
        train(config, tmp_path / "run")
    assert str(caught.value) == "photos.csv: row 7: no such thing"


def test_one_in_ten_images_damaged(tiny_config: Config, photos: Path, tmp_path: Path) -> None:
    """Every one that was met is named and replaced, and above the limit the run stops and names some."""
    folder = tmp_path / "photos"
    shutil.copytree(photos.parent, folder)
    damaged = {f"{index:03d}.png" for index in range(0, 96, 10)}
    for name in damaged:
        (folder / name).write_bytes((folder / name).read_bytes()[:200])
    inputs = replace(tiny_config().inputs, max_bad_share=0.2, val_fraction=0.0, test_fraction=0.0)
    config = tiny_config(method="baseline", data=str(folder / photos.name), steps=24, inputs=inputs)
    train(config, tmp_path / "run")
    lines = (tmp_path / "run" / "bad_samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(Path(json.loads(line)["id"]).name for line in lines) == sorted(damaged)
    with pytest.raises(DataError, match=r"could not be used, for example .*\.png"):
        train(replace(config, inputs=replace(inputs, max_bad_share=0.05)), tmp_path / "strict")


def test_the_counters_of_bad_samples_survive_a_checkpoint(tmp_path: Path) -> None:
    from threetowers.errors import BadSample

    first = BadSamples(tmp_path, 0.5, 10)
    first.add([BadSample("a", "damaged image"), BadSample("b", "empty file")], seen=9)
    second = BadSamples(tmp_path, 0.5, 10)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.counts() == first.counts()
    with pytest.raises(DataError, match="6 of 10"):
        second.add([BadSample(str(i), "empty file") for i in range(4)], seen=4)


def test_the_limits_are_those_of_the_documentation() -> None:
    assert (session.MAX_SKIPPED, session.MAX_RETURNS, workers.MAX_DEATHS) == (5, 3, 3)
