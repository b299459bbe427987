"""A suite that is measured while a model trains."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kit.runs import assert_same_weights, interrupt_at, logged, with_vit
from threetowers.compare.comparison import compare
from threetowers.config import CompareConfig, RunConfig
from threetowers.errors import DataError, UsageError
from threetowers.evaluate.evaluation import check_evaluation, evaluate_run
from threetowers.evaluate.suite.live import LiveFeatures, open_watched, suite_metrics
from threetowers.evaluate.suite.run import evaluate_suite
from threetowers.evaluate.suite.sets import read_suite
from threetowers.report.page import write_report
from threetowers.run.finished import restore_trained
from threetowers.run.setup import prepare
from threetowers.train.loop import train

Config = Callable[..., RunConfig]


@pytest.fixture
def suite(photos: Path, tmp_path: Path) -> str:
    path = tmp_path / "suite.toml"
    path.write_text(f'[[data]]\nname = "photos"\npath = "{photos}"\n')
    return str(path)


@pytest.mark.parametrize("method", ["baseline", "lit", "3t"])
def test_the_last_validation_has_the_figures_of_the_finished_run(
    method: str, suite: str, tiny_config: Config, tmp_path: Path
) -> None:
    config = with_vit(tiny_config(method=method, suite=suite, suite_images=0, eval_every_steps=3))
    config = replace(config, third=() if method == "baseline" else config.third)
    train(config, tmp_path / "run")
    found = logged(tmp_path / "run", "retrieval/photos/mean_r@1")
    assert list(found) == [3, 6]
    (row,) = evaluate_suite(str(tmp_path / "run"), read_suite(suite), tmp_path / "out")
    assert found[6] == pytest.approx(row.value)
    assert logged(tmp_path / "run", "val/mean_r@1").keys() == found.keys()


def test_a_model_in_training_has_the_features_of_the_same_model_when_it_is_finished(
    suite: str, tiny_config: Config, tmp_path: Path
) -> None:
    config = with_vit(tiny_config(suite=suite))
    train(config, tmp_path / "run")
    setup = prepare(config, tmp_path / "run", saved_tokenizer=tmp_path / "run")
    restore_trained(setup.model, tmp_path / "run")
    setup.model.train()
    (opened,) = open_watched(suite, 40)
    assert len(opened.test.source) == 40
    first = suite_metrics(setup, [opened])
    assert setup.model.training and first == suite_metrics(setup, [opened])
    captions = LiveFeatures(setup).captions(opened.test, [7, 2])
    texts = [text for sample in (7, 2) for text in opened.test.source.record(sample).captions]
    assert captions.shape[0] == len(texts) == 4
    assert (captions - LiveFeatures(setup).texts(texts)).abs().max() < 1e-5


def test_the_weights_do_not_depend_on_it_and_a_run_may_continue_without(
    suite: str, tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(eval_every_steps=2)
    train(config, tmp_path / "without")
    watching = replace(config, suite=suite, suite_images=10)
    train(watching, tmp_path / "with")
    assert_same_weights(tmp_path / "without", tmp_path / "with")
    interrupt_at(4, watching, tmp_path / "killed")
    train(config, tmp_path / "killed")
    assert_same_weights(tmp_path / "without", tmp_path / "killed")


def test_any_metric_of_a_suite_can_choose_the_weights(
    suite: str, tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(
        suite=suite, eval_every_steps=2, keep_best="retrieval/photos/t2i_r@10", keep_checkpoints=9
    )
    train(config, tmp_path / "run")
    values = logged(tmp_path / "run", "retrieval/photos/t2i_r@10")
    best = max(values, key=lambda step: values[step])
    (row,) = evaluate_suite(str(tmp_path / "run"), read_suite(suite), tmp_path / "out")
    assert row.metrics["t2i_r@10"] == pytest.approx(values[best])


@pytest.mark.parametrize("name", ["retrieval/photos/t2i", "zero_shot/photos/top1", "val/mean"])
def test_a_metric_that_no_validation_gives_is_refused_at_the_start(
    name: str, suite: str, tiny_config: Config, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"keep_best: '{name}' is no metric of the validation"):
        train(tiny_config(suite=suite, eval_every_steps=2, keep_best=name), tmp_path / "run")


def test_a_suite_is_looked_at_before_training(suite: str, tiny_config: Config, tmp_path: Path) -> None:
    assert check_evaluation(tiny_config(suite=suite)) == ["suite: photos, 96 images: retrieval"]
    Path(suite).write_text('[[data]]\nname = "gone"\npath = "gone"\n')
    with pytest.raises(DataError, match="gone"):
        check_evaluation(tiny_config(suite=suite))
    with pytest.raises(UsageError, match="no such file"):
        check_evaluation(tiny_config(suite=str(tmp_path / "nowhere.toml")))


def test_a_comparison_measures_its_finished_runs_on_all_of_a_suite(
    suite: str, photos: Path, tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(suite=suite, suite_images=5, steps=2)
    options = CompareConfig(methods=("baseline", "3t"), seeds=(0, 1), lrs=(1e-3,))
    out = tmp_path / "compare"
    result = compare(config, options, out)
    assert result is not None
    cells = {(row["method"], row["data"], row["task"]): row for row in result["suite"]}
    assert cells.keys() == {(method, "photos", "retrieval") for method in options.methods}
    for row in cells.values():
        runs = [run for run in result["runs"] if run["method"] == row["method"]]
        values = [
            evaluate_run(out / run["path"], data=str(photos)).sections["test"]["mean_r@1"] for run in runs
        ]
        assert row["mean"] == pytest.approx(sum(values) / 2) and row["num_seeds"] == 2 and row["n"] == 96
    (sentence,) = result["suite_differences"]
    assert sentence.startswith("photos, retrieval: ") and "seeds" in sentence
    page = write_report(out).read_text(encoding="utf-8")
    assert sentence in page
    assert (
        "Further data and tasks" in page and f"{100 * cells['3t', 'photos', 'retrieval']['mean']:.1f}" in page
    )
    alone = compare(replace(config, suite=None), options, out)
    assert alone is not None and not alone["suite"], "a comparison may go on without its suite"
    assert "Further data and tasks" not in write_report(out).read_text(encoding="utf-8")
