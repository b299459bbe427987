"""The page's retrieval examples and sample images, with every picture inlined."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from threetowers.objective.pairs import method_label
from threetowers.report.tables import Compare, Html, finite, join, tag

Picture = Callable[[str | None, str], Html]
"""(path in the compare folder, description) → an image element."""
OPEN_EXAMPLES = 2
"""Examples of each direction that are visible; the others are folded."""
_IMAGES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}


def pictures(folder: Path) -> Picture:
    """Makes image elements that contain the image; a file that is missing or outside the folder gives a box instead."""

    def image(path: str | None, description: str) -> Html:
        file = folder / (path or "")
        inside = file.resolve().is_relative_to(folder.resolve())
        data = file.read_bytes() if inside and file.is_file() else b""
        kind = next((kind for magic, kind in _IMAGES.items() if data.startswith(magic)), None)
        if kind is None:
            return tag("span", "image missing", class_="missing")
        return tag("img", src=f"data:{kind};base64,{base64.b64encode(data).decode()}", alt=description)

    return image


def more(title: str, *children: Html) -> Html:
    """A folded part of the page; it is open in print."""
    return tag("details", tag("summary", title), *children)


def examples(compare: Compare, image: Picture) -> Html | None:
    """Queries with the best answers of every method, in both directions; None when there are none."""
    parts = []
    for direction, title, card in (
        ("t2i", "Caption → images", _text_query),
        ("i2t", "Image → captions", _image_query),
    ):
        cards = [card(e, image) for e in compare.get("examples", []) if e["direction"] == direction]
        if cards:
            shown, rest = cards[:OPEN_EXAMPLES], cards[OPEN_EXAMPLES:]
            folded = more(f"{len(rest)} more", tag("div", *rest, class_="cards")) if rest else None
            parts += [tag("h3", title), tag("div", *shown, class_="cards"), folded]
    if not parts:
        return None
    note = "The five highest-scoring answers of each method, best first. Right answers have a frame and a ✓."
    return join(tag("p", note, class_="muted"), *parts)


def _text_query(example: dict[str, Any], image: Picture) -> Html:
    def thumb(rank: int, item: dict[str, Any]) -> Html:
        tick = tag("span", "✓", class_="tick", aria_hidden="true") if item["right"] else None
        description = f"answer {rank}, {'right' if item['right'] else 'wrong'}{_score(item)}"
        return tag(
            "span", image(item["image"], description), tick,
            class_="thumb right" if item["right"] else "thumb", title=description,
        )  # fmt: skip

    query = tag(
        "div",
        image(example.get("truth"), "the image that this caption describes"),
        tag("p", f"“{example.get('query')}”", class_="quote"),
        class_="query",
    )
    answers = [
        _answer(row, tag("div", *(thumb(i, item) for i, item in enumerate(row["items"], 1)), class_="thumbs"))
        for row in example["answers"]
    ]
    return tag("article", query, *answers, class_="card")


def _image_query(example: dict[str, Any], image: Picture) -> Html:
    def answer(row: dict[str, Any]) -> Html:
        items = row["items"]
        lines = [("✓ " if item["right"] else "") + f"“{item['text']}”" for item in items]
        texts = [
            tag("li", line, title=f"answer {rank}{_score(item)}")
            for rank, (line, item) in enumerate(zip(lines, items, strict=True), 1)
        ]
        place = next((rank for rank, item in enumerate(items, 1) if item["right"]), None)
        found = f"right answer at rank {place}" if place else f"no right answer among the first {len(items)}"
        first = tag("div", lines[0] if lines else "–", class_="found" if place == 1 else "")
        return _answer(row, tag("div", first, more(found, tag("ol", *texts, class_="texts"))))

    truth = tag("p", tag("span", "right answer: ", class_="muted"), f"“{example.get('truth')}”")
    query = tag("div", image(example.get("query_image"), "the query image"), truth, class_="query")
    return tag("article", query, *(answer(row) for row in example["answers"]), class_="card")


def _answer(row: dict[str, Any], body: Html) -> Html:
    name = str(row.get("label") or method_label(row["method"]))
    return tag("div", tag("span", name), body, class_="answer")


def _score(item: dict[str, Any]) -> str:
    score = finite(item.get("score"))
    return "" if score is None else f", score {score:.2f}"


def world(compare: Compare, image: Picture) -> Html | None:
    """Sample images with their captions; None when there are none."""
    figures = []
    for sample in compare.get("world", []):
        first, *others = [str(caption) for caption in sample["captions"]] or ["no caption"]
        folded = more(f"{len(others)} more", *(tag("p", text) for text in others)) if others else None
        figures.append(tag("figure", image(sample["image"], first), tag("figcaption", first, folded)))
    return tag("div", *figures, class_="world") if figures else None
