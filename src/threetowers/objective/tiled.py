"""The contrastive losses of losses.py in O(N·D) memory: tile by tile, the gradients made on the way.

    loss = softmax_loss(a, b, scale)        # the number and all gradients of losses.softmax_loss

Legend: N samples, D width, R × C the rows and columns of one tile. l_ij = scale · a_i · b_j.

The positive pair stays out of the matrix products. With n_i = Σ_{j≠i} exp l_ij the loss of a row is
log(exp l_ii + n_i) − l_ii = softplus(log n_i − l_ii), exact however small it is, and columns likewise. Every l is at
most the scale, so with the shift m = max(scale − 60, 0) all exp(l − m) stay below e^60 and one exponential serves
rows and columns. A second sweep makes the gradient of the logits tile by tile, G = E ∘ (1/Z_i + 1/Z_j), and multiplies
it out at once. First sweep one product, second two, and one more for the tiles that were not kept. What has N elements
is fp64: it costs nothing, and a logarithm of a sum keeps its digits.
"""

from collections.abc import Iterator
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
_TILE = {"cpu": (512, 1024), "cuda": (8192, 8192)}  # on a CPU a tile and its vectors stay in the cache
Tile = tuple[slice, slice]


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
    bf16 and add in fp32, with the positive pairs in fp32 all the same; on CUDA alone, where torch has such a product.
    A logit is then off by about scale · 2⁻⁸ / √D.
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
        with torch.autocast(inputs[0].device.type, enabled=False):
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
    kept: dict[tuple[int, int], Tensor] = {}
    left = setting.budget if any(setting.gradients) else 0
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    for at in _tiles(num, a.device):
        tile = _exponentials(setting, a, b, scale, shift, at)
        row[at[0]] += tile.sum(dim=1)
        column[at[1]] += tile.sum(dim=0)
        num_bytes = tile.numel() * dtype.itemsize
        if num_bytes <= left:
            kept[_key(at)], left = tile.to(dtype), left - num_bytes
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

    def logit_gradient(at: Tile) -> Tensor:
        rows, columns = at
        if underflown:
            logits = _logits(setting, a, b, scale, at)
            of_column = (logits - log_column[columns]).exp_()
            gradient = (logits - log_row[rows, None]).exp_().add_(of_column).div_(2 * num)
            return _without_own(setting, gradient, at, 0.0)
        tile = kept.pop(_key(at), None)
        if tile is None:
            tile = _exponentials(setting, a, b, scale, shift, at)
        # what is below the threshold is nothing beside the rest, but denormal
        return F.threshold(tile.mul_(row[rows, None] + column[columns]), _SMALLEST, 0.0, inplace=True)

    return loss, _multiplied_out(setting, a, b, scale, pull, logit_gradient)


def _sigmoid(
    setting: _Setting, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, Gradients]:
    num = len(a)
    positive = scale * (a * b).sum(dim=1) + bias
    total = F.softplus(-positive).sum(dtype=torch.float64)
    pull = -torch.sigmoid(-positive) / num
    push = a.new_zeros((), dtype=torch.float64)

    def logit_gradient(at: Tile) -> Tensor:
        nonlocal total, push
        logits = _without_own(setting, _logits(setting, a, b, scale, at).add_(bias), at, float("-inf"))
        total = total + F.softplus(logits).sum(dtype=torch.float64)
        gradient = logits.sigmoid_().div_(num)
        push = push + gradient.sum(dtype=torch.float64)
        return F.threshold(gradient, _SMALLEST, 0.0, inplace=True)

    if any(setting.gradients):
        gradients = _multiplied_out(setting, a, b, scale, pull, logit_gradient)
        gradients.append((push + pull.sum(dtype=torch.float64)).to(bias.dtype).reshape(bias.shape))
    else:
        gradients = [None, None, None, None]
        for at in _tiles(num, a.device):
            logit_gradient(at)
    return (total / num).to(a.dtype), gradients


def _multiplied_out(
    setting: _Setting, a: Tensor, b: Tensor, scale: Tensor, pull: Tensor, logit_gradient: Any
) -> Gradients:
    """Gradients of a, b and the scale from those of the logits.

    pull: [N], of the positive logits. logit_gradient: tile → [R, C], of the others, 0 on the diagonal.
    """
    for_a, for_b, for_scale = setting.gradients[:3]
    for_a |= for_scale and not for_b  # ⟨dL/da, a⟩ is the scale's gradient too
    da, db = (pull[:, None] * b if for_a else None), (pull[:, None] * a if for_b else None)
    x, y = (a.bfloat16(), b.bfloat16()) if setting.bf16 else (a, b)
    for rows, columns in _tiles(len(a), a.device):
        gradient = logit_gradient((rows, columns)).to(x.dtype)
        if da is not None:
            _add_product(da[rows], gradient, y[columns])
        if db is not None:
            _add_product(db[columns], gradient.T, x[rows])
    along = (da * a).sum(dtype=torch.float64) if da is not None else (db * b).sum(dtype=torch.float64)  # type: ignore[operator]
    return [
        da.mul_(scale) if da is not None and setting.gradients[0] else None,
        db.mul_(scale) if db is not None else None,
        along.to(scale.dtype).reshape(scale.shape) if for_scale else None,
    ]


def _tiles(num: int, device: torch.device) -> Iterator[Tile]:
    """The N × N logits, block by block."""
    num_rows, num_columns = _TILE[device.type]
    for top in range(0, num, num_rows):
        for left in range(0, num, num_columns):
            yield slice(top, min(top + num_rows, num)), slice(left, min(left + num_columns, num))


def _key(at: Tile) -> tuple[int, int]:
    return at[0].start, at[1].start


def _logits(setting: _Setting, a: Tensor, b: Tensor, scale: Tensor, at: Tile) -> Tensor:
    x, y = a[at[0]] * scale, b[at[1]].T
    if setting.bf16:
        return _bf16_product(x.bfloat16(), y.bfloat16())
    return x @ y


def _exponentials(setting: _Setting, a: Tensor, b: Tensor, scale: Tensor, shift: Tensor, at: Tile) -> Tensor:
    """exp(l − shift) [R, C] of a tile, 0 where a pair is not negative."""
    tile = _logits(setting, a, b, scale, at).sub_(shift).clamp_(min=_FLOOR).exp_()
    return _without_own(setting, tile, at, 0.0)


def _without_own(setting: _Setting, tile: Tensor, at: Tile, value: float) -> Tensor:
    """The tile with `value` for each sample's own partner, and for those that share an id with it."""
    rows, columns = at
    if rows.start < columns.stop and columns.start < rows.stop:
        tile.diagonal(rows.start - columns.start).fill_(value)
    for ids in setting.ids:
        tile.masked_fill_(ids[rows, None] == ids[columns], value)
    return tile


def _log_sums(setting: _Setting, a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ exp l over each row's and column's negatives by running maxima: slower, and safe at any scale."""
    row = torch.full((len(a),), float("-inf"), dtype=torch.float64, device=a.device)
    column = row.clone()
    for at in _tiles(len(a), a.device):
        tile = _without_own(setting, _logits(setting, a, b, scale, at), at, float("-inf"))
        for sums, part, dim in ((row, at[0], 1), (column, at[1], 0)):
            sums[part] = torch.logaddexp(sums[part], tile.logsumexp(dim=dim).double())
    return row, column


def _add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """total += x @ y in place; the sum over tiles is fp32 though x and y may be bf16."""
    if x.dtype == total.dtype:
        total.addmm_(x, y)
    else:
        total += _bf16_product(x, y)


def _bf16_product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y of bf16 matrices, added and returned in fp32; on CUDA alone."""
    return torch.mm(x, y, out_dtype=torch.float32)
