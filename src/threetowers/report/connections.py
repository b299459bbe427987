"""What each method of a comparison connects and freezes, as drawings and sentences."""

from threetowers.objective.pairs import METHODS, MethodEntry
from threetowers.report.tables import Compare, Html, join, tag

DRAWN = ("baseline", "lit", "3t")
"""The methods that have a drawing; the others are described by what they change in these."""


def connections(compare: Compare) -> Html:
    """What each method connects and freezes: drawings of the basic methods, sentences for the others in use."""
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
    beside = entry.third_beside
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
