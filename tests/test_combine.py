"""Combinations of two systems by their features, and the choice of α on validation data."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from threetowers.errors import UsageError
from threetowers.evaluate.combine import ALPHAS, Pair, Sweep, combine, sweep
from threetowers.evaluate.retrieval import System, ranks_from_features, recalls
from threetowers.objective.losses import unit


def noisy_pair(seed: int, num_images: int = 60, noise: tuple[float, float] = (1.0, 1.0)) -> Pair:
    """Two systems of widths 16 and 24 that see the same latent through independent noise; two texts per image."""
    generator = torch.Generator().manual_seed(seed)
    text_image = torch.arange(2 * num_images) // 2

    def system(width: int, level: float) -> System:
        latent = torch.randn(num_images, width, generator=generator)

        def seen(rows: Tensor) -> Tensor:
            return unit(rows + level * torch.randn(rows.shape, generator=generator))

        return System(seen(latent), seen(latent[text_image]))

    return Pair(system(16, noise[0]), system(24, noise[1]), text_image)


def one_index(pair: Pair, alpha: float) -> System:
    """Both systems in one: the dot products of [√(1−α) main ; √α side] are the scores s_α."""
    weights = (1 - alpha) ** 0.5, alpha**0.5
    return System(*(
        torch.cat([weights[0] * main, weights[1] * side], dim=1)
        for main, side in zip(pair.main, pair.side, strict=True)
    ))  # fmt: skip


def mean_recall(system: System, text_image: Tensor) -> float:
    return recalls(ranks_from_features(*system, text_image))["mean_r@1"]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 50))
def test_the_ends_are_the_two_systems_alone_exactly(seed: int, block: int) -> None:
    pair = noisy_pair(seed, num_images=20)
    ends = combine(pair, [0.0, 1.0], block=block)
    for system, ranks in zip((pair.main, pair.side), ends, strict=True):
        alone = ranks_from_features(system.image, system.text, pair.text_image)
        assert torch.equal(ranks.i2t, alone.i2t) and torch.equal(ranks.t2i, alone.t2i)


def test_every_alpha_ranks_as_its_one_index_form() -> None:
    pair = noisy_pair(5)
    for alpha, ranks in zip(ALPHAS, combine(pair, ALPHAS, block=13), strict=True):
        expected = ranks_from_features(*one_index(pair, alpha), pair.text_image)
        assert torch.equal(ranks.i2t, expected.i2t) and torch.equal(ranks.t2i, expected.t2i)


def test_equal_vectors_tie_at_every_alpha() -> None:
    generator = torch.Generator().manual_seed(0)

    def constant(width: int) -> System:
        same = unit(torch.randn(width, generator=generator))
        return System(same.expand(101, -1), same.expand(103, -1))

    pair = Pair(constant(37), constant(19), torch.arange(103) % 101)
    for ranks in combine(pair, ALPHAS):
        assert ranks.i2t.min() >= 101 and ranks.t2i.min() >= 100


def test_alpha_is_chosen_on_validation_and_reported_on_test() -> None:
    val, test = noisy_pair(1, noise=(1.0, 1.2)), noisy_pair(2, noise=(1.2, 1.0))
    result = sweep(val, test)
    expected = [mean_recall(one_index(val, alpha), val.text_image) for alpha in ALPHAS]
    assert list(result.val) == expected
    best = max(range(len(ALPHAS)), key=lambda i: (expected[i], -ALPHAS[i]))
    assert result.alpha == ALPHAS[best] and 0 < result.alpha < 1
    assert result.chosen == result.test[best]
    assert result.chosen > max(result.ends)  # independent noise: two views of the latent are better than one
    assert result.ends == tuple(mean_recall(system, test.text_image) for system in (test.main, test.side))
    hits = [array.mean() for array in result.ranks[best].hits()]
    assert sum(hits) / 2 == pytest.approx(result.chosen)


def test_ties_on_validation_go_to_the_smallest_alpha() -> None:
    assert Sweep((0.0, 0.5, 1.0), (0.2, 0.4, 0.4), (0.1, 0.2, 0.9), ()).alpha == 0.5
    perfect = Pair(System(torch.eye(4), torch.eye(4)), System(torch.eye(4), torch.eye(4)), torch.arange(4))
    assert sweep(perfect, perfect).alpha == 0.0


def test_a_useless_side_system_is_not_chosen() -> None:
    result = sweep(noisy_pair(3, noise=(0.3, 50.0)), noisy_pair(4, noise=(0.3, 50.0)))
    assert result.alpha < 0.5
    assert result.ends[1] < 0.1 < result.ends[0] <= result.chosen + 0.05


@pytest.mark.parametrize("alphas", [(), (0.0, 0.5), (0.5, 1.0), (0.0, 0.7, 0.3, 1.0), (0.0, 0.0, 1.0)])
def test_grids_that_do_not_rise_from_0_to_1_are_refused(alphas: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="rises from 0 to 1"):
        sweep(noisy_pair(0), noisy_pair(0), alphas)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match="from 0 to 1"):
        combine(noisy_pair(0), [alpha])
    with pytest.raises(UsageError, match="from 0 to 1"):
        sweep(noisy_pair(0), noisy_pair(0), (0.0, alpha, 1.0))
