"""A batch beyond memory: towers in micro-batches, one loss over the whole batch (gradient cache, arXiv 2101.06983).

First pass without gradients: every micro-batch's features. Then the loss of all features together gives the gradient
of each feature and of heads and scale. Second pass with gradients: each micro-batch again, under the random state of
its first pass, and its features' gradients are sent back through the towers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from threetowers.data.loader import Batch
from threetowers.run.setup import Prepared

RandomState = tuple[Tensor, Tensor | None]


def masked_ids(run: Prepared, batch: Batch) -> tuple[Tensor, ...]:
    """The ids by which samples of a batch are not each other's negatives; none unless that is asked for."""
    if not run.config.inputs.mask_duplicates:
        return ()
    return batch.image_ids.to(run.device), batch.caption_ids.to(run.device)


def accumulate(run: Prepared, batch: Batch) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, each row's loss and the features of a batch in host memory; adds the gradients of every parameter.

    What is returned is detached.
    """
    size = run.config.micro_batch_size
    states: list[RandomState] = []
    parts: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for micro in _micro_batches(batch, size):
            states.append(_random_state(run.device))
            parts.append(run.features(micro.to(run.device)))
    after = _random_state(run.device)
    trained = [name for name in ("img", "txt") if name in parts[0]]
    feats = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for name in trained:
        feats[name].requires_grad_()
    loss, rows = run.model.loss(feats, masked_ids(run, batch))
    loss.backward()  # type: ignore[no-untyped-call]
    start = 0
    for micro, state in zip(_micro_batches(batch, size), states, strict=True):
        _set_random_state(run.device, state)
        again = run.features(micro.to(run.device))
        stop = start + len(micro.index)
        live = [(again[name], feats[name].grad) for name in trained if again[name].requires_grad]
        torch.autograd.backward(
            [features for features, _ in live],
            [None if gradient is None else gradient[start:stop] for _, gradient in live],
        )
        start = stop
    _set_random_state(run.device, after)
    return loss.detach(), {name: value.detach() for name, value in rows.items()}, {
        name: value.detach() for name, value in feats.items()
    }  # fmt: skip


def _micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(batch.index), size):
        yield batch.part(start, start + size)


def _random_state(device: torch.device) -> RandomState:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: RandomState) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
