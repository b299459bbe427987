"""The loss across processes against one process that has the samples of all: values, gradients, traffic, errors."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kit.processes import Processes, Traffic, processes
from kit.towers import EmbeddingTower
from threetowers.config import ObjectiveConfig
from threetowers.data.transforms import ImageSpec
from threetowers.model import ThreeTowers
from threetowers.objective import losses, sharded, tiled
from threetowers.objective.kinds import LOSSES, Compared, LossKind
from threetowers.objective.pairs import Kind, Objective, baseline, regression, three_towers
from threetowers.processes import ALONE
from threetowers.processes import Processes as Group

SPEC = ImageSpec(8, (0.5,) * 3, (0.5,) * 3)
Result = tuple[Tensor, Tensor, dict[str, Tensor]]


@pytest.fixture(scope="module", params=[1, 2, 4])
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with processes(request.param, tmp_path_factory.mktemp("group")) as started:
        yield started


def whole_loss(row: Compared) -> Tensor:
    """A contrastive kind that `sharded` knows nothing about, with a scale, a bias and both directions apart."""
    logits = row.scale * row.a @ row.b.T + cast(Tensor, row.bias)
    return (logits.logsumexp(dim=1) - logits.diagonal()).mean() + 0.3 * logits.square().amax(dim=0).mean()


@dataclass(frozen=True)
class Case:
    """A model, its batch, and how the loss is cut up.

    size: samples of each process. stored: the dtype of the third towers' features. tile, budget: of `tiled`.
    """

    table: Objective
    thirds: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    size: int = 5
    width: int = 7
    weights: tuple[float, ...] | None = None
    masked: bool = False
    bf16: bool = False
    stored: torch.dtype = torch.float32
    tile: tuple[int, int] = (512, 1024)
    budget: int = tiled.BUDGET
    trained: bool = True

    def model(self) -> ThreeTowers:
        torch.manual_seed(0)
        image = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, self.width))
        options = ObjectiveConfig(**{"init_bias": -2.0, **self.options})
        lit = self.table.image == "third"
        model = ThreeTowers(
            self.table,
            None if lit else image,
            EmbeddingTower(self.width),
            self.width,
            self.thirds,
            options,
            SPEC,
            0,
        )
        with torch.no_grad():  # rows apart from each other, where each has its own
            model.log_scale.add_(0.1 * torch.arange(len(model.log_scale)))
            if model.bias is not None:
                model.bias.add_(0.1 * torch.arange(len(model.bias)))
            model.third_norms.mul_(0.3)
        return model

    def loss(self, world: int, rank: int | None) -> Any:
        """The model, the loss and each row's own: of a rank, or in one process of all samples."""
        num = world * self.size
        own = slice(0, num) if rank is None else slice(rank * self.size, (rank + 1) * self.size)
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randint(0, 256, (num, 3, 8, 8), dtype=torch.uint8, generator=generator)
        tokens = torch.randint(0, 30, (num, 4), generator=generator)
        thirds = {
            name: (3 * torch.randn(num, width, generator=generator)).to(self.stored)
            for name, width in self.thirds.items()
        }
        ids = tuple(torch.arange(num) % k + (1 << 40) for k in (3, max(2, num - 1))) if self.masked else ()
        model, local = self.model(), tuple(values[own] for values in ids)
        own_thirds = {name: value[own] for name, value in thirds.items()}
        feats = model.features(pixels=pixels[own], tokens=tokens[own], thirds=own_thirds)
        weights = self.weights or self.table.weights(0)
        group = ALONE if rank is None else Group(rank, world)
        bf16 = self.bf16 and rank is not None
        total, rows = model.loss(feats, local, weights=weights, bf16=bf16, processes=group)
        values = torch.stack(list(rows.values()))
        return model, total, values.detach() if group.size == 1 else values


def cut_up(case: Case) -> ExitStack:
    """The tiles and the budget of a case, and the kind of a row of its own, for the length of the block."""
    stack = ExitStack()
    options: dict[str, Any] = {
        "_TILE": {"cpu": case.tile},
        "BUDGET": case.budget,
        "_bf16_product": rounded_product,
    }
    stack.enter_context(mock.patch.multiple(tiled, **options))
    stack.enter_context(mock.patch.dict(LOSSES, {"whole": LossKind(whole_loss, contrastive=True, bias=True)}))
    return stack


def of_rank(case: Case) -> Result:
    """The loss in one of several processes, and the sum of the gradients of all."""
    with cut_up(case), torch.set_grad_enabled(case.trained):
        model, total, rows = case.loss(dist.get_world_size(), dist.get_rank())
    assert not rows.requires_grad and total.requires_grad == case.trained
    if case.trained:
        (3.0 * total).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad
            dist.all_reduce(gradients[name])
    return total.detach(), rows, gradients


def of_one(case: Case, world: int) -> Result:
    with cut_up(case):
        model, total, rows = case.loss(world, None)
        (3.0 * total).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return total.detach(), rows, gradients


def assert_equal(found: Result, expected: Result) -> None:
    """To 1e-5 of the norm of each."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-7)
    assert set(found[2]) == set(expected[2])
    for name, gradient in expected[2].items():
        difference, norm = (found[2][name] - gradient).norm(), gradient.norm()
        assert difference <= 1e-5 * norm + 1e-7, (name, float(difference), float(norm))


ONE, TWO = {"third": 6}, {"third_a": 6, "third_b": 9}
LIT = Objective(baseline(), image="third")
SIGMOID = Objective(three_towers(["third"], kind="sigmoid"))
PER_ROW = {"scale": "per-row"}
CASES = {
    "baseline": Case(Objective(baseline())),
    "baseline, wide and odd": Case(Objective(baseline()), width=33, size=7),
    "baseline, one sample": Case(Objective(baseline()), size=1),
    "3t": Case(Objective(three_towers(["third"])), ONE),
    "3t, one sample": Case(Objective(three_towers(["third"])), ONE, size=1),
    "3t, tiles of uneven ends": Case(Objective(three_towers(["third"])), ONE, tile=(3, 4), budget=700),
    "3t, no tile kept": Case(Objective(three_towers(["third"])), ONE, tile=(2, 3), budget=0),
    "3t, scale of each row": Case(Objective(three_towers(["third"])), ONE, PER_ROW),
    "3t, scale at its maximum": Case(Objective(three_towers(["third"])), ONE, {"init_scale": 100.0}),
    "3t, weights of a step": Case(Objective(three_towers(["third"])), ONE, weights=(0.5, 0.1, 0.7)),
    "3t, a row without weight": Case(Objective(three_towers(["third"])), ONE, weights=(0.5, 0.0, 0.5)),
    "3t, features in half precision": Case(
        Objective(three_towers(["third"])), ONE, size=3, stored=torch.float16
    ),
    "3t, duplicates": Case(Objective(three_towers(["third"])), ONE, masked=True),
    "3t, duplicates in tiles": Case(
        Objective(three_towers(["third"])), ONE, masked=True, tile=(3, 4), budget=700
    ),
    "3t, no heads on the main towers": Case(Objective(three_towers(["third"], heads="third")), ONE),
    "3t, no heads on the third tower": Case(Objective(three_towers(["third"], heads="main")), {"third": 7}),
    "two third towers": Case(Objective(three_towers(["third_a", "third_b"])), TWO),
    "lit": Case(LIT, ONE),
    "lit without projection": Case(LIT, ONE, {"lit_projection": False}, width=6),
    "cosine": Case(Objective(regression(["third"])), ONE),
    "mse": Case(Objective(regression(["third"], kind="mse")), ONE, masked=True),
    "regression alone": Case(Objective(regression(["third"])[1:]), ONE),
    "sigmoid": Case(Objective(baseline("sigmoid"))),
    "sigmoid 3t": Case(SIGMOID, ONE, PER_ROW),
    "sigmoid 3t, duplicates in tiles": Case(SIGMOID, ONE, masked=True, tile=(3, 4), budget=700),
    "sigmoid, a row without weight": Case(SIGMOID, ONE, weights=(1.0, 0.0, 0.0)),
    "sigmoid and regression": Case(Objective(regression(["third"], kind="mse", pair_kind="sigmoid")), ONE),
    "a kind of one's own": Case(Objective(three_towers(["third"], kind=cast(Kind, "whole"))), ONE, PER_ROW),
}


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_processes_is_one_process(name: str, group: Processes) -> None:
    """Values and gradients of all parameters: towers, heads, scales, biases. All ranks have the same values."""
    case = CASES[name]
    results = group.run(of_rank, case)
    expected = of_one(case, len(results))
    assert "log_scale" in expected[2] or name == "regression alone"
    for result in results:
        assert_equal(result, expected)


def test_without_gradients_the_values_are_the_same(group: Processes) -> None:
    for table in (three_towers(["third"]), three_towers(["third"], kind="sigmoid")):
        results = group.run(of_rank, Case(Objective(table), ONE, trained=False))
        total, rows, _ = of_one(Case(Objective(table), ONE), len(results))
        assert_equal(results[-1], (total, rows, {}))


def rounded_product(x: Tensor, y: Tensor) -> Tensor:
    return x.float() @ y.float()


def on_views(a: Tensor, b: Tensor, scale: float, bf16: bool = False) -> list[Tensor]:
    """Loss, and gradients of this rank's samples and of the scale, as one process has them."""
    world, rank = dist.get_world_size(), dist.get_rank()
    own = slice(rank * len(a) // world, (rank + 1) * len(a) // world)
    leaves = [a[own].clone(), b[own].clone(), torch.tensor(scale)]
    for leaf in leaves:
        leaf.requires_grad_()
    row = Compared(leaves[0], leaves[1], leaves[2], bf16=bf16)
    with mock.patch.multiple(tiled, _bf16_product=rounded_product, _TILE={"cpu": (3, 5)}), Traffic() as sent:
        total, _ = sharded.loss([("softmax", row)], [1.0], Group(rank, world))
    if world > 1:
        assert sent.seen[0] == ("_allgather_base_", leaves[1].numel() * (2 if bf16 else 4))
    total.backward()
    gradients = [cast(Tensor, leaf.grad) for leaf in leaves]
    dist.all_reduce(gradients[2])
    return [total.detach(), *gradients]


def truth(a: Tensor, b: Tensor, scale: float) -> list[Tensor]:
    """The same in fp64, from the written formula."""
    leaves = [value.double().requires_grad_() for value in (a, b, torch.tensor(scale))]
    logits = leaves[2] * leaves[0] @ leaves[1].T
    positive = logits.diagonal()
    total = 0.5 * ((logits.logsumexp(1) - positive).mean() + (logits.logsumexp(0) - positive).mean())
    return [total.detach(), *torch.autograd.grad(total, leaves)]


def joined(results: Sequence[list[Tensor]]) -> list[Tensor]:
    total, _, _, scale = results[0]
    return [total, torch.cat([r[1] for r in results]), torch.cat([r[2] for r in results]), scale]


def noisy(num: int, width: int, noise: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num)
    a = torch.randn(num, width, generator=generator)
    return losses.unit(a), losses.unit(a + noise * torch.randn(num, width, generator=generator))


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
@pytest.mark.parametrize("noise", [0.3, 5.0])
def test_views_and_scale_against_fp64(scale: float, noise: float, group: Processes) -> None:
    a, b = noisy(28, 24, noise)
    found, expected = joined(group.run(on_views, a, b, scale)), truth(a, b, scale)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 2e-5 * other.norm() + 1e-7


def test_sums_that_underflow_everywhere_or_in_one_process_fall_back_together(group: Processes) -> None:
    """At scale 100 a negative at cosine −1 is nothing after the shift, and yet the whole sum of its row."""
    a, b = (losses.unit(torch.eye(24)[0] + 0.05 * x) for x in noisy(8, 24, 5.0))
    sign = torch.ones(8, 1)
    sign[0] = -1
    for left, right in (
        (a, -b),
        (sign * a, sign * b),
    ):  # lost are all rows and columns, and those of one sample
        found, expected = joined(group.run(on_views, left, right, 100.0)), truth(left, right, 100.0)
        for one, other in zip(found, expected, strict=True):
            # logits near −100 are off by 1e-5 in fp32, and gradients are differences of vectors that are almost equal
            assert (one - other).norm() <= 5e-4 * other.norm() + 1e-5


def test_bf16_products_are_the_truth_to_their_rounding(group: Processes) -> None:
    """The arithmetic of the CUDA path: CPUs have no such product, so it is made of the same rounded inputs."""
    a, b = noisy(28, 64, 1.0)
    found, expected = joined(group.run(on_views, a, b, 30.0, True)), truth(a, b, 30.0)
    bound = 0.01 + 2 * 30.0 * 2**-8 / math.sqrt(64)
    for one, other in zip(found[:3], expected, strict=False):
        assert (one - other).norm() <= bound * other.norm()


def test_views_of_frozen_features_in_bf16_are_those_of_one_process_to_their_rounding(
    group: Processes,
) -> None:
    case = Case(Objective(three_towers(["third"])), {"third": 48}, width=64, size=6, bf16=True)
    results = group.run(of_rank, case)
    total, rows, gradients = of_one(case, len(results))
    for result in results:
        torch.testing.assert_close(result[1], rows, rtol=0.02, atol=0.01)
        assert abs(float(result[0] - total)) <= 0.01 * float(total)
        for name, gradient in gradients.items():
            assert (result[2][name] - gradient).norm() <= 0.05 * gradient.norm(), name


def traffic(case: Case) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """What a rank's loss sends forward, and what its backward does."""
    with Traffic() as forward:
        total = case.loss(dist.get_world_size(), dist.get_rank())[1]
    with Traffic() as backward:
        total.backward()
    return forward.seen, backward.seen


@pytest.mark.parametrize(
    ("name", "gathered", "scattered", "per_sample", "scalars"),
    [
        ("baseline", 4 * 7, 7, 3, 0),
        ("3t", 4 * (7 + 6), 7, 9, 0),
        ("3t, features in half precision", 4 * 7 + 2 * 6, 7, 9, 0),
        ("3t, duplicates", 4 * (7 + 6) + 2 * 8, 7, 9, 0),
        ("3t, no heads on the main towers", 4 * (7 + 6), 7, 9, 0),
        ("3t, no heads on the third tower", 4 * (7 + 7), 7, 9, 0),
        ("two third towers", 4 * (7 + 6 + 9), 7, 15, 0),
        ("lit", 4 * 6, 0, 3, 0),
        ("lit without projection", 4 * 6, 0, 3, 0),
        ("cosine", 4 * 7, 7, 3, 2),
        ("sigmoid 3t", 4 * (7 + 6), 7, 0, 3),
    ],
)  # fmt: skip
def test_collectives_and_bytes(
    name: str, gathered: int, scattered: int, per_sample: int, scalars: int, group: Processes
) -> None:
    """The texts travel once each way, the third towers' features once, and nothing in the backward.

    gathered: bytes of a sample. scattered: width of the gradients. per_sample, scalars: numbers that are added.
    """
    case, world = CASES[name], len(group.pipes)
    expected = [
        ("_allgather_base_", case.size * gathered),
        ("allreduce_", 8 * (per_sample * case.size * world + scalars)),
        ("_reduce_scatter_base_", 4 * case.size * world * scattered),
    ]
    for forward, backward in group.run(traffic, case):
        assert not backward
        assert forward == ([] if world == 1 else expected if scattered else expected[:2])
