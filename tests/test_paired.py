"""Paired tests: against enumeration and the binomial test, valid at every level, and the sentence they become."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from threetowers.errors import DataError
from threetowers.evaluate import paired
from threetowers.evaluate.paired import Paired, compare_paired, compare_seeds, sign_test


def enumerated(differences: list[float]) -> float:
    """The share of all exchanges of signs whose sum is at least as far from 0, on both sides."""
    sums = np.array(
        [np.dot(signs, differences) for signs in itertools.product((1, -1), repeat=len(differences))]
    )
    own = sum(differences)
    below, above = float(np.mean(sums <= own + 1e-12)), float(np.mean(sums >= own - 1e-12))
    return min(1.0, 2 * min(below, above))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-6, 6), min_size=1, max_size=9))
def test_p_is_that_of_all_exchanges(differences: list[int]) -> None:
    """Zeros keep their sign, and change nothing."""
    values = [float(each) for each in differences]
    assert sign_test(np.array(values)) == pytest.approx(enumerated(values))


@pytest.mark.parametrize(("wins", "losses"), [(1, 0), (5, 5), (12, 3), (140, 60), (0, 40)])
def test_right_and_wrong_answers_make_it_the_exact_test_of_mcnemar(wins: int, losses: int) -> None:
    both = np.array([1.0] * 30 + [0.0] * 20)
    a = np.concatenate([both, np.ones(wins), np.zeros(losses)])
    b = np.concatenate([both, np.zeros(wins), np.ones(losses)])
    order = np.random.default_rng(0).permutation(len(a))
    found = compare_paired(a[order], b[order])
    assert (found.wins, found.losses, found.num) == (wins, losses, 50 + wins + losses)
    assert found.p == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)
    assert found.difference == pytest.approx((wins - losses) / len(a))
    assert found.low <= found.difference <= found.high
    other = compare_paired(b[order], a[order])
    assert (other.wins, other.losses) == (losses, wins) and other.p == pytest.approx(found.p)


def test_random_exchanges_agree_with_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.array([3.0, -1.0, 2.0, 2.5, 1.0, -0.5, 1.5, 4.0, -2.0, 0.7])
    exact = enumerated(values.tolist())
    monkeypatch.setattr(paired, "RESAMPLES", 1000)
    assert sign_test(values) == pytest.approx(exact, abs=0.05)
    monkeypatch.setattr(paired, "RESAMPLES", 2000)
    assert sign_test(values) == pytest.approx(exact)


def test_the_test_rejects_at_most_as_often_as_its_level_says() -> None:
    sizes = np.array([1.0, 2.0, 2.0, 3.0, 0.5, 1.5, 1.0])
    p = np.array([sign_test(sizes * signs) for signs in itertools.product((1, -1), repeat=len(sizes))])
    for level in (0.02, 0.05, 0.1, 0.5):
        assert np.mean(p <= level) <= level
    assert p.min() == pytest.approx(2 / 2 ** len(sizes))


def test_queries_of_an_image_are_exchanged_together() -> None:
    """Twenty queries of each of two images are two independent items, which show nothing."""
    a, b, images = np.ones(40), np.zeros(40), np.repeat([0, 1], 20)
    assert compare_paired(a, b, images=images).p == pytest.approx(0.5)
    assert compare_paired(a, b).p < 1e-9
    i2t, t2i = np.ones(2), np.ones(40)
    both = compare_paired((i2t, t2i), (i2t * 0, t2i * 0), images=(np.array([0, 1]), images))
    assert both.p == pytest.approx(0.5) and both.wins == 42 and both.difference == pytest.approx(1.0)


def test_directions_count_the_same_however_many_queries_they_have() -> None:
    """The image of the one query image → text loses what its four queries text → image win, and more."""
    a = (np.array([0.0, 1.0]), np.array([1.0, 1.0, 1.0, 1.0, 1.0]))
    b = (np.array([1.0, 1.0]), np.array([0.0, 0.0, 0.0, 0.0, 1.0]))
    images = (np.array([0, 1]), np.array([0, 0, 0, 0, 1]))
    found = compare_paired(a, b, images=images)
    assert found.difference == pytest.approx(0.5 * (4 / 5 - 1 / 2)) and found.p == 1.0
    assert (found.wins, found.losses) == (4, 1)


def test_equal_answers_show_nothing() -> None:
    found = compare_paired(np.ones(9), np.ones(9))
    assert found.p == 1.0 and not found.shown()
    assert found.in_words("a", "b") == "a and b are equal on each of 9 items"


def test_the_comparison_in_words() -> None:
    found = Paired(0.031, 0.012, 0.05, 0.0003, 42, 11, 1000)
    assert found.in_words("lit", "baseline") == (
        "lit is better than baseline by 3.1 points (95 % 1.2 to 5.0); lit wins 42 of the 53 items on which they differ "
        "(p < 0.001)"
    )
    behind = Paired(-0.031, -0.05, -0.012, 0.0003, 11, 42, 1000)
    assert behind.in_words("baseline", "lit") == found.in_words("lit", "baseline")
    assert found.corrected(0.2).in_words("lit", "baseline", tests=6) == (
        "no difference between lit and baseline is shown: lit is 3.1 points ahead (95 % 1.2 to 5.0); lit wins 42 of "
        "the 53 items on which they differ (p = 0.200, corrected for 6 tests)"
    )


def test_seeds_are_compared_by_students_t() -> None:
    a, b = [0.5, 0.6, 0.7], [0.45, 0.5, 0.71]
    found = compare_seeds(a, b)
    assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert (found.wins, found.losses, found.num) == (2, 1, 3)
    assert compare_seeds(b, a).p == pytest.approx(found.p)
    assert "wins 2 of the 3 seeds on which they differ" in found.in_words("a", "b")
    assert compare_seeds(a, a).in_words("a", "b") == "a and b are equal on each of 3 seeds"


def test_answers_to_different_items_are_refused() -> None:
    with pytest.raises(DataError, match="must answer the same queries"):
        compare_paired(np.ones(3), np.ones(4))
    with pytest.raises(DataError, match="finite numbers"):
        sign_test(np.array([1.0, np.nan]))
