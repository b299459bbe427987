"""Agreement of two systems: counts, κ against scikit-learn, intervals, classes, telling queries, correlations."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from threetowers.errors import DataError
from threetowers.evaluate.agreement import agreement, by_class, correlation, count, telling


def answers(text: str) -> NDArray[np.bool_]:
    """`1` is a right answer."""
    return np.array([each == "1" for each in text])


def drawn(num: int, seed: int, shared: float = 0.0) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two systems that are right in 60 and 50 % of the queries; a share of the second's answers are the first's."""
    rng = np.random.default_rng(seed)
    first, second, same = rng.random(num) < 0.6, rng.random(num) < 0.5, rng.random(num) < shared
    return first, np.where(same, first, second)


def test_every_query_is_in_one_of_the_four_counts() -> None:
    counts = count(answers("1110010"), answers("1101010"))
    assert counts == (3, 1, 1, 2) and counts.num == 7
    assert counts.rescued() == 1 / 3
    assert counts.either() == 5 / 7


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
def test_error_consistency_is_cohens_kappa_of_right_and_wrong(pairs: list[tuple[bool, bool]]) -> None:
    first, second = (np.array(each) for each in zip(*pairs, strict=True))
    kappa = count(first, second).kappa()
    if (first.all() and second.all()) or not (first.any() or second.any()):
        assert kappa is None
        assert agreement(first, second)["kappa"] is None
    else:
        assert kappa == pytest.approx(cohen_kappa_score(first, second, labels=[False, True]))
        assert kappa == count(second, first).kappa() == pytest.approx(count(~first, ~second).kappa())


def test_oracles_of_agreement() -> None:
    first, second = drawn(20_000, 0)
    assert abs(count(first, second).kappa() or 1) < 0.03, "independent systems agree as chance says"
    assert count(first, first).kappa() == 1
    half = answers("10" * 20)
    assert count(half, ~half).kappa() == -1
    assert count(half, ~half).either() == 1 and count(half, ~half).rescued() == 1
    assert count(answers("11"), answers("10")).rescued() is None


def test_the_figures_of_a_combination() -> None:
    first, second = answers("1111100000"), answers("1110011000")
    combined = answers("1111011001")
    found = agreement(first, second, combined=combined)
    assert [found[name] for name in ("both", "first", "second", "neither")] == [3, 2, 2, 3]
    assert found["accuracy"] == {"first": 0.5, "second": 0.5, "either": 0.7, "combined": 0.7}
    assert found["kept"] == {"both": 3, "first": 1, "second": 2, "neither": 1}
    assert found["gain"]["mean"] == pytest.approx(0.2) and found["gain_over_better"] == pytest.approx(0.2)
    assert found["rescued"]["mean"] == 0.4 and found["either"]["mean"] == 0.7
    assert found["gain"]["low"] < 0.2 < found["gain"]["high"]
    assert "gain" not in agreement(first, second) and "kept" not in agreement(first, second)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    inside: dict[str, list[bool]] = {"kappa": [], "rescued": []}
    truth = count(*drawn(400_000, 77, 0.5))
    for seed in range(40):
        found = agreement(*drawn(300, seed, 0.5))
        for name, value in (("kappa", truth.kappa()), ("rescued", truth.rescued())):
            assert value is not None
            inside[name].append(found[name]["low"] <= value <= found[name]["high"])
    assert all(np.mean(each) > 0.85 for each in inside.values())


def test_queries_of_an_image_are_resampled_together() -> None:
    first, second = drawn(200, 3, 0.4)
    images = np.repeat(np.arange(200), 9)
    repeated = agreement(
        first.repeat(9), second.repeat(9), combined=(first | second).repeat(9), images=images
    )
    alone = agreement(first, second, combined=first | second)
    for name in ("kappa", "rescued", "either", "gain"):
        assert repeated[name] == pytest.approx(alone[name]), name
    independent = agreement(first.repeat(9), second.repeat(9))
    width = alone["kappa"]["high"] - alone["kappa"]["low"]
    assert independent["kappa"]["high"] - independent["kappa"]["low"] < 0.5 * width


def test_one_image_has_figures_and_no_interval() -> None:
    found = agreement(answers("10"), answers("11"), combined=answers("11"), images=[4, 4])
    for name in ("kappa", "rescued", "either", "gain"):
        assert found[name]["low"] is None and found[name]["num"] == 1
    assert found["gain"]["mean"] == 0.5 and found["rescued"]["mean"] == 1
    perfect = agreement(answers("1"), answers("1"))
    assert perfect["kappa"] is None and perfect["rescued"] is None and perfect["both"] == 1


def test_a_resample_without_kappa_leaves_no_interval() -> None:
    found = agreement(answers("1110"), answers("1110"))
    assert found["kappa"] == {"mean": 1.0, "low": None, "high": None, "num": 4}


def test_counts_by_class_leave_out_absent_classes() -> None:
    found = by_class(answers("11001"), answers("10011"), [2, 2, 0, 0, 2], ["a", "b", "c"])
    assert found == [
        {"class": "a", "both": 0, "first": 0, "second": 1, "neither": 1},
        {"class": "c", "both": 2, "first": 1, "second": 0, "neither": 0},
    ]


def test_telling_queries_are_those_that_the_other_system_misses_by_most() -> None:
    right = [0, 0, 3, 0, 0, 0]
    wrong = [5, 0, 9, 7, 7, 1]
    assert telling(right, wrong, range(6), 9) == [3, 4, 0, 5]
    assert telling(right, wrong, range(6), 2) == [3, 4]
    assert telling(right, wrong, [0, 1, 2, 3, 3, 0], 9) == [3, 0], "an image is shown once"
    assert telling([1], [2], [0], 5) == []


def test_a_correlation_needs_three_runs_and_an_interval_four() -> None:
    x, y = [0.1, 0.4, 0.2, 0.9], [1.0, 2.0, 1.5, 2.5]
    assert correlation(x[:2], y[:2]) is None and correlation([], []) is None
    three = correlation(x[:3], y[:3])
    assert three is not None and (three.low, three.high, three.num) == (None, None, 3)
    four = correlation(x, y)
    assert four is not None and four.low is not None and four.high is not None
    assert four.r == pytest.approx(np.corrcoef(x, y)[0, 1])
    half = stats.norm.ppf(0.975) / (4 - 3) ** 0.5
    assert four.low == pytest.approx(np.tanh(np.arctanh(four.r) - half))
    assert correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    with pytest.raises(DataError, match="got 3 and 2 values"):
        correlation([1, 2, 3], [1, 2])


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (answers(""), answers(""), "the same queries"),
        (answers("10"), answers("101"), r"got shapes \(2,\) and \(3,\)"),
        (np.array([0, 1]), answers("10"), "must be bool, got int64"),
        (answers("10").reshape(1, 2), answers("10").reshape(1, 2), "the same queries"),
    ],
)
def test_answers_that_cannot_be_compared_are_refused(first: Any, second: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        count(first, second)
    with pytest.raises(DataError, match=message):
        agreement(first, second)


def test_images_and_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"one image per query is needed, got \(1,\) for 2 queries"):
        agreement(answers("10"), answers("11"), images=[0])
    for labels in ([0], [0, 3], [-1, 0]):
        with pytest.raises(DataError, match="one class from 0 to 2 is needed for each of 2 queries"):
            by_class(answers("10"), answers("11"), labels, ["a", "b", "c"])
