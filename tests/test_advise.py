"""The forecast from pilots: its arithmetic against the textbook, and pilots that are trained, kept and reported."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from threetowers.compare.advise import (
    Forecast,
    Pilot,
    advise,
    at_size,
    forecasts,
    pilot_sizes,
    recommendation,
)
from threetowers.compare.runs import Job
from threetowers.config import CompareConfig, RunConfig
from threetowers.errors import UsageError
from threetowers.report.advice import advice_text, write_advice

Config = Callable[..., RunConfig]
SIZES = (100, 200, 400)
FULL = 800
A, B = ("baseline", ""), ("3t", "third")


def pilots(intercept: float, slope: float, noise: float, seed: int = 0, seeds: int = 2) -> list[Pilot]:
    """Pilots whose logits lie about a line through `intercept` at the full number of images."""
    generator = np.random.default_rng(seed)
    return [
        Pilot(size, size // 10, each, float(special.expit(logit + noise * generator.standard_normal())), 10.0)
        for size in SIZES
        for each in range(seeds)
        for logit in [intercept + slope * math.log2(size / FULL)]
    ]


def test_one_method_has_the_prediction_interval_of_a_simple_regression() -> None:
    rows = pilots(0.3, 0.8, 0.1)
    x, y = np.log2([row.images for row in rows]), special.logit([row.score for row in rows])
    fit, n = stats.linregress(x, y), len(x)
    residual = math.sqrt(float(((y - fit.intercept - fit.slope * x) ** 2).sum()) / (n - 2))
    at = math.log2(FULL)
    spread = residual * math.sqrt(1 + 1 / n + (at - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum())
    middle, half = fit.intercept + fit.slope * at, stats.t.ppf(0.975, n - 2) * spread
    found = forecasts({A: rows}, FULL, 10_000)[A]
    expected = special.expit([middle, middle - half, middle + half])
    assert (found.value, found.low, found.high) == pytest.approx(tuple(expected))
    assert found.leads == 1.0 and found.slope == pytest.approx(fit.slope)


def test_the_interval_holds_as_often_as_it_says_and_so_does_the_chance_of_leading() -> None:
    inside, right, said = [], [], []
    for seed in range(400):
        generator = np.random.default_rng(seed)
        truth = {A: 0.0, B: float(generator.normal(0, 0.4))}
        rows = {
            key: pilots(value, 0.7, 0.1, 1000 * seed + place)
            for place, (key, value) in enumerate(truth.items())
        }
        found = forecasts(rows, FULL, 10_000)
        runs = {
            key: float(special.expit(value + 0.1 * generator.standard_normal()))
            for key, value in truth.items()
        }
        inside += [found[key].low <= runs[key] <= found[key].high for key in truth]
        leader = max(found, key=lambda key: found[key].leads)
        right.append(runs[leader] == max(runs.values()))
        said.append(found[leader].leads)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.03)
    assert np.mean(said) == pytest.approx(np.mean(right), abs=0.05)


@given(st.floats(-2, 2), st.floats(0, 1.5), st.floats(0.05, 0.5), st.integers(0, 99))
def test_forecasts_are_shares_in_order_and_chances_add_up(
    intercept: float, slope: float, noise: float, seed: int
) -> None:
    found = forecasts(
        {A: pilots(intercept, slope, noise, seed), B: pilots(0, 0.5, noise, seed + 1)}, FULL, 1000
    )
    for each in found.values():
        assert 0 <= each.low <= each.value <= each.high <= 1
    assert sum(each.leads for each in found.values()) == pytest.approx(1.0)


def test_scores_of_nothing_and_everything_have_a_forecast() -> None:
    rows = [Pilot(size, 10, 0, score, 1.0) for size, score in zip(SIZES, (0.0, 0.0, 1.0), strict=True)]
    found = forecasts({A: rows}, FULL, 50)[A]
    assert all(map(math.isfinite, found)) and found.low < found.value <= found.high


def test_too_few_pilots_are_refused() -> None:
    with pytest.raises(UsageError, match="no residual"):
        forecasts({A: [Pilot(size, 10, 0, 0.5, 1.0) for size in SIZES[:2]]}, FULL, 50)
    with pytest.raises(UsageError, match="two numbers of images"):
        forecasts({A: [Pilot(100, 10, seed, 0.5, 1.0) for seed in range(4)]}, FULL, 50)


def test_sizes_are_shares_of_at_least_two_batches() -> None:
    assert pilot_sizes(1000, 16) == [125, 250, 500]
    assert pilot_sizes(1000, 64) == [250, 500]
    with pytest.raises(UsageError, match=r"1,000 images to train on are too few.*1,032 are needed"):
        pilot_sizes(1000, 129)
    assert pilot_sizes(1032, 129) == [258, 516]


def test_a_pilot_makes_as_many_passes_as_the_whole(tiny_config: Config) -> None:
    config = replace(
        tiny_config(steps=400, batch_size=10), optim=replace(tiny_config().optim, warmup_steps=40)
    )
    pilot = at_size(config, 250, 1000)
    assert (pilot.steps, pilot.optim.warmup_steps, pilot.inputs.train_images) == (100, 10, 250)
    assert at_size(replace(config, steps=8), 250, 1000).steps == 8, "never more than the whole training"


def test_a_clear_lead_is_recommended_and_an_unclear_one_is_not() -> None:
    rows = {A: pilots(0, 0.5, 0.1), B: pilots(0.5, 0.5, 0.1)}
    found = {A: Forecast(0.5, 0.4, 0.6, 0.03, 0.5), B: Forecast(0.6, 0.5, 0.7, 0.97, 0.5)}
    hours = {A: 0.5, B: 1.0}
    text = recommendation(found, rows, hours, FULL, several=False)
    assert text.startswith(
        "Train 3T. On all 800 images it is forecast to reach 60 % mean R@1 (95 % interval 50 % to 70 %)"
    )
    assert "a chance of 97 %" in text and "about 1 h 00 min" in text
    assert "12 pilots on 100 to 400 of the images, with 2 seeds each" in text
    sure = {**found, B: found[B]._replace(leads=1.0)}
    assert "a chance of more than 99 %" in recommendation(sure, rows, hours, FULL, several=False)
    even = {A: found[A]._replace(leads=0.4), B: found[B]._replace(leads=0.6)}
    text = recommendation(even, rows, hours, FULL, several=False)
    assert text.startswith("The pilots do not settle it. 3T leads with a chance of 60 %")
    assert "Compare 3T and baseline in full, which takes about 1 h 30 min" in text


def test_pilots_are_trained_once_kept_and_reported(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(tiny_config(steps=40, batch_size=4), embeddings=None)
    options = CompareConfig(methods=("baseline", "lit", "3t"), seeds=(0, 1), lrs=(1e-3, 3e-3))
    begun: list[str] = []
    run = Job.run

    def counted(job: Job, *arguments: Any, **given: Any) -> Any:
        begun.append(str(job.folder.relative_to(tmp_path)))
        if len(begun) == 5:
            raise KeyboardInterrupt
        return run(job, *arguments, **given)

    monkeypatch.setattr(Job, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        advise(config, options, tmp_path)
    advice = advise(config, options, tmp_path)
    assert advice is not None
    # by method two rates, one more seed, and two seeds at each of the two larger sizes
    assert len(begun) - 1 == len(set(begun)) == 3 * (2 + 1 + 2 * 2)
    assert len(list((tmp_path / "embeddings").iterdir())) == 3, "of the training, validation and test images"
    assert json.loads((tmp_path / "advice.json").read_text(encoding="utf-8")) == advice
    for each in advice["methods"]:
        found = [(row["images"], row["seed"]) for row in each["pilots"]]
        assert len(set(found)) == 6 and {images for images, _ in found} == set(
            pilot_sizes(advice["num_train"], 4)
        )
    again = advise(config, options, tmp_path)
    assert again == advice and len(begun) == 22
    page = write_advice(tmp_path).read_text(encoding="utf-8")
    assert (
        all(part in page for part in advice["advice"].split(". ", 1))
        and "<svg" in page
        and "chance of leading" in page
    )
    text = advice_text(advice)
    assert advice["advice"] in text and all(each["label"] in text for each in advice["methods"])
    assert "[21/21]" in capsys.readouterr().out


def test_a_stopped_forecast_says_so(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config(steps=40, batch_size=4)
    options = CompareConfig(methods=("baseline",), seeds=(0,), lrs=(1e-3,))
    assert advise(config, options, tmp_path, max_minutes=1e-9) is None
    assert not (tmp_path / "advice.json").exists()
