"""The table of rows: every method of the project is data, and this file is where the data stands.

A row compares two views. A view is a unit vector with a name: a tower (`img`, `txt`, `third`, `third_dino`), or
`a@b`, the head of tower a that faces tower b: f_h = img@third, h_f = third@img, g_h = txt@third, h_g = third@txt.

    three_towers(["third"])
    # img       · txt        weight 1/3
    # img@third · third@img  weight 1/3
    # txt@third · third@txt  weight 1/3
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from threetowers.config import ObjectiveConfig, RunConfig
from threetowers.errors import UsageError

Kind = Literal["softmax", "sigmoid", "cosine", "mse"]


@dataclass(frozen=True, slots=True)
class Row:
    """Two views that a loss compares, the weight of that loss in the sum, and its kind."""

    a: str
    b: str
    weight: float
    kind: Kind = "softmax"

    @property
    def name(self) -> str:
        """The two towers, as in metrics: `img-third`."""
        return f"{tower_of(self.a)}-{tower_of(self.b)}"

    @property
    def contrastive(self) -> bool:
        return self.kind in ("softmax", "sigmoid")


@dataclass(frozen=True, slots=True)
class Objective:
    """The rows of a method and where its image tower comes from.

    image: `own` trains a tower from scratch or given weights; `third` is LiT, the image tower is the frozen tower
    with one linear projection; `from-third` starts at the frozen tower's weights and trains.
    """

    rows: tuple[Row, ...]
    image: Literal["own", "third", "from-third"] = "own"

    def views(self) -> tuple[str, ...]:
        """Every view that a row needs, once, in the order of the rows."""
        return tuple(dict.fromkeys(view for row in self.rows for view in (row.a, row.b)))


def tower_of(view: str) -> str:
    """`third@img` → `third`."""
    return view.partition("@")[0]


def baseline(kind: Kind = "softmax") -> tuple[Row, ...]:
    """CLIP: one contrastive row."""
    return (Row("img", "txt", 1.0, kind),)


def three_towers(
    thirds: Sequence[str], weights: Sequence[float] = (1 / 3, 1 / 3, 1 / 3), kind: Kind = "softmax"
) -> tuple[Row, ...]:
    """3T (arXiv 2305.16999): the pair without heads, and each main tower with each third tower through heads.

    weights: of img·txt, img·third and txt·third, used as written; K third towers share the last two equally.
    """
    pair, image, text = weights
    rows = [Row("img", "txt", pair, kind)]
    for third in thirds:
        rows.append(Row(f"img@{third}", f"{third}@img", image / len(thirds), kind))
        rows.append(Row(f"txt@{third}", f"{third}@txt", text / len(thirds), kind))
    return tuple(rows)


def regression(
    thirds: Sequence[str],
    weights: Sequence[float] = (1 / 3, 1 / 3, 1 / 3),
    kind: Kind = "cosine",
    pair_kind: Kind = "softmax",
) -> tuple[Row, ...]:
    """Regression transfer: the main towers' heads predict the frozen features themselves.

    The frozen side has no head here: two trainable sides that only attract each other meet at a constant.
    """
    pair, image, text = weights
    rows = [Row("img", "txt", pair, pair_kind)]
    for third in thirds:
        rows.append(Row(f"img@{third}", third, image / len(thirds), kind))
        rows.append(Row(f"txt@{third}", third, text / len(thirds), kind))
    return tuple(rows)


def objective(config: RunConfig) -> Objective:
    """The table that a configuration's method, third towers and weights mean; raises UsageError."""
    thirds, options = list(config.thirds()), config.objective
    if config.method == "baseline":
        return Objective(baseline(options.kind))
    if not thirds:
        raise UsageError(
            f"method {config.method!r} needs a frozen tower: give --third timm:NAME (or hf:, open_clip:, file:), "
            "or --method baseline"
        )
    if config.method in ("lit", "lit-unlocked"):
        if len(thirds) > 1:
            raise UsageError(
                f"method {config.method!r} takes one frozen tower as image tower, {len(thirds)} are given"
            )
        return Objective(baseline(options.kind), image="third" if config.method == "lit" else "from-third")
    weights = _three_weights(options)
    if config.method == "3t":
        return Objective(three_towers(thirds, weights, options.kind))
    return Objective(regression(thirds, weights, options.regression, options.kind))


def _three_weights(options: ObjectiveConfig) -> tuple[float, float, float]:
    if len(options.weights) != 3 or min(options.weights) < 0:
        raise UsageError(
            f"objective.weights: three weights of at least 0 are needed (img-txt, img-third, txt-third), "
            f"got {list(options.weights)}"
        )
    return options.weights[0], options.weights[1], options.weights[2]
