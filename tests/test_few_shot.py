"""Few-shot classification: its draws, its figures against plain numpy, and two towers together."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from threetowers.errors import DataError, UsageError
from threetowers.evaluate.few_shot import (
    FewShot,
    JoinedFewShot,
    TwoTowers,
    draw,
    few_shot,
    joined,
    joined_few_shot,
)
from threetowers.evaluate.ridge import Samples, ridge, standardiser

NUM_CLASSES = 6


def samples(
    num: int, seed: int, *, noise: float = 1.5, width: int = 10, parity: int | None = None
) -> Samples:
    """Noisy images of six classes, as many of each. parity: classes that differ only by it cannot be told apart."""
    labels = torch.arange(num) % NUM_CLASSES
    shown = labels if parity is None else (labels // 2 if parity == 0 else labels % 2)
    centres = torch.randn(NUM_CLASSES, width, generator=torch.Generator().manual_seed(5 + (parity or 0)))
    generator = torch.Generator().manual_seed(seed)
    return Samples(centres[shown] + noise * torch.randn(num, width, generator=generator), labels)


def two_towers(num: int, seed: int, noise: float = 0.4) -> TwoTowers:
    """The first tower tells which of three pairs a class belongs to, the second which of the pair it is."""
    first = samples(num, seed, noise=noise, parity=0)
    second = samples(num, seed + 50, noise=noise, parity=1, width=7)
    return TwoTowers(first.features, second.features, first.labels)


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    shots=st.integers(1, 12),
    more=st.integers(0, 9),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None)
def test_a_draw_takes_what_it_may_of_each_class_and_begins_every_larger_one(
    labels: list[int], shots: int, more: int, seed: int
) -> None:
    of = torch.tensor(labels)
    drawn = draw(of, 5, shots, seed)
    assert len(set(drawn.tolist())) == len(drawn)
    expected = torch.bincount(of, minlength=5).clamp(max=shots)
    assert torch.equal(torch.bincount(of[drawn], minlength=5), expected)
    assert torch.equal(draw(of, 5, shots + more, seed)[: len(drawn)], drawn)


def test_draws_depend_on_the_seed_alone() -> None:
    labels = torch.arange(60) % 3
    assert draw(labels, 3, 2, 0).tolist() == draw(labels, 3, 2, 0).tolist() == [12, 34, 23, 57, 49, 35]
    assert draw(labels, 3, 2, 1).tolist() != draw(labels, 3, 2, 0).tolist()


def plain_hits(train: Samples, test: Samples, shots: int, seed: int) -> np.ndarray:
    """One draw in numpy, as big_vision makes it: classes one after the other, and one linear system."""
    x, labels = train.features.double().numpy(), train.labels.numpy()
    rng = np.random.default_rng(seed)
    rows = np.concatenate([rng.permutation(np.where(labels == c)[0])[:shots] for c in range(NUM_CLASSES)])
    mean, std = x[rows].mean(0), x[rows].std(0) + 1e-5

    def prepared(features: np.ndarray) -> np.ndarray:
        return np.pad((features - mean) / std, ((0, 0), (0, 1)), constant_values=100.0)

    own = prepared(x[rows])
    targets = 2.0 * np.eye(NUM_CLASSES)[labels[rows]] - 1
    weights = np.linalg.solve(own.T @ own + 1024 * np.eye(own.shape[1]), own.T @ targets)
    found: np.ndarray = (prepared(test.features.double().numpy()) @ weights).argmax(1) == test.labels.numpy()
    return found


def test_hits_are_those_of_plain_numpy_at_every_number_of_shots_and_seed() -> None:
    train, test = samples(200, 1), samples(101, 2)
    result = few_shot(train, test, NUM_CLASSES, shots=(1, 3, 25), seeds=(0, 7))
    assert result.hits.shape == (3, 2, 101)
    for row, shots in enumerate((1, 3, 25)):
        for column, seed in enumerate((0, 7)):
            assert (result.hits[row, column].numpy() == plain_hits(train, test, shots, seed)).all()
    assert result.accuracy.mean(1).diff().min() > 0, "more images, better"


def test_figures_are_mean_and_spread_over_seeds() -> None:
    result = few_shot(samples(200, 1), samples(60, 2), NUM_CLASSES)
    assert list(result.figures()) == ["1", "5", "10", "25"]
    values = result.hits[1].double().mean(1).tolist()
    assert result.figures()["5"] == {
        "mean": pytest.approx(np.mean(values)),
        "spread": pytest.approx(np.std(values, ddof=1)),
        "by_seed": values,
        "short_classes": 0,
    }
    assert few_shot(samples(60, 1), samples(60, 2), NUM_CLASSES, seeds=[4]).figures()["5"]["spread"] is None


def test_classes_with_few_images_or_none_are_counted() -> None:
    train = samples(60, 1)
    kept = torch.cat(
        [(train.labels == c).nonzero().flatten()[:num] for c, num in enumerate((10, 10, 1, 4, 0, 5))]
    )
    result = few_shot(Samples(train.features[kept], train.labels[kept]), samples(60, 2), NUM_CLASSES)
    assert result.short == (1, 3, 4, 6)
    assert [row["short_classes"] for row in result.figures().values()] == [1, 3, 4, 6]
    assert not result.hits[..., samples(60, 2).labels == 4].any(), (
        "a class without an image is never predicted"
    )


def test_an_oracle_scores_one_and_noise_scores_chance() -> None:
    train, test = samples(300, 1, noise=0.01), samples(600, 2, noise=0.01)
    assert (few_shot(train, test, NUM_CLASSES).accuracy == 1).all()
    generator = torch.Generator().manual_seed(0)
    blind = [
        Samples(torch.randn(len(part.labels), 10, generator=generator), part.labels) for part in (train, test)
    ]
    chance = few_shot(blind[0], blind[1], NUM_CLASSES).accuracy
    assert (chance > 0.1).all() and (chance < 0.24).all()


def test_joined_features_are_weighted_by_the_roots() -> None:
    first, second = torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    torch.testing.assert_close(joined(first, second, 0.36), torch.tensor([[2.4, 0.6, 1.2], [0.8, 0.0, -0.6]]))
    assert torch.equal(joined(first, second, 0.0), torch.tensor([[3.0, 0, 0], [1.0, 0, 0]]))
    assert torch.equal(joined(first, second, 1.0), torch.tensor([[0, 1.0, 2.0], [0, 0, -1.0]]))
    with pytest.raises(UsageError, match=r"from 0 to 1 is needed, got 1\.5"):
        joined(first, second, 1.5)


def test_standardising_again_would_cancel_the_weights() -> None:
    pair = two_towers(60, 1)
    one, other = standardiser(pair.first), standardiser(pair.second)
    parts = [joined(one(pair.first), other(pair.second), alpha) for alpha in (0.2, 0.8)]

    def difference(*, standardise: bool) -> float:
        a, b = (ridge(x, pair.labels, NUM_CLASSES, standardise=standardise).scores(x) for x in parts)
        return (a - b).abs().max().item()

    assert difference(standardise=True) < 1e-4, "only the 1e-5 on the standard deviation is left"
    assert difference(standardise=False) > 0.01


def test_the_ends_are_the_towers_alone_and_the_chosen_weight_is_better() -> None:
    train, val, test = (two_towers(num, seed) for num, seed in ((200, 1), (120, 2), (180, 3)))
    result = joined_few_shot(train, val, test, NUM_CLASSES, alphas=(0, 0.25, 0.5, 0.75, 1), shots=(5, 25))
    for end, index in zip(result.ends, (0, 1), strict=True):
        alone = few_shot(
            Samples(train[index], train.labels), Samples(test[index], test.labels), NUM_CLASSES, shots=(5, 25)
        )
        assert torch.equal(end.hits, alone.hits)
    ends = [end.accuracy.mean(1) for end in result.ends]
    assert (result.chosen.accuracy.mean(1) > torch.maximum(*ends) + 0.2).all(), (
        "each tower tells half of the class"
    )
    figures = result.figures()["25"]
    assert figures["alpha"] == result.alphas[result.places[1]]
    assert figures["test"][result.places[1]] == pytest.approx(figures["mean"])
    assert figures["val"][result.places[1]] == max(figures["val"])


def test_a_weighted_fit_is_ridge_on_the_joined_features_standardised_by_the_drawn_images() -> None:
    train, val, test = (two_towers(num, seed, noise=2.0) for num, seed in ((200, 1), (30, 2), (400, 3)))
    result = joined_few_shot(train, val, test, NUM_CLASSES, alphas=(0, 0.1, 1), shots=(20,), seeds=(2,))
    rows = draw(train.labels, NUM_CLASSES, 20, 2)
    weights = 0.9**0.5, 0.1**0.5
    parts = []
    for features in (train[:2], test[:2]):
        scaled = [
            weight * (x - own[rows].mean(0)) / (own[rows].std(0, correction=0) + 1e-5)
            for weight, x, own in zip(weights, features, train[:2], strict=True)
        ]
        parts.append(torch.cat(scaled, 1))
    fitted = ridge(parts[0][rows], train.labels[rows], NUM_CLASSES, standardise=False)
    assert torch.equal(result.test[1].hits[0, 0], fitted.hits(parts[1], test.labels))
    again = ridge(parts[0][rows], train.labels[rows], NUM_CLASSES)
    assert not torch.equal(result.test[1].hits[0, 0], again.hits(parts[1], test.labels))


def by_hand(right: list[list[int]]) -> tuple[FewShot, ...]:
    """Results of ten images and one seed, with so many right; one list for each α, one entry for each shots."""
    return tuple(
        FewShot((1, 5), (0,), torch.stack([(torch.arange(10) < num)[None] for num in of_shots]), (0, 0))
        for of_shots in right
    )


def test_the_weight_is_chosen_on_validation_at_each_number_of_shots() -> None:
    val, test = by_hand([[4, 2], [7, 3], [7, 9]]), by_hand([[9, 9], [5, 1], [8, 6]])
    result = JoinedFewShot((0.0, 0.5, 1.0), val, test)
    assert result.places == [1, 2], "the smallest α wins the tie"
    assert result.chosen.accuracy.tolist() == [[0.5], [0.6]]
    assert [row["alpha"] for row in result.figures().values()] == [0.5, 1.0]


def changed(part: Samples, **fields: Tensor) -> Samples:
    return part._replace(**fields)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            changed(samples(12, 1), features=torch.full((12, 10), torch.nan)),
            samples(12, 2),
            "training features: 12",
        ),
        (
            samples(12, 1),
            changed(samples(12, 2), labels=torch.full((12,), 6)),
            "test labels: row 0 has class 6",
        ),
        (
            samples(12, 1),
            changed(samples(12, 2), labels=torch.full((12,), -1)),
            "leave out images without a label",
        ),
        (
            samples(12, 1),
            changed(samples(12, 2), labels=torch.zeros(11).long()),
            r"test labels.*got torch.int64 \[11",
        ),
        (samples(12, 1), changed(samples(12, 2), labels=torch.zeros(12)), r"got torch.float32 \[12\]"),
        (samples(12, 1), samples(12, 2, width=9), "test features are 9 wide, the training features 10"),
        (Samples(torch.empty(0, 10), torch.empty(0).long()), samples(12, 2), "a matrix"),
    ],
)
def test_what_cannot_be_used_is_a_data_error(train: Samples, test: Samples, message: str) -> None:
    with pytest.raises(DataError, match=message):
        few_shot(train, test, NUM_CLASSES)


def test_wrong_shots_seeds_and_grids_are_usage_errors() -> None:
    part, pair = samples(12, 1), two_towers(12, 1)
    for shots, seeds in (((0, 5), (0,)), ((), (0,)), ((1,), ())):
        with pytest.raises(UsageError, match="at least one seed"):
            few_shot(part, part, NUM_CLASSES, shots=shots, seeds=seeds)
    with pytest.raises(UsageError, match="rises from 0 to 1"):
        joined_few_shot(pair, pair, pair, NUM_CLASSES, alphas=(0, 0.5))
    narrow = pair._replace(second=pair.second[:, :3])
    with pytest.raises(DataError, match=r"validation \(second tower\) features are 3 wide"):
        joined_few_shot(pair, narrow, pair, NUM_CLASSES)
