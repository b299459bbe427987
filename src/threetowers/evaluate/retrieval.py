"""Image-text retrieval: the rank of each query's best right answer, and recall at k.

Equal captions stand for each other. For an image, every text that is equal to one of its captions is right. For a
text, every image with an equal caption is right. `data/repeats.py` says which captions are equal.

Legend: N images, M texts, D width, Q queries, C candidates, B queries in a block, W weightings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from threetowers.errors import DataError, UsageError
from threetowers.evaluate.encode import Encoded, EvaluationData
from threetowers.evaluate.ranks import both_ranks, weighted_sum
from threetowers.evaluate.result import Result

BLOCK = 256
"""Images scored at a time."""
METRICS = ("i2t_r@1", "i2t_r@5", "i2t_r@10", "t2i_r@1", "t2i_r@5", "t2i_r@10", "mean_r@1")
"""The names that `recalls` returns by default."""
DIRECTIONS = {"i2t": "image → text", "t2i": "text → image", "mean": "mean of both directions"}
"""How the names of metrics begin, and what that means."""


class System(NamedTuple):
    """The unit vectors of one model: image [N, D] and text [M, D]; a score is their dot product."""

    image: Tensor
    text: Tensor


@dataclass(frozen=True, eq=False)
class Ranks:
    """For every query, the number of wrong candidates ranked above its best right one; 0 is a hit at 1.

    i2t: int64 [number of images that have a caption]. t2i: int64 [M].
    i2t_image, t2i_image: the index of the image that each query belongs to, same shapes. Images that share captions,
    directly or through other images, all have the index of the first of them: they succeed and fail together.
    """

    i2t: Tensor
    t2i: Tensor
    i2t_image: Tensor
    t2i_image: Tensor

    def hits(self, k: int = 1) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Whether each query finds a right answer in its top k, image→text and text→image, as bool arrays."""
        return (self.i2t < k).numpy(), (self.t2i < k).numpy()

    def items(self, section: str) -> dict[str, Tensor]:
        """Both directions as per-item results: `SECTION/i2t_rank` and `SECTION/t2i_rank`."""
        return {f"{section}/i2t_rank": self.i2t, f"{section}/t2i_rank": self.t2i}

    def images(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The image of each query, in the shapes of `hits`; a bootstrap draws the queries of an image together."""
        return self.i2t_image.numpy(), self.t2i_image.numpy()

    def num_independent(self) -> int:
        """The number of different images in `images`, from which a bootstrap can draw."""
        return len(self.i2t_image.unique())


def retrieval(data: EvaluationData) -> Result | None:
    """Recall of the main pair on the validation and the test data; None without captioned images."""
    sections: dict[str, dict[str, float]] = {}
    items: dict[str, Tensor] = {}
    lines = []
    for section, name, part in (("val", "validation", data.val), ("test", "test", data.test)):
        if part is not None:
            ranks = ranks_of(part)
            sections[section] = recalls(ranks)
            items |= ranks.items(section)
            num_images = len(part.index) + len(part.bad)
            shares = f", {repeated:.1%} of their captions repeated" if (repeated := part.repeated()) else ""
            several = "" if num_images == 1 else "s"
            lines.append(
                f"retrieval on {num_images} {name} image{several}{shares}: {in_words(sections[section])}"
            )
    return Result(sections, items, tuple(lines)) if sections else None


def in_words(found: Mapping[str, float]) -> str:
    """What `recalls` returns, for people.

    >>> in_words({"i2t_r@1": 0.25, "i2t_r@5": 0.5, "mean_r@1": 0.3})
    'image → text R@1 25.0%, R@5 50.0%; mean of both directions R@1 30.0%'
    """
    sides: dict[str, list[str]] = {}
    for name, value in found.items():
        side, _, k = name.partition("_r@")
        sides.setdefault(DIRECTIONS[side], []).append(f"R@{k} {value:.1%}")
    return "; ".join(f"{side} {', '.join(each)}" for side, each in sides.items())


def ranks_of(encoded: Encoded) -> Ranks:
    """Ranks of the main pair on what was encoded, with its equal captions as equal texts; see `ranks_from_features`."""
    return ranks_from_features(*encoded.system("main"), encoded.text_image, encoded.text_group)


def ranks_from_features(
    image: Tensor, text: Tensor, text_image: Tensor, text_group: Tensor | None = None, block: int = BLOCK
) -> Ranks:
    """Ranks every captioned image's best right text among all texts, and every text's best image among all images.

    image [N, D] and text [M, D] are unit vectors, text_image int64 [M] the index of the image that each text
    describes. text_group: int64 [M], equal for equal texts; None: no text is equal to another. A score is the dot
    product rounded to fp32, and a tie counts against the model. An image without a text is a candidate and no query.
    Raises DataError for shapes, indices or values that cannot be scored.
    """
    return combined_ranks([System(image, text)], [(1.0,)], text_image, text_group, block)[0]


def recalls(ranks: Ranks, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of queries with a right answer in the top k, for every k, and the mean of both directions at 1.

    Convention of the retrieval tables on COCO and Flickr30k: of several captions of an image, any one is a hit.
    Raises UsageError for a k below 1.

        recalls(ranks_from_features(image, text, text_image=torch.tensor([0, 0, 1, 2])))["t2i_r@5"]
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
    systems: Sequence[System],
    weightings: Sequence[Sequence[float]],
    text_image: Tensor,
    text_group: Tensor | None = None,
    block: int = BLOCK,
) -> list[Ranks]:
    """Ranks under the scores Σ_s weight_s · score_s, one result per weighting.

    The systems encode the same images and texts; their widths may differ. A system's scores are computed once for all
    weightings. See `ranks_from_features`.
    """
    for place, system in enumerate(systems):
        where = f"system {place}: " if len(systems) > 1 else ""
        _check_system(system, systems[0], text_image, where)
    text_id = text_image.cpu()
    if text_group is not None and (text_group.is_floating_point() or text_group.shape != text_id.shape):
        raise DataError(
            f"text_group: one number per text is needed, int64 {list(text_id.shape)}, "
            f"got {text_group.dtype} {list(text_group.shape)}"
        )
    captioned = torch.unique(text_id)
    i2t, t2i = both_ranks(systems, weightings, text_id, block, text_group)
    linked = _first_linked(text_id, text_group, len(systems[0].image))
    return [Ranks(a[captioned], b, linked[captioned], linked[text_id]) for a, b in zip(i2t, t2i, strict=True)]


def _first_linked(text_image: Tensor, text_group: Tensor | None, num_images: int) -> Tensor:
    """The first of the images that each image is linked with by equal captions, int64 [N]."""
    if text_group is None:
        return torch.arange(num_images)
    groups = text_group.cpu().unique(return_inverse=True)[1].numpy()
    return torch.from_numpy(first_linked(text_image.numpy(), groups, num_images))


def first_linked(items: NDArray[Any], shared: NDArray[Any], num_items: int) -> NDArray[np.int64]:
    """For each item the first of those that it is linked with, directly or through others, int64 [num_items].

    items, shared: of each link the item, and the number of what it has; items that have the same are linked.
    """
    size = num_items + len(
        shared
    )  # items and what they have are the nodes; there is no more of it than links
    edges = items, num_items + shared
    graph = coo_array((np.ones(len(items), dtype=bool), edges), shape=(size, size))
    parts = connected_components(graph, directed=False)[1][:num_items]
    first, place = np.unique(parts, return_index=True, return_inverse=True)[1:]
    linked: NDArray[np.int64] = first[place].astype(np.int64)
    return linked


@torch.no_grad()
def weighted_ranks(
    systems: Sequence[tuple[Tensor, Tensor]],
    weightings: Sequence[Sequence[float]],
    query_id: Tensor,
    candidate_id: Tensor,
    block: int = BLOCK,
) -> Tensor:
    """Rank of each query's best right candidate, int64 [W, Q] on the CPU: how many wrong ones score at least as high.

    systems: pairs of queries [Q, D] and candidates [C, D]. weightings: each holds one weight per system. A candidate
    is right when its id equals the query's (query_id [Q], candidate_id [C]); every query needs a right one.
    """
    systems = [(exact(queries), exact(candidates)) for queries, candidates in systems]
    device = systems[0][0].device
    query_id, candidate_id = query_id.to(device), candidate_id.to(device)
    parts = []
    for start in range(0, len(query_id), block):
        rows = slice(start, start + block)
        scores = [_scores(queries[rows], candidates) for queries, candidates in systems]
        right = (query_id[rows, None] == candidate_id).nonzero(as_tuple=True)
        combined = (weighted_sum(scores, weights) for weights in weightings)
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


def exact(features: Tensor) -> Tensor:
    """An fp64 copy, on the CPU where the device has no fp64."""
    return features.to("cpu" if features.device.type == "mps" else features.device).double()


def _scores(queries: Tensor, candidates: Tensor) -> Tensor:
    """Dot products [B, C], summed in fp64 and rounded once to fp32, so that equal vectors have equal scores.

    An fp32 matrix product sums in an order that depends on the place in the matrix (and in TF32 where that is
    allowed): equal vectors would get different scores, and ties would be lost.
    """
    return (queries @ candidates.T).float()


def _wrong_ahead(scores: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """How many wrong candidates score at least each row's best right one, int64 [B]; (row, column): the right ones."""
    values = scores[row, column]
    best = scores.new_full((len(scores),), -torch.inf).scatter_reduce(0, row, values, "amax")
    # on a CPU an int32 sum is six times as fast as an int64 sum
    at_or_above = (scores >= best[:, None]).sum(dim=1, dtype=torch.int32)
    return at_or_above - torch.bincount(row[values >= best[row]], minlength=len(scores))
