"""The nearest of a gallery's vectors to a query: exactly, and beyond a million of them by faiss where it is installed.

Legend: Q queries, C candidates, D width.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from threetowers.progress import Progress, warn_once

EXACT_UP_TO = 1_000_000
"""Candidates of which every one is compared with each query."""
Nearest = Callable[[Tensor, int], list[list[tuple[float, int]]]]
"""For each of Q queries [Q, D] the k highest products with the candidates, and where they are, best first."""
_AGAIN = 4  # times as many candidates as are wanted get their exact product
_PROBED = 1 / 16  # of the lists
_LEARNED = 64  # candidates for each list, from which the lists are learned
_ADDED = 100_000  # at a time


def nearest(candidates: Tensor) -> Nearest:
    """The search among candidates [C, D], fp32, which must not change afterwards.

    Up to EXACT_UP_TO, or without faiss, it is `exact`; without faiss a warning says so. Otherwise it is `approximate`.
    """
    if len(candidates) > EXACT_UP_TO:
        try:
            return approximate(candidates, importlib.import_module("faiss"))
        except ImportError:
            warn_once(
                f"each query is compared with all of {len(candidates):,} vectors; "
                "pip install 'threetowers[faiss]' for a faster search that may miss some"
            )
    return lambda queries, k: exact(queries, candidates, k)


def exact(queries: Tensor, candidates: Tensor, k: int) -> list[list[tuple[float, int]]]:
    """For each query the k highest products with candidates [C, D], and where they are, best first.

    queries [Q, D]. A plain product and `topk`: what costs the time is to read the candidates once, for however many
    queries, and a search that first finds out which of them matter reads them all the same.
    """
    if not len(candidates):
        return [[] for _ in queries]
    scores = (candidates @ queries[0])[None] if len(queries) == 1 else queries @ candidates.T
    return _pairs(*scores.topk(min(k, len(candidates)), dim=1))


def approximate(candidates: Tensor, faiss: Any) -> Nearest:
    """A search in a sixteenth of faiss's inverted lists, whose scores are exact and which may miss some candidates.

    The lists hold the candidates in fp16. Of those that look best, four times as many as are wanted are compared again
    in fp32.
    """
    vectors = candidates.numpy()
    num_lists = max(round(len(vectors) ** 0.5), 1)
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(vectors.shape[1]), vectors.shape[1], num_lists,
        faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT,
    )  # fmt: skip
    index.cp.max_points_per_centroid = _LEARNED
    index.nprobe = max(round(num_lists * _PROBED), 1)
    index.train(vectors[:: max(len(vectors) // (_LEARNED * num_lists), 1)])
    progress = Progress("indexing vectors for search", len(vectors), "vectors", quiet_seconds=2)
    for start in range(0, len(vectors), _ADDED):
        index.add(vectors[start : start + _ADDED])
        progress.update(min(start + _ADDED, len(vectors)))

    def search(queries: Tensor, k: int) -> list[list[tuple[float, int]]]:
        _, places = index.search(queries.numpy(), min(_AGAIN * k, len(vectors)))
        found = torch.from_numpy(places)
        scores = torch.einsum("qkd,qd->qk", candidates[found.clamp_min(0)], queries)
        scores[found < 0] = -torch.inf  # where the lists that were looked at hold fewer
        best = scores.topk(min(k, scores.shape[1]), dim=1)
        return [
            [pair for pair in row if pair[0] > -torch.inf]
            for row in _pairs(best.values, found.gather(1, best.indices))
        ]

    return search


def _pairs(scores: Tensor, places: Tensor) -> list[list[tuple[float, int]]]:
    return [list(zip(*row, strict=True)) for row in zip(scores.tolist(), places.tolist(), strict=True)]
