"""One bf16 copy of the main towers per optimiser step, beside fp32 master weights.

Autocast casts each weight again at every operation that reads it, and twice with micro-batches. Here the cast is done
once: forward and backward run in the copy, its gradients are handed to the masters, the optimiser moves the masters,
and the copy is written anew. Norms keep fp32 parameters and fp32 arithmetic, as in mixed-precision training
(arXiv 1710.03740), and so do embeddings, of which a batch reads few rows while a cast would read them all: in the copy
stand the masters themselves. Heads, scale and loss are not in the copy and stay fp32.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
KEPT = (*NORMS, nn.Embedding)
"""Modules that stay fp32 and shared."""


class WorkingCopy:
    """The bf16 towers of a pair in train mode; img is None where the method has no image tower to train.

    Made after parameters have been frozen. Buffers, such as running statistics, are the masters' own.
    """

    def __init__(self, img: nn.Module | None, txt: nn.Module) -> None:
        self._masters: list[Tensor] = []
        self._copies: list[Tensor] = []
        self.img = None if img is None else self._of(img)
        self.txt = self._of(txt)

    def _of(self, tower: nn.Module) -> nn.Module:
        twin = copy.deepcopy(tower)
        for module, source in zip(twin.modules(), tower.modules(), strict=True):
            module._buffers = source._buffers
            if isinstance(module, NORMS):
                module.register_forward_pre_hook(_to_fp32)
            if isinstance(module, KEPT):
                module.register_forward_hook(_to_bf16)
                module._parameters = source._parameters
                continue
            for name, master in source._parameters.items():
                if master is None:
                    continue
                own = nn.Parameter(master.detach().bfloat16(), requires_grad=master.requires_grad)
                module._parameters[name] = own
                if master.requires_grad:
                    self._masters.append(master)
                    self._copies.append(own)
        return twin.train()

    def hand_over(self) -> None:
        """Gives the masters the copy's gradients in fp32, and takes them off the copy."""
        for master, own in zip(self._masters, self._copies, strict=True):
            master.grad = None if own.grad is None else own.grad.float()
            own.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Writes the masters' values into the copy; after each optimiser step and when weights are loaded."""
        torch._foreach_copy_(self._copies, self._masters)


def _to_fp32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].float(), *inputs[1:]


def _to_bf16(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.bfloat16()
