"""Nearest neighbours against a sort in plain Python and against scikit-learn."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from threetowers.errors import DataError, UsageError
from threetowers.evaluate import neighbours as module
from threetowers.evaluate.neighbours import TEMPERATURE, Nearest, nearest, neighbours, predict
from threetowers.evaluate.ridge import Samples
from threetowers.objective.losses import unit


def plain_nearest(queries: Tensor, candidates: Tensor, k: int) -> tuple[list[list[float]], list[list[int]]]:
    """By a full sort of every query's cosines, rounded to float32."""

    similarity, rows = [], []
    others = unit(candidates).tolist()
    for query in unit(queries).tolist():
        cosines = [
            float(np.float32(math.fsum(a * b for a, b in zip(query, other, strict=True)))) for other in others
        ]
        order = sorted(range(len(cosines)), key=lambda row: (-cosines[row], row))[:k]
        similarity.append([cosines[row] for row in order])
        rows.append(order)
    return similarity, rows


def plain_vote(similarity: list[float], labels: list[int], temperature: float | None) -> int:
    votes: dict[int, float] = defaultdict(float)
    for cosine, label in zip(similarity, labels, strict=True):
        votes[label] += 1 if temperature is None else math.exp(cosine / temperature)
    most = max(votes.values())
    return min(label for label, number in votes.items() if number == most)


@given(
    num=st.integers(1, 9),
    others=st.integers(1, 14),
    width=st.integers(1, 3),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
@settings(deadline=None, max_examples=150)
def test_the_nearest_are_those_of_a_full_sort(
    num: int, others: int, width: int, seed: int, data: st.DataObject
) -> None:
    """Small whole numbers: many are equally similar, some vectors are zero, some opposite."""
    k = data.draw(st.integers(1, others))
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-1, 2, (num, width), generator=generator).float()
    candidates = torch.randint(-1, 2, (others, width), generator=generator).float()
    found = nearest(queries, candidates, k)
    similarity, rows = plain_nearest(queries, candidates, k)
    assert found.rows.tolist() == rows
    assert found.similarity.dtype == torch.float32
    assert found.similarity.tolist() == similarity


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_equal_features_are_equally_similar_wherever_they_stand(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(7, 129, generator=generator).to(dtype)
    candidates = few[torch.randint(0, 7, (301,), generator=generator)]
    found = nearest(few, candidates, 301)
    assert all(len(row.unique()) == len(candidates.unique(dim=0)) for row in found.similarity)
    for similarity, rows in zip(found.similarity, found.rows, strict=True):
        steps = similarity.diff() == 0
        assert (rows.diff()[steps] > 0).all(), "the lower row first"


@given(
    num=st.integers(1, 6),
    classes=st.integers(1, 5),
    k=st.integers(1, 8),
    temperature=st.sampled_from([None, 0.07, 1.0]),
    size=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=150)
def test_votes_are_those_of_plain_python(
    num: int, classes: int, k: int, temperature: float | None, size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (8,), generator=generator)
    rows = torch.stack([torch.randperm(8, generator=generator) for _ in range(num)])
    cosines = torch.randint(-2, 3, (num, 8), generator=generator).float() / 2
    near = Nearest(cosines.sort(dim=1, descending=True).values, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_VOTES", size)
        found = predict(near, labels, classes, k, temperature)
    expected = [
        plain_vote(similarity[:k], labels[own[:k]].tolist(), temperature)
        for similarity, own in zip(near.similarity.tolist(), rows, strict=True)
    ]
    assert found.tolist() == expected


def test_the_lowest_class_wins_a_tie() -> None:
    labels = torch.tensor([2, 1, 1, 2, 0])
    near = Nearest(torch.tensor([[0.9, 0.9, 0.5, 0.5, -1.0]]), torch.arange(5)[None])
    assert [predict(near, labels, 3, k).item() for k in (1, 2, 3, 4, 5)] == [2, 1, 1, 1, 1]
    assert [predict(near, labels, 3, k, 0.07).item() for k in (1, 2, 4)] == [2, 1, 1]


def samples(num: int, seed: int, *, noise: float = 1.0, width: int = 16, classes: int = 5) -> Samples:
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (num,), generator=generator)
    return Samples(centres[labels] + noise * torch.randn(num, width, generator=generator), labels)


@pytest.mark.parametrize("k", [1, 2, 5, 20, 173])
@pytest.mark.parametrize("weighted", [False, True])
def test_predictions_are_those_of_scikit_learn(k: int, weighted: bool) -> None:
    """No two cosines are equal here; equal numbers of votes are common, and go to the lowest class there too."""
    train, test = samples(173, 1, noise=2.0), samples(400, 2, noise=2.0)

    def weights(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / TEMPERATURE)

    theirs = KNeighborsClassifier(k, metric="cosine", weights=weights if weighted else "uniform")
    theirs.fit(train.features.double().numpy(), train.labels.numpy())
    near = nearest(test.features, train.features, k)
    found = predict(near, train.labels, 5, k, TEMPERATURE if weighted else None)
    assert (found.numpy() == theirs.predict(test.features.double().numpy())).all()


def test_the_number_is_chosen_on_validation_for_each_vote() -> None:
    train, val, test = samples(120, 1, noise=2.5), samples(90, 2, noise=2.5), samples(110, 3, noise=2.5)
    result = neighbours(train, val, test, 5)
    assert list(result.majority.path) == [1, 5, 10, 20, 50, 100], "200 are more than there are"
    for vote, temperature in zip(result, (None, TEMPERATURE), strict=True):
        near = nearest(val.features, train.features, 100)
        for k, accuracy in vote.path.items():
            right = predict(near, train.labels, 5, k, temperature) == val.labels
            assert accuracy == right.double().mean().item()
        most = max(vote.path.values())
        assert vote.k == min(k for k, accuracy in vote.path.items() if accuracy == most)
        near = nearest(test.features, train.features, vote.k)
        assert torch.equal(vote.hits, predict(near, train.labels, 5, vote.k, temperature) == test.labels)
        assert vote.accuracy == vote.hits.double().mean().item() > 0.4
        assert vote.figures()["path"] == [list(point) for point in vote.path.items()]
    assert result.majority.path != result.weighted.path


def test_all_training_images_may_be_neighbours() -> None:
    train = samples(7, 1)
    assert list(neighbours(train, train, train, 5, (7, 2, 8)).majority.path) == [2, 7]


def test_oracles() -> None:
    """Neighbours on the same spot, and features that say nothing."""
    labels = torch.arange(50) % 5
    part = Samples(torch.eye(5)[labels], labels)
    for vote in neighbours(part, part, part, 5):
        assert (vote.k, vote.accuracy, vote.mean_per_class) == (1, 1.0, 1.0)
    blind = Samples(torch.ones(50, 3), labels)
    for vote in neighbours(blind, blind, blind, 5):
        assert vote.accuracy == 0.2


def test_absent_classes_do_not_enter_the_mean() -> None:
    train = Samples(torch.eye(3), torch.tensor([0, 1, 2]))
    test = Samples(torch.eye(3)[[0, 0, 0, 0, 1]], torch.tensor([0, 0, 0, 0, 2]))
    vote = neighbours(train, train, test, 3).majority
    assert (vote.accuracy, vote.mean_per_class) == (0.8, 0.5)


def test_what_cannot_be_used_is_refused() -> None:
    train = samples(20, 1)
    with pytest.raises(DataError, match="test labels: row 0 has class 9"):
        neighbours(train, train, train._replace(labels=train.labels + 9), 5)
    for ks in ((0, 1), (30,), ()):
        with pytest.raises(UsageError, match=r"from 1 to that of the training images \(20\)"):
            neighbours(train, train, train, 5, ks)
