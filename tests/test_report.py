"""The report: readable from any compare folder, offline, safe with foreign text, the same bytes each time."""

import csv
import itertools
import json
import math
import random
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from threetowers.errors import DataError
from threetowers.report.claims import glance, terminal_claims
from threetowers.report.order import headline
from threetowers.report.page import write_report
from threetowers.report.panels import PALETTE, inline_svg, spread
from threetowers.report.plots import average
from threetowers.report.story import next_step, story
from threetowers.report.tables import Html, join, percent, read_curves, tag
from threetowers.report.terminal import text_table

COLOURS = ("red", "orange", "gold", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "ring", "square", "triangle", "star")
SKILL = {"baseline": 0.42, "lit": 0.47, "lit-unlocked": 0.5, "3t": 0.56, "3t-regression": 0.53}
NAMES = {
    "baseline": "baseline", "lit": "LiT", "lit-unlocked": "LiT unlocked", "3t": "3T", "3t-regression": "3T regression",
}  # fmt: skip
METRICS = [
    *(("retrieval", f"{way}_r@{k}") for way in ("i2t", "t2i", "mean") for k in (1, 5, 10)),
    *(("zero_shot", name) for name in ("top1", "top5", "mean_per_class")),
]
QUICK: dict[str, Any] = {"combination": [], "per_class": [], "summary": []}  # fewer plots to draw
NASTY = "<script>alert(1)</script> a \"red\" & 'small' <b>circle</b>"


def thumbnail(path: Path, index: int) -> str:
    image = Image.new("RGB", (32, 32), ("#c8dcc0", "#e8ddc4", "#eef1f6", "#cfe0ee")[index % 4])
    draw, x = ImageDraw.Draw(image), 4 + index % 7
    (draw.ellipse if index % 2 else draw.rectangle)((x, 6, x + 18, 24), fill=COLOURS[index % 8])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return f"images/{path.name}"


def caption(index: int) -> str:
    return f"a large {COLOURS[index % 8]} {('square', 'circle')[index % 2]} on {('grass', 'sand', 'snow')[index % 3]}"


def make_compare(folder: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """A plausible compare folder with every part: five methods, two third towers, thumbnails, logs."""
    rng = random.Random(0)
    images = [thumbnail(folder / f"images/t{i}.png", i) for i in range(24)]
    rows = [("baseline", "")] + [(m, t) for t in ("matched", "mismatched") for m in NAMES if m != "baseline"]
    skill = {(m, t): SKILL[m] - (0.0 if t != "mismatched" else 0.16 if "lit" in m else 0.04) for m, t in rows}
    labels = {(m, t): NAMES[m] + (f" ({t})" if t else "") for m, t in rows}
    methods, results, summary, runs, per_class = (list[dict[str, Any]]() for _ in range(5))
    for (m, t), level in skill.items():
        seconds, params = 60 + 40 * rng.random(), 1_150_000 if "lit" not in m else 2_400_000
        methods.append({
            "method": m, "third": t, "label": labels[m, t], "lr": 0.001,
            "trainable_params": params - (m == "lit") * 1_900_000,
            "lr_trials": {"0.0005": level - 0.05, "0.001": level, "0.002": level - 0.02}, "inference_params": params,
            "third_at_inference": m == "lit", "train_seconds": seconds, "examples_per_second": 9e4 / seconds,
            "inference_images_per_second": 3000.0 if "lit" not in m else 1400.0,
        })  # fmt: skip
        for task, metric in METRICS:
            base = level + 0.25 * ("5" in metric) + 0.35 * ("10" in metric) + 0.02 * metric.startswith("i2t")
            values = [min(1.0, base + rng.gauss(0, 0.008)) for _ in seeds]
            results += [{"method": m, "third": t, "seed": s, "task": task, "metric": metric, "value": v}
                        for s, v in zip(seeds, values, strict=True)]  # fmt: skip
            mean, half = sum(values) / len(values), 0.02 + 0.005 * rng.random()
            summary.append({"method": m, "third": t, "task": task, "metric": metric, "mean": mean, "low": mean - half,
                            "high": mean + half, "num_seeds": len(seeds), "best": False})  # fmt: skip
        for seed in seeds:
            path = f"runs/{m}-{t or 'none'}-seed{seed}-lr0.001"
            runs.append({"method": m, "third": t, "seed": seed, "lr": 0.001, "path": path})
            write_metrics(folder / path, m, level, rng)
        per_class += [{"method": m, "third": t, "class": f"{c} {s}", "value": min(1.0, max(0.0, rng.gauss(level, 0.2)))}
                      for c in COLOURS for s in SHAPES]  # fmt: skip
    runs.append({"method": "3t", "third": "matched", "seed": 0, "lr": 0.002, "path": "runs/a-trial"})
    alphas = [i / 20 for i in range(21)]
    combination = [
        combined(third, seed, alphas, 0.54, skill["lit", third], rng)
        for third in ("matched", "mismatched")
        for seed in seeds
    ]
    for third in ("matched", "mismatched"):
        mean = max(combination[0]["test"]) - 0.1 * (third == "mismatched")
        summary.append({"method": "3t", "third": third, "task": "combination", "metric": "mean_r@1", "mean": mean,
                        "low": mean - 0.02, "high": mean + 0.02, "num_seeds": len(seeds), "best": False})  # fmt: skip
    for column in {(row["task"], row["metric"]) for row in summary}:
        best = max((r for r in summary if (r["task"], r["metric"]) == column), key=lambda r: r["mean"])
        best["best"] = True
    compare = {
        "schema": 2, "title": "Which method wins on shapes", "data": "shapes", "created": "2026-01-31T12:00:00",
        "machine": {"cpu": "some CPU", "cores": 2, "device": "cpu", "python": "3.11.7", "torch": "2.10.0"},
        "settings": {"steps": 400, "batch_size": 256, "seeds": list(seeds), "lrs": [0.0005, 0.001, 0.002], "lr_seed": 0,
                     "num_train": 10000, "num_val": 1000, "num_test": 1000, "primary": "retrieval/mean_r@1"},
        "methods": methods, "results": results, "summary": summary, "claims": claims(len(seeds)),
        "combination": combination, "examples": examples(images, labels, rng), "per_class": per_class, "runs": runs,
        "world": [{"image": images[i], "captions": [caption(i), f"{COLOURS[i % 8]} thing"]} for i in range(16)],
    }  # fmt: skip
    save(folder, compare)
    return compare


def write_metrics(run: Path, method: str, level: float, rng: random.Random) -> None:
    run.mkdir(parents=True)
    lines = []
    for step in range(10, 401, 10):
        fall = math.exp(-step / 130)
        row = {"step": step, "seconds": step / 5, "train/loss": 4.0, "train/scale": 14.0,
               "train/loss/img-txt": 5.5 - 3.5 * level * 1.6 * (1 - fall) + rng.gauss(0, 0.05)}  # fmt: skip
        if method.startswith("3t"):
            low = 1.0 if method == "3t-regression" else 5.5
            row |= {f"train/loss/{side}-third": low * (0.45 + 0.55 * fall) for side in ("img", "txt")}
        lines.append(json.dumps(row))
        if step % 50 == 0:
            lines.append(json.dumps({"step": step, "val/mean_r@1": level * (1 - fall) + rng.gauss(0, 0.006)}))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def combined(
    third: str, seed: int, alphas: list[float], main: float, end: float, rng: random.Random
) -> dict[str, Any]:
    def curve(a: float, b: float, bump: float) -> list[float]:
        shift = rng.gauss(0, 0.004)
        return [a + (b - a) * x + 4 * bump * x * (1 - x) + shift for x in alphas]

    return {
        "third": third, "seed": seed, "metric": "mean_r@1", "alphas": alphas, "val": curve(main, end, 0.05),
        "test": curve(main, end, 0.05), "alpha": 0.4 - 0.05 * (seed % 2), "ends": {"main": main, "third": end},
        "control": {"val": curve(0.42, end, 0.03), "test": curve(0.42, end, 0.03), "alpha": 0.5},
        "references": {"baseline": 0.42, "lit": end},
    }  # fmt: skip


def claims(num_seeds: int) -> list[dict[str, Any]]:
    """Four claims, one of each verdict; with one seed nothing is tested."""

    def claim(id: str, third: str, text: str, verdict: str, p: float | None, *tests: Any, **more: Any) -> Any:
        one = num_seeds == 1 and bool(tests)
        return {
            "id": id, "third": third, "text": text, "verdict": "not shown" if one else verdict,
            "p": None if one else p, "p_adjusted": None if one or p is None else min(1.0, 3 * p),
            "tests": tests, "details": {}, "note": "one seed: not a test" if one else "",
        } | more  # fmt: skip

    def test(what: str, mean: float, bound: float = 0.0) -> dict[str, Any]:
        return {
            "what": what, "mean": mean, "low": mean - 0.019, "high": mean + 0.019, "num": num_seeds, "bound": bound,
            "over": "seeds" if num_seeds > 1 else "queries", "side": "above", "unit": "points", "p": 0.01,
        }  # fmt: skip

    above = "3T is above LiT in both directions of retrieval"
    both = test("image → text", 0.091), test("text → image", 0.087)
    return [
        claim("C1", "matched", above, "held", 0.004, *both),
        claim("C3", "mismatched", "3T is not worse than the baseline by more than 2 points", "not shown", 0.3,
              test("mean R@1", -0.01, -0.02)),
        claim("C4", "matched", "3T combined with the third tower is better than either of the two alone", "not held",
              1.0, test("over the main pair", -0.05), details={"α chosen on validation": "0.4, 0.35, 0.4"}),
        claim("C5", "", "The gap 3T − LiT grows with model size and with data", "not tested", None),
        claim("C6", "", "Without the third tower the outputs are the same", "held", None, details={"runs": "6 of 6"}),
    ]  # fmt: skip


def examples(
    images: list[str], labels: dict[tuple[str, str], str], rng: random.Random
) -> list[dict[str, Any]]:
    found = []
    for n in range(6):
        text_answers, image_answers = [], []
        for (m, t), name in labels.items():
            picks, place = rng.sample([i for i in range(24) if i != n], 5), rng.randrange(7)
            picks[place % 5 if place < 5 else 0] = n if place < 5 else (n + 1) % 24
            row = {"method": m, "third": t, "label": name}
            scored = [(i, 0.7 - 0.04 * rank) for rank, i in enumerate(picks)]
            text_answers.append(
                row
                | {
                    "items": [
                        {"image": images[i], "text": None, "right": i == n, "score": s} for i, s in scored
                    ]
                }
            )
            image_answers.append(
                row
                | {
                    "items": [
                        {"image": None, "text": caption(i), "right": i == n, "score": s} for i, s in scored
                    ]
                }
            )
        found.append(
            {
                "direction": "t2i",
                "query": caption(n),
                "query_image": None,
                "truth": images[n],
                "answers": text_answers,
            }
        )
        found.append(
            {
                "direction": "i2t",
                "query": None,
                "query_image": images[n],
                "truth": caption(n),
                "answers": image_answers,
            }
        )
    return found


def make_bare(folder: Path) -> dict[str, Any]:
    """One seed, no per-class figures, control or examples, and an unfinished run's log with a torn last line."""
    compare = make_compare(folder, seeds=(0,))
    for curve in compare["combination"]:
        curve["control"] = None
    compare |= {"per_class": [], "examples": [], "world": []}
    log = folder / compare["runs"][0]["path"] / "metrics.jsonl"
    log.write_text(log.read_text(encoding="utf-8")[:-900], encoding="utf-8")
    save(folder, compare)
    return compare


def save(folder: Path, compare: dict[str, Any]) -> None:
    (folder / "compare.json").write_text(json.dumps(compare), encoding="utf-8")


class Page(HTMLParser):
    """Every tag with its attributes, every id, and the text that a reader sees; unbalanced tags are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", list[str]()
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("full")
    make_compare(folder)
    return folder, write_report(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("bare")
    make_bare(folder)
    return folder, write_report(folder).read_text(encoding="utf-8")


def variant(full: tuple[Path, str], tmp_path: Path, **changes: Any) -> str:
    """The page of the full comparison with some keys changed, without its runs, which are slow to draw."""
    compare = json.loads((full[0] / "compare.json").read_text(encoding="utf-8"))
    shutil.copytree(full[0] / "images", tmp_path / "images")
    save(tmp_path, compare | {"runs": []} | changes)
    return write_report(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["full", "bare"])
def test_page_is_offline_and_well_formed(kind: str, request: pytest.FixtureRequest) -> None:
    page = request.getfixturevalue(kind)[1]
    parsed = Page(page)
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<iframe", page, re.IGNORECASE)
    for name, attributes in parsed.tags:
        assert not any(key.startswith("on") for key in attributes), (name, attributes)
        for key in ("src", "href"):
            assert (attributes.get(key) or "#").startswith(("data:image/", "#"))
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert targets <= set(ids)
    for name in re.findall(r"var\(--([\w-]+)\)", page):
        assert name in PALETTE, name


def test_page_shows_every_part(full: tuple[Path, str]) -> None:
    folder, page = full
    text = Page(page).text
    assert "3T (matched) wins on shapes: 55.9 % mean R@1" in text
    for part in (
        "not held", "not shown", "not tested", "+9.1 points, 95 % 7.2 to 11.0", "for the 3 tests of this page",
        "3 seeds, p = 0.004, corrected 0.012", "C1 matched: 3T is above LiT", "6 of 6", "a large red square on grass",
        "α chosen on val", "control: baseline + LiT", "third tower at inference", "some CPU", "t-interval",
    ):  # fmt: skip
        assert part in text, part
    # five of each row's answers, the truths and the query images, and the world; all inside the page
    assert page.count("<img ") == page.count("data:image/png;base64,") == 6 * 9 * 5 + 6 + 6 + 16
    assert page.count("thumb right") == sum(
        item["right"]
        for example in json.loads((folder / "compare.json").read_text())["examples"] if example["direction"] == "t2i"
        for answer in example["answers"] for item in answer["items"]
    )  # fmt: skip
    assert page.count('class="plot"') == len(list((folder / "figures").glob("*.png"))) == 15


def test_page_of_one_seed_without_the_optional_parts(bare: tuple[Path, str]) -> None:
    folder, page = bare
    text = Page(page).text
    assert "One seed: the 95 % intervals, a bootstrap over test queries" in text
    assert "No clear winner on shapes: 3T (matched) 55.7 %, 3T regression (matched) 53.2 %" in text
    assert (
        "95 % over queries 7.2 to 11.0" in text
        and "one seed: not a test" in text
        and "for the 3 tests" not in text
    )
    assert (
        "Retrieval examples" not in text and "accuracy by class" not in text and "Examples from" not in text
    )
    assert "cannot be told apart from plain ensembling" in text and "control: baseline" not in text
    assert "Not shown" not in text  # a torn last line is what an unfinished run looks like
    curves, problems = read_curves(folder, json.loads((folder / "compare.json").read_text()))
    lengths = {key: len(metrics["train/loss/img-txt"][0]) for key, metrics in curves.items()}
    assert 20 < lengths.pop(("baseline", "")) < 40 and set(lengths.values()) == {40} and not problems


def test_foreign_text_stays_text(full: tuple[Path, str], tmp_path: Path) -> None:
    compare = json.loads((full[0] / "compare.json").read_text(encoding="utf-8"))
    for example in compare["examples"]:
        example |= {"query": NASTY, "truth": example["truth"] if example["direction"] == "t2i" else NASTY}
        for answer in example["answers"]:
            answer["label"] = NASTY
            for item in answer["items"]:
                item["text"] = item["text"] and NASTY
    for entry in compare["per_class"]:
        entry["class"] = "$x^$ " + entry["class"] + NASTY
    compare["methods"][0]["label"] = compare["claims"][0]["text"] = compare["title"] = NASTY
    compare["world"][0]["captions"] = [NASTY, NASTY, "a lone surrogate \ud800 and a \x00"]
    page = variant(full, tmp_path, **compare)
    parsed = Page(page)
    assert not {name for name, _ in parsed.tags} & {"script", "iframe"}
    assert "<script" not in page and "<b>circle" not in page
    assert parsed.text.count(NASTY) > 50
    assert NASTY in [attributes.get("alt") for _, attributes in parsed.tags]  # quotes do not end an attribute


@given(st.text(), st.text())
def test_tag_escapes_whatever_is_not_markup(text: str, value: str) -> None:
    page = tag("p", text, tag("b", text), None, title=value)
    assert isinstance(page, Html) and isinstance(join(page, text), Html)
    assert page.count("<") == 4 and page.count('"') == 2


def test_images_that_are_missing_or_outside_are_named(full: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    thumbnail(tmp_path / "secret.png", 0)
    (tmp_path / "inner" / "text.png").write_text("not an image")
    paths = ["images/none.png", "../secret.png", str(tmp_path / "secret.png"), "text.png", None]
    world: list[dict[str, object]] = [{"image": path, "captions": []} for path in paths]
    page = variant(full, tmp_path / "inner", world=world, examples=[], **QUICK)
    assert page.count("image missing") == len(paths) and "<img" not in page


def test_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    save(tmp_path, rivals((0.6, 0.58, 0.62), (0.5, 0.48, 0.52), 3))

    def written() -> dict[Path, bytes]:
        write_report(tmp_path)
        return {path: path.read_bytes() for path in tmp_path.rglob("*.*")}

    first = written()
    assert {path.name for path in first} >= {
        "report.html",
        "primary.png",
        "summary.csv",
    } and written() == first


def test_csv_holds_the_figures_unrounded(full: tuple[Path, str]) -> None:
    folder, _ = full
    compare = json.loads((folder / "compare.json").read_text())
    names = {"summary", "results", "methods", "claims", "per_class", "combination", "curves"}
    assert {path.stem for path in (folder / "tables").iterdir()} == names
    with (folder / "tables" / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["mean"]) for row in rows] == [row["mean"] for row in compare["summary"]]
    with (folder / "tables" / "combination.csv").open(newline="") as file:
        assert [float(row["control_test"]) for row in csv.DictReader(file)][:21] == compare["combination"][0][
            "control"
        ]["test"]
    for path in (folder / "figures").iterdir():
        with Image.open(path) as image:
            image.load()
            assert image.width == 800


def test_metrics_that_cannot_be_read_are_named(full: tuple[Path, str], tmp_path: Path) -> None:
    run = {"method": "baseline", "third": "", "seed": 0, "lr": 0.001, "path": "runs/a"}
    (tmp_path / "runs/a").mkdir(parents=True)
    rows = [
        '{"step": 1, "val/mean_r@1": 0.1}',
        "garbage",
        '{"step": 2, "val/mean_r@1": NaN}',
        '{"step": 3, "val/mea',
    ]
    (tmp_path / "runs/a/metrics.jsonl").write_text("\n".join(rows))
    gone, trial = run | {"path": "runs/gone"}, run | {"lr": 0.5, "path": "runs/trial"}
    page = variant(full, tmp_path, runs=[run, gone, trial], **QUICK)
    text = Page(page).text
    assert "runs/a/metrics.jsonl: 1 of 4 lines are not JSON objects with a step" in text
    assert "runs/gone/metrics.jsonl: No such file" in text
    assert "runs/trial" not in text  # trials of other learning rates are not part of the comparison


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "schema is None"),
        ('{"schema": 1}', "schema is 1, this version reads schema 2.*finished runs are not repeated"),
        ('{"schema": 2, "methods": []}', "has no 'summary'"),
    ],
)
def test_a_folder_without_a_usable_comparison(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "compare.json").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        write_report(tmp_path)
    assert "compare.json" in str(error.value) and "threetowers compare" in str(error.value)


def test_the_least_that_makes_a_page(tmp_path: Path) -> None:
    save(tmp_path, {"schema": 2, "methods": [], "summary": []})
    assert "No method has a result for mean R@1 yet." in Page(write_report(tmp_path).read_text()).text


def rivals(
    first: tuple[float, float, float],
    second: tuple[float, float, float],
    num_seeds: int,
    spread: float = 0.01,
) -> dict[str, Any]:
    """A comparison of two methods with (mean, low, high); seeds of the first are `spread` apart."""
    keys = ("mean", "low", "high")
    summary = [
        {
            "method": m,
            "third": "",
            "task": "retrieval",
            "metric": "mean_r@1",
            "num_seeds": num_seeds,
            "best": m == "3t",
        }
        | dict(zip(keys, figures, strict=True))
        for m, figures in (("baseline", second), ("3t", first))
    ]
    methods = [{"method": m, "third": "", "label": NAMES[m]} for m in ("baseline", "3t")]
    results = [
        {
            "method": m, "third": "", "task": "retrieval", "metric": "mean_r@1", "seed": seed,
            "value": mean + (m == "3t") * half * (seed - (num_seeds - 1) / 2),
        }
        for m, mean, half in (("3t", first[0], spread), ("baseline", second[0], 0)) for seed in range(num_seeds)
    ]  # fmt: skip
    return {"schema": 2, "data": "birds", "methods": methods, "summary": summary, "results": results}


def test_headline_says_wins_only_when_the_difference_is_clear() -> None:
    apart = (0.6, 0.58, 0.62), (0.5, 0.48, 0.52)
    what, certainty = headline(rivals(*apart, 3))
    assert what == "3T wins on birds: 60.0 % mean R@1, against 50.0 % for the runner-up baseline."
    assert (
        certainty
        == "Over 3 seeds 3T is 10.0 points above baseline, 95 % 7.5 to 12.5, and ahead in 3 of 3 seeds."
    )
    wide = (0.6, 0.48, 0.72), (0.5, 0.48, 0.52)
    assert "wins" in headline(rivals(*wide, 3))[0], (
        "intervals of the two may overlap where the difference is clear"
    )
    what, certainty = headline(rivals(*apart, 3, spread=0.11))
    assert what == (
        "No clear winner on birds: 3T 60.0 %, baseline 50.0 % mean R@1; more seeds or more test data could decide."
    )
    assert certainty.endswith("95 % −17.3 to 37.3, and ahead in 2 of 3 seeds.")
    what, certainty = headline(rivals(*apart, 3, spread=0))
    assert "No clear winner" in what and "All seeds give the same difference, which is no test." in certainty
    what, certainty = headline(rivals(*apart, 1))
    assert "leads" in what and certainty.startswith("One seed")
    what, certainty = headline(rivals(*wide, 1))
    assert (
        what.endswith("; more seeds could decide.") and "overlap (48.0 to 72.0 and 48.0 to 52.0)" in certainty
    )
    what, certainty = headline({**rivals((0.6, math.nan, math.nan), (0.5, 0.48, 0.52), 3), "results": []})
    assert "leads" in what and "not known" in certainty


def test_too_short_runs_have_no_winner(tmp_path: Path) -> None:
    clear = rivals((0.6, 0.58, 0.62), (0.5, 0.48, 0.52), 3)
    short = clear | {"settings": {"steps": 100, "batch_size": 32, "num_train": 2000}}
    what, certainty = headline(short)
    assert what.startswith(
        "No winner can be named yet: each run saw the training data 1.6 times. Give --steps 188"
    )
    assert certainty.startswith("After these steps 3T leads on birds: 60.0 %")
    save(tmp_path, short)
    assert what in Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "No winner can be named yet" in text_table(short)


def test_text_table_is_aligned_and_narrow(full: tuple[Path, str]) -> None:
    compare = json.loads((full[0] / "compare.json").read_text())
    compare["methods"][3]["label"] = "a label \x1b[31m that is far too long for any terminal " * 3
    lines = text_table(compare).splitlines()
    assert max(map(len, lines)) <= 100 and "\x1b" not in "".join(lines)
    head = next(i for i, line in enumerate(lines) if line.startswith("method"))
    rows = lines[head + 2 : head + 11]
    ends = [match.end() for match in re.finditer(r"\S+(?: \S+)?(?=\s{2,}|$)", lines[head])][1:]
    assert all(row[end - 1] != " " for row in rows for end in ends)
    assert [row.count("*") for row in rows] == [5] + [0] * 8
    text = " ".join(line.strip() for line in lines[lines.index("Claims of the paper:") :])
    assert (
        "C1 matched: 3T is above LiT in both directions of retrieval: held (image → text +9.1 points, 95 % 7.2"
        in text
    )
    assert (
        "by more than 2 points: not shown (−1.0 points, 95 % −2.9 to 0.9, 3 seeds, p = 0.3, corrected 0.9)"
        in text
    )
    assert "C6: Without the third tower the outputs are the same: held (6 of 6 runs)" in text
    assert text.count("C5: ") == 1 and text.count(": not tested") == 1


def test_the_story_is_told_from_the_figures(full: tuple[Path, str]) -> None:
    compare = json.loads((full[0] / "compare.json").read_text())
    told = story(compare)
    table = {(r["method"], r["third"], r["task"], r["metric"]): 100 * r["mean"] for r in compare["summary"]}
    classes = max((key for key in table if key[2:] == ("zero_shot", "top1")), key=lambda key: table[key])
    assert re.fullmatch(rf".+ is best at zero-shot top-1, with {table[classes]:.1f} %\.", told[0])
    combined = max((key for key in table if key[2] == "combination"), key=lambda key: table[key])
    assert f"({combined[1]}) reaches {table[combined]:.1f} %; without it " in told[1]
    (other,) = told[2:]
    assert other.startswith("With the third tower mismatched: ")
    lit, base = (
        table[key]
        for key in (("lit", "mismatched", "retrieval", "mean_r@1"), ("baseline", "", "retrieval", "mean_r@1"))
    )
    assert f"LiT {lit:.1f} %" in other and other.endswith(f"The baseline, without one, reaches {base:.1f} %.")
    assert story({**compare, "summary": [], "combination": []}) == []
    text, page = " ".join(text_table(compare).split()), Page(full[1]).text
    assert all(sentence in text and sentence in page for sentence in told)


def test_claims_that_one_seed_cannot_test_stand_together() -> None:
    several, one = claims(3), claims(1)
    assert [verdict for verdict, _ in glance(several)] == [claim["verdict"] for claim in several]
    rows = glance(one)
    one_seed, lacking = [c for c in one if c["tests"]], [c for c in one if c["verdict"] == "not tested"]
    assert rows[0][0] == "not shown" and rows[0][1].startswith(f"{len(one_seed)} claims of C1")
    assert len(lacking) == 1 and rows[-1] == ("not tested", "1 claim of C5: this takes further runs")
    assert len(rows) == len(one) - len(one_seed) - len(lacking) + 2
    assert terminal_claims(one)[0].endswith("can be enough: not shown")
    assert len(terminal_claims(several)) == len(several)


@given(st.floats(0, 1))
def test_percent_has_one_decimal(value: float) -> None:
    assert (
        re.fullmatch(r"\d{1,3}\.\d", percent(value))
        and abs(float(percent(value)) - 100 * value) <= 0.05 + 1e-9
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9).map(sorted), st.floats(0.01, 0.1))
def test_labels_at_line_ends_never_touch(heights: list[float], gap: float) -> None:
    placed = spread(heights, gap)
    gaps = [b - a for a, b in itertools.pairwise(placed)]
    assert all(distance >= gap - 1e-9 for distance in gaps) and max(placed) <= 1 + 1e-9
    if all(b - a >= gap for a, b in itertools.pairwise(heights)):
        assert placed == pytest.approx(heights)  # nothing moves that need not


@given(st.lists(st.lists(st.integers(0, 2000), min_size=1, unique=True), min_size=1, max_size=3))
def test_average_keeps_to_shared_steps(seeds: list[list[int]]) -> None:
    lines = [
        [(float(step), float(step + seed)) for step in sorted(steps)] for seed, steps in enumerate(seeds)
    ]
    x, y, low, high = average(lines)
    shared = set.intersection(*map(set, seeds))
    assert len(x) == len(y) == len(low) == len(high) == min(len(shared), 250)
    if len(shared) <= 250:
        assert x == sorted(shared)
    middle = (len(seeds) - 1) / 2
    assert all(abs(b - a - middle) < 1e-6 and c <= b <= d for a, b, c, d in zip(x, y, low, high, strict=True))


def test_inlined_svg_follows_the_page() -> None:
    start = '<?xml version="1.0"?><!DOCTYPE svg PUBLIC "x" "http://x"><svg width="9pt" viewBox="0 0 9 9" xmlns="http://x">'
    body = '<metadata>\n<a href="http://y"/></metadata><defs><style type="text/css">*{x:y}</style></defs><g id="g"/>'
    use = '<path id="p1" style="fill: #0072b2; stroke: #123456"/><use xlink:href="#p1" x="1.23456"/>'
    text = "<text style=\"font: bold 12px 'A', 'B'; fill: #1c2024\">t</text></svg>\n"
    assert inline_svg(start + body + use + text, "fig", 'a "b"') == (
        '<svg class="plot" viewBox="0 0 9 9" role="img" aria-label="a &quot;b&quot;"><g/>'
        '<path id="fig-p1" style="fill: var(--3t); stroke: #123456"/><use href="#fig-p1" x="1.23"/>'
        '<text style="font-size: 12px; font-weight: bold; fill: var(--ink)">t</text></svg>'
    )


def test_palette_can_be_recognised_by_value() -> None:
    light = [shades[0] for shades in PALETTE.values()]
    assert len(set(light)) == len(light) and "#000000" not in light  # matplotlib leaves plain black unwritten


if __name__ == "__main__":  # python tests/test_report.py FOLDER: pages to look at
    for kind, make in (("full", make_compare), ("bare", make_bare)):
        print(write_report(Path(sys.argv[1]) / kind) if make(Path(sys.argv[1]) / kind) else "")


@pytest.mark.parametrize(
    ("changes", "seeds", "said"),
    [
        ({}, (0, 1, 2), ""),
        ({}, (0,), "To try next: more seeds (--seeds 0 1 2), so that differences can be told from chance."),
        (
            {"claims": "undecided"},
            (0, 1, 2),
            "To try next: more seeds: some differences are still undecided.",
        ),
        (
            {"settings": {"steps": 10, "batch_size": 8, "num_train": 1000}},
            (0, 1, 2),
            "To try next: longer runs, as said",
        ),
        ({"few": True}, (0, 1, 2), "starts at the pretrained weights (--methods 3t-main-warm)"),
    ],
)
def test_the_last_line_says_what_to_try_next(
    changes: dict[str, Any], seeds: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    compare = make_compare(tmp_path, seeds=seeds) | {"claims": [], "thirds": []}
    compare["settings"] = {**compare["settings"], **changes.get("settings", {})}
    if "claims" in changes:
        compare["claims"] = [{"verdict": "not shown", "p": 0.3, "tests": []}]
    if "few" in changes:
        compare["thirds"] = [{"name": "x", "image": {"size": 32}}]
    found = next_step(compare)
    assert said in found if said else not found
    if said and "claims" not in changes:
        assert text_table(compare).split()[-1] == found.split()[-1]
