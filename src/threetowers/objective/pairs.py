"""Objectives as tables of rows, and the list of methods. Plain data: this file imports no torch.

A row compares two views. A view is a unit vector with a name: a tower (`img`, `txt`, `third`, `third_dino`), or
`a@b`, the head of tower a that faces tower b: f_h = img@third, h_f = third@img, g_h = txt@third, h_g = third@txt.

A method is one entry of `METHODS` at the end of this file.

    three_towers(["third"])
    # img       · txt        weight 1/3
    # img@third · third@img  weight 1/3
    # txt@third · third@txt  weight 1/3
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from threetowers.config import Method, ObjectiveConfig, RunConfig
from threetowers.errors import UsageError
from threetowers.objective.weights import EQUAL, MAIN_PAIR, Schedule, Weights, first_weights, schedule_of

Kind = Literal["softmax", "sigmoid", "cosine", "mse"]
CONTRASTIVE: tuple[Kind, ...] = ("softmax", "sigmoid")
"""Kinds that tell samples apart."""
Heads = Literal["both", "third", "main", "none"]
"""Which sides of a row between a main tower and a third tower have a linear head."""
ImageFrom = Literal["own", "third", "start"]
"""Where the image tower comes from: `own` trains the tower that the settings describe; `third` is LiT, the frozen tower
with one trainable linear projection; `start` trains a copy of the third tower, or of another one, from its weights."""


@dataclass(frozen=True, slots=True)
class Row:
    """Two views that a loss compares, the weight of that loss in the sum, and the kind of loss.

    Where the weights follow a schedule, the weight is that at the start.
    """

    a: str
    b: str
    weight: float
    kind: Kind = "softmax"

    @property
    def name(self) -> str:
        """The two towers as metrics write them, for example `img-third`."""
        return f"{tower_of(self.a)}-{tower_of(self.b)}"


@dataclass(frozen=True, slots=True)
class Objective:
    """The rows of a configuration's method, and where its image tower comes from.

    schedule, ends: how the weights of the rows move, and what each is at the end; None and empty where they stay.
    """

    rows: tuple[Row, ...]
    image: ImageFrom = "own"
    schedule: Schedule | None = None
    ends: tuple[float, ...] = ()

    def weights(self, step: int) -> tuple[float, ...]:
        """The weight of each row at a step, counted from 0."""
        starts = tuple(row.weight for row in self.rows)
        if self.schedule is None:
            return starts
        return tuple(
            self.schedule.value(start, end, step) for start, end in zip(starts, self.ends, strict=True)
        )

    def weighting(self) -> str:
        """The rows and their weights in words: `img-txt × 0.6, img-third × 0.2, txt-third × 0.2`."""
        if self.schedule is None:
            return ", ".join(f"{row.name} × {row.weight:.3g}" for row in self.rows)
        moves = (
            f"{row.name} × {row.weight:.3g} → {end:.3g}"
            for row, end in zip(self.rows, self.ends, strict=True)
        )
        return f"{', '.join(moves)} ({self.schedule})"

    def views(self) -> tuple[str, ...]:
        """Every view that the rows compare, each once, in the order of the rows."""
        return tuple(dict.fromkeys(view for row in self.rows for view in (row.a, row.b)))


def tower_of(view: str) -> str:
    """The tower of a view: `third@img` → `third`."""
    return view.partition("@")[0]


def baseline(kind: Kind = "softmax") -> tuple[Row, ...]:
    """CLIP: one contrastive row."""
    return (Row("img", "txt", 1.0, kind),)


def three_towers(
    thirds: Sequence[str], weights: Weights = EQUAL, kind: Kind = "softmax", heads: Heads = "both"
) -> tuple[Row, ...]:
    """3T (arXiv 2305.16999): the main pair without heads, and each main tower with each third tower through heads.

    weights: of img·txt, img·third and txt·third, used as written; K third towers share each of the last two equally.
    heads: which sides of the third rows have one; both in the paper.
    """
    pair, image, text = weights
    rows = [Row("img", "txt", pair, kind)]
    for third in thirds:
        for main, weight in (("img", image), ("txt", text)):
            of_main = f"{main}@{third}" if heads in ("both", "main") else main
            of_third = f"{third}@{main}" if heads in ("both", "third") else third
            rows.append(Row(of_main, of_third, weight / len(thirds), kind))
    return tuple(rows)


def regression(
    thirds: Sequence[str],
    weights: Weights = EQUAL,
    kind: Kind = "cosine",
    pair_kind: Kind = "softmax",
) -> tuple[Row, ...]:
    """Regression transfer: a head on each main tower predicts the frozen features themselves.

    The frozen side has no head: if both sides could train, a constant on both would minimise the loss.
    """
    pair, image, text = weights
    rows = [Row("img", "txt", pair, pair_kind)]
    for third in thirds:
        rows.append(Row(f"img@{third}", third, image / len(thirds), kind))
        rows.append(Row(f"txt@{third}", third, text / len(thirds), kind))
    return tuple(rows)


def objective(config: RunConfig) -> Objective:
    """A configuration's rows and image tower.

    Raises UsageError for third towers, weights or a schedule that do not fit, and for rows from which nothing can be
    learned.
    """
    method, thirds = METHODS[config.method], list(config.thirds())
    if not method.needs_third:
        thirds = []
    elif not thirds:
        raise UsageError(
            f"method {config.method!r} needs a frozen tower: give --third timm:NAME (or hf:, open_clip:, file:), "
            "or --method baseline"
        )
    elif method.max_thirds is not None and len(thirds) > method.max_thirds:
        raise UsageError(
            f"method {config.method!r} takes one frozen tower as image tower, {len(thirds)} are given"
        )
    options = config.objective
    rows = method.rows(thirds, first_weights(options, method.weights), options)
    table, moving = Objective(rows, _image_from(config, method)), schedule_of(options, config.steps)
    if moving is not None:
        schedule, weights = moving
        ends = tuple(row.weight for row in method.rows(thirds, weights, options))
        if ends != table.weights(0):  # the only row of a baseline has no weight to move
            table = replace(table, schedule=schedule, ends=ends)
    _check_learning(config, table)
    return table


def _image_from(config: RunConfig, method: "MethodEntry") -> ImageFrom:
    """Where the image tower comes from; raises UsageError for a start that the method has no use for."""
    given = config.start.image
    if given is None and method.image != "start":
        return method.image
    if method.image == "third":
        raise UsageError(
            f"start.image: method {config.method!r} has the third tower as image tower, which does not train"
        )
    view, thirds = start_view(config), config.thirds() if method.needs_third else {}
    if view and view not in thirds:
        there = f"its third towers are {', '.join(thirds)}" if thirds else "it has no third tower"
        raise UsageError(
            f"start.image: {view!r} is a third tower of the run, and with method {config.method!r} {there}. Name one "
            "of them, or a tower such as timm:NAME"
        )
    return "start"


def start_view(config: RunConfig) -> str:
    """The view of the third tower at whose weights the image tower starts; empty where it starts at others.

    `third` means the only one, whatever its name is.
    """
    given = config.start.image or "third"
    if ":" in given:
        return ""
    views = list(config.thirds())
    return views[0] if given == "third" and len(views) == 1 else given


def _check_learning(config: RunConfig, table: Objective) -> None:
    """Raises UsageError for a batch without another pair to compare with, and for a tower that no loss trains."""
    # between the first and the last step a weight rises or falls, so it is above 0 if it is at one of them
    weights = zip(table.weights(0), table.weights(config.steps - 1), strict=True)
    used = [row for row, ends in zip(table.rows, weights, strict=True) if max(ends) > 0]
    contrastive = next((row for row in used if row.kind in CONTRASTIVE), None)
    if config.batch_size < 2 and contrastive is not None:
        raise UsageError(
            f"batch_size: {config.batch_size} is too small: the {contrastive.kind} loss of {contrastive.name} "
            "tells a pair from the others of its batch, and there is no other, so nothing would be learned. Give 2 or "
            "more"
        )
    trained = {tower_of(view) for row in used for view in (row.a, row.b)}
    for tower in ("txt",) if table.image == "third" else ("img", "txt"):
        if tower not in trained:
            raise UsageError(
                f"objective.weights: every row with {tower} has the weight 0, so that tower would not be trained; "
                "give one of them a weight above 0"
            )


def resolved(config: RunConfig) -> RunConfig:
    """The configuration with its method's own weights written out where none are given, as a run records it."""
    if config.objective.weights is not None:
        return config
    return _with_weights(config, METHODS[config.method].weights)


def without_own_weights(config: RunConfig) -> RunConfig:
    """The configuration without weights that are its method's own, so that another method brings its own."""
    own = config.objective.weights == METHODS[config.method].weights
    return _with_weights(config, None) if own else config


def _with_weights(config: RunConfig, weights: Weights | None) -> RunConfig:
    return replace(config, objective=replace(config.objective, weights=weights))


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """What the code and the report know about a method.

    label: the name in tables and plots. summary: one or two sentences for the report page. rows: makes the rows from
    the third towers' view names, the three weights and the options. max_thirds: the most third towers that it takes,
    None for no limit; every method except those with 0 needs at least one. weights: where the settings give none.
    is_3t: whether it is a form of 3T, with which the claims about 3T are tested.
    """

    label: str
    summary: str
    rows: Callable[[Sequence[str], Weights, ObjectiveConfig], tuple[Row, ...]]
    image: ImageFrom = "own"
    max_thirds: int | None = None
    weights: Weights = EQUAL
    is_3t: bool = False

    @property
    def needs_third(self) -> bool:
        return self.max_thirds != 0

    @property
    def third_beside(self) -> bool:
        """Whether the losses compare a third tower with two main towers that train."""
        return self.max_thirds is None


def _three_towers(thirds: Sequence[str], weights: Weights, options: ObjectiveConfig) -> tuple[Row, ...]:
    return three_towers(thirds, weights, options.kind, options.heads)


METHODS: dict[Method, MethodEntry] = {
    "baseline": MethodEntry(
        "baseline",
        "Both towers train from scratch, on captioned images alone.",
        lambda thirds, weights, options: baseline(options.kind),
        max_thirds=0,
    ),
    "lit": MethodEntry(
        "LiT",
        "The image tower is the pretrained tower and stays frozen. The text tower learns to match it.",
        lambda thirds, weights, options: baseline(options.kind),
        image="third",
        max_thirds=1,
    ),
    "lit-unlocked": MethodEntry(
        "LiT unlocked",
        "As LiT, but the image tower continues to train from its pretrained weights: the baseline with a warm start.",
        lambda thirds, weights, options: baseline(options.kind),
        image="start",
        max_thirds=1,
    ),
    "3t": MethodEntry(
        "3T",
        "Both towers train and also learn to match a frozen third tower, which is dropped after training.",
        _three_towers,
        is_3t=True,
    ),
    "3t-main": MethodEntry(
        "3T main",
        "As 3T, but the image-text pair has more weight than the third tower, unless the settings give other weights.",
        _three_towers,
        weights=MAIN_PAIR,
        is_3t=True,
    ),
    "3t-regression": MethodEntry(
        "3T regression",
        "As 3T, but the main towers predict the third tower's features instead of being contrasted with them.",
        lambda thirds, weights, options: regression(thirds, weights, options.regression, options.kind),
    ),
    "3t-warm": MethodEntry(
        "3T warm",
        "As 3T, but the image tower starts at the weights of the third tower, which stays frozen beside it.",
        _three_towers,
        image="start",
    ),
    "3t-main-warm": MethodEntry(
        "3T main warm",
        "As 3T main, but the image tower starts at the weights of the third tower, which stays frozen beside it.",
        _three_towers,
        image="start",
        weights=MAIN_PAIR,
    ),
}
"""Every method by the name that --method takes. A new method is one entry here and one name in `config.Method`."""


def method_label(method: str, third: str = "") -> str:
    """A method's name in tables and plots, with its third tower in brackets; an unknown method is named as it is.

    >>> method_label("3t", "matched")
    '3T (matched)'
    """
    label = next((entry.label for name, entry in METHODS.items() if name == method), method)
    return f"{label} ({third})" if third else label
