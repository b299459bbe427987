"""The page of an analysis of towers: `analysis.html`, out of analysis.json and the pictures that it names.

The page needs no network, no script and no other file, and the same analysis.json gives the same bytes.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from threetowers.files import write_whole
from threetowers.objective.pairs import METHODS
from threetowers.report.analysis_plots import (
    ANSWERED,
    DIRECTIONS,
    MEASURES,
    PAIRS,
    Analysis,
    Row,
    answers,
    class_plot,
    curves,
    disagreement,
    gains,
    maps,
    num_queries,
    of_tower,
    run_matrices,
    similarity_of_methods,
    titles,
    view_matrices,
    with_tower,
)
from threetowers.report.examples import Picture, more, pictures
from threetowers.report.page import document, plot_panels
from threetowers.report.panels import Plot, drawing
from threetowers.report.tables import Html, definitions, finite, html_table, join, percent, read_json, tag

SCHEMA = 1
PAGE = "analysis.html"
_STEPS = "At the checkpoints that the runs have kept. Step 0 is before training."
_RUNS = (
    "How alike the towers of every two runs are, and how alike the errors of their main pairs in retrieval."
)
_TERMS = {
    "img, txt": "The image tower and the text tower of the main pair.",
    "third, third_NAME": "A frozen tower's own features, without a head.",
    "a@b": "The head of tower a that faces tower b.",
    "CKA": "Centred kernel alignment: how alike two representations arrange the same samples, from 0, not at all, to "
    "1, equal up to rotation and scale. It is shown in its debiased form, which is 0 on average for independent "
    "features, whatever the number of samples. Directions of large variance decide it. analysis.json also has the "
    "plain form, as `cka_linear`.",
    "shared neighbours": "Share of a sample's nearest neighbours in one representation that are among its nearest "
    "neighbours in the other. It is about what lies close by, and CKA is about all distances.",
    "effective rank": "How many directions a representation uses about its mean: the exponential of the entropy of its "
    "singular values.",
    "uniformity": "How evenly unit vectors lie on the sphere; lower is more even.",
    "alignment": "Mean squared distance of the partners in a row of the objective; lower is closer.",
    "modality gap": "Distance between the mean of the images and the mean of the texts in their common space.",
    "separability": "Accuracy of a linear map that tells images from texts; 50 % is chance.",
    "κ of the errors": "Error consistency: how much more often two systems are right and wrong together than "
    "independent systems of the same accuracies. 1: the same mistakes. 0: as independent. Below 0: each is right where "
    "the other is wrong.",
    "rescued": "Share of the main pair's misses that the frozen tower, read through the heads, answers right.",
    "either": "Share of queries that at least one of the two answers right. Choosing one of the two answers cannot be "
    "better. A sum of scores can, since it can find what neither system finds alone.",
    "95 % intervals": "Over runs they are Student's t-intervals. Over queries they are bootstraps that draw images "
    "with all their queries, and do not include the variation between training runs.",
}


def write_analysis(out: Path) -> Path:
    """Writes analysis.html beside analysis.json; returns the page's path.

    Raises DataError when analysis.json is missing, damaged or of another schema.
    """
    page = out / PAGE
    write_whole(page, analysis_html(read_analysis(out), pictures(out)))
    return page


def read_analysis(out: Path) -> Analysis:
    """The contents of a folder's analysis.json, in the order of the methods; raises DataError as `write_analysis`."""
    again = "Run `threetowers analyse` again, or name the folder that it wrote"
    analysis = read_json(out / "analysis.json", SCHEMA, again)
    # captions may contain lone surrogates, which cannot be encoded as UTF-8
    clean: Analysis = json.loads(json.dumps(analysis, ensure_ascii=False).encode("utf-8", "replace"))
    order = [str(method) for method in METHODS]
    for rows in (clean["runs"], clean["methods"], clean["prediction"]["points"]):
        rows.sort(key=lambda row: order.index(row["method"]) if row["method"] in order else len(order))
    return clean


def analysis_html(analysis: Analysis, image: Picture) -> str:
    """The whole page; sections without content are left out, together with their links."""
    with drawing():
        sections = [
            ("towers", "Do the towers agree", _towers(analysis)),
            ("answers", "Who is right: the main pair or the frozen tower", _answers(analysis)),
            ("gain", "Does disagreement predict the gain of the combination", _gain(analysis)),
            ("examples", "Images that tell them apart", _examples(analysis, image)),
            ("classes", "Who is right, by class", _classes(analysis)),
            ("steps", "Over the steps of training", _plotted(_STEPS, curves(analysis))),
            ("runs", "Between the runs", _plotted(_RUNS, run_matrices(analysis))),
            ("views", "The views of each run", _views(analysis)),
            ("reading", "How to read this page", tag("div", definitions(_TERMS.items()), class_="prose")),
        ]
    return document(str(analysis["title"]), _opening(analysis), sections)


# The opening


def _opening(analysis: Analysis) -> Html:
    what, certainty = headline(analysis)
    compared, of = analysis["num_pairs"], analysis["num_images"]
    count = f"{compared:,}" if compared == of else f"{compared:,} of {of:,}"
    repeated = finite(analysis["runs"][0].get("repeated_captions"))
    note = f"Measured on {count} test images, each with its first caption."
    if repeated:
        note += f" {percent(repeated)} % of the captions are equal to a caption of another image."
    return join(
        tag("h1", str(analysis["title"])),
        tag("p", what, class_="headline"),
        tag("p", certainty, class_="certainty") if certainty else None,
        tag("p", note, class_="muted"),
    )


def headline(analysis: Analysis) -> tuple[str, str]:
    """How alike the towers are, and how certain that is: two texts.

    3T, or the first of its forms, stands beside the baseline and LiT with the same frozen tower.
    """
    rows = [row for row in analysis["methods"] if row["metric"] == "cka"]
    forms = [
        row for row in rows if any(row["method"] == name and entry.is_3t for name, entry in METHODS.items())
    ]
    found = next((row for row in forms if row["method"] == "3t"), next(iter([*forms, *rows]), None))
    if found is None:
        return "The towers give all images the same features, so there is nothing to compare.", ""
    same = [row for row in rows if row["reference"] == found["reference"]]

    def said(pair: str) -> str:
        own = {found["label"]: found["label"], "baseline": "the baseline", "lit": "LiT"}
        named = {
            own.get(row["label"]) or own.get(row["method"]): row
            for row in reversed(same)
            if row["pair"] == pair
        }
        figures = (
            f"{named[name]['mean']:.2f} in {name}" for name in dict.fromkeys(own.values()) if name in named
        )
        return f"CKA of {PAIRS[pair][0]}: {', '.join(figures)}."

    fewest = min(row["num"] for row in same)
    runs = f"Means over {fewest} runs or more." if fewest > 1 else (
        "There are methods with one run only, so the variation between training runs is not known."
    )  # fmt: skip
    return said("img-txt"), f"{said('img-reference')} {runs}" if found["reference"] else runs


# The sections


def _towers(analysis: Analysis) -> Html:
    groups: dict[tuple[str, str | None], dict[tuple[str, str], Row]] = {}
    for row in analysis["methods"]:
        groups.setdefault((row["label"], row["reference"]), {})[row["pair"], row["metric"]] = row
    rows = [
        [
            label,
            reference or "–",
            str(max(row["num"] for row in cells.values())),
            *(_cell(cells, p) for p in PAIRS),
        ]
        for (label, reference), cells in groups.items()
    ]
    chance = analysis["neighbours"] / max(analysis["num_pairs"] - 1, 1)
    text = (
        "How alike the towers arrange the same images and captions. A run is compared with its own frozen tower, and a "
        "run without one with those of all runs. The image tower of LiT is a linear map of the frozen tower, so these "
        "two are alike by construction."
    )
    note = (
        f"CKA, and below it the share of the {analysis['neighbours']} nearest neighbours that are shared (chance: "
        f"{percent(chance)} %). Where there are several runs, these are means with 95 % intervals."
    )
    table = html_table(["method", "frozen tower", "runs", *(name for name, *_ in PAIRS.values())], rows)
    return join(tag("p", text), plot_panels(similarity_of_methods(analysis)), table, _note(note))


def _cell(cells: dict[tuple[str, str], Row], pair: str) -> Html:
    cka, overlap = cells.get((pair, "cka")), cells.get((pair, "overlap"))
    if cka is None and overlap is None:
        return tag("span", "–", class_="muted")
    shared = tag("small", f"{percent(overlap['mean'])} % shared") if overlap else None
    return join(_interval(cka, 1, ".2f"), shared)


def _answers(analysis: Analysis) -> Html | None:
    called = titles(analysis)
    rows = [
        (with_tower(called[run["name"]], run, row["tower"]), row)
        for run in analysis["runs"]
        for row in run["agreement"]
    ]
    if not rows:
        return None
    text = (
        "The frozen tower is read through the heads that face it, as a second retrieval system of the same run. Where "
        "the two make different mistakes, a combination can gain. It costs the frozen tower's forward pass at "
        "inference; its α was chosen on validation data."
    )
    columns = "run", "direction", "main pair", "frozen tower", "either", "combined", "gain, points"
    table = html_table(
        [*columns, "κ of the errors", "rescued"], [[name, *_answer_cells(row)] for name, row in rows]
    )
    most = max(
        ((name, row) for name, row in rows if row.get("kept", {}).get("neither")),
        key=lambda found: float(found[1]["kept"]["neither"] / found[1]["neither"]),
        default=None,
    )
    found = most and (
        f"A combination can find what neither finds alone: {most[1]['kept']['neither']:,} of {most[1]['neither']:,} "
        f"such queries in {most[0]}, {DIRECTIONS[most[1]['direction']]}."
    )
    return join(
        tag("p", text), plot_panels(answers(analysis)), table,
        _note("Percent, with 95 % bootstrap intervals over images."), tag("p", found) if found else None,
    )  # fmt: skip


def _answer_cells(row: Row) -> list[str]:
    accuracy, alpha = row["accuracy"], finite(row.get("alpha"))
    return [
        DIRECTIONS[row["direction"]],
        *(percent(accuracy[name]) for name in ("first", "second", "either")),
        join(
            percent(finite(accuracy.get("combined"))),
            None if alpha is None else tag("small", f"α = {alpha:.2f}"),
        ),
        _interval(row.get("gain"), 100, "+.1f"),
        _interval(row["kappa"], 1, ".2f"),
        _interval(row["rescued"], 100, ".1f"),
    ]


def _gain(analysis: Analysis) -> Html | None:
    prediction, called = analysis["prediction"], titles(analysis)
    points, least = prediction["points"], prediction["least"]
    if not points:
        return None
    runs = {run["name"]: run for run in analysis["runs"]}
    rows = [
        [with_tower(called[point["run"]], runs[point["run"]], point["tower"]),
         *(_number(disagreement(point, measure), ".2f") for measure in MEASURES),
         _interval(point["gain"], 100, "+.1f"), _number(100 * point["gain_over_better"], "+.1f")]
        for point in points
    ]  # fmt: skip
    table = html_table(
        ["run", *MEASURES, "gain over the main pair, points", "gain over the better one, points"], rows
    )
    count = f"{len(points)} runs with a frozen tower" if len(points) > 1 else "one run with a frozen tower"
    if len(points) < least:
        text = f"There is nothing to say about a correlation yet: {count}, and at least {least} are needed."
        return join(tag("p", text), table)
    text = (
        f"A point is a run with a frozen tower; there are {len(points)}. A correlation over few runs is uncertain, as "
        "its interval shows. Runs with the same frozen tower are not independent of each other, and the intervals are "
        "not corrected for their number."
    )
    found = [
        [MEASURES[row["measure"]], "main pair" if row["gain"] == "gain" else "better one",
         _interval({**row, "mean": row["r"]}, 1, "+.2f"), str(row["num"])]
        for row in prediction["correlations"]
    ]  # fmt: skip
    correlations = html_table(["disagreement", "gain over the", "correlation, 95 % interval", "runs"], found)
    return join(tag("p", text), plot_panels(gains(analysis)), correlations if found else None, table)


def _examples(analysis: Analysis, image: Picture) -> Html | None:
    parts = []
    for run in analysis["runs"]:
        for tower in dict.fromkeys(row["tower"] for row in run["examples"]):
            rows, name = of_tower(run["examples"], tower), titles(analysis)[run["name"]]
            titled = {
                "main": f"The main pair is right, {tower} is not",
                "tower": f"{tower} is right, the main pair is not",
            }
            groups = []
            for right, title in titled.items():
                cards = [_card(row, image) for row in rows if row["right"] == right]
                groups += [tag("h3", title), tag("div", *cards, class_="cards")] if cards else []
            parts.append((with_tower(name, run, tower), join(*groups)))
    text = (
        "Images as queries: the caption that scores highest in each system. Shown are the images whose best right "
        "caption has the highest rank in the system that is wrong."
    )
    return join(_note(text), *_first_open(parts)) if parts else None


def _first_open(parts: Iterable[tuple[str, Html]]) -> list[Html]:
    """The first part under a heading, and the others folded."""
    return [
        more(name, body) if place else join(tag("h3", name), body) for place, (name, body) in enumerate(parts)
    ]


def _card(row: Row, image: Picture) -> Html:
    first, *others = row["captions"] or ["no caption"]
    folded = more(f"{len(others)} more", *(tag("p", f"“{text}”") for text in others)) if others else None
    right = tag("p", tag("span", "right answer: ", class_="muted"), f"“{first}”")
    lines = [tag("div", image(row["image"], first), tag("div", right, folded), class_="query")]
    for system, name in (("main", "main pair"), ("tower", row["tower"])):
        answer, found = row["answers"][system], system == row["right"]
        said = tag("div", f"{'✓ ' if found else ''}“{answer['text']}”", class_="found" if found else "")
        rank = None if found else tag("small", f"right caption at rank {answer['rank']:,}")
        lines.append(tag("div", tag("span", name), tag("div", said, rank), class_="answer"))
    return tag("article", *lines, class_="card")


def _classes(analysis: Analysis) -> Html | None:
    parts = []
    for number, run in enumerate(analysis["runs"]):
        for tower in dict.fromkeys(row["tower"] for row in run["classes"]):
            rows = of_tower(run["classes"], tower)
            counts = [
                [row["class"], str(num_queries(row)), *(str(row[each]) for each in ANSWERED)] for row in rows
            ]
            table = html_table(["class", "images", *(label for label, _ in ANSWERED.values())], counts)
            body = join(
                plot_panels([class_plot(run, tower, number)]), more(f"All {len(rows)} classes", table)
            )
            parts.append((with_tower(titles(analysis)[run["name"]], run, tower), body))
    text = (
        "Zero-shot classification of the labelled images by the main pair, and by the frozen tower read through the "
        "text tower's head."
    )
    return join(_note(text), *_first_open(parts)) if parts else None


def _views(analysis: Analysis) -> Html:
    """Every run's matrices, maps and figures; the run with the most views comes first."""
    parts = []
    for number, run in enumerate(sorted(analysis["runs"], key=lambda run: -len(run["views"]))):
        views = [
            [
                row["view"],
                str(row["width"]),
                _number(row["effective_rank"], ".1f"),
                _number(row["uniformity"], ".2f"),
            ]
            for row in run["views"]
        ]
        rows = [
            [f"{row['a']} and {row['b']}", _number(row["alignment"], ".2f"), _number(row["gap"], ".2f"),
             percent(finite(row["separability"]))]
            for row in run["rows"]
        ]  # fmt: skip
        body = join(
            plot_panels([*view_matrices(run, number), *maps(run, number)]),
            html_table(["view", "width", "effective rank", "uniformity"], views),
            html_table(["row of the objective", "alignment", "modality gap", "separability, %"], rows),
        )
        parts.append((titles(analysis)[run["name"]], body))
    text = (
        "The matrices compare every two views of a run. The maps show the two views of each row of the objective along "
        "the two directions of largest variance, and a line joins an image and its caption."
    )
    return join(_note(text), *_first_open(parts))


# Cells


def _plotted(text: str, plots: list[Plot]) -> Html | None:
    return join(_note(text), plot_panels(plots)) if plots else None


def _note(text: str) -> Html:
    return tag("p", text, class_="muted")


def _number(value: float | None, form: str) -> str:
    """A number with a true minus sign, and without one where it is rounded to 0; – where it is not known."""
    known = finite(value)
    if known is None:
        return "–"
    text = format(known, form)
    return text.replace("-", "−") if float(text) else text.lstrip("+-")


def _interval(found: Row | None, scale: float, form: str) -> Html:
    """A mean, and its interval below it where that is known."""
    if found is None:
        return tag("span", "–", class_="muted")
    mean, *ends = (
        _number(scale * found[name], form) for name in ("mean", "low", "high") if found[name] is not None
    )
    return join(mean, tag("small", " to ".join(ends)) if ends else None)
