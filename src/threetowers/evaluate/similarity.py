"""How alike two representations of the same samples are, and how one representation uses its space.

The two kinds of similarity answer different questions. Centred kernel alignment (CKA) compares all pairs of samples at
once, and a few directions of large variance can decide it. The overlap of nearest neighbours compares what lies close
by. Neither changes when a representation is rotated or scaled, so that towers of different widths can be compared.

Legend: N samples, D and E widths, K neighbours.
"""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from threetowers.errors import DataError, UsageError
from threetowers.evaluate.neighbours import nearest
from threetowers.evaluate.retrieval import check_features
from threetowers.evaluate.ridge import ridge

NEIGHBOURS = 10
"""Neighbours that are compared where nothing else is said, as in arXiv 2405.07987."""
Found = TypeVar("Found")
_BLOCK = 512  # rows compared at a time
_ROUNDING = 1e-12  # share of a sum below which nothing but rounding is left of it
_EVEN = 1e-3  # by how much the length of a unit vector may differ from 1


class UndefinedError(DataError):
    """Features without the differences that a figure is about, such as rows that are all equal."""


class Cka(NamedTuple):
    """Linear CKA of two representations.

    linear: in [0, 1]; independent features have more than 0, the more the fewer samples there are for their widths.
    debiased: in [-1, 1]; independent features have 0 on average, whatever their number and widths.
    """

    linear: float
    debiased: float


class Representation:
    """Features [N, D] of N samples, and what is computed of them once. k: the number of neighbours.

    What is not defined for features that hold no differences, such as CKA, is None.
    """

    def __init__(self, features: Tensor, k: int = NEIGHBOURS) -> None:
        self.features, self.k = features, k

    @cached_property
    def neighbours(self) -> Tensor:
        return neighbours(self.features, self.k)

    def similarity(self, other: "Representation") -> dict[str, float | None]:
        """`cka` (debiased), `cka_linear` and `overlap` with a representation of the same samples."""
        found = _if_defined(lambda: cka(self.features, other.features))
        return {
            "cka": None if found is None else found.debiased,
            "cka_linear": None if found is None else found.linear,
            "overlap": shared_neighbours(self.neighbours, other.neighbours),
        }

    def space(self) -> dict[str, float | int | None]:
        """`width`, `effective_rank` about the mean, and `uniformity` of unit vectors."""
        return {
            "width": self.features.shape[1],
            "effective_rank": _if_defined(lambda: effective_rank(_centred(self.features))),
            "uniformity": _if_defined(lambda: uniformity(self.features)),
        }


def _if_defined(measure: Callable[[], Found]) -> Found | None:
    try:
        return measure()
    except UndefinedError:
        return None


class Projection(NamedTuple):
    """Rows in few dimensions. points: float64 [N, dims]. shares: of the variance, that of each dimension."""

    points: Tensor
    shares: list[float]


def cka(x: Tensor, y: Tensor) -> Cka:
    """Centred kernel alignment of x [N, D] and y [N, E] with the linear kernel; row i of both is the same sample.

    With centred columns, ``linear`` is ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) in Frobenius norms (Kornblith et al. 2019, arXiv
    1905.00414, section 3). ``debiased`` puts the unbiased estimate of HSIC (Song et al. 2012, JMLR 13) into the same
    quotient, as Nguyen et al. do (arXiv 2010.15327). Both are computed in float64 from D × D, D × E and E × E matrices;
    nothing has N × N entries. Raises DataError for fewer than 4 rows, for different numbers of rows, and for rows of
    which all but one are equal (UndefinedError).

        cka(run_a["test/img"], run_b["test/img"]).debiased
    """
    _check_pair(x, y, least=4)
    a, b = _centred(x), _centred(y)
    cross, own_x, own_y = _Products.of(a, b), _Products.of(a, a), _Products.of(b, b)
    for own, name in ((own_x, "x"), (own_y, "y")):
        if own.total == 0 or own.hsic(len(x)) <= _ROUNDING * own.total / len(x) ** 2:
            raise UndefinedError(
                f"CKA: all rows of {name} but at most one are equal; nothing can be compared"
            )
    return Cka(
        cross.total / (own_x.total * own_y.total) ** 0.5,
        cross.hsic(len(x)) / (own_x.hsic(len(x)) * own_y.hsic(len(x))) ** 0.5,
    )


class _Products(NamedTuple):
    """What both forms of CKA need of two centred representations with the kernels K = XXᵀ and L = YYᵀ.

    total: ‖YᵀX‖², which is Σ K_ij L_ij. diagonal: Σ K_ii L_ii. traces: Σ K_ii times Σ L_ii.
    """

    total: float
    diagonal: float
    traces: float

    @staticmethod
    def of(x: Tensor, y: Tensor) -> "_Products":
        total = (y.T @ x).square().sum().item()
        squares_x, squares_y = x.square().sum(1), y.square().sum(1)
        return _Products(
            total, (squares_x * squares_y).sum().item(), (squares_x.sum() * squares_y.sum()).item()
        )

    def hsic(self, n: int) -> float:
        """The unbiased estimate of HSIC.

        With K̃ and L̃, the kernels with a diagonal of zeros, it is
        [tr K̃L̃ + (1ᵀK̃1)(1ᵀL̃1) / ((n−1)(n−2)) − 2/(n−2) 1ᵀK̃L̃1] / (n(n−3)). The estimate does not depend on the means
        of the columns. With centred columns K1 = 0, so K̃1 is minus the diagonal of K, and the three terms are
        total − diagonal, traces / ((n−1)(n−2)) and 2/(n−2) diagonal.
        """
        terms = self.total - n / (n - 2) * self.diagonal + self.traces / ((n - 1) * (n - 2))
        return terms / (n * (n - 3))


def neighbour_overlap(x: Tensor, y: Tensor, k: int = NEIGHBOURS) -> float:
    """Share of the k nearest neighbours by cosine that a sample has in both x [N, D] and y [N, E], mean over samples.

    It is the mutual nearest-neighbour metric of Huh et al. 2024 (arXiv 2405.07987), with cosines. Chance gives
    k / (N − 1). Raises as `neighbours` does, and DataError for different numbers of rows.
    """
    _check_pair(x, y, least=2)
    return shared_neighbours(neighbours(x, k), neighbours(y, k))


def neighbours(x: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """The k other rows that are nearest to each row by cosine, int64 [N, k], each row in rising order.

    Cosines are those of `neighbours.nearest`. Of equally near rows the first ones are taken, so that equal
    representations have equal neighbours. Raises DataError for features that cannot be used, UsageError for a k that is
    not from 1 to N − 1.
    """
    check_features(x, "features")
    if not 1 <= k < len(x):
        raise UsageError(
            f"k: {k} neighbours of {len(x)} rows were asked for; it must be from 1 to {len(x) - 1}"
        )
    found = nearest(x, x, k + 1).rows
    other = found != torch.arange(len(x), device=x.device)[:, None]
    other[:, -1] &= ~other.all(dim=1)  # where k + 1 earlier rows are equal to the row itself
    return found[other].view(-1, k).sort(dim=1).values


def shared_neighbours(a: Tensor, b: Tensor) -> float:
    """Share of the neighbours a [N, K] that are among b [N, K] too, mean over samples; see `neighbour_overlap`."""
    return (a[:, :, None] == b[:, None, :]).any(dim=2).double().mean().item()


def effective_rank(x: Tensor) -> float:
    """The number of directions that x [N, D] uses: exp of the entropy of its singular values, normalised to sum 1.

    It is from 1 to min(N, D), and min(N, D) when all directions are used equally (Roy & Vetterli 2007,
    EUSIPCO). The matrix is taken as it is: subtract the mean first where it is not to count as a direction. Raises
    UndefinedError for a matrix of zeros.
    """
    check_features(x, "features")
    values = torch.linalg.svdvals(x.double())
    if values.sum() == 0:
        raise UndefinedError("effective rank: all features are zero, so no direction is used")
    entropy: Tensor = torch.special.entr(values / values.sum()).sum()
    return entropy.exp().item()


def alignment(x: Tensor, y: Tensor) -> float:
    """Mean squared distance of the partners x [N, D] and y [N, D], unit vectors: from 0, equal, to 4.

    Wang & Isola 2020 (arXiv 2005.10242, section 4.1) with α = 2. Raises DataError for rows that are no unit vectors,
    and for shapes that differ.
    """
    _check_pair(x, y, least=1, same_width=True)
    return (_unit(x, "x") - _unit(y, "y")).square().sum(1).mean().item()


def uniformity(x: Tensor) -> float:
    """Logarithm of the mean Gaussian potential of all pairs of x [N, D], unit vectors: from 0, equal, to about −4.

    log mean exp(−t ‖x_i − x_j‖²) over i ≠ j with t = 2 (Wang & Isola 2020, arXiv 2005.10242, section 4.1). Lower values
    mean a more even spread over the sphere. Raises DataError for fewer than 2 rows, and for rows that are no unit
    vectors.
    """
    check_features(x, "features")
    if len(x) < 2:
        raise DataError("uniformity: it is a mean over pairs, and there is one row only")
    rows = _unit(x, "features")
    sums = []
    for start in range(0, len(x), _BLOCK):
        exponents = 4 * (rows[start : start + _BLOCK] @ rows.T) - 4  # of unit vectors ‖a − b‖² = 2 − 2 a·b
        own = torch.arange(len(exponents), device=x.device)
        exponents[own, start + own] = -torch.inf
        sums.append(exponents.logsumexp(dim=(0, 1)))
    pairs = torch.tensor(len(x) * (len(x) - 1), dtype=torch.float64, device=x.device)
    return (torch.stack(sums).logsumexp(0) - pairs.log()).item()


def modality_gap(image: Tensor, text: Tensor) -> float:
    """Distance of the mean of image [N, D] from the mean of text [M, D], unit vectors: from 0 to 2.

    Liang et al. 2022 (arXiv 2203.02053). Raises DataError for widths that differ and for rows that are no
    unit vectors.
    """
    _check_widths(image, text)
    return float((_unit(image, "image").mean(0) - _unit(text, "text").mean(0)).norm())


def separability(image: Tensor, text: Tensor) -> float:
    """Accuracy with which a linear map tells image [N, D] from text [N, D], row i being a pair; chance is 0.5.

    `ridge` is fitted on every other pair and tested on the others. Raises DataError for fewer than 4 rows and for
    shapes that differ.
    """
    _check_pair(image, text, least=4, same_width=True)

    def both(first: int) -> tuple[Tensor, Tensor]:
        parts = image[first::2], text[first::2]
        labels = torch.cat([torch.full((len(part),), place) for place, part in enumerate(parts)])
        return torch.cat(parts), labels.to(image.device)

    return ridge(*both(0), num_classes=2).accuracy(*both(1))


def principal_map(x: Tensor, dims: int = 2) -> Projection:
    """The rows of x [N, D] along the directions of largest variance (principal component analysis).

    The largest value of each dimension is positive, so that a repetition gives the same map. Raises UndefinedError
    for rows that are all equal, and for fewer than `dims` directions.
    """
    check_features(x, "features")
    rows = _centred(x)
    left, values, _ = torch.linalg.svd(rows, full_matrices=False)
    variance = values.square()
    if len(values) < dims or variance.sum() == 0:
        raise UndefinedError(
            f"{len(x)} rows of width {x.shape[1]} have fewer than {dims} directions of variance"
        )
    points = left[:, :dims] * values[:dims]
    largest = points.gather(0, points.abs().argmax(0, keepdim=True))
    points = points * torch.where(largest < 0, -1.0, 1.0)
    return Projection(points, (variance[:dims] / variance.sum()).tolist())


def _centred(x: Tensor) -> Tensor:
    """The columns minus their means, fp64; columns whose values differ by rounding alone become zeros."""
    values = x.double()
    centred = values - values.mean(0)
    centred[:, centred.abs().amax(0) <= _ROUNDING * values.abs().amax(0)] = 0
    return centred


def _unit(x: Tensor, name: str) -> Tensor:
    """Unit vectors in fp64; raises DataError for rows that are none."""
    rows = x.double()
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    wrong = ((lengths - 1).abs() > _EVEN).flatten().nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{name}: unit vectors are needed, and row {row} has length {lengths[row].item():.3g}; divide rows by "
            "their lengths"
        )
    return rows / lengths


def _check_widths(x: Tensor, y: Tensor) -> None:
    check_features(x, "first features")
    check_features(y, "second features")
    if x.shape[1] != y.shape[1]:
        raise DataError(f"features of one space are needed, got widths {x.shape[1]} and {y.shape[1]}")


def _check_pair(x: Tensor, y: Tensor, *, least: int, same_width: bool = False) -> None:
    """Raises DataError unless both have the same samples, at least so many, and the same width where that matters."""
    check_features(x, "first features")
    check_features(y, "second features")
    if same_width:
        _check_widths(x, y)
    if len(x) != len(y):
        raise DataError(f"row i of both must be the same sample, got {len(x)} and {len(y)} rows")
    if len(x) < least:
        raise DataError(f"at least {least} samples are needed, got {len(x)}")
