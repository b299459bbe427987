"""What one shard holds: its members grouped to samples, with their captions, labels and problems.

A sample is the group of members that share their path up to the first dot of the file name: `00012.jpg`,
`00012.txt` (captions, one per line), `00012.json` (img2dataset's metadata), `00012.cls` (class index).
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from threetowers.data.shards.tar import MAX_TEXT_BYTES, walk
from threetowers.data.source import IMAGE_ENDINGS, clean_captions, decode_text
from threetowers.errors import BadSample


class Found(NamedTuple):
    """A usable sample. offset, size: where its image lies in the shard; label -1: none."""

    key: str
    captions: tuple[str, ...]
    label: int
    offset: int
    size: int


@dataclass(slots=True)
class _Group:
    """What a shard holds under one key; size -1: no image."""

    offset: int = 0
    size: int = -1
    texts: dict[str, bytes] = field(default_factory=dict)
    members: list[str] = field(default_factory=list)
    repeated: bool = False


class Shelf:
    """One shard, read to its end.

    name: how messages call it; file: its open descriptor. images counts all images, usable or not; digest is of
    stem, size, headers and texts. Raises DataError for a shard that is damaged or cut short.
    """

    def __init__(self, name: str, file: int, stem: str) -> None:
        size = os.fstat(file).st_size
        digest = hashlib.sha256(f"{stem} {size}".encode())
        self._groups: dict[str, _Group] = {}
        for member in walk(name, file, size, digest.update):
            key, ending = key_and_ending(member.name)
            if not key:
                continue  # a hidden file, as macOS puts one beside each file
            group = self._groups.setdefault(key, _Group())
            group.members.append(ending if member.size >= 0 else f"{ending} (a link)")
            if member.size < 0:
                continue
            if ending in IMAGE_ENDINGS:
                if group.size < 0:
                    group.offset, group.size = member.offset, member.size
                else:
                    group.repeated = True
            elif ending in ("txt", "json", "cls"):
                group.repeated |= ending in group.texts
                text = os.pread(file, min(member.size, MAX_TEXT_BYTES), member.offset)
                group.texts.setdefault(ending, text)
                digest.update(text)
        self.digest = digest.digest()
        self.images = sum(group.size >= 0 for group in self._groups.values())

    def samples(self, num_classes: int) -> Iterator[Found | BadSample]:
        """The usable samples in the shard's order and, before each, what is wrong with it or with one left out.

        num_classes: labels from here on are bad; 0: any label is taken.
        """
        for key, group in self._groups.items():
            captions, reason = _captions(group.texts)
            label, members = -1, ", ".join(group.members)
            findings = [reason] if reason else []
            if "cls" in group.texts:
                label = _label(group.texts["cls"], num_classes)
                findings += ["bad label"] if label < 0 else []
            if group.repeated:
                findings.append("member given twice")
            usable = group.size > 0 and (bool(captions) or label >= 0)
            if group.size <= 0:
                findings.append("empty file" if group.size == 0 else "no image")
            elif not usable and not findings:
                findings.append("empty caption" if group.texts else "no caption")
            for finding in findings:
                yield BadSample(key, finding, f"has {members}")
            if usable:
                yield Found(key, captions, label, group.offset, group.size)


def _captions(texts: dict[str, bytes]) -> tuple[tuple[str, ...], str]:
    """The captions of one sample, and a reason when something is wrong with the files that hold them."""
    candidates: list[list[str]] = []
    reason = ""
    if "json" in texts:
        try:
            document = json.loads(decode_text(texts["json"]))
        except (ValueError, RecursionError):
            document, reason = None, "damaged json"
        if isinstance(document, dict):
            for key in ("captions", "caption", "text"):
                value = document.get(key)
                values = value if isinstance(value, list) else [value]
                candidates.append([text for text in values if isinstance(text, str)])
    if "txt" in texts:
        candidates.append(decode_text(texts["txt"]).split("\n"))
    for candidate in candidates:
        captions, damaged = clean_captions(candidate)
        if captions:
            return captions, "caption is not UTF-8" if damaged else reason
    return (), reason


def _label(data: bytes, num_classes: int) -> int:
    """The class index, or -1 when it is none of the classes."""
    digits = data.strip()
    label = int(digits) if digits.isdigit() and len(digits) < 10 else -1
    return label if label < (num_classes or label + 1) else -1


def key_and_ending(name: str) -> tuple[str, str]:
    """webdataset's rule: ("a/0001", "jpg") for `./a/0001.JPG`; the key is empty for folders and hidden files."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, ending = file.partition(".")
    return (folder + slash + stem if stem else ""), ending.lower()
