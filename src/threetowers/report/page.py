"""The report of a compare folder: one offline page, `report.html`, and its figures as PNG and CSV files.

The page needs no network, no script and no other file. Captions, labels and class names come from outside: they reach
the page through `tag` and `join` only, which escape everything that is not markup.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from threetowers.files import write_whole
from threetowers.progress import duration
from threetowers.report.claims import VERDICTS, certainty_in_words, counted, evidence, glance, title, untested
from threetowers.report.connections import connections
from threetowers.report.examples import examples, more, pictures, world
from threetowers.report.order import headline, how_sure
from threetowers.report.panels import PALETTE, Plot
from threetowers.report.plots import average, draw_plots, measured_once
from threetowers.report.settings import reading, settings, thirds
from threetowers.report.story import next_step, story
from threetowers.report.suite import suite
from threetowers.report.tables import (
    Compare,
    Curves,
    Html,
    Key,
    cells,
    csv_tables,
    csv_text,
    definitions,
    finite,
    html_table,
    interval_note,
    join,
    label,
    metric_name,
    num_seeds,
    percent,
    primary,
    ranking,
    read_compare,
    read_curves,
    result_table,
    row_key,
    tag,
)

BUILT_IN = "shapes"
"""The `data` of comparisons on the built-in world."""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(folder: Path) -> Path:
    """Writes report.html, figures/*.png and tables/*.csv into a compare folder; returns the page's path.

    The same folder always gives the same bytes. Raises DataError when compare.json is missing or cannot be used.
    """
    compare = read_compare(folder)
    curves, problems = read_curves(folder, compare)
    plots = draw_plots(compare, curves)
    for name, text in (csv_tables(compare) | _curve_table(curves)).items():
        _write(folder / "tables" / name, text)
    for plot in (plot for group in plots.values() for plot in group):
        _write(folder / "figures" / f"{plot.name}.png", plot.png)
    page = folder / "report.html"
    _write(page, page_html(folder, compare, plots, problems, measured_once(compare, curves)))
    return page


def _curve_table(curves: Curves) -> dict[str, str]:
    rows = [
        {
            "method": method,
            "third": third,
            "metric": metric,
            "step": step,
            "mean": y,
            "low": low,
            "high": high,
        }
        for (method, third), metrics in curves.items()
        for metric, lines in metrics.items()
        for step, y, low, high in zip(*average(lines), strict=True)
    ]
    return {"curves.csv": csv_text(rows)} if rows else {}


def page_html(
    folder: Path, compare: Compare, plots: dict[str, list[Plot]], problems: list[str], once: str = ""
) -> str:
    """The whole page; sections without content are left out, together with their links.

    On the built-in world, for which the paper's claims were written as an experiment, the page is about the claims. On
    other data it answers which method is best there, and the claims come after that, folded. once: what was logged at
    one step alone, in words.
    """
    image, own_data = pictures(folder), compare.get("data") != BUILT_IN
    towers = ("towers", "What each method connects", connections(compare))
    results = ("results", "Results", _results(compare))
    sure = ("sure", "How sure the order is", how_sure(compare))
    if own_data:
        title, opening = "The claims of the paper", _opening(compare, plots["primary"])
        folded = _folded_claims(compare)
        first = [
            results,
            sure,
            ("next", "What to try next", _next(compare)),
            ("claims", title, folded),
            towers,
        ]
    else:
        opening = _opening_by_claims(compare, plots["primary"])
        first = [towers, results, sure, ("claims", "Tests of the claims", _claims(compare))]
    sections = [
        *first,
        ("combination", "Using the third tower after training", _combination(compare, plots["combination"])),
        ("training", "Training", training(compare, plots, problems, once)),
        ("examples", "Retrieval examples", examples(compare, image)),
        ("classes", "Zero-shot accuracy by class", _classes(compare, plots["classes"])),
        ("attributes", "What each method knows of the world", _attributes(compare)),
        ("suite", "Further data and tasks", suite(compare)),
        ("cost", "Cost and quality", _cost(compare, plots["cost"])),
        ("data", "Examples from the training data", world(compare, image)),
        ("thirds", "The third towers", thirds(compare)),
        ("settings", "Settings and machine", settings(compare)),
        ("reading", "How to read this page", reading(compare)),
    ]
    return document(str(compare.get("title", "Comparison")), opening, sections)


def document(title: str, opening: Html, sections: Sequence[tuple[str, str, Html | None]]) -> str:
    """A page that stands alone: the opening, links to the sections, and the sections as (id, heading, content)."""
    shown = [(name, heading, body) for name, heading, body in sections if body]
    links = join(*(tag("a", heading, href=f"#{name}") for name, heading, _ in shown))
    body = join(*(tag("section", tag("h2", heading), body, id=name) for name, heading, body in shown))
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", _css()),
    )
    main = tag("main", opening, tag("nav", links, aria_label="Sections"), body)
    return Html(f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{main}</body></html>\n')


def _css() -> Html:
    light, dark = ("".join(f"--{name}: {shades[i]}; " for name, shades in PALETTE.items()) for i in (0, 1))
    variables = (
        f":root {{ {light}}}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n"
    )
    return Html(variables + Path(__file__).with_name("style.css").read_text(encoding="utf-8"))


def plot_panels(plots: Iterable[Plot]) -> Html | None:
    """Plots beside or below each other; None without any."""
    figures = [tag("figure", Html(plot.svg)) for plot in plots]
    return tag("div", *figures, class_="panels") if figures else None


def _opening(compare: Compare, plots: list[Plot]) -> Html:
    """The title, the headline and its certainty, the plot of the primary metric, and beside it the story."""
    note = tag("figcaption", f"{metric_name(primary(compare))}, {interval_note(compare)}.")
    figures = [tag("figure", Html(plot.svg), note) for plot in plots]
    texts = [tag("p", text) for text in story(compare)]
    beside = tag("div", *figures, tag("div", *texts) if texts else None, class_="panels beside")
    return join(*_first_words(compare), beside if figures or texts else None)


def _first_words(compare: Compare) -> list[Html]:
    """The title, the headline and its certainty."""
    what, how_certain = headline(compare)
    return [
        tag("h1", str(compare.get("title", "Comparison"))),
        tag("p", what, class_="headline"),
        tag("p", how_certain, class_="certainty"),
    ]


def _opening_by_claims(compare: Compare, plots: list[Plot]) -> Html:
    """The title, the headline and its certainty, the story, the plot of the primary metric and a list of the claims."""
    rows = [
        tag("li", state(verdict), tag("span", text)) for verdict, text in glance(compare.get("claims", []))
    ]
    claims = tag("div", tag("h3", "Claims"), tag("ul", *rows, class_="glance")) if rows else None
    note = tag("figcaption", f"{metric_name(primary(compare))}, {interval_note(compare)}.")
    figures = [tag("figure", tag("h3", "Which method wins"), Html(plot.svg), note) for plot in plots]
    return join(
        *_first_words(compare),
        *(tag("p", text) for text in story(compare)),
        tag("div", *figures, claims, class_="panels beside"),
        tag("p", step, class_="certainty") if (step := next_step(compare)) else None,
    )


def _next(compare: Compare) -> Html | None:
    step = next_step(compare).partition(": ")[2]
    return tag("p", step[0].upper() + step[1:]) if step else None


def _results(compare: Compare) -> Html | None:
    if not any(cells(compare).values()):
        return None
    note = f"Percent: {interval_note(compare)}. ★ and bold type mark the best of each column."
    note += " A name in small type is what the command line has for the method, and begins the folders of its runs."
    if any("combination/mean_r@1" in row for row in cells(compare).values()):
        note += " The combined score needs the third tower at inference; its α was chosen on validation data."
    return join(result_table(compare), tag("p", note, class_="muted"))


def state(verdict: str, words: str = "") -> Html:
    """A verdict with its symbol, in other words where some are given."""
    symbol, kind = VERDICTS[verdict]
    mark = tag("span", symbol, class_="symbol", aria_hidden="true")
    return tag("span", mark, words or verdict, class_=f"state {kind}")


def claim_item(claim: dict[str, Any]) -> Html:
    """A claim with its verdict, its differences and its notes, as an entry of a list."""
    details = claim["details"].items() if claim["tests"] else ()
    figures = [*evidence(claim), ("test", certainty_in_words(claim)), *details, ("note", claim["note"])]
    rows = definitions((name, value) for name, value in figures if value)
    return tag("li", state(claim["verdict"]), tag("div", tag("p", title(claim)), rows))


def _claims(compare: Compare, *, all_of_them: bool = True) -> Html | None:
    """The claims with their differences; the correction is for all tests of the page together.

    all_of_them: whether those that were not tested are items too, and not a line at the end.
    """
    found = compare.get("claims", [])
    items = [claim_item(claim) for claim in found if all_of_them or claim["verdict"] != "not tested"]
    lacking = "" if all_of_them else untested(found)
    if not items and not lacking:
        return None
    number = sum(claim["p"] is not None for claim in found)
    text = f"p is corrected by Holm's method for the {number} tests of this page." if number else None
    return join(
        tag("p", text, class_="muted") if text else None,
        tag("ul", *items, class_="claims"),
        tag("p", f"Not tested: {lacking}.", class_="muted") if lacking else None,
    )


def _folded_claims(compare: Compare) -> Html | None:
    body = _claims(compare, all_of_them=False)
    return more(counted(compare["claims"]), body) if body else None


def _combination(compare: Compare, plots: list[Plot]) -> Html | None:
    if not plots:
        return None
    text = (
        "After training, 3T needs only its image and text towers. Where the third tower can also run at inference, the "
        "two scores can be combined: α = 0 is the main pair alone, α = 1 is the third tower read through the text "
        "tower's head. α is chosen on validation data. The curves show test data, and thin lines are single seeds."
    )
    controls = [bool(curve.get("control")) for curve in compare["combination"]]
    control = (
        "The dashed control combines two independently trained systems, a baseline and a LiT, in the same way: "
        "its gain is that of plain ensembling."
        if all(controls)
        else "Not every curve has a control, a baseline and a LiT combined in the same way. Without one, a gain cannot "
        "be told apart from plain ensembling."
    )
    return join(tag("p", text), tag("p", control), plot_panels(plots))


def training(
    compare: Compare, plots: dict[str, list[Plot]], problems: list[str], once: str = ""
) -> Html | None:
    """The curves of validation and loss, and what could not be read of them; None when there is neither.

    once: what was logged at one step alone, in words.
    """
    if not any((plots["validation"], plots["loss"], problems, once)):
        return None
    several = "Lines are means over seeds; bands span the lowest to the highest seed."
    text = several if num_seeds(compare) > 1 else "One seed."
    rows = (
        "Each row of an objective has its own loss. Contrastive losses are in nats, regression losses are distances: "
        "the two cannot be compared."
    )
    loss = join(tag("h3", "Loss by row"), tag("p", rows, class_="muted"), plot_panels(plots["loss"]))
    return join(
        tag("p", text, class_="muted"),
        tag("p", once) if once else None,
        plot_panels(plots["validation"]),
        loss if plots["loss"] else None,
        *(tag("p", f"Not shown: {problem}.") for problem in problems),
    )


def _classes(compare: Compare, plots: list[Plot]) -> Html | None:
    if not plots:
        return None
    rows = compare["per_class"]
    keys = [key for key in ranking(compare) if any(row_key(r) == key for r in rows)]
    values = {(row_key(r), r["class"]): finite(r["value"]) for r in rows}
    names = sorted({r["class"] for r in rows})
    table = html_table(
        ["class", *(label(compare, key) for key in keys)],
        [[name, *(percent(values.get((key, name))) for key in keys)] for name in names],
    )
    return join(plot_panels(plots), more(f"All {len(names)} classes, in percent", table))


def _attributes(compare: Compare) -> Html | None:
    """Zero-shot accuracy of the built-in world's attributes, a column each; the best of each is bold."""
    values = {(row_key(row), row["attribute"]): finite(row["value"]) for row in compare.get("attributes", [])}
    if not values:
        return None
    names = list(dict.fromkeys(name for _, name in values))
    best = {name: max(value or 0.0 for (_, each), value in values.items() if each == name) for name in names}

    def cell(key: Key, name: str) -> str:
        value = values.get((key, name))
        return tag("b", percent(value)) if value == best[name] else percent(value)

    keys = [key for key in ranking(compare) if any(key == known for known, _ in values)]
    rows = [[label(compare, key), *(cell(key, name) for name in names)] for key in keys]
    text = (
        "Zero-shot accuracy in percent, with each attribute as a class set of its own, of one seed. The image "
        "tower of LiT is the third tower, and gives what that one sees. Other methods can learn the rest from captions."
    )
    return join(tag("p", text, class_="muted"), html_table(["method", *names], rows))


def _cost(compare: Compare, plots: list[Plot]) -> Html:
    columns = {
        "trained parameters": "trainable_params",
        "parameters at inference": "inference_params",
        "training time": "train_seconds",
        "training examples/s": "examples_per_second",
        "inference images/s": "inference_images_per_second",
        "third tower at inference": "third_at_inference",
    }

    def shown(field: str, value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        number = finite(value)
        if number is None:
            return "–"
        return duration(number) if field == "train_seconds" else f"{number:,.0f}"

    methods = {row_key(m): m for m in compare["methods"]}
    rows = [
        [label(compare, key), *(shown(field, methods[key].get(field)) for field in columns.values())]
        for key in ranking(compare)
        if key in methods
    ]
    return join(plot_panels(plots), html_table(["method", *columns], rows))


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    write_whole(path, content)
