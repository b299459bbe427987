"""Detection of unknown images against scikit-learn, against every pair, and with known answers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from threetowers.errors import DataError
from threetowers.evaluate.detection import auroc, detection, false_positive_rate, max_logit, max_softmax

some = st.lists(st.one_of(st.integers(-3, 3).map(float), st.floats(-3, 3)), min_size=1, max_size=50)


def joined(inside: list[float], outside: list[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([1] * len(inside) + [0] * len(outside)), np.array(inside + outside)


@given(some, some)
@settings(deadline=None)
def test_auroc_is_scikit_learns_and_the_share_of_right_pairs(
    inside: list[float], outside: list[float]
) -> None:
    found = auroc(torch.tensor(inside, dtype=torch.float64), torch.tensor(outside, dtype=torch.float64))
    assert abs(found - roc_auc_score(*joined(inside, outside))) < 1e-12
    pairs = [(known > unknown) + 0.5 * (known == unknown) for known in inside for unknown in outside]
    assert abs(found - np.mean(pairs)) < 1e-12


@given(some, some)
@settings(deadline=None)
def test_the_false_positive_rate_is_read_off_scikit_learns_curve(
    inside: list[float], outside: list[float]
) -> None:
    found = false_positive_rate(
        torch.tensor(inside, dtype=torch.float64), torch.tensor(outside, dtype=torch.float64)
    )
    false, true, _ = roc_curve(*joined(inside, outside), drop_intermediate=False)
    assert found == pytest.approx(false[true >= 0.95 - 1e-9].min(), abs=1e-12)


@pytest.mark.parametrize("num", [1, 19, 20, 21, 40, 60, 100, 1000, 12_340])
def test_exactly_as_many_known_images_as_needed_are_kept(num: int) -> None:
    """Known images score 1 to num, so that the threshold itself can be read off."""
    inside = torch.arange(1, num + 1).double()
    outside = torch.arange(1, num + 1).double() - 0.5
    kept = -(-95 * num // 100)
    assert false_positive_rate(inside, outside) == pytest.approx((kept - 1) / num)


def test_an_unknown_image_at_the_threshold_is_an_error() -> None:
    inside = torch.arange(20).double()
    assert false_positive_rate(inside, torch.tensor([1.0, 0.5, 0.0, -1.0])) == 0.25
    assert false_positive_rate(inside, torch.tensor([1.0, 1.0, 5.0, 0.9])) == 0.75


def test_oracles() -> None:
    low, high = torch.arange(10).double(), torch.arange(10, 40).double()
    assert (auroc(high, low), false_positive_rate(high, low)) == (1.0, 0.0)
    assert (auroc(low, high), false_positive_rate(low, high)) == (0.0, 1.0)
    assert (auroc(low, low), auroc(low[:1], low[:1])) == (0.5, 0.5)
    constant = torch.ones(7)
    assert (auroc(constant, constant[:3]), false_positive_rate(constant, constant[:3])) == (0.5, 1.0)
    infinite = torch.tensor([torch.inf, 2.0])
    assert auroc(infinite, infinite) == 0.5


def test_the_highest_probability_by_its_log_odds() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(200, 6, dtype=torch.float64, generator=generator)
    highest = logits.softmax(1).amax(1)
    torch.testing.assert_close(max_softmax(logits), torch.logit(highest), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(max_logit(logits), logits.sort(1).values[:, -1])


def test_sure_answers_are_told_apart() -> None:
    """Where the probabilities themselves are all 1."""
    logits = torch.tensor([[900.0, 0.0, 0.0], [90.0, 0.0, 0.0], [90.0, 0.0, -3.0]])
    assert (logits.double().softmax(1).amax(1) == 1).all()
    assert max_softmax(logits).argsort().tolist() == [1, 2, 0]
    tied = torch.tensor([[5.0, 5.0], [0.0, 0.0]])
    assert max_softmax(tied).tolist() == [0.0, 0.0], "a probability of one half"
    assert max_softmax(torch.tensor([[3.0, -torch.inf]])).tolist() == [torch.inf]


def test_the_two_scores_differ_where_all_logits_are_higher() -> None:
    """Unknown images are known ones with twenty more on every logit: the same probabilities, higher logits."""
    inside = torch.randint(-9, 9, (50, 4), generator=torch.Generator().manual_seed(0)).double()
    found = detection(inside, inside + 20)
    assert found["max_logit"] == {"auroc": 0.0, "fpr_at_95": 1.0}
    assert found["max_softmax"]["auroc"] == 0.5
    assert found["max_softmax"]["fpr_at_95"] >= 0.95
    assert detection(inside, torch.zeros(9, 4))["max_softmax"]["auroc"] > 0.9


@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(2, 3), r"known images: logits.*got \[0, 3\]"),
        (torch.zeros(2, 3), torch.zeros(2, 1), r"unknown images: logits.*at least two classes"),
        (torch.zeros(2, 3), torch.zeros(2), "unknown images: logits"),
        (torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]), torch.zeros(1, 2), "known images: 1 of 2 rows.*row 1"),
        (torch.zeros(1, 2), torch.tensor([[torch.inf, 0.0]]), "unknown images: 1 of 1 rows"),
        (torch.zeros(1, 2), torch.full((1, 2), -torch.inf), "not finite"),
    ],
)
def test_what_cannot_be_used_is_a_data_error(inside: Tensor, outside: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        detection(inside, outside)
