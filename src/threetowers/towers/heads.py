"""Linear heads between towers, and initialisation that does not depend on what else is built."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from threetowers.data.order import hash64


@contextmanager
def initialised(seed: int, name: str) -> Iterator[None]:
    """Draws torch's random numbers from (seed, name) inside the block and restores the generator after it.

    A module built inside starts the same whatever is built before or beside it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash64("initialise", seed, name) >> 1)
        yield


def head(in_dim: int, out_dim: int, *, seed: int, name: str) -> nn.Linear:
    """A bias-free linear map that starts at N(0, 1/√in_dim), from the seed of its name."""
    with initialised(seed, name):
        linear = nn.Linear(in_dim, out_dim, bias=False)
        nn.init.normal_(linear.weight, std=in_dim**-0.5)
    return linear
