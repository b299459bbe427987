"""The search of the page: exact ones equal a sort, and beyond many vectors faiss finds nearly the same ones."""

import sys

import pytest
import torch
from torch import Tensor

from threetowers.explore import nearest as module
from threetowers.explore.nearest import approximate, exact, nearest
from threetowers.objective.losses import unit


def clusters(num: int, width: int, seed: int, *, systems: int = 1) -> Tensor:
    """Vectors of images of fifty subjects: of each system unit vectors around a centre of its own for each subject."""
    generator = torch.Generator().manual_seed(seed)
    subject = torch.randint(0, 50, (num,), generator=generator)
    halves = []
    for system in range(systems):
        centres = torch.randn(50, width, generator=torch.Generator().manual_seed(1000 + system))
        halves.append(unit(centres[subject] + 0.7 * torch.randn(num, width, generator=generator)))
    return torch.cat(halves, dim=1)


def test_the_exact_search_equals_a_sort() -> None:
    candidates = torch.randn(37, 5)
    for num in (1, 2, 9):
        queries = torch.randn(num, 5)
        for k in (1, 7, 37, 50):
            for query, answers in zip(queries, exact(queries, candidates, k), strict=True):
                order = (candidates @ query).argsort(descending=True)[:k]
                assert [row for _, row in answers] == order.tolist()
                assert [value for value, _ in answers] == pytest.approx(
                    (candidates @ query)[order].tolist(), abs=1e-5
                )
    assert exact(queries, candidates[:0], 3) == [[]] * 9


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_faiss_finds_nearly_all_and_gives_their_exact_scores(alpha: float) -> None:
    """With two systems side by side in one index, and α in the query alone."""
    faiss = pytest.importorskip("faiss", reason="an extra that not every platform has a package of")
    candidates, queries = clusters(20_000, 24, 1, systems=2), clusters(40, 24, 3, systems=2)
    queries = torch.cat([(1 - alpha) * queries[:, :24], alpha * queries[:, 24:]], dim=1)
    found, expected = approximate(candidates, faiss)(queries, 10), exact(queries, candidates, 10)
    hits = [
        len({row for _, row in some} & {row for _, row in all_})
        for some, all_ in zip(found, expected, strict=True)
    ]
    assert sum(hits) > 0.9 * 400
    for query, answers in zip(queries, found, strict=True):
        scores = [score for score, _ in answers]
        assert scores == sorted(scores, reverse=True) and len({row for _, row in answers}) == 10
        assert scores == pytest.approx([float(candidates[row] @ query) for _, row in answers], abs=1e-5)


@pytest.mark.parametrize("num", [1, 2, 40])
def test_faiss_with_few_vectors_gives_no_more_than_it_found(num: int) -> None:
    faiss = pytest.importorskip("faiss", reason="an extra that not every platform has a package of")
    candidates = clusters(num, 8, 1)
    (answers,) = approximate(candidates, faiss)(candidates[:1], 50)
    score, row = answers[0]
    assert row == 0 and score == pytest.approx(1.0, abs=1e-5)
    assert all(0 <= row < num for _, row in answers) and len(answers) <= num


def test_many_vectors_take_faiss_or_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    candidates = clusters(300, 8, 1)
    monkeypatch.setattr(module, "EXACT_UP_TO", 200)
    monkeypatch.setattr(module, "approximate", lambda vectors, faiss: lambda queries, k: [[(0.5, 7)]])
    monkeypatch.setitem(sys.modules, "faiss", sys)
    assert nearest(candidates)(candidates[:2], 4) == [[(0.5, 7)]]
    assert nearest(candidates[:200])(candidates[:2], 4) == exact(candidates[:2], candidates[:200], 4)
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert nearest(candidates)(candidates[:2], 4) == exact(candidates[:2], candidates, 4)
    assert "pip install 'threetowers[faiss]'" in capsys.readouterr().err
