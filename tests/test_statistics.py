"""Intervals, tests and corrections against scipy and plain references, and their coverage in simulations."""

import subprocess
import sys
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from threetowers.errors import DataError
from threetowers.evaluate.statistics import (
    Side,
    bootstrap_difference,
    bootstrap_interval,
    doubling_slopes,
    holm,
    p_value,
    paired_difference,
    t_interval,
)

finite = st.floats(-10, 10)


@settings(deadline=None)
@given(st.lists(finite, min_size=2, max_size=12), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_t_interval_is_scipys(values: list[float], level: float) -> None:
    assume(np.std(values) > 1e-6)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    assert t_interval(values, level) == pytest.approx((np.mean(values), low, high), abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=12))
def test_paired_difference_is_scipys_paired_test(pairs: list[tuple[float, float]]) -> None:
    a, b = ([pair[i] for pair in pairs] for i in (0, 1))
    assume(np.std(np.subtract(a, b)) > 1e-6)
    expected = stats.ttest_rel(a, b)
    result = paired_difference(a, b)
    assert result.num == len(pairs)
    assert result[1:3] == pytest.approx(tuple(expected.confidence_interval()), abs=1e-9)
    mirrored = paired_difference(b, a)
    assert result[:3] == pytest.approx((-mirrored.mean, -mirrored.high, -mirrored.low), abs=1e-12)
    if abs(expected.pvalue - 0.05) > 1e-6:
        assert (expected.pvalue < 0.05) == (result.low > 0 or result.high < 0)


@pytest.mark.parametrize("value", [0.1, 0.0, -0.3])
def test_equal_values_give_an_interval_of_no_width(value: float) -> None:
    assert t_interval([value] * 3) == (value, value, value)
    assert paired_difference([value] * 3, [0.0] * 3) == (value, value, value, 3)
    assert p_value([value] * 3) == p_value([value] * 3, side="below") == 1, "no spread, no test"
    assert p_value([0.35 - 0.3, 0.36 - 0.31, 0.34 - 0.29]) == 1, "equal up to rounding"


@settings(deadline=None)
@given(st.lists(finite, min_size=2, max_size=12), st.floats(-5, 5), st.sampled_from(["above", "below"]))
def test_p_is_scipys_and_agrees_with_the_interval(values: list[float], bound: float, side: Side) -> None:
    assume(np.std(values) > 1e-6)
    p = p_value(values, bound, side)
    alternative = "greater" if side == "above" else "less"
    assert p == pytest.approx(min(1, 2 * stats.ttest_1samp(values, bound, alternative=alternative).pvalue))
    _, low, high = t_interval(values)
    if abs(p - 0.05) > 1e-6:
        assert (p < 0.05) == (low > bound if side == "above" else high < bound)


def plain_holm(p_values: list[float]) -> list[float]:
    """Holm's procedure as he wrote it, for every level at which it changes its mind: the least one that rejects."""
    adjusted = []
    for place in range(len(p_values)):
        levels = sorted({min(1.0, p * k) for p in p_values for k in range(1, len(p_values) + 1)})
        adjusted.append(next(level for level in levels if place in rejected(p_values, level) or level == 1.0))
    return adjusted


def rejected(p_values: list[float], level: float) -> set[int]:
    """Steps down from the smallest p, and stops at the first that is above the level over what is left."""
    found: set[int] = set()
    for step, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[place] * (len(p_values) - step) > level:
            break
        found.add(place)
    return found


@given(st.lists(st.floats(0, 1), max_size=7), st.randoms(use_true_random=False))
def test_holm_is_the_plain_procedure(p_values: list[float], random: Random) -> None:
    adjusted = holm(p_values)
    assert adjusted == pytest.approx(plain_holm(p_values))
    assert all(p <= corrected <= 1 for p, corrected in zip(p_values, adjusted, strict=True))
    ordered = sorted(zip(p_values, adjusted, strict=True))
    assert [corrected for _, corrected in ordered] == sorted(adjusted), "a smaller p stays the smaller one"
    places = list(range(len(p_values)))
    random.shuffle(places)
    assert holm([p_values[i] for i in places]) == [adjusted[i] for i in places]


def test_holm_on_a_known_family() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.2]) == [0.2]


def test_slopes_are_those_of_the_plane_that_the_values_lie_on() -> None:
    size, data = [1, 2, 4, 1, 2, 4], [100, 100, 100, 400, 400, 400]
    values = [0.1 + 0.03 * np.log2(s) - 0.02 * np.log2(d) for s, d in zip(size, data, strict=True)]
    assert doubling_slopes({"size": size, "data": data}, values) == pytest.approx(
        {"size": 0.03, "data": -0.02}
    )
    assert doubling_slopes({"size": size[:3], "data": data[:3]}, values[:3]) == pytest.approx({"size": 0.03})
    noisy = [0.0, 0.1, 0.05, 0.2, 0.15, 0.3]
    alone = doubling_slopes({"size": size}, noisy)["size"]
    assert alone == pytest.approx(stats.linregress(np.log2(size), noisy).slope)


def test_t_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for num, level in ((3, 0.95), (5, 0.95), (5, 0.8)):
        intervals = [t_interval(row.tolist(), level) for row in rng.normal(0.4, 0.02, (2000, num))]
        covered = sum(low <= 0.4 <= high for _, low, high in intervals)
        assert stats.binomtest(covered, 2000, level).pvalue > 1e-3, (num, level, covered)


def simulated_hits(
    rng: np.random.Generator, num_images: int, captions: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Hits whose chance varies with the image (mean 0.5), so that queries of one image go together."""
    easy = rng.beta(0.4, 0.4, num_images)
    images = np.arange(num_images), np.arange(num_images).repeat(captions)
    return (rng.random(num_images) < easy, rng.random(num_images * captions) < easy[images[1]]), images


def test_bootstrap_over_images_covers_the_truth_and_over_queries_is_too_sure() -> None:
    rng = np.random.default_rng(1)
    covered = {"images": 0, "queries": 0}
    for _ in range(300):
        hits, images = simulated_hits(rng, 120, 5)
        for name, owner in (("images", images), ("queries", None)):
            interval = bootstrap_interval(hits, images=owner, num_resamples=400)
            covered[name] += interval.low <= 0.5 <= interval.high
    assert stats.binomtest(covered["images"], 300, 0.95).pvalue > 1e-3, covered
    assert covered["queries"] < 0.88 * 300, covered


def test_bootstrap_of_independent_queries_agrees_with_the_normal_interval() -> None:
    hits = np.random.default_rng(2).random(4000) < 0.3
    interval = bootstrap_interval(hits)
    half = 1.96 * hits.std() / 4000**0.5
    assert interval.mean == hits.mean() and interval.num == 4000
    assert interval.low == pytest.approx(hits.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(hits.mean() + half, abs=0.1 * half)
    assert bootstrap_interval(hits, level=0.5).high < interval.high


def test_each_direction_weighs_one_half_however_many_queries_it_has() -> None:
    i2t, t2i = np.ones(10), np.zeros(50)
    images = np.arange(10), np.arange(10).repeat(5)
    assert bootstrap_interval((i2t, t2i)) == (0.5, 0.5, 0.5, 60)
    assert bootstrap_interval((i2t, t2i), images=images) == (0.5, 0.5, 0.5, 10)


def test_images_are_matched_by_index_not_by_order() -> None:
    hits, images = simulated_hits(np.random.default_rng(3), 50, 3)
    order = np.random.default_rng(4).permutation(150)
    shuffled = bootstrap_interval((hits[0], hits[1][order]), images=(images[0], images[1][order]))
    assert shuffled == pytest.approx(bootstrap_interval(hits, images=images))
    gaps = bootstrap_interval(hits, images=(7 * images[0] + 3, 7 * images[1] + 3))
    assert gaps == bootstrap_interval(hits, images=images)


def test_bootstrap_is_repeatable_and_its_seed_matters() -> None:
    hits, images = simulated_hits(np.random.default_rng(5), 80, 2)
    first = bootstrap_interval(hits, images=images, num_resamples=300)
    assert first == bootstrap_interval(hits, images=images, num_resamples=300)
    assert first != bootstrap_interval(hits, images=images, num_resamples=300, seed=1)


def test_bootstrap_difference_is_paired_over_queries() -> None:
    rng = np.random.default_rng(6)
    hits, images = simulated_hits(rng, 300, 2)
    better = tuple(values | (rng.random(len(values)) < 0.03) for values in hits)
    difference = bootstrap_difference((better[0], better[1]), hits, images=images)
    assert difference.mean == pytest.approx(
        sum((b.mean() - h.mean()) / 2 for b, h in zip(better, hits, strict=True))
    )
    assert difference.low > 0
    alone = bootstrap_interval(hits, images=images)
    assert difference.high - difference.low < 0.5 * (alone.high - alone.low)
    assert bootstrap_difference(hits, (better[0], better[1]), images=images).high < 0
    same = bootstrap_difference(hits, hits, images=images)
    assert same[:3] == (0.0, 0.0, 0.0)
    single = bootstrap_difference(better[0], hits[0])
    assert single.mean == pytest.approx(better[0].mean() - hits[0].mean()) and single.num == 300


def test_what_cannot_be_an_interval_is_refused() -> None:
    pair = np.ones(4), np.ones(8)
    images = np.arange(4), np.arange(4).repeat(2)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: t_interval([0.5]), "at least 2 values, got 1: add seeds"),
        (lambda: t_interval([]), "non-empty"),
        (lambda: t_interval([0.1, float("nan")]), "row 1 is not finite"),
        (lambda: paired_difference([1.0, 2.0], [1.0]), "got 2 and 1"),
        (lambda: p_value([0.5]), "at least 2 values, got 1: add seeds"),
        (lambda: holm([0.5, 1.5]), "from 0 to 1"),
        (lambda: doubling_slopes({"size": [1, 0]}, [0.1, 0.2]), "size: 2 numbers above 0"),
        (lambda: doubling_slopes({"size": [1, 2]}, [0.1]), "size: 1 numbers above 0"),
        (lambda: doubling_slopes({"a": [1, 2], "b": [2, 4]}, [0.1, 0.2]), "a and b vary only together"),
        (lambda: bootstrap_interval([1.0]), "at least 2 queries"),
        (lambda: bootstrap_interval(np.ones((2, 3))), r"shape \(2, 3\)"),
        (lambda: bootstrap_interval(pair, images=(images[0], images[1][:5])), "one index per query"),
        (lambda: bootstrap_interval(pair, images=(images[0], images[1] + 1)), "same images"),
        (lambda: bootstrap_difference(pair, (pair[0], pair[1][:5])), "same queries"),
        (lambda: bootstrap_difference(pair, pair[0]), "same queries"),
    ]
    for call, message in cases:
        with pytest.raises(DataError, match=message):
            call()


def test_statistics_need_no_torch() -> None:
    code = "import sys, threetowers.evaluate.statistics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
