"""Which of torch's attention kernels run, where its own choice is not the fastest.

On CPUs the backward pass of torch's fused attention in bf16 takes several times as long as plain products with an fp32
softmax, and rounds more. For long sequences plain attention is no faster, and its memory grows with the square of the
length.
`benchmarks/attention.py` has the figures.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

LONGEST = 128
"""Tokens up to which attention is plain."""
OWN_CHOICE = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]


@contextmanager
def trained_attention(device: torch.device, *towers: nn.Module | None, bf16: bool) -> Iterator[None]:
    """The kernels to train towers with; around the backward pass too, where checkpointed activations are made again."""
    if device.type == "cpu" and bf16 and max(map(_tokens, towers)) <= LONGEST:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield


@contextmanager
def own_attention() -> Iterator[None]:
    """The kernels that torch chooses, whatever the caller trains with; without gradients the fused ones are faster."""
    with sdpa_kernel(OWN_CHOICE):
        yield


def _tokens(tower: nn.Module | None) -> int:
    """The longest sequence that a tower reads, as far as open_clip and timm say: patches, or places of a text."""
    if tower is None:
        return 0
    grids = (getattr(module, "grid_size", None) for module in tower.modules())
    patches = [math.prod(grid) for grid in grids if isinstance(grid, tuple)]
    return max([*patches, getattr(tower, "context_length", 0)])
