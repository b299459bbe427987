"""What an evaluator returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Result:
    """The figures of one evaluator, and the per-item results that they are computed from.

    sections: what the evaluator adds to evaluation.json, by section. items: one int64 value per query or image, by
    name. lines: the figures for the terminal. saved: the names of the items that the saved features cannot reproduce
    and that features.safetensors therefore holds.
    """

    sections: Mapping[str, Mapping[str, Any]]
    items: Mapping[str, Tensor]
    lines: tuple[str, ...]
    saved: tuple[str, ...] = field(default=())


def percentages(metrics: Mapping[str, float]) -> str:
    """Metrics in one line for the terminal: `top1 43.1%, top5 81.0%`."""
    return ", ".join(f"{name} {value:.1%}" for name, value in metrics.items())
