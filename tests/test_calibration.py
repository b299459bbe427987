"""Calibration by hand, against plain Python, and on data whose calibration is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from sklearn.metrics import log_loss
from torch import Tensor

from threetowers.errors import DataError
from threetowers.evaluate.calibration import COLDEST, HOTTEST, calibration, reliability, scores, temperature


def calibrated(num: int, classes: int, seed: int, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """Logits, and labels drawn from their own probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(num, classes, dtype=torch.float64, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def test_the_error_by_hand() -> None:
    """Two bins: (0, ½] has confidences 0.4 and 0.5, one of them right; (½, 1] has 0.9, 0.7 and 0.8, two right."""
    table = reliability(
        torch.tensor([0.4, 0.9, 0.5, 0.7, 0.8]), torch.tensor([True, True, False, False, True]), bins=2
    )
    assert table.num_images.tolist() == [2, 3]
    assert table.confidence.tolist() == pytest.approx([0.45, 0.8])
    assert table.accuracy.tolist() == pytest.approx([0.5, 2 / 3])
    assert table.error == pytest.approx(0.4 * 0.05 + 0.6 * (0.8 - 2 / 3))


def test_scores_by_hand() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1]], dtype=torch.float64)
    found = scores(probabilities.log(), torch.tensor([0, 2]))
    assert found.nll == pytest.approx(-(math.log(0.7) + math.log(0.1)) / 2)
    assert found.brier == pytest.approx((0.3**2 + 0.2**2 + 0.1**2 + 0.3**2 + 0.6**2 + 0.9**2) / 2)
    assert found.ece == pytest.approx((0.3 + 0.6) / 2)
    assert sum(row["num_images"] for row in found.figures()["bins"]) == 2


def test_a_probability_on_a_border_belongs_to_the_lower_bin() -> None:
    for bins in (1, 3, 10, 15):
        borders = torch.arange(1, bins + 1, dtype=torch.float64) / bins
        assert reliability(borders, torch.ones(bins).bool(), bins).num_images.tolist() == [1] * bins
        above = torch.nextafter(borders[:-1], torch.tensor(1.0, dtype=torch.float64))
        moved = reliability(above, torch.ones(bins - 1).bool(), bins).num_images.tolist()
        assert moved == [0] + [1] * (bins - 1)


@given(
    st.lists(
        st.tuples(st.one_of(st.floats(1e-9, 1), st.integers(1, 15).map(lambda b: b / 15)), st.booleans()),
        min_size=1,
    ),
    st.sampled_from([1, 2, 15]),
)
@settings(deadline=None)
def test_the_table_is_that_of_plain_python(images: list[tuple[float, bool]], bins: int) -> None:
    confidence = torch.tensor([probability for probability, _ in images], dtype=torch.float64)
    table = reliability(confidence, torch.tensor([hit for _, hit in images]), bins)
    error = 0.0
    for b in range(bins):
        own = [(p, hit) for p, hit in images if (b == 0 or p > b / bins) and p <= (b + 1) / bins]
        assert table.num_images[b] == len(own)
        if own:
            means = [float(np.mean(column)) for column in zip(*own, strict=True)]
            assert [table.confidence[b].item(), table.accuracy[b].item()] == pytest.approx(means)
            error += len(own) / len(images) * abs(means[0] - means[1])
        else:
            assert table.figures()[b] == {"num_images": 0, "confidence": None, "accuracy": None}
    assert table.error == pytest.approx(error, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num", "classes"), [(1, 2), (57, 2), (200, 7)])
def test_likelihood_and_brier_score_are_those_of_scikit_learn_and_numpy(
    num: int, classes: int, dtype: torch.dtype
) -> None:
    logits, labels = calibrated(num, classes, 3)
    found = scores(logits.to(dtype), labels)
    probabilities = logits.to(dtype).double().softmax(1).numpy()
    own = np.eye(classes)[labels.numpy()]
    assert found.nll == pytest.approx(
        log_loss(labels.numpy(), probabilities, labels=range(classes)), abs=1e-9
    )
    assert found.brier == pytest.approx(np.square(probabilities - own).sum(1).mean(), abs=1e-12)


def test_calibrated_data_has_no_error_and_an_applied_temperature_is_found_back() -> None:
    val, test = calibrated(20_000, 8, 0), calibrated(40_000, 8, 1)
    right = calibration(*val, *test)
    assert right.before.ece < 0.01
    assert right.temperature == pytest.approx(1, abs=0.03)
    sure = calibration(3 * val[0], val[1], 3 * test[0], test[1])
    assert sure.temperature == pytest.approx(3 * right.temperature, rel=1e-9)
    assert sure.before.ece > 0.2
    assert sure.after.ece == pytest.approx(right.after.ece, abs=1e-9)
    assert sure.after.ece < 0.01
    assert sure.after.nll < sure.before.nll
    assert sure.after.brier < sure.before.brier
    assert not sure.at_limit


@given(st.integers(0, 2**32), st.integers(2, 40), st.integers(2, 5), st.floats(0.05, 20))
@settings(deadline=None, max_examples=50)
def test_the_temperature_is_where_the_likelihood_is_highest(
    seed: int, num: int, classes: int, scale: float
) -> None:
    logits, labels = calibrated(num, classes, seed)
    logits = logits * scale

    def nll(log_temperature: float) -> float:
        return scores(logits / math.exp(log_temperature), labels).nll

    found = temperature(logits, labels)
    theirs = optimize.minimize_scalar(nll, bounds=(math.log(COLDEST), math.log(HOTTEST)), method="bounded")
    assert nll(math.log(found)) <= theirs.fun + 1e-9
    if COLDEST < found < HOTTEST:
        assert nll(math.log(found) + 1e-3) >= nll(math.log(found)) <= nll(math.log(found) - 1e-3)


def test_the_temperature_is_that_of_the_validation_data() -> None:
    val, test = calibrated(500, 4, 0), calibrated(500, 4, 1)
    found = calibration(*val, 2 * test[0], test[1])
    assert found.temperature == temperature(*val)
    assert found.after.nll == pytest.approx(scores(2 * test[0] / found.temperature, test[1]).nll)
    assert found.figures()["before"]["ece"] == found.before.ece


def test_validation_data_without_a_best_temperature_is_at_a_limit() -> None:
    """All right: the colder the better. Unrelated to the label, or contrary to it: the hotter the better."""
    labels = torch.arange(30) % 3
    told = torch.nn.functional.one_hot(labels, 3).double()
    for logits, expected in ((told, COLDEST), (torch.zeros(30, 3), HOTTEST), (-told, HOTTEST)):
        found = calibration(logits, labels, told, labels)
        assert found.temperature == expected
        assert found.at_limit
        assert math.isfinite(found.after.nll)


def test_a_class_that_cannot_occur_changes_nothing() -> None:
    logits, labels = calibrated(300, 4, 0)
    wider = torch.cat([logits, torch.full((300, 1), -torch.inf)], 1)
    one, other = calibration(logits, labels, logits, labels), calibration(wider, labels, wider, labels)
    assert other.temperature == pytest.approx(one.temperature, rel=1e-9)
    assert other.after.ece == pytest.approx(one.after.ece)
    assert other.after.nll == pytest.approx(one.after.nll)
    assert other.after.brier == pytest.approx(one.after.brier)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), r"\[images, classes\] are needed, got \[3\]"),
        (torch.zeros(0, 3), torch.zeros(0).long(), "are needed"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "row 1 has class 3"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), "row 1 has class -1"),
        (
            torch.tensor([[0.0, 1.0], [torch.nan, 1.0]]),
            torch.tensor([1, 1]),
            "1 of 2 images cannot be used.*row 1",
        ),
        (torch.tensor([[0.0, torch.inf]]), torch.tensor([0]), "row 0"),
        (torch.tensor([[0.0, -torch.inf]]), torch.tensor([1]), "class 1, is not finite"),
    ],
)
def test_what_cannot_be_used_is_a_data_error(logits: Tensor, labels: Tensor, message: str) -> None:
    for check in (scores, temperature):
        with pytest.raises(DataError, match=message):
            check(logits, labels)
