"""The cost model of docs/cost.py against steps that are really taken: bytes, operations and memory."""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kit.processes import Processes as Group
from kit.processes import Traffic
from kit.processes import processes as group_of
from threetowers.config import InputConfig, ObjectiveConfig, PairConfig, RunConfig
from threetowers.data.loader import Batch
from threetowers.data.transforms import ImageSpec
from threetowers.model import build
from threetowers.objective.pairs import tower_of
from threetowers.processes import Processes
from threetowers.towers.frozen.base import FrozenTower
from threetowers.train.step import TrainingStep

sys.path.append(str(Path(__file__).parents[1] / "docs"))
import cost

WIDTH = 40  # of the frozen tower's features
PAIR = PairConfig(
    embed_dim=24,
    vision={"timm_model_name": "test_convnext2", "timm_pool": "", "image_size": 32},
    text={"context_length": 16, "width": 32, "heads": 2, "layers": 1},
    tokenizer="trained",
    vocab_size=300,
)
THREE = RunConfig(method="3t", third=("timm:x",), pair=PAIR, batch_size=16)
CASES: dict[str, RunConfig] = {
    "baseline": replace(THREE, method="baseline", third=()),
    "3t": THREE,
    "3t, duplicates masked": replace(THREE, inputs=InputConfig(mask_duplicates=True)),
    "3t sigmoid": replace(THREE, objective=ObjectiveConfig(kind="sigmoid")),
    "3t, heads on one side": replace(THREE, objective=ObjectiveConfig(heads="main")),
    "two thirds": replace(THREE, third=("a=timm:x", "b=timm:x")),
    "regression": replace(THREE, method="3t-regression"),
}
LARGE = replace(
    THREE,
    batch_size=128,
    pair=PairConfig(
        embed_dim=64,
        vision={"layers": 6, "width": 128, "head_width": 32, "patch_size": 8, "image_size": 64},
        text={"context_length": 32, "width": 128, "heads": 4, "layers": 4},
        tokenizer="trained",
        vocab_size=300,
    ),
)
BAND = (0.7, 1.3)
"""The model's memory divided by what is measured. What an allocator keeps, and what exists for a moment in the
optimiser and between two layers, is not modelled."""


def resident(name: str) -> int:
    """Bytes of this process by the kernel's count: VmRSS at present, VmHWM at most."""
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def product(total: Any, a: Any, b: Any, **options: Any) -> int:
    """Operations of total += a @ b in place, by shapes; torch's counter does not know it."""
    return 2 * int(a[0]) * int(a[1]) * int(b[1])


def stepped(config: RunConfig) -> dict[str, Any]:
    """What a process sends, computes and takes in a real step."""
    rank, size = dist.get_rank(), dist.get_world_size()
    before = resident("VmRSS")
    spec, width = ImageSpec(32, (0.5,) * 3, (0.5,) * 3), config.pair.embed_dim
    if config.objective.heads != "main":
        width = WIDTH
    thirds = {name: FrozenTower(name, "x", nn.Identity(), width, spec) for name in config.thirds()}
    model, _ = build(config, thirds, {"vocab_size": 300, "pool_type": "argmax"})
    own, side = config.batch_size // size, model.image.size
    ids = torch.arange(own) + own * rank
    context = int(model.txt.context_length)  # type: ignore[arg-type]
    tokens = torch.randint(1, 299, (own, context))
    tokens[:, -1] = 299
    heads = {name: 2 * cast(nn.Linear, head).weight.numel() for name, head in model.heads.items()}
    batch = Batch(
        ids, tokens, torch.randint(0, 256, (own, 3, side, side), dtype=torch.uint8),
        {name: torch.randn(own, width).half() for name in thirds}, {}, ids, ids.clone(),
    )  # fmt: skip
    take_step = TrainingStep(
        config,
        model,
        torch.device("cpu"),
        lambda batch: batch.third_features,
        processes=Processes(rank, size),
    )
    with (
        Traffic() as traffic,
        FlopCounterMode(display=False) as operations,
        sdpa_kernel(SDPBackend.MATH),  # the counter knows no fused attention on CPUs
    ):
        take_step(batch, 1e-3)
    feats = take_step.features(batch)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product}) as of_loss:
        take_step.loss(feats, batch)
    del feats
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what there is at present
    take_step(batch, 1e-3)
    return {
        "sent": traffic.seen,
        "operations": operations.get_total_flops(),
        "loss": of_loss.get_total_flops()
        - sum(
            each * (own if tower_of(name) in ("img", "txt") else own * size) for name, each in heads.items()
        ),
        "memory": resident("VmHWM") - before,
    }


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with group_of(2, tmp_path_factory.mktemp("group")) as started:
        yield started


def modelled(config: RunConfig) -> Any:
    return cost.counted(config, config.pair.embed_dim if config.objective.heads == "main" else WIDTH)


NAMES = {
    "all_gather": "_allgather_base_",
    "all_reduce": "allreduce_",
    "reduce_scatter": "_reduce_scatter_base_",
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_and_products_of_the_loss_are_those_of_a_step(name: str, group: Group) -> None:
    config = CASES[name]
    model = modelled(config)
    expected = [(NAMES[each.name], each.given) for each in cost.collectives(config, model, 2, bf16=False)]
    for found in group.run(stepped, config):
        assert found["sent"] == expected
        assert found["loss"] == cost.loss_operations(config, model, 2, bf16=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's counts")
def test_memory_and_operations_are_those_of_a_step(tmp_path: Path) -> None:
    model = modelled(LARGE)
    operations = 64 * (cost.PASSES * (model.image + model.text) + model.heads)
    operations += 128 * model.third_heads + cost.loss_operations(LARGE, model, 2, bf16=False)
    expected = sum(cost.memory(LARGE, model, 2, bf16=False).values())
    assert expected > 200e6
    with group_of(2, tmp_path) as group:  # new processes, whose memory nobody has used
        for found in group.run(stepped, LARGE):
            print(f"model {expected / 1e6:.0f} MB, measured {found['memory'] / 1e6:.0f} MB")
            assert found["operations"] == pytest.approx(operations, rel=0.02)
            assert BAND[0] < expected / found["memory"] < BAND[1]
