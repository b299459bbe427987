"""The contrastive losses of losses.py in O(N·D) memory: tile by tile, the gradients made on the way.

    loss = softmax_loss(a, b, scale)        # the number and all gradients of losses.softmax_loss

Legend: N samples, D width, R rows of one tile. l_ij = scale · a_i · b_j.

The positive pair stays out of the matrix products. With n_i = Σ_{j≠i} exp l_ij the loss of a row is
log(exp l_ii + n_i) − l_ii = softplus(log n_i − l_ii), exact however small it is, and columns likewise. Every l is at
most the scale, so with the shift m = max(scale − 60, 0) all exp(l − m) stay below e^60 and one exponential serves
rows and columns. A second sweep makes the gradient of the logits tile by tile, G = E ∘ (1/Z_i + 1/Z_j), and multiplies
it out at once. First sweep one product, second two, and one more for the tiles that were not kept. What has N elements
is fp64: it costs nothing, and a logarithm of a sum keeps its digits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BUDGET = 64 << 20
"""Bytes of exponentials kept for the second sweep by default; what does not fit is computed again."""

_LARGEST = 60.0  # sums of a million exp(60) are still far from fp32's end
_FLOOR = -87.0  # exp below this is denormal, on which CPUs are a hundred times slower
_SMALLEST = 1e-30  # a sum below it has lost terms to the floor
_TILE_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
_MIN_ROWS = 128


@dataclass(frozen=True)
class _Setting:
    """How a loss is cut up. ids: int64 [N] each; samples that share one are not each other's negatives."""

    ids: tuple[Tensor, ...]
    budget: int
    bf16: bool
    gradients: tuple[bool, ...]


def softmax_loss(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    ids: tuple[Tensor, ...] = (),
    *,
    budget: int = BUDGET,
    bf16: bool = False,
) -> Tensor:
    """Symmetric contrastive loss of unit vectors a, b [N, D], as losses.softmax_loss; once differentiable.

    ids: int64 [N] each, as for losses.duplicate_mask. budget: bytes of tiles that may be kept. bf16: multiply in
    bf16 and add in fp32, with the positive pairs in fp32 all the same.
    """
    return _apply(_softmax, ids, budget, bf16, a.float(), b.float(), scale.float())


def sigmoid_loss(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, ids: tuple[Tensor, ...] = (), *, budget: int = BUDGET,
    bf16: bool = False,
) -> Tensor:  # fmt: skip
    """SigLIP's loss of unit vectors a, b [N, D], as losses.sigmoid_loss; one sweep, so nothing is kept."""
    return _apply(_sigmoid, ids, budget, bf16, a.float(), b.float(), scale.float(), bias.float())


def _apply(compute: Any, ids: tuple[Tensor, ...], budget: int, bf16: bool, *inputs: Tensor) -> Tensor:
    gradients = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in inputs)
    loss: Tensor = _Tiled.apply(compute, _Setting(ids, budget, bf16, gradients), *inputs)  # type: ignore[no-untyped-call]
    return loss


class _Tiled(torch.autograd.Function):
    """A loss whose gradients are known when its value is, so that nothing of size N × N outlives the forward."""

    @staticmethod
    def forward(ctx: Any, compute: Any, setting: _Setting, *inputs: Tensor) -> Tensor:
        with torch.autocast(inputs[0].device.type, enabled=False), _products(inputs[0].device, setting.bf16):
            loss, gradients = compute(setting, *inputs)
        ctx.save_for_backward(*gradients)
        assert isinstance(loss, Tensor)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if g is None else g * factor for g in ctx.saved_tensors)


Gradients = list[Tensor | None]


def _softmax(setting: _Setting, a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Gradients]:
    num = len(a)
    positive = (scale * (a * b).sum(dim=1)).double()
    shift = (scale - _LARGEST).clamp(min=0.0)  # none where none is needed: it costs digits
    row, column = torch.zeros_like(positive), torch.zeros_like(positive)
    kept: dict[int, Tensor] = {}
    left = setting.budget if any(setting.gradients) else 0
    for rows in _tiles(num, a.device):
        tile = _exponentials(setting, a, b, scale, shift, rows)
        row[rows] = tile.sum(dim=1).double()
        column += tile.sum(dim=0)
        if tile.nbytes <= left:
            kept[rows.start], left = tile, left - tile.nbytes
    # waits for the device; with a scale up to 64 it never holds
    underflown = bool((torch.minimum(row.min(), column.min()) < _SMALLEST).item())
    if underflown:
        kept.clear()
        log_row, log_column = _log_sums(setting, a, b, scale)
    else:
        log_row, log_column = row.log() + shift, column.log() + shift
    loss = 0.5 * (F.softplus(log_row - positive) + F.softplus(log_column - positive)).mean().float()
    if not any(setting.gradients):
        return loss, [None, None, None]

    pull = -(torch.sigmoid(log_row - positive) + torch.sigmoid(log_column - positive)).float() / (2 * num)
    log_row, log_column = torch.logaddexp(positive, log_row), torch.logaddexp(positive, log_column)  # log Z
    row, column = ((shift - z).exp().float() / (2 * num) for z in (log_row, log_column))
    log_row, log_column = log_row.float(), log_column.float()

    def logit_gradient(rows: slice) -> Tensor:
        if underflown:
            logits = _logits(setting, a, b, scale, rows)
            gradient = (logits - log_row[rows, None]).exp_().add_((logits - log_column).exp_()).div_(2 * num)
            return _without_own(setting, gradient, rows, 0.0)
        tile = kept.pop(rows.start, None)
        if tile is None:
            tile = _exponentials(setting, a, b, scale, shift, rows)
        # what is below the threshold is nothing beside the rest, but denormal
        return F.threshold(tile.mul_(row[rows, None] + column), _SMALLEST, 0.0, inplace=True)

    return loss, _multiplied_out(setting, a, b, scale, pull, logit_gradient)


def _sigmoid(
    setting: _Setting, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, Gradients]:
    num = len(a)
    positive = scale * (a * b).sum(dim=1) + bias
    total = F.softplus(-positive).sum(dtype=torch.float64)
    pull = -torch.sigmoid(-positive) / num
    push = a.new_zeros((), dtype=torch.float64)

    def logit_gradient(rows: slice) -> Tensor:
        nonlocal total, push
        logits = _without_own(setting, _logits(setting, a, b, scale, rows).add_(bias), rows, float("-inf"))
        total = total + F.softplus(logits).sum(dtype=torch.float64)
        gradient = logits.sigmoid_().div_(num)
        push = push + gradient.sum(dtype=torch.float64)
        return F.threshold(gradient, _SMALLEST, 0.0, inplace=True)

    if any(setting.gradients):
        gradients = _multiplied_out(setting, a, b, scale, pull, logit_gradient)
        gradients.append((push + pull.sum(dtype=torch.float64)).to(bias.dtype).reshape(bias.shape))
    else:
        gradients = [None, None, None, None]
        for rows in _tiles(num, a.device):
            logit_gradient(rows)
    return (total / num).to(a.dtype), gradients


def _multiplied_out(
    setting: _Setting, a: Tensor, b: Tensor, scale: Tensor, pull: Tensor, logit_gradient: Any
) -> Gradients:
    """Gradients of a, b and the scale from those of the logits.

    pull: [N], of the positive logits. logit_gradient: rows → [R, N], of the others, 0 on the diagonal.
    """
    for_a, for_b, for_scale = setting.gradients[:3]
    for_a |= for_scale and not for_b  # ⟨dL/da, a⟩ is the scale's gradient too
    da, db = (pull[:, None] * b if for_a else None), (pull[:, None] * a if for_b else None)
    for rows in _tiles(len(a), a.device):
        gradient = logit_gradient(rows)
        if da is not None:
            da[rows] += _product(gradient, b, setting)
        if db is not None:
            db += _product(gradient.T, a[rows], setting)
    along = (da * a).sum(dtype=torch.float64) if da is not None else (db * b).sum(dtype=torch.float64)  # type: ignore[operator]
    return [
        da.mul_(scale) if da is not None and setting.gradients[0] else None,
        db.mul_(scale) if db is not None else None,
        along.to(scale.dtype).reshape(scale.shape) if for_scale else None,
    ]


def _tiles(num: int, device: torch.device) -> Iterator[slice]:
    rows = max(_MIN_ROWS, _TILE_BYTES[device.type] // (4 * num))
    for start in range(0, num, rows):
        yield slice(start, min(start + rows, num))


def _logits(setting: _Setting, a: Tensor, b: Tensor, scale: Tensor, rows: slice) -> Tensor:
    return _product(a[rows] * scale, b.T, setting)


def _exponentials(
    setting: _Setting, a: Tensor, b: Tensor, scale: Tensor, shift: Tensor, rows: slice
) -> Tensor:
    """exp(l − shift) [R, N] of a tile, 0 where a pair is not negative."""
    tile = _logits(setting, a, b, scale, rows).sub_(shift).clamp_(min=_FLOOR).exp_()
    return _without_own(setting, tile, rows, 0.0)


def _without_own(setting: _Setting, tile: Tensor, rows: slice, value: float) -> Tensor:
    """The tile with `value` for each sample's own partner, and for those that share an id with it."""
    tile.diagonal(rows.start).fill_(value)
    for ids in setting.ids:
        tile.masked_fill_(ids[rows, None] == ids, value)
    return tile


def _log_sums(setting: _Setting, a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ exp l over each row's and column's negatives by running maxima: slower, and safe at any scale."""
    row = torch.empty(len(a), dtype=torch.float64, device=a.device)
    column = torch.full_like(row, float("-inf"))
    for rows in _tiles(len(a), a.device):
        tile = _without_own(setting, _logits(setting, a, b, scale, rows), rows, float("-inf"))
        row[rows] = tile.logsumexp(dim=1).double()
        column = torch.logaddexp(column, tile.logsumexp(dim=0).double())
    return row, column


def _product(x: Tensor, y: Tensor, setting: _Setting) -> Tensor:
    if setting.bf16 and x.is_cuda:
        return torch.mm(x.bfloat16(), y.bfloat16(), out_dtype=torch.float32)
    return x @ y


@contextmanager
def _products(device: torch.device, bf16: bool) -> Iterator[None]:
    """Full fp32 products, or on CPUs those that round their inputs to bf16; the caller's setting is put back.

    torch's setting is global, and a caller who uses its newer form leaves the older one unreadable.
    """
    if device.type != "cpu" or not bf16:
        yield
        return
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before
