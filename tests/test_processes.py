"""Training in several processes is training in one: losses, weights, decisions, and what happens when one ends."""

import json
import math
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from kit.processes import Processes as Group
from kit.processes import processes as group_of
from kit.runs import (
    TINY_INPUTS,
    Config,
    assert_same_weights,
    at_step,
    logged,
    poisoned,
    rows,
    weights,
    with_vit,
)
from kit.started import LINUX, TORCHRUN, Started, command
from threetowers import processes
from threetowers.cli import main
from threetowers.config import ObjectiveConfig, RunConfig
from threetowers.data import loader
from threetowers.errors import ThreeTowersError, UsageError
from threetowers.evaluate.encode import encode
from threetowers.evaluate.evaluation import evaluate_run
from threetowers.processes import ALONE, Processes
from threetowers.run.setup import prepare
from threetowers.settings import read_config
from threetowers.train import loop, together
from threetowers.train.guards import StopRequest
from threetowers.train.loop import train
from threetowers.train.session import open_session
from threetowers.world.write import write_world


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with group_of(2, tmp_path_factory.mktemp("group")) as started:
        yield started


@pytest.fixture(scope="module")
def group_of_four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with group_of(4, tmp_path_factory.mktemp("group")) as started:
        yield started


@dataclass(frozen=True)
class Told:
    """What a process says of a run: the step at its end, a digest of its weights, and the error that ended it."""

    step: int = 0
    weights: str = ""
    error: str = ""


def trained(
    config: RunConfig, folder: Path, stop: tuple[int, int] | None = None, bad: int | None = None
) -> Told:
    """A run in a process of a group. stop: a rank, and the step at which it alone is asked to stop.

    bad: a rank whose features are not finite in each step from the third on, up to the seventh.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    sessions = []

    def opened(*arguments: Any, **options: Any) -> Any:
        sessions.append(open_session(*arguments, **options))
        return sessions[-1]

    request = StopRequest()
    asked = at_step(stop[1], request.request) if stop and stop[0] == rank else mock.MagicMock()
    batches = poisoned(set(range(2, 7))) if bad == rank else loader.batches
    with (
        mock.patch.object(loop, "open_session", opened),
        mock.patch.object(loop, "batches", batches),
        asked,
        request,
    ):
        try:
            result = train(config, folder, stop=request, processes=Processes(rank, size, rank, size))
        except ThreeTowersError as error:
            return Told(error=f"{type(error).__name__}: {error}")
    return Told(result.step, digest_of(sessions[0].setup.model) if sessions else "")


def digest_of(model: torch.nn.Module) -> str:
    """Of the whole weights, which this process gathers where they are cut up; all processes call it."""
    values = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
    }
    return together._digest(values)


def alike(told: list[Told]) -> Told:
    """What all processes say."""
    assert len(set(told)) == 1, told
    return told[0]


def assert_near(one: Path, several: Path, tolerance: float = 1e-5) -> None:
    """Losses of every step, and the finished weights, to a share of their norms."""
    for key in (
        key for key in rows(one)[0] if key.startswith(("train/loss", "train/grad_norm", "train/acc"))
    ):
        assert logged(several, key) == pytest.approx(logged(one, key), rel=tolerance), key
    for key in ("data/duplicate_captions", "train/lr"):
        assert logged(several, key) == logged(one, key), key
    found, expected = weights(several), weights(one)
    assert found.keys() == expected.keys()
    off = {name: _norm(found[name] - value) for name, value in expected.items()}
    norms = {name: _norm(value) for name, value in expected.items()}
    assert math.hypot(*off.values()) <= tolerance * math.hypot(*norms.values())
    for name, norm in norms.items():
        # of attention's biases, those of the keys have no gradient but rounding, which AdamW makes larger
        share = tolerance if name.startswith(("heads", "log_scale", "bias")) else 100 * tolerance
        assert off[name] <= share * norm + 1e-7, (name, off[name], norm)


def _norm(value: Tensor) -> float:
    return float(value.double().norm())


def sent(bucket: int) -> tuple[Any, ...]:
    """What this process has of values that every process exchanges, gathers and adds up."""
    rank, size = dist.get_rank(), dist.get_world_size()
    those = Processes(rank, size)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (), (4,), (5, 1), (2,))]
    for number, parameter in enumerate(parameters):
        if number != 2:  # one that is frozen
            parameter.grad = torch.full_like(parameter, 10.0**number * (rank + 1))
    parameters[0].grad = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).T.contiguous().T * (rank + 1)
    with mock.patch.object(processes, "BUCKET", bucket):
        those.add_gradients(parameters)
    tensors = [
        torch.full((3, 2), rank + 0.5),
        torch.tensor([rank, 1 << 40, 7]),
        torch.full((3,), rank).bfloat16(),
    ]
    order = []
    with those.one_before_all():
        order.append(time.monotonic())
        time.sleep(0.05 * (rank == 0))
        order.append(time.monotonic())
    return (
        [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters],
        [tensor.tolist() for tensor in those.gather(tensors)],
        those.exchange({"rank": rank, "text": "ä\ud800" * rank, "value": 0.1}),
        those.told(lambda: [rank, None]),
        order,
    )


@pytest.mark.parametrize("bucket", [1, 7, 100])
def test_what_processes_send_each_other(bucket: int, group: Group) -> None:
    (*first, before), (*second, after) = group.run(sent, bucket)
    assert first == second
    gradients, gathered, exchanged, told = first
    assert gradients[0] == [[3.0, 6.0, 9.0], [12.0, 15.0, 18.0]]
    assert gradients[1:] == [30.0, None, [[3000.0]] * 5, [30000.0] * 2]
    assert gathered == [
        [[0.5, 0.5]] * 3 + [[1.5, 1.5]] * 3,
        [0, 1 << 40, 7, 1, 1 << 40, 7],
        [0.0] * 3 + [1.0] * 3,
    ]
    assert exchanged == [{"rank": rank, "text": "ä\ud800" * rank, "value": 0.1} for rank in (0, 1)]
    assert told == [0, None]
    assert before[1] <= after[0], "rank 0 has left the block when the others enter it"


def two_thirds(config: RunConfig) -> RunConfig:
    return replace(config, third=(f"a={config.third[0]}", f"b={config.third[0]}"))


def with_inputs(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, inputs=replace(config.inputs, **changes))


def with_objective(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, objective=ObjectiveConfig(**changes))


def schedule(config: RunConfig) -> RunConfig:
    return with_objective(
        config,
        weights=(0.5, 0.5, 0.0),
        weights_end=(0.5, 0.0, 0.5),
        weights_schedule="linear",
        weights_steps=(1, 4),
    )


CASES: dict[str, Any] = {
    "baseline": partial(replace, method="baseline"),
    "lit": partial(replace, method="lit"),
    "3t": replace,
    "3t live": partial(with_inputs, third_view="same"),
    "3t in micro-batches": partial(replace, micro_batch_size=3),
    "3t in micro-batches, vit": lambda config: with_vit(
        replace(config, micro_batch_size=3, grad_checkpointing=True)
    ),
    "3t, weights that move": schedule,
    "3t, duplicates masked": partial(with_inputs, mask_duplicates=True),
    "3t sigmoid": partial(with_objective, kind="sigmoid", scale="per-row"),
    "regression": partial(replace, method="3t-regression"),
    "two third towers": two_thirds,
}
QUICK = ("lit", "3t live", "3t in micro-batches", "3t sigmoid", "regression")
"""What the default tests train; the others are among the slow ones, with four processes too."""


SHARDED_QUICK = ("lit", "3t in micro-batches, vit")


def case(name: str, tiny_config: Config) -> RunConfig:
    changed: RunConfig = CASES[name](tiny_config(log_every_steps=1))
    return changed


@pytest.mark.parametrize("name", QUICK)
def test_two_processes_train_as_one(name: str, group: Group, tiny_config: Config, tmp_path: Path) -> None:
    config = case(name, tiny_config)
    train(config, tmp_path / "one")
    told = alike(group.run(trained, config, tmp_path / "two"))
    assert told.step == config.steps and told.weights
    assert_near(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("name", SHARDED_QUICK)
def test_two_processes_that_share_the_towers_train_as_one(
    name: str, group: Group, tiny_config: Config, tmp_path: Path
) -> None:
    config = case(name, tiny_config)
    train(config, tmp_path / "one")
    told = alike(group.run(trained, replace(config, shard="blocks"), tmp_path / "two"))
    assert told.step == config.steps and told.weights
    assert_near(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "blocks"])
@pytest.mark.parametrize("name", CASES)
def test_two_and_four_processes_train_as_one(
    name: str, shard: Any, group: Group, group_of_four: Group, tiny_config: Config, tmp_path: Path
) -> None:
    config = replace(case(name, tiny_config), steps=20)
    train(config, tmp_path / "one")
    config = replace(config, shard=shard)
    for several in (group, group_of_four):
        folder = tmp_path / str(len(several.pipes))
        assert alike(several.run(trained, config, folder)).step == 20
        assert_near(tmp_path / "one", folder)


def test_a_stop_request_of_one_process_stops_all_and_any_number_continues(
    group: Group, tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(log_every_steps=1)
    train(config, tmp_path / "one")
    assert alike(group.run(trained, config, tmp_path / "from-two", (1, 2))).step == 3
    assert (tmp_path / "from-two" / "checkpoints" / "step-00000003").is_dir()
    assert train(config, tmp_path / "from-two").finished  # 2 → 1
    with StopRequest() as stop, at_step(2, stop.request):
        assert train(config, tmp_path / "from-one", stop=stop).step == 3
    assert alike(group.run(trained, config, tmp_path / "from-one")).step == config.steps  # 1 → 2
    for name in ("from-two", "from-one"):
        assert_near(tmp_path / "one", tmp_path / name)
    log = (tmp_path / "from-one" / "events.log").read_text(encoding="utf-8")
    assert "processes 1 → 2" in log and "continuing from step 3" in log


def test_a_continued_run_of_two_processes_is_the_uninterrupted_one_to_the_bit(
    group: Group, tiny_config: Config, tmp_path: Path
) -> None:
    """With patches that are dropped at random, others in each process."""
    config = with_vit(tiny_config(), patch_dropout=0.5)
    alike(group.run(trained, config, tmp_path / "whole"))
    alike(group.run(trained, config, tmp_path / "parts", (0, 3)))
    alike(group.run(trained, config, tmp_path / "parts"))
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def evaluated(folder: Path) -> dict[str, Any]:
    """The evaluation of a finished run in a process of a group."""
    return evaluate_run(folder, processes=Processes(dist.get_rank(), dist.get_world_size())).as_dict()


@pytest.mark.parametrize("method", ["3t", "lit"])
def test_processes_share_an_evaluation_and_find_what_one_does(
    method: str, group: Group, tiny_config: Config, tmp_path: Path
) -> None:
    """Retrieval, classes and the combination; the files too. Only the first process has figures."""
    world = tmp_path / "shapes"
    write_world(world, num_train=64, num_val=25, num_test=33, num_labelled=96)
    config = tiny_config(method=method, steps=2, data=str(world), classes=str(world / "objects" / "test"))
    train(config, tmp_path / "run")
    alone = evaluate_run(tmp_path / "run").as_dict()
    names = ("evaluation.json", "features.safetensors")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in names}
    for name in names:
        (tmp_path / "run" / name).unlink()
    first, other = group.run(evaluated, tmp_path / "run")
    assert alone["zero_shot"] and first.keys() == alone.keys() and not other.get("test")
    assert json.dumps(first) == json.dumps(alone) == json.dumps(json.loads(json.dumps(alone)))
    (tmp_path / "one.safetensors").write_bytes(before["features.safetensors"])
    one, two = (load_file(path) for path in (tmp_path / "one.safetensors", tmp_path / "run" / names[1]))
    assert one.keys() == two.keys()
    for name, values in one.items():
        torch.testing.assert_close(two[name], values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shard", ["none", "blocks"])
def test_steps_that_are_not_finite_in_one_process_are_skipped_by_all(
    shard: Any, group: Group, tiny_config: Config, tmp_path: Path
) -> None:
    """Five in a row send all of them back to the last checkpoint, and on with the batches after them."""
    config = tiny_config(steps=8, log_every_steps=1, checkpoint_every_steps=1)
    with mock.patch.object(loop, "batches", poisoned(set(range(2, 7)))):
        train(config, tmp_path / "one")
    told = alike(group.run(trained, replace(config, shard=shard), tmp_path / "two", None, 1))
    assert told.step == 8
    assert_near(tmp_path / "one", tmp_path / "two")
    events = (tmp_path / "two" / "events.log").read_text(encoding="utf-8")
    assert (
        events.count("not finite; the step is skipped") == 5 and "back to the checkpoint of step 2" in events
    )


@pytest.fixture
def damaged(photos: Path, tmp_path: Path) -> Path:
    """The photos, of which six are no images."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for number, path in enumerate(sorted(photos.parent.iterdir())):
        (folder / path.name).write_bytes(path.read_bytes() if number % 16 else b"no image")
    (folder / photos.name).write_bytes(photos.read_bytes())
    return folder / photos.name


def encoded(config: RunConfig, folder: Path, batch_size: int) -> Any:
    """The validation data as the processes of a group encode it together, and its metrics."""
    own = Processes(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE
    setup = prepare(config, folder, saved_tokenizer=folder, processes=own)
    stores = setup.thirds.stores(setup.val)
    found = encode(
        setup.model, setup.val, setup.tokenizer, stores, setup.device, batch_size=batch_size, processes=own
    )
    bad = [(each.id, each.reason) for each in found.bad]
    return (
        found.views,
        found.index.tolist(),
        found.text_image.tolist(),
        found.captions,
        bad,
        loop.validate(setup, own),
    )


@pytest.mark.parametrize("method", ["baseline", "3t", "lit"])
@pytest.mark.parametrize("share", [0.7, 0.02])
def test_processes_that_encode_together_have_what_one_has(
    share: float, method: Any, group: Group, damaged: Path, tiny_config: Config, tmp_path: Path
) -> None:
    """Of uneven shares, some without an image or with one that cannot be read."""
    inputs = replace(TINY_INPUTS, max_bad_share=0.5, val_fraction=share)
    for path in sorted(damaged.parent.glob("*.png"))[3::5]:
        path.write_bytes(path.read_bytes()[:-900])  # whole up to its last rows
    config = tiny_config(data=str(damaged), method=method, inputs=inputs)
    views, *rest, metrics = encoded(config, tmp_path / "one", 3)
    assert method == "lit" or share < 0.1 or rest[-1], "some are unreadable"
    for found, *other, values in group.run(encoded, config, tmp_path / "two", 3):
        assert other == rest and values == pytest.approx(metrics)
        assert found.keys() == views.keys()
        for name, value in views.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_bad_samples_are_counted_over_all_processes(
    group: Group, damaged: Path, tiny_config: Config, tmp_path: Path
) -> None:
    inputs = replace(TINY_INPUTS, max_bad_share=0.5, val_fraction=0.0, test_fraction=0.0)
    config = tiny_config(data=str(damaged), method="baseline", log_every_steps=1, inputs=inputs)
    train(config, tmp_path / "one")
    alike(group.run(trained, config, tmp_path / "two"))
    named = [
        sorted((tmp_path / name / "bad_samples.jsonl").read_text(encoding="utf-8").splitlines())
        for name in ("one", "two")
    ]
    assert named[0] == named[1] and len(named[0]) == 6
    key = next(key for key in rows(tmp_path / "one")[0] if key.startswith("data/bad/"))
    assert logged(tmp_path / "one", key) == logged(tmp_path / "two", key)
    config = replace(config, inputs=replace(inputs, max_bad_share=0.01))
    told = alike(group.run(trained, config, tmp_path / "too-many"))
    assert told.error.startswith("DataError: 6 of 96 samples could not be used")


def test_patience_ends_all_processes_at_the_same_step(
    group: Group, tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(eval_every_steps=1, keep_best="val/mean_r@1", patience=1, method="baseline")
    one = train(config, tmp_path / "one")
    steps = {told.step for told in group.run(trained, config, tmp_path / "two")}
    assert steps == {max(logged(tmp_path / "two", "val/mean_r@1"))}
    assert one.finished and (tmp_path / "two" / "model.json").is_file()
    assert logged(tmp_path / "one", "val/mean_r@1") == pytest.approx(logged(tmp_path / "two", "val/mean_r@1"))


def differing(config: RunConfig, folder: Path) -> str:
    """The error of processes of which one has another learning rate in mind."""
    changed = replace(config, optim=replace(config.optim, lr=0.5)) if dist.get_rank() else config
    return trained(changed, folder).error


def test_what_cannot_be_trained_together_is_refused(
    group: Group, tiny_config: Config, tmp_path: Path
) -> None:
    says = "batch_size: 15 samples cannot be shared equally by 2 processes; give --batch-size 14 or --batch-size 16"
    with pytest.raises(UsageError, match=says):
        together.check_divisible(tiny_config(batch_size=15), 2)
    told = alike(group.run(trained, tiny_config(batch_size=15), tmp_path / "odd"))
    assert told.error == f"UsageError: {says}"
    (first, second) = group.run(differing, tiny_config(method="baseline"), tmp_path / "other")
    assert first == second and "rank 1 starts with other settings than rank 0" in first
    pair = replace(
        tiny_config().pair, vision={"timm_model_name": "test_efficientnet", "timm_pool": "", "image_size": 32}
    )
    told = alike(group.run(trained, tiny_config(pair=pair, method="baseline"), tmp_path / "norms"))
    assert "BatchNorm that follows each batch" in told.error and "--start.batchnorm frozen" in told.error


@LINUX
def test_a_process_that_is_killed_is_named_and_the_same_command_continues(
    tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(steps=400, log_every_steps=1, checkpoint_every_steps=2, method="baseline")
    folder = tmp_path / "run"
    run = Started(config, folder)
    run.wait_for(6)
    killed = run.rank(1)
    os.kill(killed, signal.SIGKILL)
    code, said = run.end()
    assert code == 1, said
    assert f"rank 1 (process {killed}) was ended by SIGKILL" in said and "Traceback" not in said
    assert "The same command continues from the last checkpoint" in said
    with StopRequest() as stop:
        stop.request()
        step = train(read_config(folder / "config.toml"), folder, stop=stop).step
    assert step >= 5
    assert f"continuing from step {step - 1}" in (folder / "events.log").read_text(encoding="utf-8")


@LINUX
@pytest.mark.slow
def test_processes_that_are_stopped_and_killed_finish_with_the_weights_of_an_undisturbed_run(
    tiny_config: Config, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """SIGTERM to one, which stops both, and SIGKILL to either at random steps, twenty times."""
    config = tiny_config(steps=300, log_every_steps=1, checkpoint_every_steps=3)
    folder, whole = tmp_path / "run", Started(config, tmp_path / "whole")
    assert whole.end()[0] == 0
    run = Started(config, folder)
    run.wait_for(2)
    os.kill(run.rank(1), signal.SIGTERM)
    code, said = run.end()
    step = int(re.findall(r"stopped at step (\d+); the same command continues", said)[0])
    assert code == 75 and f"step-{step:08d}" in {path.name for path in (folder / "checkpoints").iterdir()}
    draw = random.Random(0)
    ends: list[tuple[int, int, float]] = []
    for _ in range(20):
        run, rank = Started(config, folder), draw.randrange(2)
        run.wait_for(step + draw.randint(1, 7))
        killed, start = run.rank(rank), time.monotonic()
        os.kill(killed, signal.SIGKILL)
        code, said = run.end()
        step = max(logged(folder))
        ends.append((rank, step, round(time.monotonic() - start, 1)))
        print(f"rank {rank} killed at step {step}: the end after {ends[-1][-1]} s", flush=True)
        assert code == 1 and ends[-1][-1] < 30 and step < config.steps, said
        assert f"rank {rank} (process {killed}) was ended by SIGKILL" in said and "Traceback" not in said
    record_property("rank, step and seconds until the end", ends)
    assert Started(config, folder).end()[0] == 0
    assert_same_weights(folder, tmp_path / "whole")


@LINUX
@pytest.mark.slow
def test_torchrun_starts_again_by_itself(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config(steps=100, log_every_steps=1, checkpoint_every_steps=3)
    folder = tmp_path / "run"
    run = Started(config, folder, (*TORCHRUN, "--max-restarts", "2"))
    for rank, step in enumerate((4, 20)):
        run.wait_for(step)
        os.kill(run.rank(rank), signal.SIGKILL)
    code, said = run.end()
    assert code == 0, said
    assert (folder / "events.log").read_text(encoding="utf-8").count("continuing from step") == 2
    assert Started(config, tmp_path / "whole").end()[0] == 0
    assert_same_weights(folder, tmp_path / "whole")


def test_mistakes_are_said_before_any_process_is_started(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for config, number, says in (
        (tiny_config(batch_size=15), "2", "batch_size: 15 samples cannot be shared equally by 2 processes"),
        (tiny_config(), "0", "processes: 0 is out of range"),
        (tiny_config(method="3t", third=()), "2", "needs a frozen tower"),
    ):
        words = command(config, tmp_path / "run", "--processes", number)
        with pytest.raises(SystemExit) as end:
            main(words[words.index("train") :])
        assert end.value.code == 2 and capsys.readouterr().err.count(says) == 1
