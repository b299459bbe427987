"""A model that is cut up over processes: what each of them holds, adds up, writes and reads again.

That whole runs are those of one process is in `test_processes.py`.
"""

import errno
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from kit.processes import Processes as Group
from kit.processes import Traffic
from kit.processes import processes as group_of
from kit.runs import Config, at_step, events, logged, weights, with_vit
from kit.sentences import sentence_encoder
from test_processes import alike, assert_near, trained
from threetowers.config import RunConfig, StartConfig
from threetowers.data.loader import batches
from threetowers.processes import ALONE, Processes
from threetowers.run.setup import prepare
from threetowers.towers.weights import read_safetensors
from threetowers.train import checkpoint, shard_files
from threetowers.train.guards import StopRequest
from threetowers.train.loop import train, validate
from threetowers.train.optim import describe_groups
from threetowers.train.shards import blocks_of, cut_parameters, whole
from threetowers.train.step import TrainingStep
from threetowers.train.tensor_file import write_tensors


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with group_of(2, tmp_path_factory.mktemp("group")) as started:
        yield started


@pytest.fixture(scope="module")
def group_of_four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with group_of(4, tmp_path_factory.mktemp("group")) as started:
        yield started


def own_processes() -> Processes:
    return Processes(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE


def a_step(config: RunConfig, folder: Path, processes: Processes, spare: bool = False) -> Any:
    """The model's setup, the step that trains it, and the batch of this process. spare: a layer that nothing calls."""
    setup = prepare(config, folder, saved_tokenizer=folder)
    if spare:
        setup.model.txt.spare = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    take_step = TrainingStep(config, setup.model, setup.device, setup.thirds.features, processes=processes)
    (batch,) = batches(setup.reader(), 0, 1, own=processes.own(config.batch_size))
    return setup, take_step, batch


def gathered(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value.clone()
        for name, value in model.state_dict().items()
    }


def stepped(config: RunConfig, folder: Path, spare: bool) -> dict[str, Any]:
    """What a process has to say of one step."""
    setup, take_step, batch = a_step(config, folder, own_processes(), spare)
    with Traffic() as traffic:
        result = take_step(batch, 1e-3)
    cut = cut_parameters(setup.model)
    local = sum(value.to_local().numel() for value in cut.values())
    held = {own.data_ptr() for group in take_step.optimizer.param_groups for own in group["params"]}
    trained = [
        each.to_local()
        for each in setup.model.parameters()
        if each.requires_grad and isinstance(each, DTensor)
    ]
    return {
        "loss": result.loss.item(),
        "norm": result.norm.item(),
        "weights": gathered(setup.model),
        "table": describe_groups(take_step.optimizer, 1e-3),
        "cut": sorted(cut),
        "share": local / max(sum(value.numel() for value in cut.values()), 1),
        "same memory": all(each.data_ptr() in held for each in trained if each.numel()),
        "scattered": sum(name == "_reduce_scatter_base_" for name, _ in traffic.seen),
        "groups": sum(isinstance(each, FSDPModule) for each in setup.model.modules()),
        "moments": sorted(checkpoint.optimizer_tensors(take_step.optimizer)),
    }  # fmt: skip


def assert_as_one(found: dict[str, Any], one: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert found["loss"] == pytest.approx(one["loss"], rel=tolerance)
    assert found["norm"] == pytest.approx(one["norm"], rel=tolerance)
    assert found["table"] == one["table"]
    assert found["moments"] == one["moments"]
    assert list(found["weights"]) == list(one["weights"])
    for name, value in one["weights"].items():
        assert found["weights"][name].shape == value.shape


@pytest.mark.parametrize("spare", [False, True])
def test_a_step_of_shares_is_the_step_of_one(
    spare: bool, group: Group, tiny_config: Config, tmp_path: Path
) -> None:
    """Each process holds about half of the towers, and gradients travel once, whatever the micro-batches.

    A layer that nothing calls has no gradient and no moments, and nobody waits for them.
    """
    config = with_vit(
        tiny_config(
            micro_batch_size=3, shard="blocks", optim=replace(tiny_config().optim, freeze=("img.ln_pre.*",))
        )
    )
    one = stepped(config, tmp_path / "one", spare)
    assert not one["cut"] and not one["scattered"]
    for found in group.run(stepped, config, tmp_path / "two", spare):
        assert_as_one(found, one)
        assert found["cut"] == sorted(n for n in one["weights"] if n.startswith(("img.", "txt.")))
        assert 0.4 < found["share"] < 0.6 and found["same memory"]
        assert found["scattered"] == found["groups"] + 1 - 2 * spare  # one more is that of the loss


def test_an_encoder_of_transformers_is_cut_up_by_its_layers(
    group: Group, tiny_config: Config, tmp_path: Path
) -> None:
    encoder = sentence_encoder(tmp_path / "encoder")
    start = StartConfig(text=f"hf-text:{encoder}")
    config = tiny_config(micro_batch_size=5, shard="blocks", start=start, grad_checkpointing=True)
    one = stepped(config, tmp_path / "one", False)
    for found in group.run(stepped, config, tmp_path / "two", False):
        assert_as_one(found, one)
        assert any(name.startswith("txt.transformer.encoder.layer.1.") for name in found["cut"])
        assert 0.4 < found["share"] < 0.6 and found["same memory"]
        for name, value in one["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=1e-4)


def test_blocks_are_the_layers_that_follow_each_other(tiny_config: Config, tmp_path: Path) -> None:
    model = prepare(with_vit(tiny_config(method="baseline")), tmp_path).model
    assert model.img is not None
    named = {module: name for name, module in model.img.named_modules()}
    assert [named[each] for each in blocks_of(model.img)] == [
        "transformer.resblocks.1",
        "transformer.resblocks.0",
    ]


def in_bf16(config: RunConfig, folder: Path) -> dict[str, float]:
    """The losses of a few steps, and metrics that rank 0 finds alone."""
    processes = own_processes()
    setup, take_step, batch = a_step(config, folder, processes)
    found = {str(step): take_step(batch, 1e-3, step=step).loss.item() for step in range(4)}
    with whole(setup.model):
        if processes.first:
            found |= validate(setup)
        if processes.size > 1:
            dist.barrier()
    held = {name for name, each in setup.model.named_parameters() if isinstance(each, DTensor)}
    assert held == set(cut_parameters(setup.model)), "the weights are cut up again"
    assert bool(held) == (processes.size > 1)
    found["4"] = take_step(batch, 1e-3, step=4).loss.item()
    return found


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16-autocast", 2e-3)])
def test_precision_and_a_process_that_computes_alone(
    precision: Any, tolerance: float, group: Group, tiny_config: Config, tmp_path: Path
) -> None:
    config = with_vit(tiny_config(shard="blocks", precision=precision))
    one = in_bf16(config, tmp_path / "one")
    first, second = group.run(in_bf16, config, tmp_path / "two")
    assert first.keys() == one.keys() and "val/mean_r@1" in first
    for step in range(5):
        assert first[str(step)] == second[str(step)] == pytest.approx(one[str(step)], rel=tolerance)
    if precision == "fp32":
        assert first == pytest.approx(one, rel=1e-5)


def files(folder: Path, step: int) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))


def test_a_sharded_run_goes_on_in_any_number_of_processes(
    group: Group, tiny_config: Config, tmp_path: Path
) -> None:
    """2 → 1 → 2, and the finished weights are those of the step where validation was best."""
    config = tiny_config(
        log_every_steps=1,
        eval_every_steps=1,
        keep_best="val/mean_r@1",
        micro_batch_size=4,
        steps=7,
        shard="blocks",
    )
    train(config, tmp_path / "one")
    folder = tmp_path / "several"
    assert alike(group.run(trained, config, folder, (1, 2))).step == 3
    assert files(folder, 3) == [shard_files.file_name(0), shard_files.file_name(1)]
    consolidated(folder / "checkpoints" / "step-00000003", tmp_path / "consolidated")
    with StopRequest() as stop, at_step(4, stop.request):
        assert train(config, folder, stop=stop).step == 5
    assert files(folder, 5) == ["model.safetensors", "optim.safetensors"]
    assert {told.step for told in group.run(trained, config, folder)} == {config.steps}
    assert_near(tmp_path / "one", folder)
    assert logged(folder, "val/mean_r@1") == pytest.approx(logged(tmp_path / "one", "val/mean_r@1"))
    assert "processes 2 → 1" in events(folder) and "processes 1 → 2" in events(folder)


def consolidated(folder: Path, out: Path) -> None:
    """torch's own tool makes one file of the shards, with the tensors that we read; scalars it writes as 0."""
    ours = shard_files.read(folder, nn.Module())
    out.mkdir()
    consolidate_safetensors_files(str(folder), str(out), dict.fromkeys(ours, 1))
    (path,) = out.glob("*.safetensors")
    theirs = read_safetensors(path)
    assert theirs.keys() == ours.keys() and any(name.endswith("/exp_avg_sq") for name in ours)
    assert [n for n, value in theirs.items() if value.ndim and not torch.equal(ours[n], value)] == []
    assert {value.item() for name, value in ours.items() if name.endswith("/step")} == {3.0}


def refused(config: RunConfig, folder: Path) -> Any:
    """A run in which the disk refuses one write of rank 1."""
    real, calls = write_tensors, []

    def write(path: Path, *arguments: Any) -> Any:
        calls.append(path)
        if dist.get_rank() == 1 and len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *arguments)

    with mock.patch.object(checkpoint, "write_tensors", write):
        return trained(config, folder)


def test_a_disk_that_refuses_one_process_refuses_all(
    group: Group, tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(checkpoint_every_steps=2, shard="blocks", method="baseline")
    assert alike(group.run(refused, config, tmp_path / "run")).step == config.steps
    said = events(tmp_path / "run")
    assert said.count("could not be saved") == 1
    assert "the checkpoint of step 2 could not be saved: No space left on device" in said
    assert files(tmp_path / "run", 4) and not files(tmp_path / "run", 2)
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial-*"))


def killed(config: RunConfig, folder: Path, rank: int, point: str) -> Any:
    """A run in which a process is killed in its third save."""
    owner: Any = os if point == "rename" else checkpoint
    real, calls = getattr(owner, point), list[Any]()

    def act(*arguments: Any) -> Any:
        calls.extend(arguments[:1] if ".partial-" in str(arguments[0]) else [])
        if dist.get_rank() == rank and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    with mock.patch.object(owner, point, act):
        return trained(config, folder)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "point"), [(1, "write_tensors"), (0, "write_tensors"), (0, "rename")])
def test_a_kill_in_a_save_leaves_the_checkpoint_before_it(
    rank: int, point: str, group: Group, tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(checkpoint_every_steps=2, shard="blocks", log_every_steps=1)
    folder = tmp_path / "run"
    with pytest.raises((AssertionError, OSError, EOFError)), group_of(2, tmp_path) as doomed:
        doomed.run(killed, config, folder, rank, point)
    found = checkpoint.find(folder / "checkpoints")
    assert found is not None and found.step == 2 and not found.passed_over
    alike(group.run(trained, config, folder))
    assert "continuing from step 2" in events(folder)
    train(config, tmp_path / "one")
    assert_near(tmp_path / "one", folder)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "blocks"])
@pytest.mark.parametrize("order", [(4, 2, 1), (4, 1, 2), (1, 2, 4), (2, 4, 1)])
def test_four_two_and_one_process_continue_each_other(
    order: tuple[int, ...],
    shard: Any,
    group: Group,
    group_of_four: Group,
    tiny_config: Config,
    tmp_path: Path,
) -> None:
    config = with_vit(tiny_config(log_every_steps=1, steps=12, shard=shard, micro_batch_size=3))
    train(config, tmp_path / "one")
    folder = tmp_path / "several"
    for number, size in enumerate(order, start=1):
        stop = 4 * number - 1
        if size == 1:
            with StopRequest() as request, at_step(stop, request.request):
                step = train(config, folder, stop=request).step
        else:
            several = group if size == 2 else group_of_four
            step = alike(several.run(trained, config, folder, (size - 1, stop))).step
        assert step == 4 * number
    assert (folder / "model.json").is_file()
    assert_near(tmp_path / "one", folder)
    assert weights(folder).keys() == weights(tmp_path / "one").keys()
