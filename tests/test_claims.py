"""The claims on figures that are known: verdicts, margins, the correction, and how often chance alone holds one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from threetowers.compare.claims import Exact, GridCell, Measured, claims, growth, judged
from threetowers.errors import DataError
from threetowers.evaluate.retrieval import Ranks
from threetowers.report.claims import sentence, short_budget

Rows = list[dict[str, Any]]
Figures = dict[tuple[str, str], dict[int, Measured]]
ALL = Exact([True], [True], [True])
NOISE = {
    "baseline": (0.0, 0.004, -0.003, 0.006, -0.005),
    "lit": (0.003, -0.002, 0.005, -0.004, 0.001),
    "3t": (-0.004, 0.006, 0.001, -0.002, 0.003),
}
"""Of five seeds; the differences of two methods are of different sizes."""


def measured(value: float, alpha: float = 0.4, **more: float) -> Measured:
    """A run with the same figure in both directions of retrieval, and that of further systems by name."""
    metrics = {f"retrieval/{name}": value for name in ("i2t_r@1", "t2i_r@1", "mean_r@1")}
    metrics |= {f"{name}/mean_r@1": other for name, other in more.items()}
    return Measured(metrics, {name: ranks(v) for name, v in {"main": value, **more}.items()}, alpha)


def ranks(value: float) -> Ranks:
    ids = torch.arange(100)
    rank = (ids >= round(100 * value)).long()
    return Ranks(rank, rank, ids, ids)


def figures(
    base: float,
    lit: float,
    three: float,
    *,
    tower: str = "t",
    seeds: int = 5,
    noise: float = 1.0,
    alphas: Sequence[float] = (0.4,) * 5,
    method: str = "3t",
    **systems: float,
) -> Figures:
    """Runs at these levels; the combination's systems are given relative to the main pair of 3T."""
    rest = {"combination": 0.1, "third": -0.3, "control": 0.02} | systems
    runs: Figures = {("baseline", ""): {}, ("lit", tower): {}, (method, tower): {}}
    for seed in range(seeds):
        off = {name: noise * values[seed] for name, values in NOISE.items()}
        own = three + off["3t"]
        others = {name: own + more + 0.3 * off["lit"] * (place + 1)
                  for place, (name, more) in enumerate(rest.items())}  # fmt: skip
        runs["baseline", ""][seed] = measured(base + off["baseline"])
        runs["lit", tower][seed] = measured(lit + off["lit"])
        runs[method, tower][seed] = measured(own, alphas[seed], **others)
    return runs


def judge(runs: Mapping[tuple[str, str], Any], third: str = "t", **options: Any) -> Rows:
    forms = [method for method, name in runs if name and method.startswith("3t") and "twice" not in method]
    return claims(runs, [third], forms, options.pop("exact", ALL), **options)


def verdicts(rows: Rows, id: str, words: str = "") -> list[str]:
    return [row["verdict"] for row in rows if row["id"] == id and words in row["text"]]


def test_superiority_is_held_not_held_or_not_shown() -> None:
    assert verdicts(judge(figures(0.3, 0.35, 0.6)), "C1") == ["held", "held"]
    rows = judge(figures(0.3, 0.62, 0.55))
    assert verdicts(rows, "C1") == ["held", "not held"], "LiT is above for certain"
    rows = judge(figures(0.3, 0.598, 0.6))
    assert verdicts(rows, "C1") == ["held", "not shown"], "a mean above is not enough"
    assert verdicts(rows, "C2") == ["not tested"]
    assert "zero_shot/top1 of 3T was not measured" in sentence(next(r for r in rows if r["id"] == "C2"))


def test_a_claim_of_both_directions_needs_both() -> None:
    runs = figures(0.3, 0.35, 0.6)
    for seed, run in runs["3t", "t"].items():
        runs["3t", "t"][seed] = replace(run, metrics={**run.metrics, "retrieval/t2i_r@1": 0.2})
    rows = judge(runs)
    assert verdicts(rows, "C1") == ["not held", "not held"]
    assert rows[0]["p"] == max(test["p"] for test in rows[0]["tests"])


@pytest.mark.parametrize(
    ("lit", "three", "expected"),
    [
        (0.2, 0.41, ["held", "held"]),
        (0.395, 0.30, ["not held", "not held"]),
        (0.379, 0.381, ["not shown", "not shown"]),
        (0.379, 0.395, ["not shown", "held"]),  # a little worse, and less than the margin
    ],
)
def test_the_mismatched_tower_is_judged_by_margins(lit: float, three: float, expected: list[str]) -> None:
    rows = judge(figures(0.4, lit, three, tower="mismatched"), "mismatched")
    assert verdicts(rows, "C3") == expected and verdicts(rows, "C1") == []
    bounds = [(test["side"], test["bound"]) for row in rows if row["id"] == "C3" for test in row["tests"]]
    assert bounds == [("below", -0.02), ("above", -0.02)]


def test_the_margin_is_what_is_passed_in() -> None:
    runs = figures(0.4, 0.35, 0.36, tower="mismatched")
    assert verdicts(judge(runs, "mismatched"), "C3") == ["held", "not held"]
    rows = judge(runs, "mismatched", margin=0.08)
    assert verdicts(rows, "C3") == ["not held", "held"]
    assert "by more than 8 points" in rows[0]["text"]


def test_the_combination_is_judged_against_its_ends_and_its_controls() -> None:
    rows = judge(figures(0.3, 0.35, 0.6))
    assert verdicts(rows, "C4") == ["held", "held", "held", "not tested", "held"]
    rows = judge(figures(0.3, 0.35, 0.6, combination=-0.005, control=0.1))
    assert verdicts(rows, "C4", "not worse than either") == ["held"], "within the margin"
    assert verdicts(rows, "C4", "better than either") == ["not held"]
    assert verdicts(rows, "C4", "score average") == ["not held"]
    rows = judge(figures(0.3, 0.35, 0.6, alphas=(0.4, 0.4, 0.0, 0.4, 1.0)))
    assert verdicts(rows, "C4", "either of the two") == ["not shown", "not shown"], "α has to be inside"
    assert "in 2 of 5 seeds" in next(r for r in rows if r["id"] == "C4")["note"]
    rows = judge(figures(0.3, 0.35, 0.6), exact=Exact([True, False], [True], [True]))
    assert verdicts(rows, "C4", "are exactly") == ["not held"]


def test_twice_the_training_is_a_control_when_such_runs_are_there() -> None:
    runs = figures(0.3, 0.35, 0.6)
    runs["3t-twice", "t"] = {seed: measured(0.8 + NOISE["lit"][seed]) for seed in range(5)}
    assert verdicts(judge(runs), "C4", "twice") == ["not held"]
    runs["3t-twice", "t"] = {seed: measured(0.6 + NOISE["lit"][seed]) for seed in range(5)}
    assert verdicts(judge(runs), "C4", "twice") == ["held"]


def test_every_form_of_3t_has_its_own_claims() -> None:
    runs = figures(0.3, 0.35, 0.6) | figures(0.3, 0.35, 0.2, method="3t-other")
    rows = judge(runs)
    assert verdicts(rows, "C1", "3T is") == ["held", "held"]
    assert verdicts(rows, "C1", "3t-other is") == ["not held", "not held"]


def test_exact_claims_look_at_every_run() -> None:
    runs = figures(0.3, 0.35, 0.6)
    assert verdicts(judge(runs), "C6") == ["held", "held"]
    rows = judge(runs, exact=Exact([True], [True] * 3, [True, False, True]))
    assert verdicts(rows, "C6") == ["held", "not held"]
    assert "3 of 3" in sentence(rows[-2]) and "2 of 3" in sentence(rows[-1])
    rows = judge(runs, exact=Exact([True], [True, False], [True, True]))
    assert verdicts(rows, "C6") == ["not held", "held"]
    assert verdicts(judge({}, exact=Exact()), "C6") == ["not tested", "not tested"]


def test_one_seed_is_never_a_test_and_shows_the_queries() -> None:
    rows = judge(figures(0.2, 0.3, 0.7, seeds=1))
    assert {row["verdict"] for row in rows if row["tests"]} == {"not shown"}
    assert all(row["p"] is row["p_adjusted"] is None for row in rows)
    line = sentence(rows[0])
    assert line.startswith("C1 t: 3T is above the baseline in both directions of retrieval: not shown (")
    assert "95 % over queries" in line and "one seed: not a test" in line


def test_equal_differences_are_no_test() -> None:
    rows = judge(figures(0.3, 0.35, 0.6, noise=0.0))
    assert {row["verdict"] for row in rows if row["tests"]} == {"not shown"}
    assert "all seeds give the same difference" in rows[0]["note"]
    rows = judge(figures(0.6, 0.6, 0.3, noise=0.0))
    assert verdicts(rows, "C1") == ["not shown", "not shown"], "nor are they against a claim"


def test_the_correction_is_over_all_tests_of_the_page() -> None:
    rows = judge(figures(0.3, 0.35, 0.6))
    tested = [row for row in rows if row["p"] is not None]
    smallest = min(row["p"] for row in tested)
    assert next(row for row in tested if row["p"] == smallest)["p_adjusted"] == len(tested) * smallest
    pages = (  # but for one claim there is nothing to find
        judge(figures(0.3, 0.6, 0.6, noise=noise, combination=0.0, third=0.0, control=0.0))
        for noise in range(10, 90, 2)
    )
    row = next(page[0] for page in pages if page[0]["p"] > 0.01)
    assert row["tests"][0]["low"] > 0 and row["p"] < 0.05 < row["p_adjusted"]
    assert row["verdict"] == "not shown", "an interval above 0 is not enough among several tests"


def test_missing_methods_are_not_tested_rather_than_guessed() -> None:
    runs = {key: value for key, value in figures(0.3, 0.35, 0.6).items() if key[0] != "lit"}
    rows = judge(runs)
    assert verdicts(rows, "C1") == ["held", "not tested"]
    assert sentence(rows[1]).endswith("not tested (LiT was not compared)")
    runs["baseline", ""] = {9: runs["baseline", ""][0]}
    assert judge(runs)[0]["note"] == "the runs have no seed in common"
    assert verdicts(claims({}, ["t"], [], Exact()), "C1") == ["not tested", "not tested"]


# The chance of a claim that is held and not true


def null_page(rng: np.random.Generator, seeds: int, queries: int, spread: float) -> Rows:
    """A page on which every claim is just false: each true difference lies at the claim's bound.

    The figures are counts of queries, as recalls are, so that seeds often agree exactly on a small test set.
    """

    def run(level: float, alpha: float = 0.4, **more: float) -> Measured:
        def draw(level: float) -> float:
            return float(np.round(queries * (level + rng.normal(0, spread))) / queries)

        metrics = {f"retrieval/{name}": draw(level) for name in ("i2t_r@1", "t2i_r@1", "mean_r@1")}
        metrics |= {"zero_shot/top1": draw(0.3)} | {f"{name}/mean_r@1": draw(v) for name, v in more.items()}
        return Measured(metrics, {}, alpha)

    systems = {"combination": 0.38, "third": 0.4, "control": 0.38}
    levels: dict[tuple[str, str], tuple[float, dict[str, float]]] = {
        ("baseline", ""): (0.4, {}),
        ("lit", "t"): (0.4, {}),
        ("lit", "mismatched"): (0.38, {}),
        ("3t", "t"): (0.4, systems),
        ("3t", "mismatched"): (0.38, systems | {"combination": 0.36, "third": 0.38, "control": 0.36}),
    }
    runs = {key: {s: run(level, **more) for s in range(seeds)} for key, (level, more) in levels.items()}
    return claims(runs, ["t", "mismatched"], ["3t"], Exact())


@pytest.mark.parametrize(("seeds", "queries"), [(2, 40), (3, 64), (5, 1000)])
def test_chance_holds_a_claim_on_few_pages(seeds: int, queries: int) -> None:
    """The correction promises 5 % of pages at most."""
    rng, num = np.random.default_rng(seeds * queries), 200
    pages = [null_page(rng, seeds, queries, 0.02) for _ in range(num)]
    assert sum(row["p"] is not None for row in pages[0]) == 11
    wrong = sum(any(row["verdict"] == "held" for row in page) for page in pages)
    assert stats.binomtest(wrong, num, 0.05, alternative="greater").pvalue > 0.01, wrong


# C5


def grid(slope: tuple[float, float], seeds: int = 4, sizes: Sequence[float] = (1, 2, 4)) -> list[GridCell]:
    """Gaps on a plane with these slopes per doubling of size and data, and noise that differs by cell and seed."""
    rng = np.random.default_rng(0)
    return [
        GridCell(size, data, seed, 0.1 + slope[0] * np.log2(size) + slope[1] * np.log2(data) + rng.normal(0, 0.004))
        for seed in range(seeds) for size in sizes for data in (1000, 2000, 4000)
    ]  # fmt: skip


def test_growth_is_judged_by_the_slopes_of_the_seeds() -> None:
    rows = judged(growth(grid((0.03, 0.02)), "t"))
    assert verdicts(rows, "C5", "model size") == verdicts(rows, "C5", "with data") == ["held"]
    assert rows[0]["tests"][0]["mean"] == pytest.approx(0.03, abs=0.005)
    assert "points per doubling" in sentence(rows[0]) and "4 seeds" in sentence(rows[0])
    rows = judged(growth(grid((-0.03, 0.0)), "t"))
    assert verdicts(rows, "C5") == ["not held", "not shown"]
    assert verdicts(judged(growth(grid((0.03, 0.02), sizes=(2,)))), "C5") == ["not tested", "held"]
    rows = judged(growth(grid((0.03, 0.02), seeds=1)))
    assert verdicts(rows, "C5") == ["not shown", "not shown"] and "one seed" in rows[0]["note"]
    with pytest.raises(DataError, match="vary only together"):
        growth([GridCell(n, n, 0, 0.1) for n in (1, 2, 4)])


def test_a_grid_takes_the_place_of_the_untested_claim() -> None:
    runs = figures(0.3, 0.35, 0.6)
    assert verdicts(judge(runs), "C5") == ["not tested"]
    rows = judge(runs, grids={"t": grid((0.03, 0.02)), "mismatched": grid((0.03, 0.0))})
    assert [(row["third"], row["verdict"]) for row in rows if row["id"] == "C5"] == [
        *(("t", "held"), ("t", "held")),
        *(("mismatched", "held"), ("mismatched", "not shown")),
    ]


# Words


def test_a_sentence_says_the_claim_the_verdict_and_its_grounds() -> None:
    rows = judge(figures(0.4, 0.2, 0.47, tower="mismatched"), "mismatched")
    line = sentence(next(row for row in rows if row["text"].startswith("3T is not worse")))
    assert line == (
        "C3 mismatched: 3T is not worse than the baseline by more than 2 points: held "
        "(+7.0 points, 95 % 6.2 to 7.8, 5 seeds, p < 0.001, corrected < 0.001)"
    )
    row = judge(figures(0.4, 0.2, 0.3, tower="third"), "third")[0]
    assert sentence(row).startswith(
        "C1: 3T is above the baseline in both directions of retrieval: not held (image → "
    )
    assert "text −10.0 points, 95 % −10.8 to −9.2; text → image −10.0" in sentence(row)
    assert sentence(row).endswith(
        "the opposite holds: an interval lies on the other side of its bound; "
        "5 seeds, p of the claim = 1, corrected 1)"
    )


def budget(steps: int, batch_size: int, num_train: int) -> dict[str, Any]:
    return {"settings": {"steps": steps, "batch_size": batch_size, "num_train": num_train}}


def test_short_runs_name_no_winner_and_say_how_long_they_should_be() -> None:
    text = short_budget(budget(100, 32, 2000))
    assert "saw the training data 1.6 times" in text and "--steps 188 or more" in text
    assert short_budget(budget(188, 32, 2000)) == ""
    assert "2.9 times" in short_budget(budget(2999, 1, 1000)), "never rounded up to the limit"
    assert short_budget({}) == short_budget(budget(0, 0, 0)) == ""


def test_a_warm_start_is_compared_with_the_other_uses_of_the_same_weights() -> None:
    runs = figures(0.3, 0.35, 0.6)
    warm = figures(0.3, 0.35, 0.7, method="3t-main-warm")["3t-main-warm", "t"]
    unlocked = figures(0.3, 0.69, 0.5)["lit", "t"]
    both = {**runs, ("3t-main-warm", "t"): warm, ("lit-unlocked", "t"): unlocked}
    rows = [row for row in judge(both) if row["id"] == "W"]
    assert [(row["text"], row["verdict"]) for row in rows] == [
        ("3T main warm is above LiT unlocked in mean R@1", "held"),
        ("3T main warm is above LiT in mean R@1", "held"),
    ]
    worse = {**both, ("lit-unlocked", "t"): figures(0.3, 0.75, 0.5)["lit", "t"]}
    assert verdicts(judge(worse), "W", "unlocked") == ["not held"]
    assert not verdicts(judge(runs), "W"), "it is asked where both are compared"
    assert not verdicts(judge({**runs, ("lit-unlocked", "t"): unlocked}), "W")
