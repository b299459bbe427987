"""The losses of an objective over the batches of several processes, each of which computes its own samples' share.

    rows = [("softmax", Compared(img, txt, scale)), ("cosine", Compared(img_head, third, scale))]
    total, values = sharded.loss(rows, [0.5, 0.5], processes)  # in every process
    total.backward()  # then add up the gradients of the parameters over the processes

Legend: W processes, B samples of each, G = W · B samples of all, D width of the compared views.

What is computed where. A contrastive row needs the views of one side only from the other processes: with b gathered, a
process has the logits [B, G] of its own a, and with them the whole sum over each row and its part of the sum over each
column. The shift of `tiled` depends on the scale alone, so the parts of the columns can be added: one small all_reduce
makes them whole. Then the gradients of the process's own logits are known. Those of its a are complete at home, and
those of b, of which every process has a part, are reduce-scattered. All this is done in the forward, as in `tiled`, so
the backward has no collective.

Frozen features. A view of a third tower is made of features that need no gradient. They are gathered instead of the
view, once for all rows and as they are stored, and every process applies the heads to those of all samples. That takes
4 · G · P · D operations a head, for features of width P, and spares the traffic of a view and of its gradients.

Which gradients. Process r has its own copy θ_r of each parameter, the loss of the global batch is L(θ_1, …, θ_W), and
all copies are equal, so dL/dθ = Σ_r ∂L/∂θ_r. The value of the loss is that of the global batch, the same in all
processes, and what its backward gives in process r is ∂L/∂θ_r. The gradients are therefore added, not averaged.

A step has three collectives: an all_gather of bytes, for any dtypes; an all_reduce of about 3 · G fp64 numbers a row;
and a reduce_scatter in fp32, which is left out where no gathered tensor needs a gradient. Where sums underflow (see
`tiled`), one more all_reduce follows. Gloo makes its reduce_scatter out of an all_reduce, with twice the traffic.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from threetowers.objective import tiled
from threetowers.objective.kinds import LOSSES, Compared
from threetowers.objective.pairs import Kind
from threetowers.objective.tiled import Gradients, Setting, Share
from threetowers.processes import Processes

SHARES: dict[Kind, Callable[..., Share]] = {"softmax": tiled.softmax_share, "sigmoid": tiled.sigmoid_share}
"""The contrastive kinds of which each process computes a share. Of another kind every process computes the whole."""


View = Callable[[Tensor], Tensor]
"""Makes unit vectors [n, D] of frozen features [n, P]."""


@dataclass(frozen=True)
class _Row:
    """A row of the objective: its kind and weight, what it compares, and which of the inputs are its own.

    second: the second view [G, D] of all processes, as the products take it, and `compared.ids` are those of all too.
    whole: whether the second input is that of all samples, of which no other process adds a part; else it is the
    process's own. The inputs of a row with shares are its two views, the scale and the bias, if it has one; those of
    another row, its part of the loss.
    """

    kind: Kind
    weight: float
    compared: Compared
    inputs: range
    second: Tensor | None = None
    whole: bool = False


def loss(
    rows: Sequence[tuple[Kind, Compared]],
    weights: Sequence[float],
    processes: Processes,
    views: Mapping[int, View] | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the rows' losses over the samples of all processes, and each row's own loss, fp32 [rows].

    Every process calls it with its own B samples, as many as every other, and the same kinds, weights and scales. Both
    results are those of one process with the G samples in the order of the ranks. The sum is once differentiable, for
    gradients that are then added over the processes, as the head of this file derives. The rows' own losses are for
    the log and have no gradient, and a row of weight 0 is computed for the log alone.

    views: for the rows of a kind with shares, by their place, whose b are frozen features [B, P]: what makes the second
    view of them.
    """
    views = views or {}
    turned = [(kind, row if i in views else _turned(kind, row)) for i, (kind, row) in enumerate(rows)]
    seconds = iter(_gathered([row for kind, row in turned if kind in SHARES], processes))
    plan: list[_Row] = []
    inputs: list[Tensor] = []
    for i, ((kind, row), weight) in enumerate(zip(turned, weights, strict=True)):
        start = len(inputs)
        if kind in SHARES:
            second, ids = next(seconds)
            b = _made(views[i], second, row) if i in views else row.b
            inputs += [row.a, b, row.scale]
            if LOSSES[kind].bias and row.bias is not None:
                inputs.append(row.bias)
            second = _for_products(b.detach() if i in views else second, row)
            plan.append(
                _Row(kind, weight, replace(row, ids=ids), range(start, len(inputs)), second, i in views)
            )
        else:
            inputs.append(_own_part(kind, row, processes))
            plan.append(_Row(kind, weight, row, range(start, len(inputs))))
    inputs = [tensor.float() for tensor in inputs]
    total, values = _Sharded.apply(plan, processes, torch.is_grad_enabled(), *inputs)  # type: ignore[no-untyped-call]
    return total, values


def _turned(kind: Kind, row: Compared) -> Compared:
    """The row, turned where only its first view needs no gradient, so that what is gathered has no way back.

    Both directions of these kinds count alike.
    """
    if kind in SHARES and row.b.requires_grad and not row.a.requires_grad:
        return replace(row, a=row.b, b=row.a)
    return row


def _made(view: View, features: Tensor, row: Compared) -> Tensor:
    """The view of the frozen features of all samples.

    Heads multiply in the precision of the row: in fp32 they would take as long as sending the views.
    """
    with torch.autocast(features.device.type, torch.bfloat16, enabled=row.bf16):
        return view(features)


def _for_products(view: Tensor, row: Compared) -> Tensor:
    """A view in the precision of the products, to which these would round it anyway."""
    return view.to(torch.bfloat16 if row.bf16 else torch.float32)


def _own_part(kind: Kind, row: Compared, processes: Processes) -> Tensor:
    """The part of a row's loss of which the other processes have the others: of a mean over samples, that of its own.

    Of a contrastive kind without a share of its own, every process computes the loss of all samples, and has one part
    in W of it. That is W times the work, and memory as the kind needs it.
    """
    if LOSSES[kind].contrastive:
        a, b = (_Gathered.apply(view.float(), processes) for view in (row.a, row.b))  # type: ignore[no-untyped-call]
        row = replace(row, a=a, b=b, ids=tuple(processes.gather(row.ids)))
    return LOSSES[kind].loss(row) / processes.size


class _Gathered(torch.autograd.Function):
    """The views of all processes [G, D], for a loss that is the same in all and of which each has one part in W."""

    @staticmethod
    def forward(ctx: Any, view: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return processes.gather([view])[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # the parts of all W processes are equal, and no other process adds those of these samples
        return gradient[ctx.processes.own(len(gradient))] * ctx.processes.size, None


class _Sharded(torch.autograd.Function):
    """The loss of the global batch, whose gradients are known when its value is."""

    @staticmethod
    def forward(
        ctx: Any, plan: list[_Row], processes: Processes, trains: bool, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(inputs[0].device.type, enabled=False):
            total, values, gradients = _compute(plan, processes, trains, list(inputs))
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(values)
        return total, values

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, factor: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(None if g is None else g * factor for g in ctx.saved_tensors)


def _compute(
    plan: Sequence[_Row], processes: Processes, trains: bool, inputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Gradients]:
    """The loss, each row's own, and the gradient of every input that needs one, None for the others."""
    needs = [trains and tensor.requires_grad for tensor in inputs]
    shares = []
    for row in plan:
        own = [inputs[place] for place in row.inputs]
        if row.second is None:
            shares.append(_added(own[0]))
            continue
        setting = Setting(
            row.compared.ids, tiled.BUDGET // len(plan), row.compared.bf16,  # all are between their sweeps at once
            tuple(needs[place] and row.weight != 0 for place in row.inputs), processes.rank, processes.size,
        )  # fmt: skip
        a, b, *scalars = own
        if row.whole:
            b = b[processes.own(len(b))]
        shares.append(SHARES[row.kind](setting, a, b, row.second, *scalars))
    results = tiled.computed(shares, processes.add)
    found: Gradients = []
    for row, (_, own_gradients) in zip(plan, results, strict=True):
        found += [None if gradient is None else gradient.mul_(row.weight) for gradient in own_gradients]
    seconds = [row.inputs[1] for row in plan if row.second is not None and not row.whole]
    parts = {place: part for place in seconds if (part := found[place]) is not None}
    if parts:  # [G, D], of which the other processes have parts too
        total = processes.add_scattered(torch.cat(list(parts.values()), dim=1))
        widths = [part.shape[1] for part in parts.values()]
        for place, own_part in zip(parts, total.split(widths, dim=1), strict=True):
            found[place] = own_part
    gradients: Gradients = [
        # that of a row of weight 0 is 0, as in one process
        (torch.zeros_like(given) if gradient is None else gradient) if need else None
        for given, gradient, need in zip(inputs, found, needs, strict=True)
    ]
    values = torch.stack([value.float() for value, _ in results])
    return (values * values.new_tensor([row.weight for row in plan])).sum(), values, gradients


def _gathered(rows: Sequence[Compared], processes: Processes) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """For each row b and the ids of all processes; what several rows have in common travels once.

    Views travel in the precision of the products, and frozen features in theirs.
    """
    wanted: dict[int, Tensor] = {}
    for row in rows:
        frozen = not row.b.requires_grad
        wanted[id(row.b)] = row.b if frozen else _for_products(row.b, row)
        wanted |= {id(ids): ids for ids in row.ids}
    found = dict(zip(wanted, processes.gather(list(wanted.values())), strict=True))
    return [(found[id(row.b)], tuple(found[id(ids)] for ids in row.ids)) for row in rows]


def _added(part: Tensor) -> Share:
    """A row of which this process has its part already."""
    total = yield part.double().reshape(1)
    return total[0], [torch.ones_like(part)]
