"""A comparison of the user's own data: what its page says first, how sure the order is, and what is folded."""

import itertools
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import threetowers
from test_report import Page, make_compare, rivals, save
from threetowers.evaluate.statistics import paired_difference
from threetowers.objective.pairs import METHODS
from threetowers.report.claims import certainty_in_words, signed, untested
from threetowers.report.order import MAX_PAIRS, difference, differences, headline
from threetowers.report.page import write_report
from threetowers.report.panels import METHOD_COLOURS, PALETTE
from threetowers.report.plots import draw_plots, measured_once
from threetowers.report.tables import Cell, cells, read_curves

SHARES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """A comparison of nine rows of methods on data of the user's own, and its page."""
    folder = tmp_path_factory.mktemp("own")
    compare = make_compare(folder)
    compare |= {
        "data": "birds.csv",
        "combination": [],
        "per_class": [],
        "runs": [],
        "examples": [],
        "world": [],
    }
    save(folder, compare)
    return compare, write_report(folder).read_text(encoding="utf-8")


def two(values: list[tuple[float, float]]) -> dict[str, Any]:
    """A comparison of two methods with these values, a pair for each seed."""
    compare = rivals((0.6, 0.5, 0.7), (0.5, 0.4, 0.6), len(values))
    for row in compare["results"]:
        row["value"] = values[row["seed"]][row["method"] == "baseline"]
    return compare


def section(page: str, name: str) -> str:
    """What stands in a section of a page."""
    return page.partition(f'<section id="{name}">')[2].partition("</section>")[0]


@given(SHARES)
def test_differences_are_those_of_the_statistics(values: list[tuple[float, float]]) -> None:
    found = difference(two(values), ("3t", ""), ("baseline", ""))
    expected = paired_difference([a for a, _ in values], [b for _, b in values])
    assert found and found.num == len(values) and found.ahead == sum(a > b for a, b in values)
    assert found.low is not None and found.high is not None
    assert (found.mean, found.low, found.high) == pytest.approx(expected[:3], abs=1e-8)
    assert not found.clear or math.copysign(1, found.low) == math.copysign(1, found.high)


def test_seeds_that_only_one_method_has_do_not_count() -> None:
    compare = two([(0.6, 0.5), (0.7, 0.5), (0.9, 0.1)])
    compare["results"] = [
        row for row in compare["results"] if (row["method"], row["seed"]) != ("baseline", 2)
    ]
    found = difference(compare, ("3t", ""), ("baseline", ""))
    assert found and (found.num, found.ahead) == (2, 2) and found.mean == pytest.approx(0.15)
    assert difference({**compare, "results": []}, ("3t", ""), ("baseline", "")) is None


def test_a_headline_names_all_that_may_be_best(own: tuple[dict[str, Any], str]) -> None:
    """Five methods that differ by noise, and four that are far below."""
    compare = json.loads(json.dumps(own[0]))
    noise = random.Random(0)
    for row in [*compare["summary"], *compare["results"]]:
        if (row["task"], row["metric"]) == ("retrieval", "mean_r@1"):
            level = 0.5 if row["third"] != "mismatched" else 0.2
            row["value" if "value" in row else "mean"] = level + noise.gauss(0, 0.01)
    what, certainty = headline(compare)
    assert re.match(r"No clear winner on birds.csv: (.+ %, ){2}.+ % and 2 more mean R@1; more seeds or", what)
    below = certainty.partition("Clearly below ")[2]
    assert below.count("(mismatched)") == 4 and "(matched)" not in below


def test_the_page_of_own_data_answers_before_it_tests(own: tuple[dict[str, Any], str]) -> None:
    page = own[1]
    places = [page.index(f'id="{name}"') for name in ("results", "sure", "claims", "towers", "settings")]
    assert places == sorted(places) and page.index('class="plot"') < places[0]
    folded = section(page, "claims")
    assert "5 claims: 2 held, 1 not held, 1 not shown, 1 not tested" in folded
    assert folded.index("<details>") < folded.index("C1 matched") < folded.index("</details>")
    assert "C1 matched" not in page[: page.index('id="claims"')]
    text = Page(folded).text
    assert "<p>More seeds: some differences are still undecided." in section(page, "next")
    assert "Not tested: C5: The gap 3T − LiT grows" in text and folded.count("<li>") == 4


def test_the_page_of_the_built_in_world_begins_with_the_claims(
    own: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    save(tmp_path, own[0] | {"data": "shapes"})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    places = [
        page.index(each) for each in ("C1 matched", 'id="towers"', 'id="results"', 'id="sure"', 'id="claims"')
    ]
    assert places == sorted(places) and page.count("5 claims: ") == 0


def test_every_pair_is_on_the_page(own: tuple[dict[str, Any], str]) -> None:
    compare, page = own
    text = Page(section(page, "sure")).text
    found = differences(compare)
    assert len(found) == 9 * 8 / 2 > MAX_PAIRS and "All 36 pairs" in text
    for each in found:
        shown = text.count(f"{signed(100 * each.mean)}{signed(100 * (each.low or 0)).lstrip('+')} to ")
        assert shown >= (2 if each.first == found[0].first else 1)
    clear, rest = text.count(" is better"), text.count("undecided")
    assert clear == sum(each.clear for each in (*found, *found[:8])) and clear + rest == 36 + 8


def test_one_seed_tells_no_pair_apart(own: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    compare = rivals((0.6, 0.58, 0.62), (0.5, 0.48, 0.52), 1)
    save(tmp_path, compare)
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "undecided" in text and "is better" not in text and "--seeds 0 1 2 adds two" in text


def test_a_name_on_the_command_line_stands_with_its_label(own: tuple[dict[str, Any], str]) -> None:
    table = section(own[1], "results")
    assert "3T regression (matched)<small><code>3t-regression</code></small>" in table
    assert "<code>baseline</code>" not in table, "where both are the same, one is enough"


def test_intervals_stay_within_what_a_share_can_be(tmp_path: Path) -> None:
    compare = rivals((0.97, 0.9, 1.04), (0.05, -0.011, 0.116), 3)
    spans = {key[0]: row["retrieval/mean_r@1"] for key, row in cells(compare).items()}
    assert (spans["3t"].interval, spans["baseline"].interval) == ("90.0 to 100.0", "0.0 to 11.6")
    assert spans["baseline"].low == -0.011, "the statistics stay as they are"
    assert Cell(0.5, None, None, 1, False).interval == ""


@pytest.mark.parametrize(
    ("value", "text"), [(-0.04, "0.0"), (0.0, "0.0"), (-1e-18, "0.0"), (-0.06, "−0.1"), (9.1, "+9.1")]
)
def test_what_rounds_to_zero_has_no_sign(value: float, text: str) -> None:
    assert signed(value) == text


def claim(mean: float, p: float, verdict: str, bound: float = 0.0, side: str = "above") -> dict[str, Any]:
    test = {"mean": mean, "bound": bound, "side": side, "num": 3}
    return {"tests": [test], "p": p, "p_adjusted": p, "verdict": verdict}


def test_a_p_near_one_is_explained() -> None:
    assert certainty_in_words(claim(0.1, 0.004, "held")) == "3 seeds, p = 0.004, corrected 0.004"
    lost = certainty_in_words(claim(-0.145, 1.0, "not held"))
    assert lost.startswith("the opposite holds: ") and lost.endswith(
        "3 seeds, p of the claim = 1, corrected 1"
    )
    assert certainty_in_words(claim(-0.01, 1.0, "not shown")).endswith(
        "corrected 1: a difference is not on the claimed side"
    )
    assert (
        certainty_in_words(claim(-0.01, 0.4, "not shown", bound=-0.02)) == "3 seeds, p = 0.4, corrected 0.4"
    )
    assert "claimed side" in certainty_in_words(claim(-0.01, 1.0, "not shown", bound=-0.02, side="below"))
    assert certainty_in_words(claim(0.1, 0.004, "not tested") | {"p": None}) == ""


@pytest.mark.parametrize(
    ("id", "note", "said"),
    [
        ("C1", "LiT was not compared", "--methods lit tests it"),
        ("C1", "3T main warm was not compared", "--methods 3t-main-warm tests it"),
        ("C2", "zero_shot/top1 of 3T was not measured", "--classes tests it"),
        ("C4", "3t-twice was not compared", "`threetowers reproduce` tests it"),
        ("C4", "control/mean_r@1 of 3T was not measured", "--methods baseline lit tests it"),
        ("C5", "it takes runs of several model sizes and data sizes", "`threetowers reproduce` tests it"),
        ("C6", "there is no run to check", ""),
    ],
)
def test_what_was_not_tested_says_what_would_test_it(id: str, note: str, said: str) -> None:
    rows = [
        {"id": id, "third": "", "text": "It is so", "verdict": verdict, "note": note}
        for verdict in ("not tested", "held")
    ]
    assert untested(rows) == f"{id}: It is so ({'; '.join(filter(None, (note, said)))})"


def test_one_validation_is_a_sentence_and_no_curve(tmp_path: Path) -> None:
    compare = rivals((0.6, 0.58, 0.62), (0.5, 0.48, 0.52), 1)
    compare["runs"] = [{**method, "path": method["method"]} for method in compare["methods"]]
    for name, value in (("3t", 0.25), ("baseline", 0.125)):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "train/loss/img-txt": 1 / step} for step in (60, 120)]
        rows.append({"step": 120, "val/mean_r@1": value})
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    curves, _ = read_curves(tmp_path, compare)
    plots = draw_plots(compare, curves)
    assert not plots["validation"] and len(plots["loss"]) == 1
    said = measured_once(compare, curves)
    assert said.startswith("Validation ran once, after step 120: 3T 25.0 %, baseline 12.5 % mean R@1.")
    save(tmp_path, compare)
    assert said in Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    with (tmp_path / "3t" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 240, "val/mean_r@1": 0.3}) + "\n")
    curves, _ = read_curves(tmp_path, compare)
    early = {
        key: {"train/loss/img-txt": [line[:1] for line in row["train/loss/img-txt"]]}
        for key, row in curves.items()
    }
    assert measured_once(compare, early).startswith("Logged once, after step 60: loss img-txt, ")
    assert not measured_once(compare, curves) and len(draw_plots(compare, curves)["validation"]) == 1


def test_neighbouring_charts_have_titles_of_their_own(tmp_path: Path) -> None:
    compare = make_compare(tmp_path)
    second = [row | {"method": "3t-regression"} for row in compare["combination"]]
    plots = draw_plots(compare | {"combination": compare["combination"] + second, "per_class": []}, {})
    titles = [re.findall(r'aria-label="([^"]+)"', p.svg) for p in plots["combination"] + plots["cost"]]
    assert all(len(title) == 1 for title in titles) and len({title[0] for title in titles}) == 6


@pytest.mark.parametrize("theme", [0, 1])
def test_no_two_methods_have_nearly_the_same_colour(theme: int) -> None:
    """Distances in CIELAB (CIE 1976), where 2.3 is just noticeable."""

    def lab(shade: str) -> np.ndarray[Any, Any]:
        value = np.array([int(shade[place : place + 2], 16) / 255 for place in (1, 3, 5)])
        linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
        to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
        x, y, z = np.cbrt(to_xyz @ linear / [0.9505, 1.0, 1.089])
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    shades = {name: lab(PALETTE[name][theme]) for name in METHODS}
    for a, b in itertools.combinations(shades, 2):
        assert np.linalg.norm(shades[a] - shades[b]) > (25, 17)[theme], (a, b)


def test_the_page_of_explore_has_the_colours_of_the_report() -> None:
    style = (Path(threetowers.__file__).parent / "explore" / "page" / "style.css").read_text(encoding="utf-8")
    found = [re.findall(rf"--s{i}: (#[0-9a-f]{{6}})", style) for i in range(len(METHOD_COLOURS))]
    assert found == [list(pair) for pair in METHOD_COLOURS]
