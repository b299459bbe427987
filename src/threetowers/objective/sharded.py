"""The losses of an objective over the batches of several processes, each of which computes its own samples' share.

    rows = [("softmax", Compared(img, txt, scale)), ("cosine", Compared(img_head, third, scale))]
    total, values = sharded.loss(rows, [0.5, 0.5], processes)  # in every process
    total.backward()  # then add up the gradients of the parameters over the processes

Legend: W processes, B samples of each, G = W · B samples of all, D width of the compared views.

What is computed where. Heads are applied at home. A contrastive row needs the views of one side only from the other
processes: with b gathered, a process has the logits [B, G] of its own a, and with them the whole sum over each row and
its part of the sum over each column. The shift of `tiled` depends on the scale alone, so the parts of the columns can
be added: one small all_reduce makes them whole. Then the gradients of the process's own logits are known. Those of its
a are complete at home, and those of b, of which every process has a part, are reduce-scattered. All this is done in
the forward, as in `tiled`, so the backward has no collective.

Which gradients. Process r has its own copy θ_r of each parameter, the loss of the global batch is L(θ_1, …, θ_W), and
all copies are equal, so dL/dθ = Σ_r ∂L/∂θ_r. The value of the loss is that of the global batch, the same in all
processes, and what its backward gives in process r is ∂L/∂θ_r. The gradients are therefore added, not averaged.

A step has three collectives: an all_gather of bytes, for any dtypes; an all_reduce of about 3 · G fp64 numbers a row;
and a reduce_scatter in fp32, which is left out where no gathered view needs a gradient. Where sums underflow (see
`tiled`), one more all_reduce follows. Gloo makes its reduce_scatter out of an all_reduce, with twice the traffic.
"""

from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class _Row:
    """A row of the objective: its kind and weight, what it compares, and which of the inputs are its own.

    The inputs of a row with shares are its two views, the scale and the bias, if it has one; those of another row, its
    part of the loss.
    """

    kind: Kind
    weight: float
    compared: Compared
    inputs: range

    @property
    def shared(self) -> bool:
        return self.kind in SHARES


def loss(
    rows: Sequence[tuple[Kind, Compared]], weights: Sequence[float], processes: Processes
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the rows' losses over the samples of all processes, and each row's own loss, fp32 [rows].

    Every process calls it with its own B samples, as many as every other, and the same kinds, weights and scales. Both
    results are those of one process with the G samples in the order of the ranks. The sum is once differentiable, for
    gradients that are then added over the processes, as the head of this file derives. The rows' own losses are for
    the log and have no gradient, and a row of weight 0 is computed for the log alone.
    """
    plan: list[_Row] = []
    inputs: list[Tensor] = []
    for (kind, row), weight in zip(rows, weights, strict=True):
        if kind in SHARES:
            if row.b.requires_grad and not row.a.requires_grad:
                # both directions count alike, and a gathered view without gradient needs no way back
                row = replace(row, a=row.b, b=row.a)
            own = [row.a, row.b, row.scale]
            if LOSSES[kind].bias and row.bias is not None:
                own.append(row.bias)
        else:
            own = [_own_part(kind, row, processes)]
        plan.append(_Row(kind, weight, row, range(len(inputs), len(inputs) + len(own))))
        inputs += [tensor.float() for tensor in own]
    total, values = _Sharded.apply(plan, processes, torch.is_grad_enabled(), *inputs)  # type: ignore[no-untyped-call]
    return total, values


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
    views = _gathered(plan, processes, inputs)
    shares = []
    for row, (view, ids) in zip(plan, views, strict=True):
        own = [inputs[place] for place in row.inputs]
        if not row.shared:
            shares.append(_added(own[0]))
            continue
        setting = Setting(
            ids, tiled.BUDGET // len(plan), row.compared.bf16,  # all rows are between their two sweeps at once
            tuple(needs[place] and row.weight != 0 for place in row.inputs), processes.rank, processes.size,
        )  # fmt: skip
        shares.append(SHARES[row.kind](setting, *own[:2], view, *own[2:]))
    results = tiled.computed(shares, processes.add)
    found: Gradients = []
    for row, (_, own_gradients) in zip(plan, results, strict=True):
        found += [None if gradient is None else gradient.mul_(row.weight) for gradient in own_gradients]
    seconds = [row.inputs[1] for row in plan if row.shared]
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


def _gathered(
    plan: Sequence[_Row], processes: Processes, inputs: Sequence[Tensor]
) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """For each row the second view [G, D] of all processes, and their ids; empty for a row without shares."""
    wanted: list[Tensor] = []
    for row in plan:
        if row.shared:
            # in the precision of the products, to which the view would be rounded anyway
            dtype = torch.bfloat16 if row.compared.bf16 else torch.float32
            wanted += [inputs[row.inputs[1]].to(dtype), *row.compared.ids]
    found = iter(processes.gather(wanted))
    return [
        (next(found), tuple(next(found) for _ in row.compared.ids)) if row.shared else (torch.empty(0), ())
        for row in plan
    ]


def _added(part: Tensor) -> Share:
    """A row of which this process has its part already."""
    total = yield part.double().reshape(1)
    return total[0], [torch.ones_like(part)]
