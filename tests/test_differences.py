"""Differences between models on a suite: all pairs, corrected together, from the answers that were kept."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from threetowers.commands.arguments import EvaluateArguments
from threetowers.commands.evaluate import evaluate
from threetowers.config import RunConfig
from threetowers.evaluate.paired import Paired, compare_paired, compare_seeds
from threetowers.evaluate.statistics import holm
from threetowers.evaluate.suite.differences import (
    Place,
    compare_items,
    differences,
    leading,
    model_differences,
    write_differences,
)
from threetowers.evaluate.suite.items import read_items
from threetowers.evaluate.suite.rows import read_rows
from threetowers.evaluate.suite.run import evaluate_suite
from threetowers.evaluate.suite.sets import DataSet
from threetowers.train.loop import train

Config = Callable[..., RunConfig]


@pytest.fixture
def runs(tiny_config: Config, tmp_path: Path) -> list[Path]:
    for seed in (0, 1):
        train(tiny_config(steps=2, seed=seed), tmp_path / f"run{seed}")
    return [tmp_path / "run0", tmp_path / "run1"]


def test_all_pairs_are_corrected_together_and_the_two_best_are_shown() -> None:
    values = {
        Place("a", "t", "m"): {"x": [0.1, 0.2, 0.3], "y": [0.5, 0.7, 0.6], "z": [0.55, 0.72, 0.66]},
        Place("b", "t", "m"): {"x": [0.9, 0.8, 0.85], "y": [0.1, 0.2, 0.1]},
        Place("c", "t", "m"): {"x": [0.9, 0.8, 0.85]},
    }
    found = differences(values, compare_seeds)
    assert [(each.place.data, each.a, each.b) for each in found] == [
        ("a", "x", "y"), ("a", "x", "z"), ("a", "y", "z"), ("b", "x", "y"),
    ]  # fmt: skip
    plain = [compare_seeds(values[each.place][each.a], values[each.place][each.b]).p for each in found]
    assert [each.found.p for each in found] == holm(plain) and {each.tests for each in found} == {4}
    assert [(each.place.data, each.a, each.b) for each in leading(found)] == [
        ("a", "y", "z"),
        ("b", "x", "y"),
    ]
    assert "corrected for 4 tests" in leading(found)[1].in_words()


def test_models_are_compared_on_the_answers_that_a_suite_kept(
    runs: list[Path], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    rows = [evaluate_suite(str(run), [DataSet("photos", str(photos))], out)[0] for run in runs]
    kept = [read_items(out, row) for row in rows]
    (found,) = model_differences(out, read_rows(out))
    assert kept[0] is not None and kept[1] is not None
    assert found.found == compare_paired(kept[0][0], kept[1][0], images=kept[0][1])
    assert found.found.difference == pytest.approx(rows[0].value - rows[1].value)
    write_differences(out, [found])
    with (out / "differences.csv").open(encoding="utf-8") as file:
        (line,) = csv.DictReader(file)
    assert (line["model"], line["other"], line["tests"]) == (str(runs[0]), str(runs[1]), "1")
    assert float(line["p"]) == found.found.p
    capsys.readouterr()
    (out / "differences.csv").unlink()
    suite = tmp_path / "suite.toml"
    suite.write_text(f'[[data]]\nname = "photos"\npath = "{photos}"\n')
    evaluate(EvaluateArguments(target=str(runs[0]), suite=str(suite), out=out))
    assert found.in_words() in capsys.readouterr().out and (out / "differences.csv").is_file()
    other = [replace(row, data_digest=row.model_digest) for row in rows]
    assert model_differences(out, other) == [], "these are answers to other data, and were not kept"


def test_answers_to_different_items_are_not_compared() -> None:
    ones, images = np.ones(4), np.array([0, 0, 1, 1])
    assert isinstance(compare_items((ones, images), (1 - ones, images)), Paired)
    for other in ((np.ones(3), np.array([0, 0, 1])), (ones, np.array([0, 1, 1, 1])), (ones, None)):
        assert compare_items((ones, images), other) is None
    assert compare_items((ones[:1], None), (ones[:1], None)) is None
