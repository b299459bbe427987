"""The report of a study: the page, the Markdown and the lines for the terminal, in every state of a study."""

import json
import math
import random
import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from threetowers.compare import claims as claims_module
from threetowers.errors import DataError
from threetowers.objective.pairs import METHODS
from threetowers.report import study_plots
from threetowers.report.claims import VERDICTS, sentence, title
from threetowers.report.panels import Plot
from threetowers.report.study import CLAIMS, PROTOCOL, SCHEMA, study_text, write_study
from threetowers.report.study_plots import COLUMNS, MAIN_THIRDS, SCORE, TWICE
from threetowers.reproduce import summary as summary_module
from threetowers.reproduce.plan import FULL, OF_CLAIM, QUICK, TUNED_THIRDS, Protocol, Unit, units
from threetowers.reproduce.records import Record
from threetowers.reproduce.summary import summary
from threetowers.world.attributes import ATTRIBUTES

SKILL = {
    "baseline": 0.45,
    "lit": 0.3,
    "lit-unlocked": 0.72,
    "3t": 0.7,
    "3t-main": 0.66,
    "3t-regression": 0.52,
}
SPOILT = {"lit": 0.2, "lit-unlocked": 0.2, "3t": 0.25, "3t-main": 0.21, "3t-regression": 0.1}
"""What a mismatched third tower costs."""
ALPHAS = [place / 20 for place in range(21)]
MACHINE = {
    "cpu": "some CPU",
    "cores": 2,
    "threads": 1,
    "device": "cpu",
    "python": "3.11.7",
    "torch": "2.10.0",
}
SECTIONS = [
    "claims", "methods", "combination", "attributes", "towers", "growth", "ablations", "budgets", "rates", "protocol",
    "reading",
]  # fmt: skip


def swept(start: float, end: float, bump: float) -> dict[str, Any]:
    test = [start + (end - start) * alpha + 4 * bump * alpha * (1 - alpha) for alpha in ALPHAS]
    place = test.index(max(test))
    return {
        "alphas": ALPHAS, "val": test, "test": test, "alpha": ALPHAS[place], "chosen": test[place],
        "ends": [test[0], test[-1]],
    }  # fmt: skip


def record(unit: Unit, lr: float = 2e-3) -> Record:
    """A plausible record of a unit, the same at each call."""
    draw, third = random.Random(unit.name), METHODS[unit.method].needs_third
    level = SKILL[unit.method] - (SPOILT.get(unit.method, 0) if unit.third == "mismatched" else 0)
    level += 0.02 * math.log2(unit.steps / 500) + draw.gauss(0, 0.01) - 0.03 * (unit.part == "ablations")
    if unit.part == "growth":
        level += 0.02 * math.log2(unit.num_train / 625) * (unit.method == "3t") - 0.2
    fields = ("part", "label", "method", "third", "seed", "steps", "num_train", "size")
    settings = {name: getattr(unit, name) for name in fields} | {"lr": lr}
    if unit.part == "tuning":
        score = level - 0.05 * abs(math.log2(lr / 2e-3))
        return Record(settings, {"val/mean_r@1": score}, described={"machine": MACHINE})
    metrics = {
        "retrieval/mean_r@1": level, "retrieval/i2t_r@1": level + 0.01, "retrieval/t2i_r@1": level - 0.01,
        "zero_shot/top1": level / 2,
    }  # fmt: skip
    metrics |= {
        f"{task}/{name}": 0.6 + draw.gauss(0, 0.02) for task in ("attribute", "probe") for name in ATTRIBUTES
    }
    combination, checks = None, {}
    if METHODS[unit.method].is_3t:
        combination = swept(level, 0.3, 0.14 if unit.third == "matched" else 0.0)
        metrics |= {
            "combination/mean_r@1": combination["chosen"],
            "third/mean_r@1": 0.3 + draw.gauss(0, 0.01),
        }
        checks = {"ends": True, "identical": True, "untouched": True}
    wide = {"": 420_000, "small": 90_000, "medium": 310_000, "large": 1_130_000}[unit.size]
    described = {
        "seconds": 30 + 60 * draw.random(), "scale": 20.0, "num_trainable": wide - third, "num_main": wide,
        "machine": MACHINE,
    }  # fmt: skip
    control = swept(0.45, 0.3, 0.08) if unit.part == "main" and unit.label == "lit" else None
    return Record(settings, metrics, combination, control, checks=checks, described=described)


def records(protocol: Protocol) -> dict[str, Record]:
    """The records of a whole study."""
    found = {
        unit.name: record(unit, unit.lr or 2e-3) for part in protocol.parts for unit in units(protocol, part)
    }
    for third in protocol.thirds:
        for seed in protocol.seeds:
            settings = {"part": "towers", "label": third, "third": third, "seed": seed, "steps": 1000}
            metrics = {"own/top1": 0.9 + seed % 5 / 100} | {
                f"probe/{name}": 0.8 + seed % 5 / 50 for name in ATTRIBUTES
            }
            found[f"towers-{third}-seed{seed}"] = Record(settings, metrics)
    return dict(sorted(found.items()))


@cache
def whole(protocol: Protocol) -> str:
    """study.json of a whole study."""
    return json.dumps(summary(protocol, records(protocol)))


def make_study(protocol: Protocol = FULL, made: dict[str, Record] | None = None) -> dict[str, Any]:
    """study.json as it is read again. made: the records that there are; None is all."""
    text = whole(protocol) if made is None else json.dumps(summary(protocol, made))
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are set up, and neither rendered nor saved, which takes most of the time of a page."""
    monkeypatch.setattr(
        study_plots, "finish", lambda figure, name, description: Plot(name, "<svg></svg>", b"")
    )


def written(folder: Path, study: dict[str, Any]) -> tuple[str, str]:
    """The page and the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(study), encoding="utf-8")
    page = write_study(folder, folder / "docs" / "claims.md")
    assert page == folder / "report.html"
    return page.read_text(encoding="utf-8"), (folder / "docs" / "claims.md").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """The elements of a page, its sections, and its text by line."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sections: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "section":
            self.sections.append(dict(attrs)["id"] or "")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def cells_of(markdown: str) -> list[list[list[str]]]:
    """The tables of a document, each as rows of cells."""
    blocks = [block for block in markdown.split("\n\n") if block.startswith("|")]
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()] for block in blocks]


def test_what_the_report_names_is_what_the_study_names() -> None:
    assert SCHEMA == summary_module.SCHEMA and SCORE == summary_module.SCORE and TWICE == claims_module.TWICE
    assert tuple(COLUMNS) == summary_module.COLUMNS and MAIN_THIRDS == TUNED_THIRDS
    assert asdict(FULL).keys() <= PROTOCOL.keys() and OF_CLAIM.keys() == CLAIMS.keys()


def test_a_whole_study_has_every_section_claim_and_figure(tmp_path: Path) -> None:
    study = make_study()
    assert {claim["verdict"] for claim in study["claims"]} == {*VERDICTS} - {"not tested"}
    page, markdown = written(tmp_path, study)
    read = Reader(page)
    assert read.sections == SECTIONS
    for claim in study["claims"]:
        assert title(claim) in read.texts and title(claim) in markdown
        place = read.texts.index(title(claim))
        assert read.texts[place - 1] == claim["verdict"], "the verdict stands beside the claim"
    assert markdown.count("| **not held** |") == sum(c["verdict"] == "not held" for c in study["claims"])
    (form,) = (row for row in study["methods"] if (row["label"], row["third"]) == ("3t", "matched"))
    score = form["metrics"]["retrieval/mean_r@1"]
    mean, low, high = (f"{100 * score[name]:.1f}" for name in ("mean", "low", "high"))
    assert f"{low}–{high}" in read.texts and f"| 3T (matched) | {mean} ({low}–{high}) |" in markdown
    gap = study["growth"][0]["gap"]
    assert f"{100 * gap['low']:.1f} to {100 * gap['high']:.1f}" in read.texts
    assert re.search(
        r"\| LiT \(mismatched\), 2,000 steps \| \d+\.\d \([\d.]+–[\d.]+\) \| −\d+\.\d \(−", markdown
    )
    assert page.count("<table>") == page.count('class="scroll"'), (
        "a wide table scrolls in a container of its own"
    )
    assert "svg" in read.tags and {"script", "link", "img"}.isdisjoint(read.tags) and "http" not in markdown
    assert "The study is complete, with 462 runs." in markdown
    for rows in cells_of(markdown):
        assert len(rows) > 2 and len({len(row) for row in rows}) == 1


def test_the_best_of_a_column_is_a_method_of_as_many_steps(undrawn: None, tmp_path: Path) -> None:
    _, markdown = written(tmp_path, make_study())
    means = {row[0].strip(): row[1].strip() for row in cells_of(markdown)[1][2:]}
    twice, unlocked = means["3T, twice the steps (matched)"], means["LiT unlocked (matched)"]
    assert twice > unlocked.strip("*") and [name for name in means if "**" in means[name]] == [
        "LiT unlocked (matched)"
    ]


def test_sections_without_content_are_left_out(undrawn: None, tmp_path: Path) -> None:
    page, markdown = written(tmp_path / "quick", make_study(QUICK))
    gone = {"growth", "ablations", "budgets", "rates"}
    assert Reader(page).sections == [name for name in SECTIONS if name not in gone]
    assert re.findall("^## (.*)", markdown, re.MULTILINE) == [
        "Claims", "Methods", "Zero-shot accuracy by attribute, percent", "Machines",
    ]  # fmt: skip
    for study in ({"schema": SCHEMA}, make_study(FULL, {})):
        page, markdown = written(tmp_path / "empty", study)
        assert Reader(page).sections == ["protocol", "reading"] and "## " not in markdown
        assert "No claim is judged" in page and "No claim is judged" in markdown


@pytest.mark.parametrize("name", sorted(summary(FULL, {}).keys() - {"schema"}))
def test_any_part_of_a_study_may_be_missing(undrawn: None, tmp_path: Path, name: str) -> None:
    study = make_study()
    del study[name]
    page, _ = written(tmp_path, study)
    assert Reader(page).sections[-1] == "reading" and study_text(study)


def test_an_unfinished_study_says_what_is_missing(undrawn: None, tmp_path: Path) -> None:
    made = {
        name: each for name, each in records(FULL).items() if name.startswith(("tuning", "main", "towers"))
    }
    del made["main-3t-rich-seed105"]
    page, markdown = written(tmp_path, make_study(FULL, made))
    said = (
        "The study is not finished: there are 109 of 110 runs of main, 0 of 180 runs of growth, 0 of 63 runs of "
        "ablations and 0 of 24 runs of budgets."
    )
    assert said in page and said in markdown
    assert "Percent: mean over 4 to 5 seeds" in page and "growth" not in Reader(page).sections


def test_one_seed_has_no_interval(undrawn: None, tmp_path: Path) -> None:
    page, markdown = written(tmp_path, make_study(replace(FULL, seeds=(101,), few_seeds=(101,))))
    assert "<small>" not in page and not re.search(r"\d–\d|\d to \d", markdown)
    assert "One seed, so there is no interval and no test." in page and "Percent, one seed." in page
    assert "claims" not in Reader(page).sections


def test_names_from_outside_are_text(tmp_path: Path) -> None:
    study = make_study(replace(QUICK, thirds=("matched", "mismatched", "rich")))
    study |= {
        "title": "a <script> & more",
        "machines": [{"cpu": "one | two <i>", "cores": 2}],
        "diverged": ["<u>"],
    }
    for row in (
        *study["methods"],
        *study["sweeps"],
        *study["attributes"],
        *study["growth"],
        *study["claims"],
    ):
        row["third"] = "<b>" if row["third"] in ("rich", "matched") else row["third"]
    for row in study["towers"]:
        row["name"] = "<b>" if row["name"] == "rich" else row["name"]
    page, markdown = written(tmp_path, study)
    assert {"script", "b", "i", "u"}.isdisjoint(Reader(page).tags)
    assert "LiT (&lt;b&gt;)" in page and "C1 &lt;b>: 3T is above" in markdown
    assert not re.search(r"<\w", markdown) and "# a &lt;script> & more" in markdown
    assert r"| one \| two &lt;i> | 2 |" in markdown


def test_the_same_study_gives_the_same_bytes(tmp_path: Path) -> None:
    study = make_study(QUICK)
    assert written(tmp_path / "a", study) == written(tmp_path / "b", study)


def test_edges_and_diverged_runs_are_named(undrawn: None, tmp_path: Path) -> None:
    study = make_study() | {"open_edges": [0.016, 0.00025], "diverged": ["tuning-3t-matched-seed0-lr0.016"]}
    study["learning_rates"][0]["on_edge"] = True
    page, markdown = written(tmp_path, study)
    assert (
        "Still to be tried: 0.016 and 0.00025." in page
        and "Still to be tried: 0.016 and 0.00025." in markdown
    )
    assert markdown.count(" | yes | ") == 1 and "<dd>tuning-3t-matched-seed0-lr0.016</dd>" in page


def test_the_terminal_reads_progress_and_every_claim() -> None:
    study = make_study()
    text = study_text(study)
    assert max(map(len, text.splitlines())) <= 100
    flat = " ".join(text.split())
    assert "growth: 180 of 180 runs" in flat and flat.endswith("are not shown.")
    assert all(" ".join(sentence(claim).split()) in flat for claim in study["claims"])


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"schema": 0}', b"\xff"])
def test_a_study_that_cannot_be_read_is_named_with_a_remedy(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "study.json").write_bytes(content)
    with pytest.raises(DataError, match=r"study\.json: .*\. Run `threetowers reproduce` again"):
        write_study(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_report_of_a_study_never_imports_torch() -> None:
    program = "import sys, threetowers.report.study\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
