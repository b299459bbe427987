"""The report of a study of the claims: an offline page, a Markdown document, and lines for the terminal.

Everything is made from study.json, and the same study.json gives the same bytes.
"""

import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from threetowers.files import write_whole
from threetowers.objective.pairs import method_label
from threetowers.report.claims import TERMS, VERDICTS, sentence
from threetowers.report.examples import more
from threetowers.report.page import claim_item, document, plot_panels, state
from threetowers.report.panels import Plot
from threetowers.report.study_plots import (
    SCORE,
    Study,
    Table,
    attributes_table,
    claims_table,
    differences_table,
    draw_study,
    escaped,
    growth_table,
    machines_table,
    methods_table,
    plain,
    rates_table,
    rows_of,
    towers_table,
)
from threetowers.report.tables import Html, definitions, join, read_json, tag
from threetowers.report.terminal import WIDTH

SCHEMA = 1
CLAIMS = {
    "C1": "3T is above the baseline and LiT in retrieval",
    "C2": "3T is above the baseline in zero-shot classification",
    "C3": "A mismatched third tower harms LiT and does not harm 3T",
    "C4": "3T combined with its third tower is better still",
    "C5": "The gap between 3T and LiT grows with model size and with data",
    "C6": "3T runs without the third tower, and training does not change the third tower",
}
"""What the claims of an id are about."""
# fmt: off
PROTOCOL = {
    "seeds": "seeds", "few_seeds": "seeds of ablations and longer training",
    "tuning_seed": "seed of the learning-rate trials", "own_towers": "third towers of its own for each seed",
    "steps": "training steps", "growth_steps": "training steps of the growth runs",
    "budgets": "training steps of the longer runs", "batch_size": "pairs of a step", "num_train": "training images",
    "num_eval": "validation images, and test images", "data_sizes": "training images of the growth runs",
    "lrs": "learning rates of the grid", "max_extensions": "extensions of the grid on either side",
    "margin": "margin within which a method counts as not worse", "parts": "parts", "methods": "methods",
    "thirds": "third towers", "smoke": "further settings",
}
# fmt: on
"""The fields of the protocol in words."""
_TERMS = {
    "R@1": "Share of queries whose highest-scoring candidate is a right answer. In image → text the query is an image, "
    "in text → image it is a caption. The mean is the average of both directions.",
    "zero-shot top-1": "Share of images that score highest with the name of their own class. The methods are trained "
    "with captions, not with class labels.",
    "interval": "A 95 % t-interval over seeds: how far the mean could move with other seeds. One seed has none.",
    "difference": "Differences are in points, which are hundredths of the metric. They are paired by seed.",
    **TERMS,
    "not tested": "The runs that the claim needs are missing.",
    "third tower": "A frozen pretrained model. 3T and its other forms learn from it, in training alone. LiT has it as "
    "image tower. A mismatched one was trained for another task.",
    "combined": "The third tower also runs at inference: score = (1 − α) · main pair + α · third tower. α is chosen "
    "on validation data.",
    "control": "The scores of a baseline and a LiT that were trained independently, combined in the same way.",
    "probe": "A linear regression from an image tower's features to the classes of an attribute, fitted on validation "
    "images. Its accuracy on test images says what the features contain.",
}


def write_study(folder: Path, docs: Path | None = None) -> Path:
    """Writes report.html beside study.json, and the Markdown where `docs` names a file; returns the page's path.

    Raises DataError when study.json is missing or cannot be used.
    """
    study = read_study(folder)
    page = folder / "report.html"
    write_whole(page, study_html(study))
    if docs is not None:
        docs.parent.mkdir(parents=True, exist_ok=True)
        write_whole(docs, study_markdown(study))
    return page


def read_study(folder: Path) -> Study:
    """The contents of a folder's study.json; raises DataError when it is missing, damaged or of another schema."""
    again = "Run `threetowers reproduce` again; finished runs are not repeated"
    return read_json(folder / "study.json", SCHEMA, again)


def study_text(study: Study) -> str:
    """How much of each part is done, and every claim in a sentence, for the terminal."""
    progress = [
        f"{row['part']}: {row['done']:,} of {row['total']:,} runs" for row in study.get("progress") or ()
    ]
    claims = [sentence(claim) for claim in study.get("claims") or ()]
    lines = [_name(study), *progress, *claims, _verdicts(study)]
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="    ") for line in lines)


def study_markdown(study: Study) -> str:
    """The tables of the page as Markdown, for docs/claims.md."""
    methods, *others = _parts(study)
    parts = [
        Part(
            "claims", "Claims", claims_table(study), f"Differences are paired by seed. {_correction(study)}"
        ),
        methods,
        Part(
            "attributes", "Zero-shot accuracy by attribute, percent", attributes_table(study, "attribute"), ""
        ),
        *others,
        Part("machines", "Machines", machines_table(study), ""),
    ]
    opening = (
        f"# {escaped(_name(study))}\n\n"
        "`make claims` writes this page from the records in `claims/runs`. [claims/report.html](claims/report.html) "
        "has the same figures with curves, and [protocol.md](protocol.md) says what was fixed before the runs.\n\n"
        f"{_about(study)} {_completeness(study)} {_verdicts(study)}\n"
    )
    return opening + "".join(part.markdown() for part in parts)


def study_html(study: Study) -> str:
    """The whole page; sections without content are left out, together with their links."""
    plots = draw_study(study)
    methods, *others = _parts(study)
    sections = [
        ("claims", "Claims", _claims(study)),
        methods.html(),
        ("combination", "Combination", _combination(study, plots)),
        ("attributes", "What each method keeps and gives up", _attributes(study)),
        ("towers", "Third towers", _towers(study, plots["other methods"])),
        *(part.html(plots.get(part.id, ())) for part in others),
        ("protocol", "Protocol and machines", _protocol(study)),
        ("reading", "How to read", tag("div", definitions(_TERMS.items()), class_="prose")),
    ]
    return document(_name(study), _opening(study, plots["methods"]), sections)


class Part(NamedTuple):
    """A section with one table, of the page and of the Markdown."""

    id: str
    heading: str
    table: Table
    note: str

    def markdown(self) -> str:
        """The section; empty without rows."""
        body = f"\n## {self.heading}\n\n" + (f"{self.note}\n\n" if self.note else "") + self.table.markdown()
        return body if self.table.rows else ""

    def html(self, plots: Iterable[Plot] = ()) -> tuple[str, str, Html | None]:
        """The section as `document` takes it, with plots above the table."""
        body = join(tag("p", self.note, class_="muted"), plot_panels(plots), self.table.html())
        return self.id, self.heading, body if self.table.rows else None


def _parts(study: Study) -> list[Part]:
    """The sections that the page and the Markdown share, the methods first."""
    notes = (
        f"{_means(study)} Bold type marks the best of a column. Methods with twice the steps are not ranked.",
        "Mean R@1 of 3T minus that of LiT, in points, by size of the main towers and number of training images.",
        "3T with one thing changed. Differences are to 3T with the same seeds, in points of mean R@1.",
        "Differences are to the baseline of as many steps with the same seeds, in points of mean R@1.",
        f"Rates tried: with the validation mean R@1 of each, percent. {_edges(study)}".strip(),
    )
    ablations = differences_table(study, "ablations", "3t", "difference to 3T")
    budgets = differences_table(study, "budgets", "baseline", "difference to the baseline")
    return [
        Part("methods", "Methods", methods_table(study), notes[0]),
        Part("growth", "Growth", growth_table(study), notes[1]),
        Part("ablations", "Ablations", ablations, notes[2]),
        Part("budgets", "Longer training", budgets, notes[3]),
        Part("rates", "Learning rates", rates_table(study), notes[4]),
    ]


# What the page, the Markdown and the terminal say


def _name(study: Study) -> str:
    return str(study.get("title", "The claims of Three Towers"))


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _about(study: Study) -> str:
    """What the study is."""
    protocol = study.get("protocol")
    if not protocol:
        return ""
    number, steps = len(protocol["seeds"]), f"{protocol['steps']:,} steps"
    own = "a world and third towers of its own" if protocol.get("own_towers") else "a world of its own"
    seeds = (
        f"{number} seeds, each with {own}."
        if number > 1
        else "One seed, so there is no interval and no test."
    )
    batch = f" of {protocol['batch_size']:,} pairs" if "batch_size" in protocol else ""
    return f"{seeds} A run trains for {steps}{batch} on {protocol['num_train']:,} images where nothing else is said."


def _completeness(study: Study) -> str:
    """Whether all runs are there, and in which parts some are missing."""
    progress = study.get("progress") or ()
    if missing := [row for row in progress if row["done"] < row["total"]]:
        counts = (f"{row['done']:,} of {row['total']:,} runs of {row['part']}" for row in missing)
        return f"The study is not finished: there are {_listed(counts)}."
    return f"The study is complete, with {sum(row['total'] for row in progress):,} runs." if progress else ""


def _verdicts(study: Study) -> str:
    """How many claims have each verdict."""
    claims = study.get("claims") or ()
    if not claims:
        return "No claim is judged before all runs of the main part are there, with at least two seeds of every method."
    found = Counter(claim["verdict"] for claim in claims)
    counts = (
        f"{found[name]} {'is' if found[name] == 1 else 'are'} {name}" for name in VERDICTS if found[name]
    )
    return f"Of {len(claims)} claims, {_listed(counts)}."


def _correction(study: Study) -> str:
    number = sum(claim["p"] is not None for claim in study.get("claims") or ())
    return f"p is corrected by Holm's method for the {number} tests of this page."


def _means(study: Study) -> str:
    """What the figures of the methods are means over."""
    found = {row["metrics"][SCORE]["num"] for row in study.get("methods") or () if SCORE in row["metrics"]}
    low, high = min(found, default=1), max(found, default=1)
    if high == 1:
        return "Percent, one seed."
    return f"Percent: mean over {low if low == high else f'{low} to {high}'} seeds, with the 95 % t-interval."


def _edges(study: Study) -> str:
    """The learning rates by which the grid is still to be extended; empty without any."""
    rates = [f"{lr:g}" for lr in study.get("open_edges") or ()]
    return f"A best rate is on the edge of the grid. Still to be tried: {_listed(rates)}." if rates else ""


# The sections of the page


def _opening(study: Study, plots: Iterable[Plot]) -> Html:
    """The verdicts in a sentence, what the study is, the scores of the methods, and the claims by what they are of."""
    groups: dict[tuple[str, str], Counter[str]] = {}
    for claim in study.get("claims") or ():
        groups.setdefault((claim["id"], claim["third"]), Counter())[claim["verdict"]] += 1
    glance = []
    for (id, third), count in groups.items():
        states = (tag("div", state(name, f"{count[name]} {name}")) for name in VERDICTS if count[name])
        link = tag("a", f"{id} {third}".strip(), href=f"#{id}")
        glance.append(tag("li", tag("div", *states), tag("span", link, f": {CLAIMS.get(id, '')}")))
    figures = [tag("figure", Html(plot.svg)) for plot in plots]
    beside = [
        tag("div", tag("h3", "Retrieval by method and third tower"), *figures) if figures else None,
        tag("div", tag("h3", "Claims"), tag("ul", *glance, class_="glance")) if glance else None,
    ]
    return join(
        tag("h1", _name(study)),
        tag("p", _verdicts(study), class_="headline"),
        tag("p", f"{_about(study)} {_completeness(study)}", class_="certainty"),
        tag("div", *beside, class_="panels beside") if any(beside) else None,
    )


def _claims(study: Study) -> Html | None:
    """Every claim with its differences; the correction is for all tests of the page together."""
    groups: dict[str, list[Html]] = {}
    for claim in study.get("claims") or ():
        groups.setdefault(claim["id"], []).append(claim_item(claim))
    if not groups:
        return None
    return join(
        tag("p", _correction(study), class_="muted"),
        *(
            tag("div", tag("h3", f"{id}: {CLAIMS.get(id, '')}"), tag("ul", *items, class_="claims"), id=id)
            for id, items in groups.items()
        ),
    )


def _combination(study: Study, plots: dict[str, list[Plot]]) -> Html | None:
    rows = [row for row in rows_of(study, "sweeps") if row["label"] != "control"]
    if not rows:
        return None
    text = (
        "Each curve is the mean over seeds, on test data. The dashed control combines a baseline and a LiT that were "
        "trained independently: its gain is that of plain ensembling."
    )
    chosen = [(method_label(row["label"], row["third"]), plain(row["chosen"])) for row in rows]
    others = plot_panels(plots["other combination"])
    return join(
        tag("p", text),
        plot_panels(plots["combination"]),
        more("The other third towers", others) if others else None,
        tag("h3", "α chosen on validation, by seed"),
        definitions(chosen),
    )


def _attributes(study: Study) -> Html | None:
    """What a text can ask for, and what the features contain."""
    zero_shot, probes = (attributes_table(study, task) for task in ("attribute", "probe"))
    if not zero_shot.rows:
        return None
    return join(
        tag("h3", "Zero-shot accuracy by attribute, percent"), zero_shot.html(),
        tag("h3", "Accuracy of a probe of the image tower by attribute, percent"), probes.html(),
    )  # fmt: skip


def _towers(study: Study, plots: Iterable[Plot]) -> Html | None:
    """What each third tower is and knows, and the methods with those that the claims are not about."""
    rows, table = rows_of(study, "towers", "name"), towers_table(study)
    if not rows:
        return None
    said = ((row["name"], f"{row['summary']} Training steps: {row['steps']:,}.") for row in rows)
    return join(definitions(said), table.html() if table.rows else None, plot_panels(plots))


def _protocol(study: Study) -> Html:
    given = dict(study.get("protocol") or {})
    if "margin" in given:
        given["margin"] = f"{100 * given['margin']:g} points"
    numbers = [
        (words, plain(given[key])) for key, words in PROTOCOL.items() if given.get(key) not in (None, [])
    ]
    numbers.append(("runs that diverged", plain(study.get("diverged") or "none")))
    numbers.append(("written on", str(study.get("created", "–"))))
    machines = [
        definitions((key.replace("_", " "), plain(value)) for key, value in machine.items())
        for machine in study.get("machines") or ()
    ]
    beside = join(tag("h3", "Machines"), tag("div", *machines, class_="panels"))
    return join(definitions(numbers), beside if machines else None)
