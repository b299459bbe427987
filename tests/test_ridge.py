"""Ridge regression against scikit-learn's, and by oracles."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from threetowers.errors import DataError
from threetowers.evaluate.ridge import BIAS, PENALTY, ridge


@given(num=st.integers(2, 60), width=st.integers(1, 40), classes=st.integers(2, 5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_its_scores_are_those_of_scikit_learn(num: int, width: int, classes: int, seed: int) -> None:
    """With fewer samples than features, too, where the other linear system is solved."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num, width, generator=generator) * 3 + 1
    labels = torch.randint(0, classes, (num,), generator=generator)
    found = ridge(features, labels, classes)
    mean, std = features.double().mean(0), features.double().std(0, correction=0) + 1e-5
    x = np.hstack([((features.double() - mean) / std).numpy(), np.full((num, 1), BIAS)])
    y = 2 * np.eye(classes)[labels.numpy()] - 1
    theirs = Ridge(alpha=PENALTY, fit_intercept=False, solver="svd").fit(x, y)
    np.testing.assert_allclose(found.scores(features).numpy(), theirs.predict(x), rtol=1e-6, atol=1e-8)


def test_an_oracle_scores_one_and_noise_scores_chance() -> None:
    labels = torch.arange(2_000) % 4
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2_000, 8, generator=generator)
    told = noise.clone()
    told[:, :4] += 20 * torch.nn.functional.one_hot(labels, 4)
    half = slice(0, 1_000), slice(1_000, None)
    assert ridge(told[half[0]], labels[half[0]], 4).accuracy(told[half[1]], labels[half[1]]) == 1
    chance = ridge(noise[half[0]], labels[half[0]], 4).accuracy(noise[half[1]], labels[half[1]])
    assert 0.2 < chance < 0.3


def test_mistakes_are_data_errors() -> None:
    with pytest.raises(DataError, match="0 features"):
        ridge(torch.empty(0, 3), torch.empty(0, dtype=torch.long), 2)
    with pytest.raises(DataError, match="3 features and 2 labels"):
        ridge(torch.zeros(3, 2), torch.tensor([0, 1]), 2)
    with pytest.raises(DataError, match="from 0 to 1"):
        ridge(torch.zeros(2, 2), torch.tensor([0, 2]), 2)
