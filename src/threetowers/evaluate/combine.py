"""The convex combination of two systems: the main pair, and the frozen tower read through the heads.

In score space s_α(I, T) = (1−α) f(I)·g(T) + α h_g(I)·g_h(T) (arXiv 2305.16999, figure 5, which leaves the space open).
α = 0 is the main pair alone; α > 0 needs the frozen tower's forward pass at inference. The same functions combine any
two models, for example a baseline and a LiT, which shows how much of a gain is plain ensembling.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from threetowers.errors import UsageError
from threetowers.evaluate.encode import Encoded, EvaluationData
from threetowers.evaluate.result import Result
from threetowers.evaluate.retrieval import BLOCK, Ranks, System, combined_ranks, recalls

ALPHAS = tuple(step / 20 for step in range(21))


class Pair(NamedTuple):
    """Two systems on the same images and texts.

    text_image: the image that each text describes. text_group: the same number for equal texts; None: all differ. Both
    are int64 [number of texts].
    """

    main: System
    side: System
    text_image: Tensor
    text_group: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Sweep:
    """`mean_r@1` over a grid of α on validation and on test data, and the α that validation chose.

    alphas, val, test: one value per grid point. ranks: the test ranks at every grid point, for a bootstrap.
    """

    alphas: tuple[float, ...]
    val: tuple[float, ...]
    test: tuple[float, ...]
    ranks: tuple[Ranks, ...] = field(repr=False)

    @property
    def index(self) -> int:
        """Index of the chosen α: the first maximum on validation, so that the smallest α wins a tie."""
        return self.val.index(max(self.val))

    @property
    def alpha(self) -> float:
        return self.alphas[self.index]

    @property
    def chosen(self) -> float:
        """Test `mean_r@1` at the chosen α."""
        return self.test[self.index]

    @property
    def ends(self) -> tuple[float, float]:
        """Test `mean_r@1` of the main system alone (α = 0) and of the side system alone (α = 1)."""
        return self.test[0], self.test[-1]

    def figures(self) -> dict[str, Any]:
        """The sweep in plain values, as evaluation.json and compare.json hold it."""
        return {
            "alphas": list(self.alphas),
            "val": list(self.val),
            "test": list(self.test),
            "alpha": self.alpha,
            "chosen": self.chosen,
            "ends": list(self.ends),
        }


def combination(data: EvaluationData) -> Result | None:
    """The main pair combined with each third tower; None without third tower, validation data or test data."""
    if data.val is None or data.test is None:
        return None
    sections: dict[str, dict[str, Any]] = {}
    items: dict[str, Tensor] = {}
    lines = []
    for third in data.test.systems()[1:]:
        swept = sweep(pair_of(data.val, third), pair_of(data.test, third))
        sections[third] = swept.figures()
        items |= swept.ranks[swept.index].items(f"combination/{third}")
        main, alone = swept.ends
        lines.append(
            f"with {third} combined at inference: mean R@1 {swept.chosen:.1%} on the test images, at α = "
            f"{swept.alpha:g}, chosen on validation. The trained pair alone has {main:.1%}, {third} alone {alone:.1%}"
            + (". The third tower is the better one here; compare with method lit" if alone > main else "")
        )
    return Result({"combination": sections}, items, tuple(lines)) if sections else None


def pair_of(encoded: Encoded, third: str) -> Pair:
    """The main pair, and a third tower read through the heads, as the two systems of a combination."""
    main, side = System(*encoded.system("main")), System(*encoded.system(third))
    return Pair(main, side, encoded.text_image, encoded.text_group)


def sweep(val: Pair, test: Pair, alphas: Sequence[float] = ALPHAS, block: int = BLOCK) -> Sweep:
    """Retrieval with s_α for every α of a rising grid from 0 to 1; α is chosen on `val` and reported on `test`.

    At its two ends the result equals the retrieval of each system alone, exactly. Raises UsageError for a grid that
    does not rise from 0 to 1, DataError as `retrieval.ranks_from_features` does.

        result = sweep(Pair(System(f, g), System(h, g_h), text_image), test)
        result.alpha, result.chosen, result.ends
    """
    grid = tuple(float(alpha) for alpha in alphas)
    _check_alphas(grid)
    if sorted(set(grid)) != list(grid) or grid[:1] != (0.0,) or grid[-1:] != (1.0,):
        raise UsageError(f"alphas: a grid that rises from 0 to 1 is needed, got {list(grid)}")
    ranks = combine(test, grid, block)
    return Sweep(grid, _mean_recalls(combine(val, grid, block)), _mean_recalls(ranks), tuple(ranks))


def combine(pair: Pair, alphas: Sequence[float], block: int = BLOCK) -> list[Ranks]:
    """Ranks with s_α for every α, from one computation of both systems' scores."""
    _check_alphas(alphas)
    weightings = [(1 - alpha, alpha) for alpha in alphas]
    return combined_ranks([pair.main, pair.side], weightings, pair.text_image, pair.text_group, block)


def _mean_recalls(ranks: Sequence[Ranks]) -> tuple[float, ...]:
    return tuple(recalls(each, ks=(1,))["mean_r@1"] for each in ranks)


def _check_alphas(alphas: Sequence[float]) -> None:
    outside = [alpha for alpha in alphas if not 0 <= alpha <= 1]
    if outside:
        raise UsageError(f"alpha: a weight from 0 to 1 is needed, got {outside[0]}")
