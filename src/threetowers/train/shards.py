"""A model whose towers are cut up over the processes, by PyTorch's FSDP2.

    shard(model, device, bf16=False)        # in every process, in place; names and shapes stay what they were
    optimizer = adamw(...)                  # over the plain tensors that `own_part` gives
    gradients = Gradients(model, optimizer, processes)
    with whole(model): ...                  # every process has all weights while the block lasts

Each process keeps some rows of every parameter of the two main towers, and of its gradient and moments. Before a block
of layers computes, its weights are gathered from all processes, and afterwards they are let go. Heads, scale and biases
are small and read outside the towers' forward pass: every process has a copy, and their gradients are added up. Frozen
towers are no part of the model.

The optimiser gets plain tensors that share memory with the shards. AdamW treats every number by itself, so this is
AdamW of the whole; and its fused kernel refuses a list in which DTensors stand beside plain tensors, as heads do.

Legend: W processes.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from threetowers.model import ThreeTowers
from threetowers.processes import Processes

TOWERS = ("img.", "txt.")
"""What the names of the parameters begin with that are cut up."""


def blocks_of(tower: nn.Module) -> list[nn.Module]:
    """The layers that are gathered one at a time: modules of one class that follow each other, inner ones first.

    These are the blocks of open_clip's and timm's transformers, and the blocks and stages of timm's convolutional
    networks.
    """
    blocks: dict[nn.Module, None] = {}
    for module in tower.modules():
        children = list(module.children())
        alike = len(children) > 1 and len(set(map(type, children))) == 1
        if alike and isinstance(module, nn.ModuleList | nn.Sequential):
            blocks |= {child: None for child in children if any(True for _ in child.parameters())}
    return [module for module in reversed(list(tower.modules())) if module in blocks]


def shard(model: ThreeTowers, device: torch.device, processes: Processes, *, bf16: bool) -> None:
    """Leaves to this process its rows of every parameter of the two main towers; the others have the rest.

    bf16: whether the towers compute under autocast to bf16. The blocks' weights then travel in bf16 and are kept in it
    for the backward pass, where autocast would keep a copy of all of them in each process. Gradients are summed in
    fp32, and what is outside the blocks stays fp32. The one difference to autocast in one process is that the gains and
    shifts of norms inside the blocks are rounded to bf16.

    Every process calls it with equal weights. `model.features` is the forward pass that gathers weights.
    """
    # pooled features may be views; FSDP warns, since writing into one would go unnoticed, and nothing here does
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh(device.type, (processes.size,))
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP takes no channels_last
    rounded = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = rounded if bf16 else MixedPrecisionPolicy()
    for tower in (model.img, model.txt):
        for block in blocks_of(tower) if tower is not None else []:
            fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    if model.img is not None:
        fully_shard(model.img, mesh=mesh, reshard_after_forward=True)
    # what is left is the text tower's, whose own forward pass `features` does not always take
    copies = {each for name, each in model.named_parameters() if not name.startswith(TOWERS)}
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=copies)
    register_fsdp_forward_method(model, "features")
    for part in _parts(model):
        # the loss is that of all samples, so gradients are added and not averaged; gloo can do no other sum than a sum
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has cut this model up."""
    return isinstance(model, FSDPModule)


def own_part(parameter: Tensor) -> Tensor:
    """The rows of a parameter that this process holds, as a plain leaf in the same memory; a whole one is itself."""
    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad)


def first_row(parameter: DTensor) -> int:
    """The first row that this process holds of a parameter. DTensor cuts as torch.chunk does, and may leave no row."""
    each = -(-parameter.shape[0] // parameter.device_mesh.size())
    return min(parameter.device_mesh.get_local_rank() * each, parameter.shape[0])


def of_rows(rows: Tensor, parameter: DTensor) -> DTensor:
    """The DTensor of which this process has these rows, cut up as a parameter is."""
    return DTensor.from_local(
        rows, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def cut_parameters(model: nn.Module) -> dict[str, DTensor]:
    """The parameters that are cut up, by name."""
    state: Mapping[str, Any] = model.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, DTensor)}


def last_backward(model: nn.Module, last: bool) -> None:
    """Says whether the next backward pass is the last of the step, after which gradients are added up.

    Until then each process keeps its own gradients of the weights whole.
    """
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(last)
        model.set_requires_gradient_sync(last)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """All weights in every process while the block lasts, so that one of them may compute without the others."""
    parts = _parts(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


class Gradients:
    """The gradients of what an optimiser trains, where some of them may be cut up over the processes."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes) -> None:
        named = dict(model.named_parameters())
        self._processes, self._copies = processes, list[Tensor]()
        self._cut: list[tuple[Tensor, Tensor]] = []
        for group in optimizer.param_groups:
            for name, own in zip(group["names"], group["params"], strict=True):
                if own is named[name]:
                    self._copies.append(own)
                else:
                    self._cut.append((named[name], own))

    def collect(self) -> None:
        """After the last backward pass: gives each tensor of the optimiser the sum of its gradient over all processes.

        The towers' own have been added up by FSDP, which leaves them at the DTensors.
        """
        for parameter, own in self._cut:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is None or isinstance(gradient, DTensor)
            own.grad = None if gradient is None else gradient.to_local()
        self._processes.add_gradients(self._copies)

    def norm(self) -> Tensor:
        """The norm of all gradients together, a scalar, the same to the bit in every process."""
        total = _norm(self._copies)
        if not self._cut:
            return total
        own = _norm([own for _, own in self._cut]).to(total.device).double().square()
        return (total.double().square() + self._processes.add(own)).sqrt().to(total.dtype)


def _norm(parameters: list[Tensor]) -> Tensor:
    return get_total_norm([each.grad for each in parameters if each.grad is not None])


def _parts(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
