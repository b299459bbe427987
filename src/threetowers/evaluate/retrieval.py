"""Image-text retrieval: the rank of the best right answer of every query, and recall at k from it.

Legend: N images, M texts, D width, Q queries, C candidates, B queries in a block, W weightings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from threetowers.errors import DataError, UsageError

BLOCK = 256
"""Queries scored at a time; memory is O(BLOCK × candidates)."""


METRICS = ("i2t_r@1", "i2t_r@5", "i2t_r@10", "t2i_r@1", "t2i_r@5", "t2i_r@10", "mean_r@1")
"""What `recalls` gives by default."""


class System(NamedTuple):
    """The unit vectors of one model: image [N, D] and text [M, D]; a score is their dot product."""

    image: Tensor
    text: Tensor


@dataclass(frozen=True, eq=False)
class Ranks:
    """For every query, how many wrong candidates stand before its best right one; 0 is a hit at 1.

    i2t: int64 [number of images that have a caption]. t2i: int64 [M].
    i2t_image, t2i_image: the index of the image that each query belongs to, same shapes.
    """

    i2t: Tensor
    t2i: Tensor
    i2t_image: Tensor
    t2i_image: Tensor

    def hits(self, k: int = 1) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Whether each query finds a right answer in its top k, image→text and text→image, as bool arrays."""
        return (self.i2t < k).numpy(), (self.t2i < k).numpy()

    def images(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The image of each query, in the shapes of `hits`: what a bootstrap resamples together."""
        return self.i2t_image.numpy(), self.t2i_image.numpy()


def recall_from_features(
    image: Tensor, text: Tensor, text_image: Tensor, ks: Sequence[int] = (1, 5, 10), block: int = BLOCK
) -> dict[str, float]:
    """Recall at k in both directions, in [0, 1]: `i2t_r@1`, …, `t2i_r@1`, … and `mean_r@1`.

    Shapes, conventions and errors are those of `ranks_from_features` and `recalls`.

        recall_from_features(image, text, text_image=torch.tensor([0, 0, 1, 2]))["t2i_r@5"]
    """
    return recalls(ranks_from_features(image, text, text_image, block), ks)


def ranks_from_features(image: Tensor, text: Tensor, text_image: Tensor, block: int = BLOCK) -> Ranks:
    """Rank of the best right answer of every captioned image among the texts and of every text among the images.

    image [N, D] and text [M, D] are unit vectors, text_image int64 [M] the index of the image that each text
    describes. A score is the dot product rounded to fp32, and a tie counts against the model. Images without a
    text are candidates, not queries. Raises DataError for shapes, indices or values that cannot be scored.
    """
    return combined_ranks([System(image, text)], [(1.0,)], text_image, block)[0]


def recalls(ranks: Ranks, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of queries with a right answer in the top k, for every k, and the mean of both directions at 1.

    The convention of the retrieval tables on COCO and Flickr30k: several captions per image, any of them is a hit.
    Raises UsageError for a k below 1.
    """
    if min(ks, default=1) < 1:
        raise UsageError(f"recall at k: every k must be at least 1, got {list(ks)}")

    def recall(rank: Tensor, k: int) -> float:
        return (rank < k).double().mean().item()

    result = {f"i2t_r@{k}": recall(ranks.i2t, k) for k in ks}
    result |= {f"t2i_r@{k}": recall(ranks.t2i, k) for k in ks}
    result["mean_r@1"] = 0.5 * (recall(ranks.i2t, 1) + recall(ranks.t2i, 1))
    return result


def combined_ranks(
    systems: Sequence[System], weightings: Sequence[Sequence[float]], text_image: Tensor, block: int = BLOCK
) -> list[Ranks]:
    """Ranks under Σ_s weight_s · score_s, one result per weighting; every score is computed once for all of them.

    The systems describe the same images and texts; their widths may differ. See `ranks_from_features`.
    """
    for place, system in enumerate(systems):
        where = f"system {place}: " if len(systems) > 1 else ""
        _check_system(system, systems[0], text_image, where)
    image_id = torch.arange(len(systems[0].image))
    text_id = text_image.cpu()
    captioned = torch.unique(text_id)
    i2t = weighted_ranks(
        [(s.image[captioned.to(s.image.device)], s.text) for s in systems],
        weightings, captioned, text_id, block,
    )  # fmt: skip
    t2i = weighted_ranks([(s.text, s.image) for s in systems], weightings, text_id, image_id, block)
    return [Ranks(a, b, captioned, text_id) for a, b in zip(i2t, t2i, strict=True)]


@torch.no_grad()
def weighted_ranks(
    systems: Sequence[tuple[Tensor, Tensor]],
    weightings: Sequence[Sequence[float]],
    query_id: Tensor,
    candidate_id: Tensor,
    block: int = BLOCK,
) -> Tensor:
    """Ranks of the best right candidate, int64 [W, Q] on the CPU: the wrong ones that score at least as much.

    systems: pairs of queries [Q, D] and candidates [C, D]; weightings: one weight per system each. A candidate is
    right when its id is the query's (query_id [Q], candidate_id [C]); every query needs a right one.
    """
    systems = [(_exact(queries), _exact(candidates)) for queries, candidates in systems]
    device = systems[0][0].device
    query_id, candidate_id = query_id.to(device), candidate_id.to(device)
    parts = []
    for start in range(0, len(query_id), block):
        rows = slice(start, start + block)
        scores = [_scores(queries[rows], candidates) for queries, candidates in systems]
        right = (query_id[rows, None] == candidate_id).nonzero(as_tuple=True)
        combined = (_weighted_sum(scores, weights) for weights in weightings)
        parts.append(torch.stack([_wrong_ahead(score, *right) for score in combined]).cpu())
    return torch.cat(parts, dim=1)


def check_features(features: Tensor, what: str) -> None:
    """Raises DataError unless `features` is a matrix with rows and finite values; names the first bad row."""
    if features.ndim != 2 or features.numel() == 0:
        raise DataError(f"{what}: a matrix [rows, width] is needed, got {tuple(features.shape)}")
    bad = (~features.isfinite().all(dim=1)).nonzero().flatten()
    if len(bad):
        raise DataError(
            f"{what}: {len(bad)} of {len(features)} rows are not finite, the first is row {int(bad[0])}; "
            "the model that made them has diverged or overflows in half precision"
        )


def _check_system(system: System, first: System, text_image: Tensor, where: str) -> None:
    check_features(system.image, f"{where}image features")
    check_features(system.text, f"{where}text features")
    num_images, num_texts = len(system.image), len(system.text)
    if system.image.shape[1] != system.text.shape[1]:
        raise DataError(
            f"{where}image features are {system.image.shape[1]} wide and text features {system.text.shape[1]}; "
            "both must come from the same pair of views"
        )
    if (num_images, num_texts) != (len(first.image), len(first.text)):
        raise DataError(
            f"{where}{num_images} images and {num_texts} texts, but system 0 has {len(first.image)} and "
            f"{len(first.text)}; the systems must describe the same data"
        )
    if text_image.is_floating_point() or text_image.shape != (num_texts,):
        raise DataError(
            f"text_image: one image index per text is needed, int64 [{num_texts}], "
            f"got {text_image.dtype} {tuple(text_image.shape)}"
        )
    wrong = ((text_image < 0) | (text_image >= num_images)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"text_image: row {row} names image {int(text_image[row])}, there are {num_images} (0 to {num_images - 1})"
        )


def _exact(features: Tensor) -> Tensor:
    """fp64 copy, on the CPU where the device has no fp64."""
    return features.to("cpu" if features.device.type == "mps" else features.device).double()


def _scores(queries: Tensor, candidates: Tensor) -> Tensor:
    """Dot products [B, C], rounded once to fp32.

    An fp32 matrix product sums in an order that depends on the place in the matrix (and in TF32 if that is allowed),
    so equal vectors score unequally and ties are lost. Summed in fp64 and rounded, equal vectors tie anywhere.
    """
    return (queries @ candidates.T).float()


def _weighted_sum(scores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Products and sums rounded one by one: a fused multiply-add in some lanes only would break ties."""
    total = weights[0] * scores[0]
    for score, weight in zip(scores[1:], weights[1:], strict=True):
        total += weight * score
    return total


def _wrong_ahead(scores: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Wrong candidates at or above each row's best right one, int64 [B]; (row, column) are the right places."""
    values = scores[row, column]
    best = scores.new_full((len(scores),), -torch.inf).scatter_reduce(0, row, values, "amax")
    at_or_above = (scores >= best[:, None]).sum(
        dim=1, dtype=torch.int32
    )  # six times as fast as int64 on a CPU
    return at_or_above - torch.bincount(row[values >= best[row]], minlength=len(scores))
