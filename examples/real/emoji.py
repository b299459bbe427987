"""Emoji as four vendors draw them, with their names and keywords as captions."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from drawings import Drawing, parts_by_concept
from packages import Package

LICENCE = "MIT for the data; the pictures belong to their vendors, see the package's README"
VENDORS = {
    vendor: Package("npm", f"emoji-datasource-{vendor}", "16.0.0", digest, LICENCE)
    for vendor, digest in {
        "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "facebook": "017038cf5a4e7fcf03dd9133cbed43d4c281c4b3ce7b927c7160261b92b8821e",
        "apple": "b34d1665e136f163b0d4433318df151895b785186e8c729b2211b43017945075",
    }.items()
}
NAMES = Package(
    "npm", "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", "MIT"
)  # fmt: skip


def captions_of(names: list[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """The captions of each emoji by its code points: its name, and its name with two keywords each."""
    found = {}
    for entry in names:
        tags = [tag for tag in entry.get("tags", []) if tag not in entry["label"]]
        pairs = [
            f"{entry['label']}, {', '.join(tags[start : start + 2])}"
            for start in range(0, min(len(tags), 8), 2)
        ]
        found[entry["hexcode"].replace("-FE0F", "")] = (entry["label"], *pairs)
    return found


def read_emoji(vendors: Mapping[str, Path], names: list[dict[str, Any]]) -> Iterator[tuple[str, Drawing]]:
    """Every picture with its vendor; an emoji without a name is left out. Skin tones are not drawn."""
    captions = captions_of(names)
    for vendor, package in vendors.items():
        folder = package / "package"
        for entry in json.loads((folder / "emoji.json").read_text(encoding="utf-8")):
            known = captions.get(entry["unified"].replace("-FE0F", ""))
            path = folder / "img" / vendor / "64" / entry["image"]
            if known and path.is_file() and entry["subcategory"] != "country-flag":
                yield vendor, Drawing(
                    f"{vendor}:{entry['unified']}", entry["unified"], known,
                    entry["subcategory"].replace("-", " "), png=path.read_bytes(),
                )  # fmt: skip


def by_concept(pictures: list[tuple[str, Drawing]], held_out: int = 250) -> dict[str, list[Drawing]]:
    """All vendors in every part, and no emoji in two of them; one picture of each that is held out."""
    drawings = [drawing for _, drawing in pictures]
    parts = parts_by_concept(drawings, held_out)
    held = {drawing.concept for name in ("val", "test") for drawing in parts[name]}
    return {**parts, "classes/test": [drawing for drawing in drawings if drawing.concept in held]}


def by_vendor(pictures: list[tuple[str, Drawing]]) -> dict[str, list[Drawing]]:
    """Two vendors to train on, a third for validation and the last for the test."""
    of = {vendor: [drawing for each, drawing in pictures if each == vendor] for vendor in VENDORS}
    *train, val, test = of.values()
    return {
        "train": [drawing for drawings in train for drawing in drawings],
        "val": val,
        "test": test,
        "classes/test": test,
    }
