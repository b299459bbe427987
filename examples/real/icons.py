"""Icons of open icon sets, with the words of their names as captions."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drawings import Drawing, parts_by_concept, place
from packages import Package

PACKAGE = Package(
    "npm", "@iconify/json", "2.2.535", "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91",
    "a licence for each icon set, listed in collections.md of the package",
)  # fmt: skip
LEFT_OUT = ("Logos", "Flags / Maps")
"""Categories of sets whose names are brands and countries."""
NOT_FREE = re.compile(r"\bNC\b|GPL", re.IGNORECASE)
STYLES = (
    "outline outlined line linear bold filled fill solid thin light regular duotone twotone two tone round rounded "
    "sharp broken bulk alt fluent color colour mini micro small large big variant off sm lg xs xl"
)
"""Words of a name that say how an icon is drawn, and not what it shows."""
CLASS_SET = "mdi"
"""The set whose categories are the classes of zero-shot classification; no other part has icons of it."""
MOST = 2_000
"""Icons with a class."""
TOWER_SET = "material-symbols"
"""The set whose categories a tower of icons learns; without the concepts of validation and test."""


def concept_of(name: str) -> str:
    """The words of a name without those of style and numbers, sorted.

    >>> concept_of("arrow-left-bold-24")
    'arrow left'
    """
    style = STYLES.split()
    words = [word for word in re.split(r"[-_ ]+", name.lower()) if not word.isdigit() and word not in style]
    return " ".join(sorted(set(words)))


def read_icons(package: Path) -> Iterator[Drawing]:
    """The icons of every set that may be used freely and shows no brands or flags."""
    sets = json.loads((package / "package" / "collections.json").read_text(encoding="utf-8"))
    for prefix, about in sorted(sets.items()):
        if about.get("category") in LEFT_OUT or NOT_FREE.search(about["license"].get("spdx", "")):
            continue
        yield from read_set(
            json.loads((package / "package" / "json" / f"{prefix}.json").read_text(encoding="utf-8"))
        )


def read_set(content: dict[str, Any]) -> Iterator[Drawing]:
    """The icons of one set; those that its authors have hidden, and those without a word, are left out."""
    category_of = {
        name: category for category, names in content.get("categories", {}).items() for name in names
    }
    for name, icon in content["icons"].items():
        concept = concept_of(name)
        if icon.get("hidden") or not re.search("[a-z]{2}", concept):
            continue
        box = [
            icon.get(key, content.get(key, default))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        ]
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
            f'width="{box[2]}" height="{box[3]}" viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
        )
        caption = " ".join(re.split(r"[-_ ]+", name.lower()))
        yield Drawing(f"{content['prefix']}:{name}", concept, (caption,), category_of.get(name, ""), svg)


def parts(icons: list[Drawing], num: int, held_out: int = 1_000) -> dict[str, list[Drawing]]:
    """Training icons, and one of each concept held out for validation and for the test; also icons with a class.

    The parts that are held out are the same for every number of training icons, and a smaller training part lies within
    a larger one.
    """
    labelled = [icon for icon in icons if icon.key.startswith(f"{CLASS_SET}:")]
    icons = [icon for icon in icons if not icon.key.startswith(f"{CLASS_SET}:")]
    by_concept = parts_by_concept(icons, held_out)
    train = sorted(by_concept["train"], key=lambda icon: place(icon.key))
    known = [icon for icon in train if icon.key.startswith(f"{TOWER_SET}:") and icon.category]
    return {
        **by_concept,
        "train": train[:num] if num else train,
        "classes/test": sorted(
            (icon for icon in labelled if icon.category), key=lambda icon: place(icon.key)
        )[:MOST],
        "categories/train": known[len(known) // 10 :],
        "categories/test": known[: len(known) // 10],
    }
