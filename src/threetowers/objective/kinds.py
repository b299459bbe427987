"""The kinds of loss that a row of an objective can have: one entry each.

Legend: B samples, D width of the compared views.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from threetowers.objective import losses, tiled
from threetowers.objective.pairs import Kind


@dataclass(frozen=True, slots=True)
class Compared:
    """What the loss of a row is computed from.

    a, b: the two views [B, D]. scale: the factor of the cosines. bias: of the logits, for kinds that learn one. ids:
    int64 [B] each; samples that share one are not each other's negatives. bf16: see `tiled.softmax_loss`.
    """

    a: Tensor
    b: Tensor
    scale: Tensor
    bias: Tensor | None = None
    ids: tuple[Tensor, ...] = ()
    bf16: bool = False


@dataclass(frozen=True, slots=True)
class LossKind:
    """How a kind of row is computed.

    loss: a scalar from the two views. contrastive: whether samples are told apart, so that an accuracy within the
    batch means something. unit: whether the views are unit vectors, or as the towers and heads give them. bias: whether
    the row learns a bias.
    """

    loss: Callable[[Compared], Tensor]
    contrastive: bool
    unit: bool = True
    bias: bool = False


def _softmax(row: Compared) -> Tensor:
    return tiled.softmax_loss(row.a, row.b, row.scale, row.ids, bf16=row.bf16)


def _sigmoid(row: Compared) -> Tensor:
    assert row.bias is not None
    return tiled.sigmoid_loss(row.a, row.b, row.scale, row.bias, row.ids, bf16=row.bf16)


LOSSES: dict[Kind, LossKind] = {
    "softmax": LossKind(_softmax, contrastive=True),
    "sigmoid": LossKind(_sigmoid, contrastive=True, bias=True),
    "cosine": LossKind(lambda row: losses.cosine_loss(row.a, row.b), contrastive=False),
    "mse": LossKind(lambda row: losses.mse_loss(row.a, row.b), contrastive=False, unit=False),
}
"""Every kind of loss by its name in a row. A new one is a function in losses.py and one entry here."""
