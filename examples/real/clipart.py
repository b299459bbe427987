"""Drawings of the Open Clip Art Library, and stamps of Tux Paint, with their titles as captions."""

import re
from collections import Counter
from collections.abc import Iterator
from html import unescape
from pathlib import Path

from drawings import Drawing
from packages import Package

PICTURES = Package(
    "debian", "openclipart-png", "1:0.18+dfsg-19",
    "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02", "CC0",
)  # fmt: skip
TITLES = Package(
    "debian", "openclipart-svg", "1:0.18+dfsg-19",
    "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5", "CC0",
)  # fmt: skip
STAMPS = Package(
    "debian", "tuxpaint-stamps-default", "2022.06.04-1",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    "GPL-2.0-or-later and others: see its copyright file",
)  # fmt: skip
MOST = 5
"""A title that more drawings have is that of a series, and says nothing about one of them."""


def read_clipart(pictures: Path, titles: Path) -> Iterator[Drawing]:
    """The drawings with a title of their own, each with its title, and its title with its keywords."""
    root = titles / "usr" / "share" / "openclipart" / "svg"
    found = {
        path.relative_to(root).with_suffix(""): metadata(path.read_text(encoding="utf-8", errors="replace"))
        for path in sorted(root.rglob("*.svg"))
    }
    uses = Counter(title for title, _ in found.values())
    for name, (title, keywords) in found.items():
        path = pictures / "usr" / "share" / "openclipart" / "png" / name.with_suffix(".png")
        if uses[title] <= MOST and re.search(r"[a-zA-Z]{3}", title) and path.is_file():
            captions = (title, f"{title}: {', '.join(keywords)}") if keywords else (title,)
            yield Drawing(str(name), title.lower(), captions, png=path.read_bytes())


def metadata(svg: str) -> tuple[str, list[str]]:
    """The title and the keywords in the metadata of an SVG file."""
    title = re.search(r"<dc:title>(.*?)</dc:title>", svg, re.DOTALL)
    keywords = re.findall(r"<rdf:li>(.*?)</rdf:li>", svg, re.DOTALL)
    words = dict.fromkeys(unescape(word).strip() for word in keywords)
    return " ".join(unescape(title[1]).split()) if title else "", [
        word for word in words if word and word != "unsorted"
    ]


def read_stamps(package: Path) -> Iterator[Drawing]:
    """The stamps that are photographs or drawings with an English sentence."""
    root = package / "usr" / "share" / "tuxpaint" / "stamps"
    for path in sorted(root.rglob("*.png")):
        text = path.with_suffix(".txt")
        if not path.stem.endswith("_mirror") and text.is_file():
            sentence = text.read_text(encoding="utf-8").partition("\n")[0].strip()
            if sentence:
                yield Drawing(
                    str(path.relative_to(root)), sentence.lower(), (sentence,), png=path.read_bytes()
                )
