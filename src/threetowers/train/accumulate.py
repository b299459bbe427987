"""A batch beyond memory: towers in micro-batches, one loss over the whole batch (gradient cache, arXiv 2101.06983).

First pass without gradients: every micro-batch's features. Then the loss of all features together gives the gradient
of each feature and of heads and scale. Second pass with gradients: each micro-batch again, under the random state of
its first pass, and its features' gradients are sent back through the towers.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from threetowers.data.loader import Batch
from threetowers.train.profile import Phase, no_phase

RandomState = tuple[Tensor, Tensor | None]
Features = dict[str, Tensor]
Losses = tuple[Tensor, dict[str, Tensor]]


def accumulate(
    batch: Batch,
    size: int,
    device: torch.device,
    features: Callable[[Batch], Features],
    loss: Callable[[Features, Batch], Losses],
    phase: Phase = no_phase,
    before_backward: Callable[[bool], None] = lambda last: None,
) -> tuple[Tensor, dict[str, Tensor], Features]:
    """Loss, each row's loss and the features of a batch in host memory; adds the gradients of every parameter.

    size: samples of a micro-batch. features: of a batch that lies on the device, by tower. loss: of the features of
    the whole batch, and each row's own by name. phase: of the copies to the device and of the backward passes; the
    others are for the two functions to name. before_backward: told of each backward pass through the towers whether it
    is the last. What is returned is detached.
    """
    states: list[RandomState] = []
    parts: list[Features] = []
    with torch.no_grad():
        for micro in _micro_batches(batch, size):
            states.append(_random_state(device))
            with phase("data"):
                micro = micro.to(device)
            parts.append(features(micro))
    after = _random_state(device)
    trained = [name for name in ("img", "txt") if name in parts[0]]
    feats = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for name in trained:
        feats[name].requires_grad_()
    total, rows = loss(feats, batch)
    with phase("backward"):
        total.backward()  # type: ignore[no-untyped-call]
    start = 0
    for micro, state in zip(_micro_batches(batch, size), states, strict=True):
        _set_random_state(device, state)
        with phase("data"):
            micro = micro.to(device)
        again = features(micro)
        stop = start + len(micro.index)
        live = [(again[name], feats[name].grad) for name in trained if again[name].requires_grad]
        before_backward(stop == len(batch.index))
        with phase("backward"):
            torch.autograd.backward(
                [values for values, _ in live],
                [None if gradient is None else gradient[start:stop] for _, gradient in live],
            )
        start = stop
    _set_random_state(device, after)
    rows = {name: value.detach() for name, value in rows.items()}
    return total.detach(), rows, {name: value.detach() for name, value in feats.items()}


def _micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(batch.index), size):
        yield batch.part(start, start + size)


def _random_state(device: torch.device) -> RandomState:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: RandomState) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
