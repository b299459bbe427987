"""The tiled losses against fp64 references: values, gradients and memory."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from threetowers.objective import losses, tiled

SIZES = st.sampled_from([1, 2, 3, 7, 31, 127, 128, 129, 257])
SCALES = st.sampled_from([1.0, 10.0, 30.0, 100.0])


def problem(num: int, width: int, seed: int, noise: float) -> tuple[Tensor, Tensor]:
    """Unit vectors and noisy copies of them: the less noise, the smaller the loss."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(num, width, generator=generator, dtype=torch.float64)
    b = a + noise * torch.randn(num, width, generator=generator, dtype=torch.float64)
    return tuple(x / x.norm(dim=1, keepdim=True) for x in (a, b))  # type: ignore[return-value]


def reference_softmax(a: Tensor, b: Tensor, scale: Tensor, negatives: Tensor | None) -> Tensor:
    """losses.softmax_loss in the inputs' own precision, so that fp64 gives the truth."""
    logits = scale * a @ b.T
    if negatives is not None:
        keep = negatives | torch.eye(len(a), dtype=torch.bool)
        logits = logits.masked_fill(~keep, float("-inf"))
    positive = logits.diagonal()
    return 0.5 * ((logits.logsumexp(1) - positive).mean() + (logits.logsumexp(0) - positive).mean())


def gradients(loss: Callable[..., Tensor], *values: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [value.clone().requires_grad_() for value in values]
    result = loss(*leaves)
    (3.0 * result).backward()
    return result.detach(), [leaf.grad for leaf in leaves]  # type: ignore[misc]


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm().clamp_min(1e-12))


def small_tiles(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(tiled, "_TILE", {"cpu": (rows, rows + 2)})


@pytest.mark.parametrize("rows", [1, 5, 64, 1000])
@pytest.mark.parametrize("budget", [0, 3000, 1 << 30])
def test_softmax_equals_the_reference_in_values_and_all_gradients(
    rows: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tiles(monkeypatch, rows)

    @given(num=SIZES, scale=SCALES, seed=st.integers(0, 99), noise=st.sampled_from([0.05, 0.5, 5.0]))
    @settings(deadline=None, max_examples=15)
    def check(num: int, scale: float, seed: int, noise: float) -> None:
        a, b = problem(num, 24, seed, noise)
        s = torch.tensor(scale, dtype=torch.float64)
        truth, expected = gradients(partial(reference_softmax, negatives=None), a, b, s)
        loss, found = gradients(partial(tiled.softmax_loss, budget=budget), a.float(), b.float(), s.float())
        assert float(loss) == pytest.approx(float(truth), rel=2e-5, abs=1e-9)
        if truth > 1e-4:  # below, fp32 inputs themselves are too coarse for a relative bound
            assert max(map(relative, found[:2], expected[:2])) < 2e-5
            # the scale's gradient is a difference of terms of size 1
            assert float(found[2]) == pytest.approx(float(expected[2]), rel=2e-5, abs=1e-6)

    check()


@pytest.mark.parametrize("rows", [3, 1000])
@given(num=SIZES, scale=SCALES, seed=st.integers(0, 99), groups=st.integers(1, 9))
@settings(deadline=None, max_examples=25)
def test_duplicates_are_masked_like_the_reference(
    rows: int, num: int, scale: float, seed: int, groups: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, rows)
        a, b = problem(num, 16, seed, 1.0)
        ids = torch.randint(0, groups, (num,), generator=torch.Generator().manual_seed(seed))
        own = torch.arange(num)
        s = torch.tensor(scale, dtype=torch.float64)
        reference = partial(reference_softmax, negatives=losses.duplicate_mask(ids, own))
        truth, expected = gradients(reference, a, b, s)
        loss, found = gradients(partial(tiled.softmax_loss, ids=(ids, own)), a.float(), b.float(), s.float())
        assert float(loss) == pytest.approx(float(truth), rel=2e-5, abs=1e-6)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-5 * max(1.0, scale / 10))


@pytest.mark.parametrize("rows", [3, 1000])
@given(
    num=SIZES,
    scale=SCALES,
    bias=st.sampled_from([-10.0, 0.0, 3.0]),
    seed=st.integers(0, 99),
    masked=st.booleans(),
)
@settings(deadline=None, max_examples=25)
def test_sigmoid_equals_the_reference(
    rows: int, num: int, scale: float, bias: float, seed: int, masked: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, rows)
        a, b = problem(num, 16, seed, 1.0)
        ids = (torch.arange(num) // 2,) if masked else ()
        s, c = (torch.tensor(value, dtype=torch.float64) for value in (scale, bias))

        def reference(a: Tensor, b: Tensor, s: Tensor, c: Tensor) -> Tensor:
            logits = s * a @ b.T + c
            sign = 2 * torch.eye(num, dtype=torch.float64) - 1
            terms = -torch.nn.functional.logsigmoid(sign * logits)
            if masked:
                terms = terms * (losses.duplicate_mask(*ids) | torch.eye(num, dtype=torch.bool))
            return terms.sum() / num

        truth, expected = gradients(reference, a, b, s, c)
        loss, found = gradients(partial(tiled.sigmoid_loss, ids=ids), *(x.float() for x in (a, b, s, c)))
        assert float(loss) == pytest.approx(float(truth), rel=2e-5, abs=1e-6)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-5 * max(1.0, scale / 10))


def test_sums_that_underflow_fall_back_to_running_maxima() -> None:
    """At scale 100 a negative at cosine −0.9 is e^−130 after the shift: nothing, and yet the whole sum."""
    direction = torch.eye(4, dtype=torch.float64)[0]
    tilt = 0.3 * torch.eye(4, dtype=torch.float64)[1:]
    a = torch.stack([direction + tilt[0], direction + tilt[1]])
    b = -torch.stack([direction + tilt[1], direction + tilt[2]])
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    s = torch.tensor(100.0, dtype=torch.float64)
    truth, expected = gradients(partial(reference_softmax, negatives=None), a, b, s)
    loss, found = gradients(tiled.softmax_loss, a.float(), b.float(), s.float())
    assert float(loss) == pytest.approx(float(truth), rel=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_a_tiny_loss_keeps_its_relative_precision() -> None:
    a, b = problem(64, 64, 0, 0.02)
    s = torch.tensor(20.0, dtype=torch.float64)
    truth, expected = gradients(partial(reference_softmax, negatives=None), a, b, s)
    loss, found = gradients(tiled.softmax_loss, a.float(), b.float(), s.float())
    assert 0 < float(truth) < 1e-4
    assert float(loss) == pytest.approx(float(truth), rel=1e-5)
    assert max(map(relative, found[:2], expected[:2])) < 1e-5
    assert float(found[2]) == pytest.approx(float(expected[2]), rel=1e-4)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_sides_that_need_no_gradient_get_none_and_change_nothing(frozen: tuple[int, ...]) -> None:
    a, b = (x.float() for x in problem(33, 8, 1, 1.0))
    values = [a, b, torch.tensor(10.0)]
    _, full = gradients(tiled.softmax_loss, *values)
    leaves = [value.clone().requires_grad_(place not in frozen) for place, value in enumerate(values)]
    loss = tiled.softmax_loss(leaves[0], leaves[1], leaves[2])
    assert loss.requires_grad == (len(frozen) < 3)
    if loss.requires_grad:
        (3.0 * loss).backward()
    for place, leaf in enumerate(leaves):
        if place in frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, full[place], rtol=1e-5, atol=1e-7)


def test_without_gradients_the_value_is_the_same() -> None:
    a, b = (x.float().requires_grad_() for x in problem(33, 8, 1, 1.0))
    scale = torch.tensor(10.0)
    with torch.no_grad():
        quiet = tiled.softmax_loss(a, b, scale)
    assert not quiet.requires_grad and torch.equal(quiet, tiled.softmax_loss(a, b, scale).detach())


def test_autocast_does_not_reach_the_logits() -> None:
    a, b = (x.float() for x in problem(64, 32, 3, 0.5))
    scale = torch.tensor(100.0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = tiled.softmax_loss(a, b, scale)
    assert torch.equal(inside, tiled.softmax_loss(a, b, scale))


class Watch(TorchDispatchMode):
    """Counts matrix products, and remembers the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        self.largest = max(self.largest, result.numel() if isinstance(result, Tensor) else 0)
        return result


@pytest.mark.parametrize(("budget", "sweeps"), [(0, 4), (1 << 30, 3)])
def test_nothing_larger_than_a_tile_or_the_inputs_is_made_and_kept_tiles_save_a_product(
    budget: int, sweeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tiles(monkeypatch, 16)
    a, b = (x.float().requires_grad_() for x in problem(512, 8, 0, 1.0))
    with Watch() as watch:
        tiled.softmax_loss(a, b, torch.tensor(10.0), budget=budget).backward()  # type: ignore[no-untyped-call]
    assert watch.largest == a.numel() < 512 * 512
    assert watch.products == sweeps * math.ceil(512 / 16) * math.ceil(512 / 18)


def bf16_bound(scale: float, width: int) -> float:
    """What rounding the unit vectors to bf16 may cost a gradient: each logit is off by about scale · 2⁻⁸ / √width."""
    return 0.01 + 2 * scale * 2**-8 / math.sqrt(width)


@given(num=SIZES, scale=SCALES, seed=st.integers(0, 99), noise=st.sampled_from([0.05, 0.5, 5.0]))
@settings(deadline=None, max_examples=25)
def test_bf16_products_are_the_reference_to_their_rounding(
    num: int, scale: float, seed: int, noise: float
) -> None:
    """The arithmetic of the CUDA path: CPUs have no such product, so it is made of the same rounded inputs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "_bf16_product", lambda x, y: x.float() @ y.float())
        small_tiles(patch, 31)
        a, b = problem(num, 64, seed, noise)
        s = torch.tensor(scale, dtype=torch.float64)
        truth, expected = gradients(partial(reference_softmax, negatives=None), a, b, s)
        _, found = gradients(partial(tiled.softmax_loss, bf16=True), a.float(), b.float(), s.float())
        if truth > 1e-4:
            assert max(map(relative, found[:2], expected[:2])) < bf16_bound(scale, 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has this product on CUDA alone")
def test_bf16_products_on_cuda_are_the_reference_to_their_rounding() -> None:
    a, b = problem(700, 64, 3, 0.5)
    s = torch.tensor(30.0, dtype=torch.float64)
    _, expected = gradients(partial(reference_softmax, negatives=None), a, b, s)
    loss = partial(tiled.softmax_loss, bf16=True)
    _, found = gradients(loss, a.float().cuda(), b.float().cuda(), s.float().cuda())
    assert max(map(relative, [x.cpu() for x in found[:2]], expected[:2])) < bf16_bound(30.0, 64)
