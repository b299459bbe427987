"""Few-shot classification: ridge regression on a few images of each class, of one tower or of two towers together.

Two towers are weighted as arXiv 2305.16999 weights them for tasks without texts: each one's features are standardised,
then multiplied by √(1−α) and √α, then put side by side. α is chosen on validation data, at each number of shots.

Legend: N images, F width of the features, C classes, S numbers of shots, R seeds, A values of α.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from threetowers.errors import UsageError
from threetowers.evaluate.combine import ALPHAS
from threetowers.evaluate.ridge import Samples, check_parts, ridge, standardiser

SHOTS = (1, 5, 10, 25)
SEEDS = (0, 1, 2)


class TwoTowers(NamedTuple):
    """Features of the same images by two towers, [N, F1] and [N, F2], and the class of each image, int64 [N]."""

    first: Tensor
    second: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class FewShot:
    """Which images a few-shot classifier gets right, at every number of shots and from every seed's draw.

    hits: bool [S, R, N]. short: at each number of shots, how many classes have fewer training images than that, and
    gave all they have.
    """

    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    hits: Tensor = field(repr=False)
    short: tuple[int, ...]

    @property
    def accuracy(self) -> Tensor:
        """Share of images that are right, float64 [S, R]."""
        return self.hits.double().mean(2)

    def figures(self) -> dict[str, dict[str, Any]]:
        """By number of shots: the accuracy of each seed, their mean and spread, and the number of short classes.

        The spread is the standard deviation with N − 1, which one seed does not have (None).
        """
        rows: dict[str, dict[str, Any]] = {}
        for shots, values, short in zip(self.shots, self.accuracy, self.short, strict=True):
            spread = values.std().item() if len(self.seeds) > 1 else None
            rows[str(shots)] = {
                "mean": values.mean().item(),
                "spread": spread,
                "by_seed": values.tolist(),
                "short_classes": short,
            }
        return rows


@dataclass(frozen=True, eq=False)
class JoinedFewShot:
    """Few-shot classification from two towers over a grid of α; val and test have one result per value of α."""

    alphas: tuple[float, ...]
    val: tuple[FewShot, ...]
    test: tuple[FewShot, ...]

    @property
    def places(self) -> list[int]:
        """Of each number of shots, the place of the chosen α in the grid.

        It is the one with the most right answers on validation, all seeds together; the smallest α wins a tie.
        """
        right = torch.stack([each.hits.sum((1, 2)) for each in self.val])
        return right.argmax(0).tolist()

    @property
    def chosen(self) -> FewShot:
        """The test result, at each number of shots with the α chosen for it."""
        hits = torch.stack([self.test[place].hits[row] for row, place in enumerate(self.places)])
        return FewShot(self.test[0].shots, self.test[0].seeds, hits, self.test[0].short)

    @property
    def ends(self) -> tuple[FewShot, FewShot]:
        """The test results of the first tower alone (α = 0) and of the second alone (α = 1)."""
        return self.test[0], self.test[-1]

    def figures(self) -> dict[str, dict[str, Any]]:
        """By number of shots: α and its test figures, and the mean accuracy over the grid on validation and test."""
        rows = self.chosen.figures()
        for row, (place, figures) in enumerate(zip(self.places, rows.values(), strict=True)):
            figures["alpha"] = self.alphas[place]
            for part, results in (("val", self.val), ("test", self.test)):
                figures[part] = [each.accuracy[row].mean().item() for each in results]
        return rows


def few_shot(
    train: Samples,
    test: Samples,
    num_classes: int,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = SEEDS,
) -> FewShot:
    """Ridge regression on the drawn images of each class, tested on all of `test`; float64 on the CPU.

    Convention: big_vision's `fewshot_lsr` (see `ridge`), with its shots, and with its draws where the training images
    are in the same order. Features are standardised by the drawn images alone. Raises DataError for features or labels
    that cannot be used, UsageError for shots below 1.

        result = few_shot(Samples(train, train_labels), Samples(test, test_labels), 10)
        result.figures()["5"]["mean"]
    """
    _check_draws(shots, seeds)
    check_parts({"training": train, "test": test}, num_classes)
    hits = torch.empty(len(shots), len(seeds), len(test.labels), dtype=torch.bool)
    for row, count in enumerate(shots):
        for column, seed in enumerate(seeds):
            drawn = draw(train.labels, num_classes, count, seed)
            fitted = ridge(train.features[drawn], train.labels[drawn], num_classes)
            hits[row, column] = fitted.hits(test.features, test.labels)
    return FewShot(tuple(shots), tuple(seeds), hits, _short(train.labels, num_classes, shots))


def joined_few_shot(
    train: TwoTowers,
    val: TwoTowers,
    test: TwoTowers,
    num_classes: int,
    alphas: Sequence[float] = ALPHAS,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = SEEDS,
) -> JoinedFewShot:
    """`few_shot` on the joined features of two towers, for every α of a rising grid from 0 to 1; see `joined`.

    The draws are those of `few_shot`, and so the ends equal the two towers alone. Raises as `few_shot` does, and
    UsageError for another grid.

        result = joined_few_shot(train, val, test, 10)
        result.chosen.figures(), result.ends[0].figures()
    """
    _check_draws(shots, seeds)
    grid = tuple(float(alpha) for alpha in alphas)
    if sorted(set(grid)) != list(grid) or grid[:1] != (0.0,) or grid[-1:] != (1.0,):
        raise UsageError(f"alphas: a grid that rises from 0 to 1 is needed, got {list(grid)}")
    for tower, which in (("first", 0), ("second", 1)):
        parts = (("training", train), ("validation", val), ("test", test))
        check_parts(
            {f"{name} ({tower} tower)": Samples(part[which], part.labels) for name, part in parts},
            num_classes,
        )
    hits = [
        torch.empty(len(grid), len(shots), len(seeds), len(part.labels), dtype=torch.bool)
        for part in (val, test)
    ]
    for row, count in enumerate(shots):
        for column, seed in enumerate(seeds):
            drawn = draw(train.labels, num_classes, count, seed)
            first, second = standardiser(train.first[drawn]), standardiser(train.second[drawn])
            own = first(train.first[drawn]), second(train.second[drawn])
            others = [(first(part.first), second(part.second)) for part in (val, test)]
            for place, alpha in enumerate(grid):
                fitted = ridge(joined(*own, alpha), train.labels[drawn], num_classes, standardise=False)
                for found, pair, part in zip(hits, others, (val, test), strict=True):
                    found[place, row, column] = fitted.hits(joined(*pair, alpha), part.labels)
    short = _short(train.labels, num_classes, shots)
    of_val, of_test = (
        tuple(FewShot(tuple(shots), tuple(seeds), each, short) for each in found) for found in hits
    )
    return JoinedFewShot(grid, of_val, of_test)


def joined(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    """Two towers' features as one, [N, F1 + F2]: √(1−α) times the first beside √α times the second.

    first [N, F1] and second [N, F2] must be standardised by the training images (`ridge.standardiser`), so that α means
    the same for every pair of towers. What is fitted on the result must not standardise it again, since that would
    cancel α. Raises UsageError for an α outside 0 to 1.

        one, other = standardiser(train.first), standardiser(train.second)
        joined(one(test.first), other(test.second), 0.3)
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha: a weight from 0 to 1 is needed, got {alpha}")
    return torch.cat([(1 - alpha) ** 0.5 * first, alpha**0.5 * second], dim=1)


def draw(labels: Tensor, num_classes: int, shots: int, seed: int) -> Tensor:
    """The rows of the training images that stand for the classes, int64 [at most shots × C].

    The first image of every class comes first, then the second of every class, and so on: a draw begins with the
    seed's draw at fewer shots. A class with fewer images gives all of them. labels: int64 [N].
    """
    generator = np.random.default_rng(seed)
    by_class = np.split(
        np.argsort(labels.numpy(), kind="stable"),
        np.cumsum(np.bincount(labels.numpy(), minlength=num_classes))[:-1],
    )
    drawn = [generator.permutation(rows)[:shots] for rows in by_class]
    return torch.tensor([int(rows[place]) for place in range(shots) for rows in drawn if place < len(rows)])


def _short(labels: Tensor, num_classes: int, shots: Sequence[int]) -> tuple[int, ...]:
    counts = torch.bincount(labels, minlength=num_classes)
    return tuple(int((counts < count).sum()) for count in shots)


def _check_draws(shots: Sequence[int], seeds: Sequence[int]) -> None:
    if not seeds or min(shots, default=0) < 1:
        raise UsageError(
            f"few-shot: at least one seed, and shots of at least 1 are needed, got shots {list(shots)} and seeds "
            f"{list(seeds)}"
        )
