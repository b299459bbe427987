"""The linear probe against scikit-learn's logistic regression, and how it chooses the regularisation."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor

from threetowers.errors import DataError
from threetowers.evaluate import linear_probe as module
from threetowers.evaluate.linear_probe import Logistic, fit_logistic, linear_probe
from threetowers.evaluate.ridge import Samples, standardiser, unchanged


def samples(
    num: int, width: int, classes: int, *, seed: int = 0, noise: float = 1.0, decay: float = 0.0
) -> Samples:
    """Noisy images of classes whose centres do not depend on the seed; decay: later features are smaller."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (num,), generator=generator)
    labels[:classes] = torch.arange(classes)
    features = centres[labels] + noise * torch.randn(num, width, generator=generator)
    mix = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(7)))[0]
    return Samples(features * torch.arange(1, width + 1) ** -decay @ mix * 3 + 1, labels)


def oracle(
    train: Samples, features: Tensor, inverse_penalty: float, *, standardise: bool = True
) -> np.ndarray:
    """Probabilities by scikit-learn's Newton method, which is another way to the same minimum."""
    prepare = standardiser(train.features) if standardise else Tensor.double
    model = LogisticRegression(C=inverse_penalty, solver="newton-cg", tol=1e-12, max_iter=20_000)
    model.fit(prepare(train.features).numpy(), train.labels.numpy())
    found: np.ndarray = model.predict_proba(prepare(features).numpy())
    return found


CASES = {
    "five classes": samples(200, 12, 5, noise=2.0),
    "two classes": samples(150, 8, 2, noise=2.0),
    "one feature": samples(120, 1, 3, noise=0.5),
    "separable": samples(90, 10, 4, noise=0.05),
    "fewer images than features": samples(30, 50, 3),
    "correlated features": samples(300, 40, 6, decay=1.0),
    "one image of each class": samples(4, 6, 4),
}


@pytest.mark.filterwarnings("ignore:Line Search failed", "ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("inverse_penalty", [1e-4, 0.03, 1.0, 100.0])
@pytest.mark.parametrize("name", CASES)
def test_probabilities_are_those_of_scikit_learn(name: str, inverse_penalty: float) -> None:
    """On the images that it was fitted on, and on others."""
    train = CASES[name]
    generator = torch.Generator().manual_seed(3)
    features = torch.cat([train.features, 4 * torch.randn(50, train.features.shape[1], generator=generator)])
    fitted = fit_logistic(train, int(train.labels.max()) + 1, inverse_penalty)
    found = fitted.logits(features).softmax(1).numpy()
    np.testing.assert_allclose(found, oracle(train, features, inverse_penalty), rtol=0, atol=1e-4)


def test_features_whose_scales_are_meant_stay_as_they_are() -> None:
    train = CASES["correlated features"]
    fitted = fit_logistic(train, 6, 0.01, standardise=False)
    expected = oracle(train, train.features, 0.01, standardise=False)
    np.testing.assert_allclose(fitted.logits(train.features).softmax(1).numpy(), expected, rtol=0, atol=1e-4)
    assert (
        fit_logistic(train, 6, 0.01).logits(train.features).softmax(1) - torch.from_numpy(expected)
    ).abs().max() > 0.1


def test_a_fit_does_not_depend_on_where_it_starts_from() -> None:
    train = CASES["five classes"]
    cold = fit_logistic(train, 5, 1.0)
    start = fit_logistic(samples(60, 12, 5, seed=8), 5, 0.01)
    torch.testing.assert_close(fit_logistic(train, 5, 1.0, start).weights, cold.weights, rtol=0, atol=1e-5)


def parts(num: int = 150, classes: int = 5, noise: float = 2.5, decay: float = 0.0) -> list[Samples]:
    return [
        samples(size, 12, classes, seed=seed, noise=noise, decay=decay)
        for seed, size in enumerate((num, 81, 97))
    ]


def test_the_result_is_of_the_chosen_penalty_fitted_on_training_and_validation_images() -> None:
    train, val, test = parts()
    result = linear_probe(train, val, test, 5)
    both = Samples(torch.cat([train.features, val.features]), torch.cat([train.labels, val.labels]))
    expected = oracle(both, test.features, result.inverse_penalty)
    np.testing.assert_allclose(result.logits.softmax(1).numpy(), expected, rtol=0, atol=1e-4)
    of_train = oracle(train, val.features, result.inverse_penalty)
    found = result.chosen.logits(val.features).softmax(1).numpy()
    np.testing.assert_allclose(found, of_train, rtol=0, atol=1e-4)
    predicted = expected.argmax(1)
    assert (result.hits.numpy() == (predicted == test.labels.numpy())).all()
    assert result.accuracy == result.hits.double().mean().item() > 0.5
    assert result.mean_per_class == pytest.approx(balanced_accuracy_score(test.labels.numpy(), predicted))
    assert result.figures()["path"] == [list(point) for point in result.path.items()]


def test_the_path_has_the_validation_accuracies_and_its_first_maximum_is_chosen() -> None:
    train, val, test = parts()
    result = linear_probe(train, val, test, 5)
    values = list(result.path)
    assert values == sorted(values)
    np.testing.assert_allclose(np.diff(np.log10(values)), 0.5)
    assert {round(float(np.log10(value)), 1) for value in values} >= {
        -4.0,
        -3.5,
        -3.0,
        -2.5,
        -2.0,
        -1.5,
        -1.0,
    }
    for value, accuracy in result.path.items():
        own = oracle(train, val.features, value).argmax(1) == val.labels.numpy()
        assert accuracy == pytest.approx(own.mean(), abs=1.1 / len(own)), (
            "the search is rougher than the last fit"
        )
    assert result.inverse_penalty == max(result.path, key=lambda value: result.path[value])
    assert values[0] < result.inverse_penalty < values[-1]
    assert not result.at_limit


def test_the_grid_grows_upwards_while_less_regularisation_helps() -> None:
    train, val, test = parts(num=300, noise=0.25, decay=2.5)
    result = linear_probe(train, val, test, 5)
    assert result.inverse_penalty > 0.1
    assert max(result.path) > result.inverse_penalty or result.at_limit
    assert result.path[result.inverse_penalty] > result.path[0.1]


def test_the_grid_grows_downwards_to_its_limit_while_nothing_gets_worse() -> None:
    """Three classes of as many images each, far apart: the faintest weights are enough."""
    labels = torch.arange(60) % 3
    part = Samples(torch.eye(3)[labels], labels)
    result = linear_probe(part, part, part, 3)
    assert result.inverse_penalty == min(result.path) == 1e-6
    assert result.at_limit
    assert result.accuracy == 1


def test_the_grid_ends_at_its_upper_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for the fit, of which each value gets one more image right."""
    labels = torch.zeros(60).long()
    part = Samples(torch.arange(60.0)[:, None], labels)

    def fit(samples: Samples, num_classes: int, value: float, *_: object, **__: object) -> Logistic:
        border = 20 + round(2 * np.log10(value))
        weights = torch.tensor([[0.0, 1.0], [0.0, 0.5 - border]], dtype=torch.float64)
        return Logistic(unchanged(1), weights)

    monkeypatch.setattr(module, "fit_logistic", fit)
    result = linear_probe(part, part, part, 2)
    assert result.inverse_penalty == max(result.path) == 1e6
    assert result.at_limit
    assert result.accuracy == pytest.approx(32 / 60)


def without(part: Samples, label: int) -> Samples:
    kept = part.labels != label
    return Samples(part.features[kept], part.labels[kept])


def test_a_class_may_be_missing_from_validation() -> None:
    train, val, test = parts()
    result = linear_probe(train, without(val, 2), test, 5)
    both = Samples(
        torch.cat([train.features, without(val, 2).features]),
        torch.cat([train.labels, without(val, 2).labels]),
    )
    expected = oracle(both, test.features, result.inverse_penalty)
    np.testing.assert_allclose(result.logits.softmax(1).numpy(), expected, rtol=0, atol=1e-4)
    assert result.hits[test.labels == 2].any()


def test_a_class_without_training_images_is_never_predicted() -> None:
    train, val, test = parts()
    result = linear_probe(without(train, 2), without(val, 2), test, 5)
    assert (result.logits[:, 2] == -torch.inf).all()
    assert not result.hits[test.labels == 2].any()
    others = result.logits[:, [0, 1, 3, 4]].softmax(1).numpy()
    both = Samples(
        torch.cat([without(train, 2).features, without(val, 2).features]),
        torch.cat([without(train, 2).labels, without(val, 2).labels]),
    )
    np.testing.assert_allclose(others, oracle(both, test.features, result.inverse_penalty), rtol=0, atol=1e-4)
    known_later = linear_probe(without(train, 2), val, test, 5)
    assert (known_later.chosen.logits(test.features)[:, 2] == -torch.inf).all()
    assert known_later.hits[test.labels == 2].any(), "validation images have shown it"


def test_one_class_is_always_right() -> None:
    part = Samples(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), torch.ones(9).long())
    assert linear_probe(part, part, part, 3).accuracy == 1


def test_double_and_single_precision_features_give_one_result() -> None:
    train = CASES["five classes"]
    double = fit_logistic(Samples(train.features.double(), train.labels), 5, 1.0)
    assert torch.equal(fit_logistic(train, 5, 1.0).weights, double.weights)


def test_a_fit_that_does_not_converge_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_MOST_STEPS", 3)
    fit_logistic(CASES["five classes"], 5, 1.0)
    assert "no convergence at inverse penalty 1 in 3 steps" in capsys.readouterr().err


def test_what_cannot_be_used_is_a_data_error() -> None:
    train, val, test = parts()
    with pytest.raises(DataError, match="validation labels: row 0 has class 7"):
        linear_probe(train, val._replace(labels=val.labels + 7), test, 5)
    with pytest.raises(DataError, match="validation features are 11 wide"):
        linear_probe(train, val._replace(features=val.features[:, 1:]), test, 5)
    with pytest.raises(DataError, match="test features: a matrix"):
        linear_probe(train, val, Samples(test.features[:0], test.labels[:0]), 5)
