"""The contrastive losses of losses.py in O(N·D) memory: tile by tile, the gradients made on the way.

    loss = softmax_loss(a, b, scale)        # the number and all gradients of losses.softmax_loss

Legend: N samples, D width, R × C the rows and columns of one tile. l_ij = scale · a_i · b_j. Where several processes
share the batch, each has B of the N samples, and N is B in one process.

The positive pair stays out of the matrix products. With n_i = Σ_{j≠i} exp l_ij the loss of a row is
log(exp l_ii + n_i) − l_ii = softplus(log n_i − l_ii), exact however small it is, and columns likewise. Every l is at
most the scale, so with the shift m = max(scale − 60, 0) all exp(l − m) stay below e^60 and one exponential serves
rows and columns. A second sweep makes the gradient of the logits tile by tile, G = E ∘ (1/Z_i + 1/Z_j), and multiplies
it out at once. First sweep one product, second two, and one more for the tiles that were not kept. What has N elements
is fp64: it costs nothing, and a logarithm of a sum keeps its digits.

`softmax_share` and `sigmoid_share` compute what one process has of the loss: the logits [B, N] of its own a with all b.
They are generators. Where they need a sum over all processes they yield their part of it and are sent the sum, so that
`computed` can add up the parts of several rows at once (see `sharded`), and one process sends back what it was given.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
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
class Setting:
    """How a loss is cut up. ids: int64 [N] each; samples that share one are not each other's negatives.

    gradients: which inputs need one. rank, processes: which B of the N samples are those of this process.
    """

    ids: tuple[Tensor, ...]
    budget: int
    bf16: bool
    gradients: tuple[bool, ...]
    rank: int = 0
    processes: int = 1

    def own(self, num: int) -> slice:
        """The places of this process's samples among `num`."""
        return slice(self.rank * num // self.processes, (self.rank + 1) * num // self.processes)


Gradients = list[Tensor | None]
Share = Generator[Tensor, Tensor, tuple[Tensor, Gradients]]
"""Yields parts of sums, is sent the sums, and returns the loss of all N samples and the gradients of this process."""


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
    return _apply(softmax_share, ids, budget, bf16, a.float(), b.float(), scale.float())


def sigmoid_loss(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, ids: tuple[Tensor, ...] = (), *, budget: int = BUDGET,
    bf16: bool = False,
) -> Tensor:  # fmt: skip
    """SigLIP's loss of unit vectors a, b [N, D], as losses.sigmoid_loss; one sweep, so nothing is kept."""
    return _apply(sigmoid_share, ids, budget, bf16, a.float(), b.float(), scale.float(), bias.float())


def _apply(compute: Any, ids: tuple[Tensor, ...], budget: int, bf16: bool, *inputs: Tensor) -> Tensor:
    gradients = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in inputs)
    loss: Tensor = _Tiled.apply(compute, Setting(ids, budget, bf16, gradients), *inputs)  # type: ignore[no-untyped-call]
    return loss


class _Tiled(torch.autograd.Function):
    """A loss whose gradients are known when its value is, so that nothing of size N × N outlives the forward."""

    @staticmethod
    def forward(ctx: Any, share: Any, setting: Setting, *inputs: Tensor) -> Tensor:
        a, b, *scalars = inputs
        with torch.autocast(a.device.type, enabled=False):
            ((loss, gradients),) = computed([share(setting, a, b, b, *scalars)], add=lambda part: part)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if g is None else g * factor for g in ctx.saved_tensors)


def computed(shares: Sequence[Share], add: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Gradients]]:
    """What the shares return. add: the sum over the processes of a vector; called once a round for all shares."""
    results: dict[Share, tuple[Tensor, Gradients]] = {}
    sums: dict[Share, Tensor | None] = dict.fromkeys(shares)
    while sums:
        parts = {}
        for share, total in sums.items():
            try:
                parts[share] = share.send(total)  # type: ignore[arg-type]  # None starts it
            except StopIteration as end:
                results[share] = end.value
        sizes = [len(part) for part in parts.values()]
        sums = (
            dict(zip(parts, add(torch.cat(list(parts.values()))).split(sizes), strict=True)) if parts else {}
        )
    return [results[share] for share in shares]


def softmax_share(setting: Setting, a: Tensor, b: Tensor, y: Tensor, scale: Tensor) -> Share:
    """The softmax loss of the logits of a, b [B, D] with all y [N, D], of which b are the own ones.

    The gradients are those of a, y and the scale, as far as these logits know them: their sum over the processes is
    the whole one.
    """
    num, own = len(y), setting.own(len(y))
    positive = a.new_zeros(num, dtype=torch.float64)
    positive[own] = scale * (a * b).sum(dim=1)
    shift = (scale - _LARGEST).clamp(min=0.0)  # none where none is needed: it costs digits
    row, column = torch.zeros_like(positive), torch.zeros_like(positive)
    kept: dict[tuple[int, int], Tensor] = {}
    left = setting.budget if any(setting.gradients) else 0
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    for at in _tiles(len(a), num, a.device):
        tile = _exponentials(setting, a, y, scale, shift, at)
        row[own][at[0]] += tile.sum(dim=1)
        column[at[1]] += tile.sum(dim=0)
        num_bytes = tile.numel() * dtype.itemsize
        if num_bytes <= left:
            kept[_key(at)], left = tile.to(dtype), left - num_bytes
    row, column, positive = (yield torch.cat([row, column, positive])).view(3, num)
    # waits for the device; with a scale up to 64 it never holds. All processes see the same sums, and agree
    underflown = bool((torch.minimum(row.min(), column.min()) < _SMALLEST).item())
    if underflown:
        kept.clear()
        parts = row.new_zeros(
            setting.processes, 2, num
        )  # each in its own place, so that their sum has them all
        parts[setting.rank] = _log_sums(setting, a, y, scale)
        log_row, log_column = (yield parts.flatten()).view(parts.shape).logsumexp(dim=0)
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
            logits = _logits(setting, a, y, scale, at)
            of_column = (logits - log_column[columns]).exp_()
            gradient = (logits - log_row[own][rows, None]).exp_().add_(of_column).div_(2 * num)
            return _without_own(setting, gradient, at, num, 0.0)
        tile = kept.pop(_key(at), None)
        if tile is None:
            tile = _exponentials(setting, a, y, scale, shift, at)
        # what is below the threshold is nothing beside the rest, but denormal
        return F.threshold(tile.mul_(row[own][rows, None] + column[columns]), _SMALLEST, 0.0, inplace=True)

    return loss, _multiplied_out(setting, a, b, y, scale, pull[own], logit_gradient)


def sigmoid_share(setting: Setting, a: Tensor, b: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Share:
    """The sigmoid loss, as `softmax_share`, with the gradient of the bias last."""
    num = len(y)
    positive = scale * (a * b).sum(dim=1) + bias
    total = F.softplus(-positive).sum(dtype=torch.float64)
    pull = -torch.sigmoid(-positive) / num
    push = a.new_zeros((), dtype=torch.float64)

    def logit_gradient(at: Tile) -> Tensor:
        nonlocal total, push
        logits = _logits(setting, a, y, scale, at).add_(bias)
        logits = _without_own(setting, logits, at, num, float("-inf"))
        total = total + F.softplus(logits).sum(dtype=torch.float64)
        gradient = logits.sigmoid_().div_(num)
        push = push + gradient.sum(dtype=torch.float64)
        return F.threshold(gradient, _SMALLEST, 0.0, inplace=True)

    if any(setting.gradients):
        gradients = _multiplied_out(setting, a, b, y, scale, pull, logit_gradient)
        gradients.append((push + pull.sum(dtype=torch.float64)).to(bias.dtype).reshape(bias.shape))
    else:
        gradients = [None, None, None, None]
        for at in _tiles(len(a), num, a.device):
            logit_gradient(at)
    (total,) = yield total.reshape(1)
    return (total / num).to(a.dtype), gradients


def _multiplied_out(
    setting: Setting, a: Tensor, b: Tensor, y: Tensor, scale: Tensor, pull: Tensor, logit_gradient: Any
) -> Gradients:
    """Gradients of a, y and the scale from those of the logits.

    pull: [B], of the positive logits. logit_gradient: tile → [R, C], of the others, 0 for the positive ones.
    """
    for_a, for_y, for_scale = setting.gradients[:3]
    for_a |= for_scale and not for_y  # ⟨dL/da, a⟩ is the scale's gradient too
    da, dy = (pull[:, None] * b if for_a else None), None
    if for_y:
        dy = a.new_zeros(y.shape)
        torch.mul(pull[:, None], a, out=dy[setting.own(len(y))])
    x, z = (a.bfloat16(), y.bfloat16()) if setting.bf16 else (a, y)
    for rows, columns in _tiles(len(a), len(y), a.device):
        gradient = logit_gradient((rows, columns)).to(x.dtype)
        if da is not None:
            _add_product(da[rows], gradient, z[columns])
        if dy is not None:
            _add_product(dy[columns], gradient.T, x[rows])
    along = (da * a).sum(dtype=torch.float64) if da is not None else (dy * y).sum(dtype=torch.float64)  # type: ignore[operator]
    return [
        da.mul_(scale) if da is not None and setting.gradients[0] else None,
        dy.mul_(scale) if dy is not None else None,
        along.to(scale.dtype).reshape(scale.shape) if for_scale else None,
    ]


def _tiles(size: int, num: int, device: torch.device) -> Iterator[Tile]:
    """The B × N logits, block by block."""
    num_rows, num_columns = _TILE[device.type]
    for top in range(0, size, num_rows):
        for left in range(0, num, num_columns):
            yield slice(top, min(top + num_rows, size)), slice(left, min(left + num_columns, num))


def _key(at: Tile) -> tuple[int, int]:
    return at[0].start, at[1].start


def _logits(setting: Setting, a: Tensor, y: Tensor, scale: Tensor, at: Tile) -> Tensor:
    x, z = a[at[0]] * scale, y[at[1]].T
    if setting.bf16:
        return _bf16_product(x.bfloat16(), z.bfloat16())
    return x @ z


def _exponentials(setting: Setting, a: Tensor, y: Tensor, scale: Tensor, shift: Tensor, at: Tile) -> Tensor:
    """exp(l − shift) [R, C] of a tile, 0 where a pair is not negative."""
    tile = _logits(setting, a, y, scale, at).sub_(shift).clamp_(min=_FLOOR).exp_()
    return _without_own(setting, tile, at, len(y), 0.0)


def _without_own(setting: Setting, tile: Tensor, at: Tile, num: int, value: float) -> Tensor:
    """The tile with `value` for each sample's own partner, and for those that share an id with it."""
    first, columns = setting.own(num).start, at[1]
    start, stop = first + at[0].start, first + at[0].stop
    if start < columns.stop and columns.start < stop:
        tile.diagonal(start - columns.start).fill_(value)
    for ids in setting.ids:
        tile.masked_fill_(ids[start:stop, None] == ids[columns], value)
    return tile


def _log_sums(setting: Setting, a: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """log Σ exp l over each row's and column's negatives, fp64 [2, N], by running maxima: slower, safe at any scale.

    −inf where this process has none of them.
    """
    num = len(y)
    sums = torch.full((2, num), float("-inf"), dtype=torch.float64, device=a.device)
    row, column = sums[0, setting.own(num)], sums[1]
    for at in _tiles(len(a), num, a.device):
        logits = _logits(setting, a, y, scale, at)
        tile = _without_own(setting, logits, at, num, float("-inf"))
        for found, part, dim in ((row, at[0], 1), (column, at[1], 0)):
            found[part] = torch.logaddexp(found[part], tile.logsumexp(dim=dim).double())
    return sums


def _add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """total += x @ y in place; the sum over tiles is fp32 though x and y may be bf16."""
    if x.dtype == total.dtype:
        total.addmm_(x, y)
    else:
        total += _bf16_product(x, y)


def _bf16_product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y of bf16 matrices, added and returned in fp32; on CUDA alone."""
    return torch.mm(x, y, out_dtype=torch.float32)
