"""One offline page from a compare folder: `report.html`, with the same figures as PNG and CSV beside it.

The page needs no network, no script and no other file. Captions, labels and class names are foreign text: they reach
the page through `tag` and `join`, which escape whatever is not markup already.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from threetowers.objective.pairs import METHODS, MethodEntry
from threetowers.progress import duration
from threetowers.report.examples import examples, more, pictures, world
from threetowers.report.plots import PALETTE, Plot, average, draw_plots
from threetowers.report.tables import (
    Compare,
    Curves,
    Html,
    cells,
    claim_word,
    csv_tables,
    csv_text,
    finite,
    headline,
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

_SETTINGS = {
    "lrs": "learning rates tried",
    "lr_seed": "seed of the trials",
    "num_train": "training images",
    "num_val": "validation images",
    "num_test": "test images",
    "primary": "deciding metric",
}
DRAWN = ("baseline", "lit", "3t")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(folder: Path) -> Path:
    """Writes report.html, figures/*.png and tables/*.csv into a compare folder; returns the page's path.

    The bytes depend on the folder's files alone. Raises DataError when compare.json is missing or cannot be used.
    """
    compare = read_compare(folder)
    curves, problems = read_curves(folder, compare)
    plots = draw_plots(compare, curves)
    for name, text in (csv_tables(compare) | _curve_table(curves)).items():
        _write(folder / "tables" / name, text.encode("utf-8"))
    for plot in (plot for group in plots.values() for plot in group):
        _write(folder / "figures" / f"{plot.name}.png", plot.png)
    page = folder / "report.html"
    _write(page, page_html(folder, compare, plots, problems).encode("utf-8"))
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


def page_html(folder: Path, compare: Compare, plots: dict[str, list[Plot]], problems: list[str]) -> str:
    """The whole page; sections without anything to show are left out, with their links."""
    image = pictures(folder)
    sections = [
        ("towers", "What each method connects", _towers(compare)),
        ("results", "Results", _results(compare)),
        ("claims", "Claims, tested", _claims(compare)),
        ("combination", "Using the third tower after training", _combination(compare, plots["combination"])),
        ("training", "Training", _training(compare, plots, problems)),
        ("examples", "Retrieval, seen", examples(compare, image)),
        ("classes", "Zero-shot, class by class", _classes(compare, plots["classes"])),
        ("cost", "Cost against quality", _cost(compare, plots["cost"])),
        ("data", "What the data look like", world(compare, image)),
        ("settings", "Settings and machine", _settings(compare)),
        ("reading", "How to read this page", _reading(compare)),
    ]
    shown = [(name, title, body) for name, title, body in sections if body]
    links = join(*(tag("a", title, href=f"#{name}") for name, title, _ in shown))
    body = join(*(tag("section", tag("h2", title), body, id=name) for name, title, body in shown))
    title = str(compare.get("title", "Comparison"))
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", _css()),
    )
    main = tag("main", _opening(compare, plots["primary"]), tag("nav", links, aria_label="Sections"), body)
    return Html(f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{main}</body></html>\n')


def _css() -> Html:
    light, dark = ("".join(f"--{name}: {shades[i]}; " for name, shades in PALETTE.items()) for i in (0, 1))
    variables = (
        f":root {{ {light}}}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n"
    )
    return Html(variables + Path(__file__).with_name("style.css").read_text(encoding="utf-8"))


def _panels(plots: Iterable[Plot]) -> Html:
    return tag("div", *(tag("figure", Html(plot.svg)) for plot in plots), class_="panels")


def _rows(pairs: Iterable[tuple[str, str]]) -> Html:
    return tag("dl", *(join(tag("dt", name), tag("dd", value)) for name, value in pairs), class_="rows")


def _opening(compare: Compare, plots: list[Plot]) -> Html:
    """Title, headline with its certainty, the plot of the primary metric and the claims at a glance."""
    what, certainty = headline(compare)
    glance = [
        tag("li", _state(claim["held"]), tag("span", f"{claim['id']}: {claim['text']}"))
        for claim in compare.get("claims", [])
    ]
    claims = tag("div", tag("h3", "Claims"), tag("ul", *glance, class_="glance")) if glance else None
    note = tag("figcaption", f"{metric_name(primary(compare))}, {interval_note(compare)}.")
    figures = [tag("figure", tag("h3", "Who wins"), Html(plot.svg), note) for plot in plots]
    return join(
        tag("h1", str(compare.get("title", "Comparison"))),
        tag("p", what, class_="headline"),
        tag("p", certainty, class_="certainty"),
        tag("div", *figures, claims, class_="panels beside"),
    )


def _towers(compare: Compare) -> Html:
    """What each method connects and freezes: a drawing of the basic methods, a sentence for every other one in use."""
    used = {m["method"] for m in compare["methods"]}
    figures, notes = [], []
    for method, entry in METHODS.items():
        text = join(tag("b", entry.label[0].upper() + entry.label[1:] + "."), " ", entry.summary)
        if method in DRAWN:
            figures.append(tag("figure", _drawing(method, entry), tag("figcaption", text)))
        elif method in used:
            notes.append(tag("p", text, class_="muted"))
    return join(tag("div", *figures, class_="panels towers"), *notes)


def _drawing(method: str, entry: MethodEntry) -> Html:
    def box(x: int, y: int, name: str, state: str) -> str:
        frozen = " frozen" if state == "frozen" else ""
        return (
            f'<rect class="box{frozen}" x="{x}" y="{y}" width="104" height="46" rx="7"/>'
            f'<text x="{x + 52}" y="{y + 20}">{name}</text>'
            f'<text class="note" x="{x + 52}" y="{y + 36}">{state}</text>'
        )

    def wire(path: str) -> str:
        return f'<path class="wire" style="stroke: var(--{method})" d="{path}"/>'

    left = ("third tower p", "frozen") if entry.image == "third" else ("image tower f", "trained")
    parts = [wire("M106 109H214"), box(2, 86, *left), box(214, 86, "text tower g", "trained")]
    beside = entry.needs_third and entry.image == "own"
    if beside:
        third = box(108, 8, "third tower p", "frozen")
        parts = [wire("M108 52L72 86"), wire("M212 52L248 86"), *parts, third]
    for x, name in ((54, "image"), (266, "caption")):
        parts.append(f'<path class="input" d="M{x} 156V136M{x - 4} 141L{x} 135L{x + 4} 141"/>')
        parts.append(f'<text class="note" x="{x}" y="171">{name}</text>')
    parts.append('<text class="note" x="160" y="127">contrastive</text>')
    top = 0 if beside else 76
    return Html(
        f'<svg viewBox="0 {top} 320 {178 - top}" role="img" aria-label="What {entry.label} connects">'
        f"{''.join(parts)}</svg>"
    )


def _results(compare: Compare) -> Html | None:
    if not any(cells(compare).values()):
        return None
    note = f"Percent, {interval_note(compare)} below it. ★ and bold mark the best of a column."
    if any("combination/mean_r@1" in row for row in cells(compare).values()):
        note += " The combined score needs the third tower at inference; its α was chosen on validation data."
    return join(result_table(compare), tag("p", note, class_="muted"))


def _state(held: bool | None) -> Html:
    symbol, word = claim_word(held)
    kind = {True: "state yes", False: "state no", None: "state unknown"}[held]
    return tag("span", tag("span", symbol, class_="symbol", aria_hidden="true"), word, class_=kind)


def _claims(compare: Compare) -> Html | None:
    items = []
    for claim in compare.get("claims", []):
        figures = _rows((name, str(value)) for name, value in (claim.get("figures") or {}).items())
        note = tag("p", claim["note"], class_="muted") if claim.get("note") else None
        text = tag("p", tag("b", claim["id"]), " ", claim["text"])
        items.append(tag("li", _state(claim["held"]), tag("div", text, figures, note)))
    return tag("ul", *items, class_="claims") if items else None


def _combination(compare: Compare, plots: list[Plot]) -> Html | None:
    if not plots:
        return None
    text = (
        "Main use needs the image and text tower alone. Where the third tower may run at inference too, the two scores "
        "can be mixed: α = 0 is the main pair, α = 1 the third tower read through the text tower's head. "
        "α is chosen on validation data; the curves are test data, thin lines are single seeds."
    )
    controls = [bool(curve.get("control")) for curve in compare["combination"]]
    control = (
        "The dashed control mixes two independently trained systems, baseline and LiT, in the same way: "
        "what it gains is plain ensembling."
        if all(controls)
        else "A curve here has no control (baseline and LiT mixed in the same way): plain ensembling is not told apart."
    )
    return join(tag("p", text), tag("p", control), _panels(plots))


def _training(compare: Compare, plots: dict[str, list[Plot]], problems: list[str]) -> Html | None:
    if not any((plots["validation"], plots["loss"], problems)):
        return None
    several = "Mean over seeds; the band spans the lowest and the highest seed."
    text = several if num_seeds(compare) > 1 else "One seed."
    rows = (
        "Each row of an objective has its own loss. A regression row measures distance, not nats: "
        "its height does not compare with the others."
    )
    loss = join(tag("h3", "Loss by row"), tag("p", rows, class_="muted"), _panels(plots["loss"]))
    return join(
        tag("p", text, class_="muted"),
        _panels(plots["validation"]) if plots["validation"] else None,
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
    return join(_panels(plots), more(f"All {len(names)} classes, percent", table))


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
    return join(_panels(plots) if plots else None, html_table(["method", *columns], rows))


def _settings(compare: Compare) -> Html:
    settings, machine = compare.get("settings", {}), compare.get("machine", {})
    rates = []
    for m in compare["methods"]:
        trials = [f"{lr}: {percent(finite(value))}" for lr, value in (m.get("lr_trials") or {}).items()]
        rates += [[label(compare, row_key(m)), _plain(m.get("lr")), ", ".join(trials)]] if trials else []
    created = str(compare.get("created", "–")).replace("T", " ")
    given = [("data", compare.get("data")), *settings.items(), ("created", created)]
    table = html_table(["method", "learning rate", "each rate tried: validation, percent"], rates)
    return join(
        tag("div", _rows(_pairs(given)), _rows(_pairs(machine.items())), class_="panels"),
        more("How each learning rate was chosen", table) if rates else None,
    )


def _pairs(items: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    known = ((name, value) for name, value in items if value is not None)
    return [(_SETTINGS.get(name, name.replace("_", " ")), _plain(value)) for name, value in known]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(v) for v in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _reading(compare: Compare) -> Html:
    """The words of this page, explained."""
    interval = (
        "95 %: how far the mean could lie elsewhere with other seeds (t-interval over seeds)."
        if num_seeds(compare) > 1
        else "95 %, from resampling the test queries of one seed: it leaves out the luck of a training run."
    )
    thirds = ", ".join(dict.fromkeys(m["third"] for m in compare["methods"] if m.get("third"))) or "none"
    words = {
        "R@k": "Share of queries whose right answer is among the first k. Image → text asks with an image, "
        "text → image with a caption; mean is the average of both.",
        "zero-shot top-1": "Share of images whose class name lies nearest of all names. No label was trained on.",
        "interval": interval,
        "held": "The 95 % interval of the seed-paired differences leaves out 0; "
        "with one seed, the interval of a bootstrap over queries, and the page says so.",
        "third tower": f"A frozen pretrained model; here: {thirds}. Mismatched: trained for another task.",
        "α": "Weight of the third tower: score = (1 − α) · main pair + α · third tower.",
        "cost at inference": "3T at α = 0 runs the image and text tower alone, as the baseline does. Any α > 0 also "
        "runs the third tower on every image. LiT always runs the pretrained tower: it is its image tower.",
    }
    return tag("div", _rows(words.items()), class_="prose")


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
