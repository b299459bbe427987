"""The weights of the rows, and the schedule that they may follow. Plain data: this file imports no torch.

Three weights stand for the rows img·txt, img·third and txt·third, in this order. Steps are counted from 0.
"""

import math
from dataclasses import dataclass
from typing import Literal

from threetowers.config import ObjectiveConfig
from threetowers.errors import UsageError

Weights = tuple[float, float, float]
EQUAL: Weights = (1 / 3, 1 / 3, 1 / 3)
"""The weights of the paper."""
MAIN_PAIR: Weights = (0.6, 0.2, 0.2)
"""More than half of the weight on the image-text pair."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A way of numbers from a start to an end.

    Up to step `first` a number has its value at the start, and from step `last` on that at the end. Between the two
    it moves along a line, or along half a cosine, which begins and ends slowly.
    """

    kind: Literal["linear", "cosine"]
    first: int
    last: int

    def value(self, start: float, end: float, step: int) -> float:
        """The number at a step. It depends on nothing else, so a run that continues has the same one."""
        share = min(max((step - self.first) / (self.last - self.first), 0.0), 1.0)
        if self.kind == "cosine":
            share = 0.5 * (1.0 - math.cos(math.pi * share))
        return end if share == 1.0 else start + share * (end - start)

    def __str__(self) -> str:
        return f"{self.kind} from step {self.first:,} to step {self.last:,}"


def first_weights(options: ObjectiveConfig, own: Weights) -> Weights:
    """The weights at the start of a run: those given, or else `own`. Raises UsageError for what cannot be weights."""
    return own if options.weights is None else _three("objective.weights", options.weights)


def schedule_of(options: ObjectiveConfig, steps: int) -> tuple[Schedule, Weights] | None:
    """The schedule of a run of so many steps and the weights at its end; None where the weights stay as they are.

    Raises UsageError for a schedule that is not complete, and for settings of a schedule where none is chosen.
    """
    end, first_last, kind = options.weights_end, options.weights_steps, options.weights_schedule
    if kind == "constant":
        for name, value in (("weights_end", end), ("weights_steps", first_last)):
            if value is not None:
                raise UsageError(
                    f"objective.{name}: {list(value)} has no effect while objective.weights_schedule is constant; give "
                    "--objective.weights-schedule linear (or cosine), or leave it out"
                )
        return None
    if end is None:
        raise UsageError(
            f"objective.weights_end: a {kind} schedule needs the three weights that it ends at, for example "
            "--objective.weights-end 1 0 0"
        )
    first_last = (0, steps) if first_last is None else first_last
    if len(first_last) != 2 or not 0 <= first_last[0] < first_last[1]:
        raise UsageError(
            f"objective.weights_steps: {list(first_last)} is no first and last step; give two whole numbers of at "
            "least 0, the smaller first"
        )
    return Schedule(kind, *first_last), _three("objective.weights_end", end)


def _three(key: str, weights: tuple[float, ...]) -> Weights:
    if len(weights) != 3 or not all(0 <= weight < math.inf for weight in weights):
        raise UsageError(
            f"{key}: three finite weights of at least 0 are needed (img-txt, img-third, txt-third), got {list(weights)}"
        )
    return weights[0], weights[1], weights[2]
