"""The k best candidates are those of a search in fp64: with each fast product, ties, clusters and awkward values."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from threetowers.errors import DataError, UsageError
from threetowers.evaluate import search
from threetowers.evaluate.search import top_k
from threetowers.objective.losses import unit

KINDS = ["plain", "ties", "near", "equal", "far", "outliers", "zeros", "half"]


def reference(queries: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Every score in fp64, rounded once to fp32; a stable sort leaves equal scores in the order of the candidates."""
    scores = (queries.double() @ candidates.double().T).float()
    values, order = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], order[:, :k]


def features(kind: str, rows: int, width: int, generator: torch.Generator) -> Tensor:
    """`near`: vectors that differ in the last bits of fp32. `far`: one that is far from all of the others."""
    plain = torch.randn(rows, width, generator=generator)
    if kind == "ties":
        return unit(torch.randint(-1, 2, (rows, width), generator=generator).float())
    if kind == "near":
        return unit(torch.randn(1, width, generator=generator) + 2e-7 * plain)
    if kind == "equal":
        return unit(torch.ones(rows, width))
    if kind == "far":
        same = torch.ones(rows, width)
        same[rows // 2] = plain[0]
        return unit(same)
    if kind == "outliers":
        plain[:, 0] += 30
        return unit(plain)
    if kind == "zeros":
        return unit(plain) * (torch.rand(rows, 1, generator=generator) < 0.5)
    return unit(plain).half() if kind == "half" else unit(plain)


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(params=["int8", "fp32"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast product; int8 also where the processor has no fast one, as long as it is exact."""
    if request.param == "int8":
        exact_int8()
    monkeypatch.setattr(search, "_has_fast_int8", lambda device: request.param == "int8")


def exact_int8() -> None:
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    if not bool((torch._int_mm(largest, largest) == 64 * 127**2).all()):
        pytest.skip("int8 products overflow on this processor")


@settings(max_examples=200, deadline=None)
@given(
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    shape=st.tuples(st.integers(1, 23), st.integers(1, 70), st.integers(1, 33)),
    k=st.integers(1, 70),
    sizes=st.tuples(st.integers(1, 41), st.integers(1, 9), st.integers(1, 8), st.integers(1, 20)),
    limits=st.tuples(st.sampled_from([0.0, 0.08, 1.0]), st.sampled_from([0.75, 1.0])),
    int8=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_the_best_are_those_of_a_search_in_fp64(
    kinds: tuple[str, str],
    shape: tuple[int, int, int],
    k: int,
    sizes: tuple[int, int, int, int],
    limits: tuple[float, float],
    int8: bool,
    seed: int,
) -> None:
    """sizes: candidates and queries of a tile, vectors of a group and of a rounding. limits: what counts as many."""
    if int8:
        exact_int8()
    num_queries, num_candidates, width = shape
    k = min(k, num_candidates)
    generator = torch.Generator().manual_seed(seed)
    queries = features(kinds[0], num_queries, width, generator)
    candidates = features(kinds[1], num_candidates, width, generator)
    if kinds[0] == kinds[1] == "near":
        queries = candidates[torch.randint(0, num_candidates, (num_queries,), generator=generator)]
    block, rows, group, few = sizes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_has_fast_int8", lambda device: int8)
        patch.setattr(search, "ROWS", rows)
        patch.setattr(search, "PASS", 2 * rows)
        patch.setattr(search, "GROUP", group)
        patch.setattr(search, "_FEW", few * group)
        patch.setattr(search, "_MANY", limits[0])
        patch.setattr(search, "_MANY_GROUPS", limits[1])
        found = top_k(queries, candidates, k, block=block)
    assert same(found, reference(queries, candidates, k))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("product")
def test_many_candidates(kind: str) -> None:
    """Sizes at which most candidates are left out by the fast product alone, with uneven tails."""
    generator = torch.Generator().manual_seed(1)
    queries, candidates = features(kind, 40, 96, generator), features(kind, 5003, 96, generator)
    assert same(top_k(queries, candidates, 10, block=1024), reference(queries, candidates, 10))


@pytest.mark.parametrize("int8", [True, False])
def test_few_scores_are_exact_ones(int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the search is right and slow."""
    if int8:
        exact_int8()
    close, types = 0, set[torch.dtype]()

    def counted(queries: search._Near, *rest: Any) -> search._Pairs | None:
        nonlocal close
        pairs = above(queries, *rest)
        types.add(queries.vectors.dtype)
        close += len(queries.vectors) * search.BLOCK if pairs is None else len(pairs.query)
        return pairs

    above = search._above
    monkeypatch.setattr(search, "_above", counted)
    monkeypatch.setattr(search, "_has_fast_int8", lambda device: int8)
    generator = torch.Generator().manual_seed(2)
    for kind in ("plain", "outliers"):
        close = 0
        top_k(features(kind, 64, 128, generator), features(kind, 20_000, 128, generator), 5)
        assert 64 * 5 <= close < 0.02 * 64 * 20_000, (kind, close)
    assert types == {torch.int8 if int8 else torch.float32}


def test_the_error_of_the_queries_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The query's small coordinates are rounded to 0, and the best candidate has only them."""
    exact_int8()
    width = 65
    frame = search._Frame(torch.zeros(width), torch.full((width,), 127.0), torch.ones(width), 1 / 127)
    monkeypatch.setattr(search, "_has_fast_int8", lambda device: True)
    monkeypatch.setattr(search, "_frame", lambda queries, candidates: frame)
    monkeypatch.setattr(search, "GROUP", 1)
    queries, candidates = torch.full((1, width), 0.49), torch.zeros(200, width)
    queries[0, 0] = 127
    candidates[:, 0] = 2 / 127
    candidates[150, 0], candidates[150, 1:] = 0, 10 / 127
    assert top_k(unit(queries), candidates, 1)[1].tolist() == [[150]]


@pytest.mark.usefixtures("product")
def test_what_fills_the_last_group_is_no_candidate() -> None:
    """Rows of zeros would be the best of candidates that all score below 0."""
    queries = unit(torch.ones(3, 8))
    candidates = -unit(
        torch.ones(33, 8) + 0.1 * torch.randn(33, 8, generator=torch.Generator().manual_seed(9))
    )
    for k in (1, 2, 3, 33):
        assert same(top_k(queries, candidates, k), reference(queries, candidates, k))


@pytest.mark.usefixtures("product")
def test_candidates_that_overflow_in_the_coordinates_of_the_sample() -> None:
    candidates = torch.zeros(2000, 8)
    candidates[1501] = unit(torch.ones(8))
    queries = torch.stack([torch.zeros(8), candidates[1501], -candidates[1501]])
    assert same(top_k(queries, candidates, 4), reference(queries, candidates, 4))


def test_bounds_hold_for_every_vector() -> None:
    """The error of each product is at most what `_above` allows for it."""
    generator = torch.Generator().manual_seed(3)
    for kind in KINDS:
        queries, candidates = features(kind, 30, 48, generator), features(kind, 64, 48, generator)
        frame = search._frame(queries, candidates)
        of_queries = search._Search(queries, 1, frame)
        columns = search._Columns(candidates, 0, 64, frame)
        true = queries.double() @ candidates.double().T
        tiers = [(of_queries.fine, columns.fine, true)]
        if columns.coarse:
            products = (true - of_queries.offset[:, None].double()) / of_queries.unit[:, None].double()
            tiers.append((of_queries.coarse, columns.coarse, products))
        for near_queries, near, expected in tiers:
            product = near_queries.vectors.double() @ near.vectors.double().T
            error, norm = (field.repeat_interleave(search.GROUP) for field in (near.error, near.norm))
            allowed = near_queries.norm[:, None] * error + near_queries.error[:, None] * (norm + error)
            excess = (product - expected).abs() - allowed
            assert float(excess.max()) <= 0, (kind, near.vectors.dtype)


@pytest.fixture
def low_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("product", "low_precision")
def test_the_result_does_not_depend_on_the_precision_that_is_allowed() -> None:
    generator = torch.Generator().manual_seed(4)
    # scores that bf16 cannot tell apart and fp32 can
    base, noise = torch.ones(64), 0.01 * torch.randn(3060, 64, generator=generator)
    queries, candidates = unit(base + noise[:60]), unit(base + noise[60:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = top_k(queries, candidates, 10, block=256)
    torch.set_float32_matmul_precision("highest")
    assert same(found, reference(queries, candidates, 10))


@pytest.mark.usefixtures("product")
def test_types_and_layouts() -> None:
    generator = torch.Generator().manual_seed(5)
    queries, candidates = (torch.randn(24, rows, generator=generator) for rows in (31, 333))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        some = unit(queries.T).to(dtype).T.contiguous().T, unit(candidates.T).to(dtype)[::3]
        assert same(top_k(*some, 7, block=50), reference(*some, 7)), dtype


def test_one_pair_at_a_time_gives_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other devices than a CPU do, in parts of three pairs."""

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")  # type: ignore[assignment]

    monkeypatch.setattr(search, "_PAIRS", 3)
    generator = torch.Generator().manual_seed(6)
    queries, candidates = (features("plain", rows, 20, generator).double() for rows in (9, 30))
    pairs = search._Pairs(torch.tensor([0, 0, 3, 3, 8]), torch.tensor([1, 29, 0, 4, 7]))
    expected = (queries @ candidates.T).float()[pairs.query, pairs.candidate]
    assert torch.equal(search._exact(queries, candidates, pairs), expected)
    assert torch.equal(search._exact(queries.as_subclass(Elsewhere), candidates, pairs), expected)


def test_int8_products_are_exact_at_every_width_that_uses_them() -> None:
    exact_int8()
    generator = torch.Generator().manual_seed(8)
    for width in (*range(2, 40), 63, 65, 100, 511, 513):
        for rows, columns in ((1, 1), (1, 2), (16, 1), (3, 17), (33, 5), (64, 31)):
            a, b = (torch.randint(-127, 128, (num, width), generator=generator) for num in (rows, columns))
            assert torch.equal(torch._int_mm(a.to(torch.int8), b.to(torch.int8).T).long(), a @ b.T)


def test_int8_is_used_only_where_it_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflowing(a: Tensor, b: Tensor) -> Tensor:
        return (a.int() @ b.int()).clamp(max=2**15 - 1)

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True}, raising=False)
    search._has_fast_int8.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", overflowing)
    assert not search._has_fast_int8("cpu")
    search._has_fast_int8.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: a.int() @ b.int())
    assert search._has_fast_int8("cpu") and not search._has_fast_int8("cuda")
    search._has_fast_int8.cache_clear()


def test_what_cannot_be_searched_is_refused() -> None:
    good = unit(torch.randn(600, 4))
    bad, far = good.clone(), good.clone()
    bad[550, 2] = float("nan")
    far[550] = 1e30
    for queries, candidates, k, error, message in (
        (good, good, 0, UsageError, "from 1 to 600 candidates is needed, got 0"),
        (good, good, 601, UsageError, "got 601"),
        (good, good[:, :3], 1, DataError, "queries are 4 wide and candidates 3"),
        (good[0], good, 1, DataError, r"queries: a matrix \[rows, width\]"),
        (good, good[:0], 1, DataError, r"candidates: a matrix \[rows, width\]"),
        (good, torch.ones(3, 4, dtype=torch.int64), 1, DataError, "candidates: floating-point numbers"),
        (bad, good, 1, DataError, "queries: 1 of 600 rows are not finite, the first is row 550"),
        (good, bad, 1, DataError, "candidates: 1 of 600 rows are not finite, the first is row 550"),
        (good, far, 1, DataError, "candidates: unit vectors are needed, the norm of row 550 overflows"),
    ):
        with pytest.raises(error, match=message):
            top_k(queries, candidates, k)
