"""Which model is better on a data set and task, by tests of all pairs of models, corrected for their number."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from threetowers.evaluate.paired import Paired, compare_paired
from threetowers.evaluate.statistics import Hits, directions_of, holm
from threetowers.evaluate.suite.items import read_items
from threetowers.evaluate.suite.rows import Row
from threetowers.files import write_whole

CSV = "differences.csv"
Answers = TypeVar("Answers")


class Place(NamedTuple):
    """What models are compared on."""

    data: str
    task: str
    metric: str


@dataclass(frozen=True)
class Difference:
    """Model a beside model b on a data set and task. tests: for how many the p of `found` is corrected."""

    place: Place
    a: str
    b: str
    found: Paired
    tests: int

    def in_words(self) -> str:
        """The comparison as a sentence that begins with data set and task."""
        return f"{self.place.data}, {self.place.task}: {self.found.in_words(self.a, self.b, self.tests)}"


def differences(
    answers: Mapping[Place, Mapping[str, Answers]], compare_two: Callable[[Answers, Answers], Paired | None]
) -> list[Difference]:
    """All pairs of models at each place, with Holm's correction over all of them.

    answers: by place and model. compare_two: of the answers of two models; None where they cannot be compared.
    """
    found: list[tuple[Place, str, str, Paired]] = []
    for place, by_model in answers.items():
        for a, b in combinations(by_model, 2):
            result = compare_two(by_model[a], by_model[b])
            if result is not None:
                found.append((place, a, b, result))
    corrected = holm([result.p for *_, result in found])
    return [
        Difference(place, a, b, result.corrected(p), len(found))
        for (place, a, b, result), p in zip(found, corrected, strict=True)
    ]


def leading(found: Sequence[Difference]) -> list[Difference]:
    """Of each place the comparison of the model with the highest mean and the one after it."""
    shown = []
    for place in dict.fromkeys(each.place for each in found):
        pairs = [each for each in found if each.place == place]
        models = dict.fromkeys(model for each in pairs for model in (each.a, each.b))
        ahead = {model: sum(_lead(each, model) for each in pairs) for model in models}
        first, second = sorted(models, key=lambda model: -ahead[model])[:2]
        shown += [each for each in pairs if {each.a, each.b} == {first, second}]
    return shown


def _lead(each: Difference, model: str) -> float:
    """How far a model is ahead in a comparison; over all pairs of a place these sums are in the order of the means."""
    return (
        (each.found.difference if model == each.a else -each.found.difference)
        if model in (each.a, each.b)
        else 0.0
    )


def model_differences(folder: Path, rows: Iterable[Row]) -> list[Difference]:
    """All pairs of models among the rows of a folder, on the data sets and tasks whose answers were kept.

    Models are compared on the same data only; answers to different images, such as those that one model could not read,
    are not compared.
    """
    answers: dict[tuple[Place, str], dict[str, tuple[Hits, Hits | None]]] = {}
    for row in rows:
        items = read_items(folder, row)
        if items is not None:
            place = Place(row.data, row.task, row.metric)
            answers.setdefault((place, row.data_digest), {})[row.model] = items
    return differences({place: by_model for (place, _), by_model in answers.items()}, compare_items)


def compare_items(a: tuple[Hits, Hits | None], b: tuple[Hits, Hits | None]) -> Paired | None:
    """Compares answers as `read_items` returns them; None where they are not answers to the same two or more items."""
    for first, second in zip(a, b, strict=True):
        if (first is None) != (second is None):
            return None
    shapes = [[len(side) for side in directions_of(hits, "hits")] for hits, _ in (a, b)]
    if shapes[0] != shapes[1] or sum(shapes[0]) < 2:
        return None
    images = a[1]
    if images is not None and b[1] is not None:
        pairs = zip(directions_of(images, "images"), directions_of(b[1], "images"), strict=True)
        if not all(np.array_equal(*pair) for pair in pairs):
            return None
    return compare_paired(a[0], b[0], images=images)


def write_differences(folder: Path, found: Sequence[Difference]) -> None:
    """Writes all comparisons as CSV."""
    lines = io.StringIO()
    writer = csv.writer(lines)
    names = ("difference", "low", "high", "p", "wins", "losses", "num")
    writer.writerow(("data", "task", "metric", "model", "other", *names, "tests"))
    for each in found:
        values = (getattr(each.found, name) for name in names)
        writer.writerow((*each.place, each.a, each.b, *values, each.tests))
    write_whole(folder / CSV, lines.getvalue())
