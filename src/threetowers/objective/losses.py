"""The losses of a row, written to be read; what is faster elsewhere is tested against this file.

Legend: B samples, D width of the compared vectors. Everything is fp32 whatever the towers computed in.
`negatives` [B, B] says which pairs (i, j) count as each other's negatives; None means all but the diagonal.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def unit(features: Tensor) -> Tensor:
    """L2-normalised fp32 vectors; a zero vector stays zero (eps 1e-8)."""
    return F.normalize(features.float(), dim=-1, eps=1e-8)


def duplicate_mask(*ids: Tensor) -> Tensor:
    """Pairs that are true negatives, bool [B, B]: no id of the one equals that id of the other.

    ids: int64 [B] each, for example of images and of captions.
    """
    same = torch.zeros(len(ids[0]), len(ids[0]), dtype=torch.bool, device=ids[0].device)
    for values in ids:
        same |= values[:, None] == values[None, :]
    return ~same


def softmax_loss(a: Tensor, b: Tensor, scale: Tensor, negatives: Tensor | None = None) -> Tensor:
    """Symmetric contrastive loss of unit vectors a, b [B, D]: ½ (L(a→b) + L(b→a)), METHOD: CLIP and 3T.

    L(a→b) = −1/B Σ_i log softmax_j(scale · a_i · b_j)[i], with j over i itself and its negatives.
    """
    logits = contrastive_logits(a, b, scale, negatives)
    positive = logits.diagonal()
    forward = torch.logsumexp(logits, dim=1) - positive
    backward = torch.logsumexp(logits, dim=0) - positive
    return 0.5 * (forward.mean() + backward.mean())


def contrastive_logits(a: Tensor, b: Tensor, scale: Tensor, negatives: Tensor | None = None) -> Tensor:
    """scale · a · bᵀ in fp32 [B, B], −inf where a pair is neither the positive nor a negative."""
    with torch.autocast(a.device.type, enabled=False):
        logits = scale.float() * a.float() @ b.float().T
    if negatives is None:
        return logits
    counted = negatives | torch.eye(len(a), dtype=torch.bool, device=a.device)
    return logits.masked_fill(~counted, float("-inf"))


def sigmoid_loss(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, negatives: Tensor | None = None
) -> Tensor:
    """SigLIP's loss (arXiv 2303.15343, algorithm 1): −1/B Σ_ij log σ(z_ij (scale · a_i · b_j + bias)), z = ±1."""
    with torch.autocast(a.device.type, enabled=False):
        logits = scale.float() * a.float() @ b.float().T + bias.float()
    positive = torch.eye(len(a), dtype=torch.bool, device=a.device)
    terms = -F.logsigmoid(torch.where(positive, logits, -logits))
    if negatives is not None:
        terms = terms.masked_fill(~(negatives | positive), 0.0)
    return terms.sum() / len(a)


def cosine_loss(a: Tensor, b: Tensor) -> Tensor:
    """Mean of 1 − cos(a_i, b_i) over unit vectors [B, D]."""
    return (1.0 - (a * b).sum(dim=-1)).mean()


def mse_loss(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of raw vectors [B, D], averaged over samples and dimensions."""
    return (a.float() - b.float()).square().mean()


@torch.no_grad()
def contrastive_accuracy(
    a: Tensor, b: Tensor, ids: tuple[Tensor, Tensor] | None = None, own: slice = slice(None)
) -> Tensor:
    """Share of samples whose nearest partner within the batch is right, mean of both directions.

    ids: of what a and what b encode, int64 [B] each, equal for equal things. A partner is right when some sample has
    the one and the other. None: all differ, and a sample's own partner alone is right. own: the samples that are
    counted, with partners among all.
    """
    first = second = torch.arange(len(a), device=a.device)
    if ids is not None:
        first, second = (values.to(a.device).unique(return_inverse=True)[1] for values in ids)
    pairs = first * len(a) + second
    if own == slice(None):
        similarity = a @ b.T
        nearest_b, nearest_a = similarity.argmax(dim=1), similarity.argmax(dim=0)
    else:
        nearest_b, nearest_a = (a[own] @ b.T).argmax(dim=1), (b[own] @ a.T).argmax(dim=1)
    forward = torch.isin(first[own] * len(a) + second[nearest_b], pairs)
    backward = torch.isin(first[nearest_a] * len(a) + second[own], pairs)
    return 0.5 * (forward.float().mean() + backward.float().mean())
