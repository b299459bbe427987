"""The samples of one tar shard: its members in groups, with captions, labels and problems.

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


class TarSample(NamedTuple):
    """A usable sample. offset, size: the position of its image in the shard in bytes; label: -1 for none."""

    key: str
    captions: tuple[str, ...]
    label: int
    offset: int
    size: int


@dataclass(slots=True)
class _Group:
    """The members of a shard under one key. offset, size: of the image in bytes; size -1: there is none."""

    offset: int = 0
    size: int = -1
    texts: dict[str, bytes] = field(default_factory=dict)
    members: list[str] = field(default_factory=list)
    repeated: bool = False


def read_groups(name: str, file: int, stem: str) -> "TarGroups":
    """The groups of a shard, which is read to its end.

    name: the shard in messages. file: its open descriptor. stem: what the ids of its samples begin with.
    Raises DataError for a shard that is damaged or cut short.
    """
    size = os.fstat(file).st_size
    digest = hashlib.sha256(f"{stem} {size}".encode())
    groups: dict[str, _Group] = {}
    for member in walk(name, file, size, digest.update):
        key, ending = key_and_ending(member.name)
        if not key:
            continue  # a hidden file, as macOS puts one beside each file
        group = groups.setdefault(key, _Group())
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
    return TarGroups(groups, digest.digest())


@dataclass(frozen=True)
class TarGroups:
    """The members of one shard by key, and a digest of its stem, size, headers and texts."""

    groups: dict[str, _Group]
    digest: bytes

    @property
    def num_images(self) -> int:
        """The number of all images, usable or not."""
        return sum(group.size >= 0 for group in self.groups.values())

    def samples(self, num_classes: int) -> Iterator[TarSample | BadSample]:
        """The usable samples in the shard's order, and the problems of these and of those left out.

        num_classes: labels from this number on are bad; 0: all labels are good.
        """
        for key, group in self.groups.items():
            captions, reason = _captions(group.texts)
            label, members = -1, ", ".join(group.members)
            problems = [reason] if reason else []
            if "cls" in group.texts:
                label = _label(group.texts["cls"], num_classes)
                problems += ["bad label"] if label < 0 else []
            if group.repeated:
                problems.append("member given twice")
            usable = group.size > 0 and (bool(captions) or label >= 0)
            if group.size <= 0:
                problems.append("empty file" if group.size == 0 else "no image")
            elif not usable and not problems:
                problems.append("empty caption" if group.texts else "no caption")
            for problem in problems:
                yield BadSample(key, problem, f"has {members}")
            if usable:
                yield TarSample(key, captions, label, group.offset, group.size)


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
