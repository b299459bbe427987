"""Similarities of representations: plain N × N references, invariances, oracles and what cannot be compared."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from threetowers.errors import DataError, UsageError
from threetowers.evaluate.similarity import (
    Representation,
    alignment,
    cka,
    effective_rank,
    modality_gap,
    neighbour_overlap,
    neighbours,
    principal_map,
    separability,
    uniformity,
)
from threetowers.objective.losses import unit


def normal(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def rotation(width: int, seed: int = 1) -> Tensor:
    turned: Tensor = torch.linalg.qr(normal(width, width, seed).double()).Q
    return turned


def related(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two representations of other widths that share a part."""
    shared = normal(rows, 6, seed)
    first = torch.cat([shared, 0.7 * normal(rows, 5, seed + 1)], dim=1) + 3
    return first, shared @ normal(6, 17, seed + 2) + normal(rows, 17, seed + 3)


def plain_cka(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Both forms from N × N kernels: the centred one, and the unbiased one with zeros on the diagonals."""
    n = len(x)
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    kernels = [each.double() @ each.double().T for each in (x, y)]

    def centred(a: Tensor, b: Tensor) -> float:
        return float((centring @ a @ centring * (centring @ b @ centring)).sum())

    def unbiased(a: Tensor, b: Tensor) -> float:
        a, b, one = a - a.diag().diag(), b - b.diag().diag(), torch.ones(n, dtype=torch.float64)
        terms = (a @ b).trace() + (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
        return float((terms - 2 / (n - 2) * (one @ a @ b @ one)) / (n * (n - 3)))

    k, m = kernels
    return tuple(form(k, m) / (form(k, k) * form(m, m)) ** 0.5 for form in (centred, unbiased))  # type: ignore[return-value]


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 60), st.integers(0, 2**32), st.booleans())
def test_cka_equals_its_plain_reference(rows: int, seed: int, half: bool) -> None:
    x, y = related(rows, seed)
    if half:
        x = x.half()
    found, (linear, debiased) = cka(x, y), plain_cka(x, y)
    assert found.linear == pytest.approx(linear, rel=1e-9)
    assert found.debiased == pytest.approx(debiased, rel=1e-6, abs=1e-9)


def test_a_large_mean_takes_no_digits_from_cka() -> None:
    x, y = related(50)
    shifted = x.double() + 1e4
    assert cka(shifted, y) == pytest.approx(cka(x, y), rel=1e-8)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.floats(1e-3, 1e3))
def test_rotation_scale_and_shift_change_no_similarity(seed: int, factor: float) -> None:
    x, y = (each.double() for each in related(40, seed))
    turned = factor * x @ rotation(x.shape[1], seed)
    assert cka(turned + 5 * factor, y) == pytest.approx(cka(x, y), rel=1e-7, abs=1e-9)
    assert effective_rank(turned) == pytest.approx(effective_rank(x), rel=1e-9)
    assert torch.equal(neighbours(turned, 5), neighbours(x, 5))
    assert cka(x, turned) == pytest.approx((1.0, 1.0))
    assert cka(x, y) == pytest.approx(cka(y, x))
    assert neighbour_overlap(x, y, 5) == neighbour_overlap(y, x, 5)


def test_unequal_scaling_of_directions_changes_similarity() -> None:
    x = normal(80, 8)
    stretched = x * torch.tensor([9.0, 1, 1, 1, 1, 1, 1, 1])
    assert cka(x, stretched).linear < 0.9 and neighbour_overlap(x, stretched) < 0.9


def test_identical_features_are_1_and_independent_ones_near_0() -> None:
    x = normal(400, 32)
    assert cka(x, x) == pytest.approx((1.0, 1.0))
    assert neighbour_overlap(x, x) == 1
    y = normal(400, 48, seed=9)
    assert abs(cka(x, y).debiased) < 0.02
    assert neighbour_overlap(x, y) == pytest.approx(10 / 399, abs=0.01)


def test_linear_cka_of_few_samples_is_biased_and_the_debiased_one_is_not() -> None:
    pairs = [cka(normal(24, 40, seed), normal(24, 40, seed + 1000)) for seed in range(60)]
    assert sum(pair.linear for pair in pairs) / 60 > 0.5
    assert abs(sum(pair.debiased for pair in pairs)) / 60 < 0.03


def plain_neighbours(x: Tensor, k: int) -> list[list[int]]:
    rows = unit(x).double()
    found = []
    for i, row in enumerate(rows):
        scores = (rows * row).sum(1).float().tolist()
        order = sorted((j for j in range(len(x)) if j != i), key=lambda j: (-scores[j], j))
        found.append(sorted(order[:k]))
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 30), st.booleans(), st.data())
def test_neighbours_are_those_of_a_full_sort_with_ties_to_the_first(
    seed: int, rows: int, ties: bool, data: st.DataObject
) -> None:
    x = normal(rows, 3, seed)
    if ties:
        x = x.round()
    k = data.draw(st.integers(1, rows - 1))
    assert neighbours(x, k).tolist() == plain_neighbours(x, k)


def test_blocks_do_not_change_uniformity(monkeypatch: pytest.MonkeyPatch) -> None:
    x = unit(normal(37, 5).round())
    x[x.norm(dim=1) == 0] = unit(torch.ones(5))
    whole = uniformity(x)
    monkeypatch.setattr("threetowers.evaluate.similarity._BLOCK", 8)
    assert uniformity(x) == pytest.approx(whole, rel=1e-12)


def test_rows_that_are_all_equal_have_the_first_others_as_neighbours() -> None:
    assert neighbours(torch.ones(6, 3), 2).tolist() == [[1, 2], [0, 2], *[[0, 1]] * 4]


def test_overlap_counts_what_two_sets_share() -> None:
    def circle(*degrees: float) -> Tensor:
        angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    in_order, exchanged = circle(0, 40, 81, 123), circle(0, 81, 40, 123)
    assert neighbours(in_order, 1).flatten().tolist() == [1, 0, 1, 2]
    assert neighbours(exchanged, 1).flatten().tolist() == [2, 2, 0, 1]
    assert neighbour_overlap(in_order, exchanged, 1) == 0
    assert neighbours(in_order, 2).tolist() == [[1, 2], [0, 2], [1, 3], [1, 2]]
    assert neighbours(exchanged, 2).tolist() == [[1, 2], [2, 3], [0, 1], [1, 2]]
    assert neighbour_overlap(in_order, exchanged, 2) == 6 / 8


@pytest.mark.parametrize(("rows", "width"), [(30, 6), (6, 30)])
def test_effective_rank_of_equal_and_of_single_directions(rows: int, width: int) -> None:
    equal = rotation(30)[:, :6]  # orthonormal columns
    assert effective_rank(equal if rows > width else equal.T) == pytest.approx(6)
    assert effective_rank(normal(rows, 1) @ normal(1, width)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.ones(1, 5)) == pytest.approx(1)


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    sizes = torch.tensor([4.0, 2.0, 1.0, 1.0])
    x = rotation(9, 2)[:, :4] * sizes.double() @ rotation(4, 3)
    p = (sizes / sizes.sum()).tolist()
    assert effective_rank(x) == pytest.approx(math.exp(-sum(each * math.log(each) for each in p)))


def test_alignment_and_uniformity_equal_their_definitions() -> None:
    x, y = unit(normal(30, 7)), unit(normal(30, 7, 4))
    assert alignment(x, y) == pytest.approx((x - y).norm(dim=1).square().mean().item(), rel=1e-5)
    assert uniformity(x) == pytest.approx(torch.pdist(x).square().mul(-2).exp().mean().log().item(), rel=1e-4)
    assert alignment(x, x) == 0 and alignment(x, -x) == pytest.approx(4)
    same = unit(torch.ones(1, 3)).expand(5, -1)
    assert uniformity(same) == pytest.approx(0, abs=1e-9)
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8)


def test_the_gap_is_the_distance_of_the_means_and_separability_sees_it() -> None:
    pairs = unit(normal(200, 8))
    assert modality_gap(pairs, pairs) == 0
    assert separability(pairs, unit(pairs + 0.5 * normal(200, 8, 3))) == pytest.approx(0.5, abs=0.12)
    shift = torch.tensor([2.0] + [0.0] * 7)
    image, text = unit(pairs + shift), unit(pairs - shift)
    assert modality_gap(image, text) == pytest.approx((image.mean(0) - text.mean(0)).norm().item(), rel=1e-5)
    assert modality_gap(image, text) > 1 and separability(image, text) == 1
    assert modality_gap(image, text[:50]) > 1, "the numbers of images and texts may differ"
    turned = rotation(8).float()
    assert modality_gap(image @ turned, text @ turned) == pytest.approx(modality_gap(image, text), rel=1e-5)


def test_a_map_shows_the_directions_of_largest_variance() -> None:
    spread = torch.tensor([5.0, 2.0, 0.1, 0.1]).double()
    rows = (normal(300, 4).double() * spread) @ rotation(4) + 7
    found = principal_map(rows)
    centred = rows - rows.mean(0)
    variance = torch.linalg.eigvalsh(centred.T @ centred).flip(0)
    assert found.shares == pytest.approx((variance[:2] / variance.sum()).tolist())
    assert found.points.square().sum(0).tolist() == pytest.approx(variance[:2].tolist())
    largest = found.points.abs().argmax(0)
    assert (found.points[largest, [0, 1]] > 0).all()
    turned = principal_map(rows @ rotation(4, 8))
    torch.testing.assert_close(turned.points, found.points)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.ones(5, 2), normal(5, 2), "all rows of x but at most one are equal"),
        (normal(5, 2), torch.ones(5, 2) * 0.1, "all rows of y but at most one are equal"),
        (normal(5, 2), torch.eye(5)[:, :1], "all rows of y but at most one are equal"),
        (normal(3, 2), normal(3, 2), "at least 4 samples are needed, got 3"),
        (normal(1, 2), normal(1, 2), "at least 4 samples are needed, got 1"),
        (normal(5, 2), normal(6, 2), "row i of both .* got 5 and 6 rows"),
        (normal(5, 2) * torch.inf, normal(5, 2), "not finite"),
        (torch.empty(0, 2), normal(5, 2), "a matrix"),
    ],
)
def test_what_cka_cannot_compare_is_refused(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        cka(x, y)


def test_degenerate_features_are_refused() -> None:
    with pytest.raises(UsageError, match="10 neighbours of 5 rows"):
        neighbours(normal(5, 2))
    with pytest.raises(UsageError, match="0 neighbours of 5 rows"):
        neighbour_overlap(normal(5, 2), normal(5, 2), 0)
    with pytest.raises(DataError, match="at least 2 samples"):
        neighbour_overlap(normal(1, 2), normal(1, 2), 1)
    with pytest.raises(DataError, match="zero"):
        effective_rank(torch.zeros(3, 2))
    with pytest.raises(DataError, match="one row only"):
        uniformity(torch.tensor([[1.0, 0.0]]))
    with pytest.raises(DataError, match="row 1 has length 2"):
        uniformity(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    with pytest.raises(DataError, match="y: unit vectors are needed, and row 0 has length 0"):
        alignment(torch.eye(2), torch.zeros(2, 2))
    with pytest.raises(DataError, match="got widths 2 and 3"):
        modality_gap(unit(normal(4, 2)), unit(normal(4, 3)))
    with pytest.raises(DataError, match="got widths 2 and 3"):
        alignment(unit(normal(4, 2)), unit(normal(4, 3)))
    with pytest.raises(DataError, match="at least 4 samples"):
        separability(torch.eye(3), torch.eye(3))
    with pytest.raises(DataError, match="2 directions"):
        principal_map(torch.full((4, 3), 0.1))
    with pytest.raises(DataError, match="2 directions"):
        principal_map(normal(1, 3))


def test_a_collapsed_representation_has_no_cka_and_no_rank() -> None:
    collapsed, other = (Representation(rows, 3) for rows in (unit(torch.ones(9, 4)), unit(normal(9, 4))))
    found = collapsed.similarity(other)
    assert found["cka"] is None and found["cka_linear"] is None and 0 <= (found["overlap"] or 0) <= 1
    assert collapsed.space() == {"width": 4, "effective_rank": None, "uniformity": pytest.approx(0)}
    expected = cka(other.features, normal(9, 5, 2))
    same = other.similarity(Representation(normal(9, 5, 2), 3))
    assert (same["cka_linear"], same["cka"]) == pytest.approx(expected)
    with pytest.raises(DataError, match="row 0 has length"):
        Representation(2 * unit(normal(9, 4)), 3).space()
    with pytest.raises(DataError, match="got 9 and 8 rows"):
        other.similarity(Representation(unit(normal(8, 4)), 3))
