"""Guards that no other test covers; tests/guards.py removes each of them and expects its test to fail."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from kit.batches import reader
from kit.runs import Config, interrupt_at, logged, poisoned
from threetowers.commands.convert import convert
from threetowers.config import ObjectiveConfig, OptimConfig
from threetowers.data.loader import Batch, BatchReader, batches
from threetowers.errors import CheckpointError, DataError, UsageError
from threetowers.files import sync_to_disk
from threetowers.objective import tiled
from threetowers.towers.weights import read_safetensors
from threetowers.train import checkpoint, loop
from threetowers.train.guards import FiniteGuard, StopRequest, folder_lock
from threetowers.train.log import RunLog
from threetowers.train.loop import train
from threetowers.train.optim import adamw
from threetowers.train.saver import Saver

FORK = multiprocessing.get_context("fork")


def layer() -> tuple[nn.Linear, torch.optim.AdamW]:
    """A model of one layer after one step, so that it has moments."""
    model = nn.Linear(3, 2)
    optimizer = adamw(model, OptimConfig())
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(root: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save(root, step, checkpoint.snapshot(*layer()), {}, {}, keep)


# Checkpoints


def test_all_is_on_the_disk_before_the_rename_and_older_ones_go_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, done = tmp_path / "checkpoints", list[str]()

    def noted(what: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *arguments: Any, **options: Any) -> Any:
            done.append(f"{what} {path.name.partition('-0')[0].partition(f'-{os.getpid()}')[0]}")
            return do(path, *arguments, **options)

        return call

    save(root, 1, keep=1)
    monkeypatch.setattr(checkpoint, "sync_to_disk", noted("sync", sync_to_disk))
    monkeypatch.setattr(os, "rename", noted("rename", os.rename))
    monkeypatch.setattr(shutil, "rmtree", noted("remove", shutil.rmtree))
    save(root, 2, keep=1)
    files = ("model.safetensors", "optim.safetensors", "state.json", "MANIFEST.json")
    assert done == [
        "remove .partial",
        *(f"sync {name}" for name in files),
        "sync .partial",
        "rename .partial",
        "sync checkpoints",
        "remove step",
    ]


def test_a_step_that_is_there_is_never_written_over(tmp_path: Path) -> None:
    first = (save(tmp_path, 3) / "model.safetensors").read_bytes()
    second = (save(tmp_path, 3) / "model.safetensors").read_bytes()
    assert second != first
    assert (tmp_path / "damaged-step-00000003" / "model.safetensors").read_bytes() == first


def test_a_checkpoint_under_another_steps_name_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / "step-00000009")
    found = checkpoint.find(tmp_path)
    assert found is not None and found.step == 1 and "holds another step" in found.passed_over[0]


def test_moments_of_unknown_parameters_are_refused(tmp_path: Path) -> None:
    model, optimizer = layer()
    tensors = checkpoint.snapshot(model, optimizer)
    tensors["optim.safetensors"]["nobody/exp_avg"] = torch.zeros(2)
    checkpoint.save(tmp_path, 1, tensors, {}, {}, 1)
    found = checkpoint.find(tmp_path)
    assert found is not None
    with pytest.raises(CheckpointError, match=r"does not fit this configuration.*nobody/exp_avg"):
        checkpoint.restore(found, model, optimizer)


def test_a_background_save_holds_the_weights_of_its_own_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model, optimizer), trained_on, real = layer(), threading.Event(), checkpoint.save

    def slow(*arguments: Any, **options: Any) -> Path:
        assert trained_on.wait(60)
        return real(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save", slow)
    saver, before = Saver(tmp_path, 1, RunLog(tmp_path), {}, background=True), model.weight.detach().clone()
    saver.save(1, model, optimizer, {})
    with torch.no_grad():
        model.weight.zero_()
    trained_on.set()
    saver.wait()
    assert torch.equal(read_safetensors(tmp_path / "step-00000001" / "model.safetensors")["weight"], before)


@pytest.mark.parametrize("background", [True, False])
def test_what_is_no_fault_of_the_disk_ends_the_run_from_a_thread_too(
    background: bool, tmp_path: Path
) -> None:
    model, optimizer = layer()
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    saver = Saver(tmp_path, 1, RunLog(tmp_path), {}, background=background)
    with pytest.raises(CheckpointError, match=r"phase: torch.complex64 cannot be saved"):
        saver.save(1, model, optimizer, {})
        saver.wait()


def test_a_damaged_best_checkpoint_never_becomes_the_result(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = tmp_path / "run" / "checkpoints" / "step-00000002" / "model.safetensors"

    def validate(*_: Any) -> dict[str, float]:
        if not best.exists():
            return {"val/mean_r@1": 0.5}
        data = bytearray(best.read_bytes())
        data[-3] ^= 1
        best.write_bytes(data)
        return {"val/mean_r@1": 0.1}

    monkeypatch.setattr(loop, "validate", validate)
    config = tiny_config(steps=4, eval_every_steps=2, keep_best="val/mean_r@1", background_saves=False)
    with pytest.raises(CheckpointError, match=r"the best checkpoint \(step 2\) cannot be used"):
        train(config, tmp_path / "run")


# Stopping and going on


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_requests_a_stop(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)  # unhandled, it would take the test run with it
    try:
        with StopRequest() as stop:
            assert not stop.requested
            signal.raise_signal(number)
            assert stop.requested
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_second_interrupt_ends_at_once() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_folder_has_one_trainer_as_long_as_it_lives(tmp_path: Path) -> None:
    held = FORK.Event()

    def hold() -> None:
        with folder_lock(tmp_path):
            held.set()
            time.sleep(60)

    process = FORK.Process(target=hold)
    process.start()
    try:
        assert held.wait(30)
        with pytest.raises(CheckpointError, match=f"process {process.pid} "), folder_lock(tmp_path):
            pass
    finally:
        process.kill()
        process.join()
    with folder_lock(tmp_path):
        pass


def test_rows_and_counters_of_a_killed_run_are_those_of_an_uninterrupted_one(
    tiny_config: Config, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos.parent, folder)
    for index in range(0, 96, 10):
        (folder / f"{index:03d}.png").write_bytes(b"")
    inputs = replace(tiny_config().inputs, max_bad_share=0.5, val_fraction=0.0, test_fraction=0.0)
    config = tiny_config(
        method="baseline",
        data=str(folder / photos.name),
        inputs=inputs,
        steps=9,
        checkpoint_every_steps=4,
        log_every_steps=1,
        background_saves=False,
    )
    train(config, tmp_path / "whole")
    interrupt_at(7, config, tmp_path / "torn")
    train(config, tmp_path / "torn")
    counts = [logged(tmp_path / name, "data/bad/empty file") for name in ("whole", "torn")]
    assert counts[0] == counts[1] and counts[0][9] > counts[0][4] > 0
    lines = (tmp_path / "torn" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if "train/loss" in row]
    assert steps == list(range(1, 10)), "no row is missing and none stands twice"


def test_skipped_steps_are_counted_across_stops(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "batches", poisoned(set(range(2, 7))))
    while not train(tiny_config(steps=8), tmp_path / "run", max_minutes=1e-6).finished:
        pass  # a step a call
    assert (tmp_path / "run" / "events.log").read_text().count("back to the checkpoint") == 1


# Numbers


def test_a_gradient_alone_that_is_not_finite_skips_the_step() -> None:
    guard, samples = FiniteGuard(), torch.arange(2)
    flags = [
        float(guard.watch(step, samples, torch.tensor(loss), torch.tensor(norm)))
        for step, (loss, norm) in enumerate([(1.0, 1.0), (1.0, math.inf), (math.nan, 1.0)])
    ]
    assert flags == [0.0, 1.0, 1.0] and [step for step, _ in guard.skipped()] == [1, 2]


def test_gradients_are_clipped_and_the_scale_is_clamped_in_every_step(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms, step = list[float](), torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, *arguments: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    config = tiny_config(
        method="baseline",
        steps=20,
        log_every_steps=1,
        optim=OptimConfig(lr=3e-3, warmup_steps=1, clip_norm=0.05),
        objective=ObjectiveConfig(init_scale=2.0, max_scale=2.0),
    )
    train(config, tmp_path / "run")
    assert min(logged(tmp_path / "run", "train/grad_norm").values()) > 0.05 >= max(norms) * 0.999
    assert max(logged(tmp_path / "run", "train/scale").values()) <= 2.0 + 1e-6


def test_near_negatives_at_a_large_scale_do_not_overflow() -> None:
    """Four equal pairs at scale 100: exp 100 is beyond fp32, and the loss is log 4."""
    a = nn.functional.normalize(torch.ones(4, 8), dim=1).requires_grad_()
    loss = tiled.softmax_loss(a, a.detach(), torch.tensor(100.0))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(math.log(4), rel=1e-5)
    assert a.grad is not None and bool(a.grad.isfinite().all())


# Data


def test_replacements_are_the_same_for_every_reader(photos: Path, tmp_path: Path) -> None:
    for file in photos.parent.iterdir():
        (tmp_path / file.name).write_bytes(b"" if file.stem.endswith("7") else file.read_bytes())
    steps = [range(8 * step, 8 * step + 8) for step in range(12)]
    one, other = reader(tmp_path / photos.name), reader(tmp_path / photos.name)
    forward, backward = [one[step] for step in steps], [other[step] for step in reversed(steps)][::-1]
    assert [len(batch.bad) > 0 for batch in forward].count(True) > 3
    assert all(torch.equal(a.index, b.index) for a, b in zip(forward, backward, strict=True))


def test_a_dead_worker_is_started_again_where_it_was_and_not_for_ever(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, real, said = list(batches(reader(photos), 0, 8)), BatchReader.__getitem__, list[str]()

    def deadly(self: BatchReader, positions: range) -> Batch:
        if positions.start == 8 * 5 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, positions)

    def read() -> Iterator[Batch]:
        return batches(reader(photos, workers=1), 0, 8, say=said.append)

    # how often torch looks whether its workers live: five seconds
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))
    monkeypatch.setattr(BatchReader, "__getitem__", deadly)
    found = [batch.index.tolist() for batch in read()]
    assert found == [batch.index.tolist() for batch in expected]
    assert len(said) == 1 and "a loader worker died" in said[0]
    monkeypatch.setattr(BatchReader, "__getitem__", lambda *_: os._exit(1))
    with pytest.raises(DataError, match="died 3 times in a row before batch 0"):
        list(read())


# Foreign files


def test_an_old_torch_opens_no_foreign_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(UsageError, match=r"torch 2\.9\.1 is too old to open foreign files"):
        convert(tmp_path / "weights.pt", tmp_path / "weights.safetensors")


def test_a_program_is_refused_before_torch_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "program.pt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(CheckpointError, match="is a TorchScript program, which holds code"):
        convert(tmp_path / "program.pt", tmp_path / "weights.safetensors")
