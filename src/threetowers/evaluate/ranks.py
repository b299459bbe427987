"""The ranks of both directions of retrieval from one fp32 product per tile; close scores are settled in fp64.

An fp32 dot product is off by a known bound. A score that is further than the bound from a query's best right score is
above or below it for certain; the few that are nearer are computed again in fp64, rounded to fp32 and compared. The
ranks are therefore those of `retrieval.weighted_ranks`, which computes every score so.

A text is right for an image that has an equal text. Equal texts are a group: every image of a group is right for every
text of it, and no other pair is. Only these pairs are listed, and what lists them never has N × M entries.

Legend: N images, M texts, D width, S systems, W weightings, R rows and C columns of a tile, P pairs of image and text.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

COLUMNS = 4
"""Columns of a tile for each row: with 256 rows a tile of scores takes 1 MB, which stays in the cache."""
_DENSE = 0.02  # share of close scores from which a product in fp64 is faster than dot products one by one
_PAIRS = 1 << 14  # dot products at a time
_FEW = 8  # images of a group up to which dot products are taken one by one; above it one product is faster
_ULP = 2.0**-23
Index = slice | Tensor


@torch.no_grad()
def both_ranks(
    systems: Sequence[tuple[Tensor, Tensor]],
    weightings: Sequence[Sequence[float]],
    text_image: Tensor,
    block: int,
    text_group: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How many wrong candidates score at least as high as a query's best right one: int64 [W, N] and [W, M] on the CPU.

    systems: image vectors [N, D] and text vectors [M, D] of each. weightings: each holds one weight per system.
    text_image: int64 [M], the image of each text. An image without a text has the rank −1. block: rows of a tile.
    text_group: int64 [M], equal for equal texts; None: all differ.
    """
    device = systems[0][0].device
    if device.type == "mps":  # which has no fp64
        device = torch.device("cpu")
    scorer = _Scorer([(image.to(device), text.to(device)) for image, text in systems], weightings)
    owner = text_image.to(device)
    group = torch.arange(len(owner), device=device) if text_group is None else text_group.to(device)
    num_images, num_texts = len(systems[0][0]), len(owner)
    row_best = _Best(len(weightings), num_images, device)
    column_best = _Best(len(weightings), num_texts, device)
    for images, texts, scores in _right_scores(scorer, owner, group, num_images, block):
        row_best.add(images, scores)
        column_best.add(texts, scores)
    # the right candidates that reach the best are counted too
    i2t, t2i = -row_best.count, -column_best.count
    for top in range(0, num_images, block):
        rows = slice(top, min(top + block, num_images))
        for left in range(0, num_texts, COLUMNS * block):
            columns = slice(left, min(left + COLUMNS * block, num_texts))
            for weighting, scores in enumerate(scorer.tile(rows, columns)):
                bounds = row_best.score[weighting, rows], column_best.score[weighting, columns]
                by_row, by_column = _at_or_above(scorer, weighting, scores, rows, columns, *bounds)
                i2t[weighting, rows] += by_row
                t2i[weighting, columns] += by_column
    i2t[:, torch.bincount(owner, minlength=num_images) == 0] = -1
    return i2t.cpu(), t2i.cpu()


class _Best:
    """Of each query the highest score of a right candidate, fp32 [W, Q], and how many reach it, int64 [W, Q]."""

    def __init__(self, num_weightings: int, num_queries: int, device: torch.device) -> None:
        self.score = torch.full((num_weightings, num_queries), -torch.inf, device=device)
        self.count = torch.zeros(num_weightings, num_queries, dtype=torch.int64, device=device)

    def add(self, query: Tensor, scores: Tensor) -> None:
        """Further right candidates: the query of each [P], and its scores [W, P]."""
        some = query.unique()
        before = self.score[:, some]
        query = query.expand_as(scores)
        self.score.scatter_reduce_(1, query, scores, "amax")
        self.count[:, some] *= self.score[:, some] == before
        self.count.scatter_add_(1, query, (scores == self.score.gather(1, query)).long())


def _right_scores(
    scorer: "_Scorer", text_image: Tensor, text_group: Tensor, num_images: int, block: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every right pair once: the images [P], the texts [P] and their exact scores [W, P], some pairs at a time."""
    group = text_group.unique(return_inverse=True)[1]
    pairs = (group * num_images + text_image).unique()  # each image of a group once, by group
    image_of, num_own = pairs % num_images, torch.bincount(pairs // num_images)
    first = num_own.cumsum(0) - num_own
    few = (num_own[group] <= _FEW).nonzero().flatten()
    for start in range(0, len(few), _PAIRS):
        texts = few[start : start + _PAIRS]
        times = num_own[group[texts]]
        own = first[group[texts]] - (times.cumsum(0) - times)
        pair_text = texts.repeat_interleave(times)
        place = own.repeat_interleave(times) + torch.arange(len(pair_text), device=texts.device)
        pair_image = image_of[place]
        yield pair_image, pair_text, scorer.exact(pair_image, pair_text)
    by_group, num_texts = group.argsort(), torch.bincount(group)
    begin = num_texts.cumsum(0) - num_texts
    for number in (num_own > _FEW).nonzero().flatten().tolist():
        own_images = image_of[first[number] :][: num_own[number]]
        own_texts = by_group[begin[number] :][: num_texts[number]]
        for images in own_images.split(block):
            for texts in own_texts.split(COLUMNS * block):
                scores = scorer.exact_tile(images, texts).flatten(1)
                yield images.repeat_interleave(len(texts)), texts.repeat(len(images)), scores


def _at_or_above(
    scorer: "_Scorer",
    weighting: int,
    scores: Tensor,
    rows: slice,
    columns: slice,
    row_best: Tensor,
    column_best: Tensor,
) -> tuple[Tensor, Tensor]:
    """How many scores of a tile [R, C] reach the row's best right score, int64 [R], and the column's, int64 [C]."""
    slack = scorer.slack[weighting]
    counts, close = [], []
    for dim, limit in ((1, row_best[:, None]), (0, column_best[None])):
        above = scores > limit + slack
        counts.append(above.sum(dim, dtype=torch.int32))
        close.append((scores >= limit - slack).logical_xor_(above))
    row, column = close[0].logical_or(close[1]).nonzero(as_tuple=True)
    if len(row) > _DENSE * scores.numel():
        exact = scorer.exact_tile(rows, columns, weighting)
        return (exact >= row_best[:, None]).sum(1), (exact >= column_best).sum(0)
    if len(row):
        found = scorer.exact(row + rows.start, column + columns.start, weighting)
        for place, index, best in ((0, row, row_best), (1, column, column_best)):
            counts[place] += torch.bincount(
                index[close[place][row, column] & (found >= best[index])], minlength=len(best)
            )
    return counts[0].long(), counts[1].long()


class _Scorer:
    """Scores of images and texts under several weightings, fast or exact.

    slack: by weighting, a bound of the difference between a fast score and an exact one.
    """

    def __init__(
        self, systems: Sequence[tuple[Tensor, Tensor]], weightings: Sequence[Sequence[float]]
    ) -> None:
        self.systems, self.weightings = systems, weightings
        self.fast = [(image.float(), text.float()) for image, text in systems]
        errors = []
        for image, text in self.fast:
            # The sum of D products in any order is off by at most D·u/(1 − D·u) times the product of the norms.
            share = image.shape[1] * _ULP / 2
            largest = float(image.norm(dim=1).max()) * float(text.norm(dim=1).max())
            errors.append(largest * (share / (1 - share) + 4 * _ULP))
        self.slack = [
            2 * sum(abs(weight) * error for weight, error in zip(weights, errors, strict=True))
            for weights in weightings
        ]

    def tile(self, rows: slice, columns: slice) -> Iterator[Tensor]:
        """The fast scores of some images and texts under each weighting, fp32 [R, C]."""
        with full_precision(), torch.autocast(self.fast[0][0].device.type, enabled=False):
            scores = [image[rows] @ text[columns].T for image, text in self.fast]
        for weights in self.weightings:
            yield weighted_sum(scores, weights)

    def exact_tile(self, rows: Index, columns: Index, weighting: int | None = None) -> Tensor:
        """The exact scores of some images and texts under one weighting, fp32 [R, C], or under all, [W, R, C]."""
        scores = [(image[rows].double() @ text[columns].double().T).float() for image, text in self.systems]
        return self._weighted(scores, weighting)

    def exact(self, images: Tensor, texts: Tensor, weighting: int | None = None) -> Tensor:
        """The exact scores of P pairs under one weighting, fp32 [P], or under all, [W, P]."""
        parts = []
        for start in range(0, len(images), _PAIRS):
            some = slice(start, start + _PAIRS)
            pairs = [
                (image[images[some]].double(), text[texts[some]].double()) for image, text in self.systems
            ]
            parts.append([(image * text).sum(1).float() for image, text in pairs])
        scores = [torch.cat(system) for system in zip(*parts, strict=True)]
        return self._weighted(scores, weighting)

    def _weighted(self, scores: Sequence[Tensor], weighting: int | None) -> Tensor:
        if weighting is not None:
            return weighted_sum(scores, self.weightings[weighting])
        return torch.stack([weighted_sum(scores, weights) for weights in self.weightings])


def weighted_sum(scores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum with every product and sum rounded: a fused multiply-add in some lanes would break ties."""
    if len(scores) == 1 and weights[0] == 1.0:
        return scores[0]
    total = weights[0] * scores[0]
    for score, weight in zip(scores[1:], weights[1:], strict=True):
        total += weight * score
    return total


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Products of fp32 matrices in fp32 also where TF32 or bf16 were allowed for them; the setting is restored."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller has used the newer settings, which cannot be mixed with the older one
        places = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
        newer = [place.fp32_precision for place in places]
        try:
            for place in places:
                place.fp32_precision = "ieee"
            yield
        finally:
            for place, value in zip(places, newer, strict=True):
                place.fp32_precision = value
        return
    if before == "highest":
        yield
        return
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)
