"""The samples of one tar shard: its members in groups, with captions, labels and problems.

A sample is the group of members that share their path up to the first dot of the file name: `00012.jpg`,
`00012.txt` (captions, one per line), `00012.json` (img2dataset's metadata), `00012.cls` (class index). Names with more
dots, such as `DSC.0001.jpg`, are grouped up to the last dot where no image has the name up to the first one.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from threetowers.data.cells import CAPTION_KEYS, cell_texts, file_texts
from threetowers.data.copies import middle_key_at, some_of
from threetowers.data.shards.tar import MAX_TEXT_BYTES, Member, walk
from threetowers.data.source import IMAGE_ENDINGS, REMARKS, clean_captions, decode_text
from threetowers.errors import BadSample

PREFERRED_ENDINGS = ("jpg", "png", "jpeg", "webp")
"""Which image of a sample is used, in open_clip's order; after these come other endings in the order of the shard."""
_RANKS = {ending: rank for rank, ending in enumerate(PREFERRED_ENDINGS)}
_TEXT_ENDINGS = ("txt", "json", "cls")
_SHOWN_MEMBERS = 8


@dataclass(frozen=True)
class Reading:
    """How the samples of a shard are read.

    num_classes: labels from this number on are bad; 0: all labels are good. caption_keys: the keys of a sample's json
    that hold its captions; empty: those of CAPTION_KEYS, and the .txt before them.
    """

    num_classes: int = 0
    caption_keys: tuple[str, ...] = ()


class TarSample(NamedTuple):
    """A usable sample. offset, size: the position of its image in the shard in bytes; label: -1 for none.

    picture: the `middle_key` of its image.
    """

    key: str
    captions: tuple[str, ...]
    label: int
    offset: int
    size: int
    picture: int


class _Image(NamedTuple):
    ending: str
    offset: int
    size: int


@dataclass(slots=True)
class _Group:
    """The members of a shard under one key. texts: by ending, the first of each."""

    images: list[_Image] = field(default_factory=list)
    texts: dict[str, bytes] = field(default_factory=dict)
    members: list[str] = field(default_factory=list)
    repeated: bool = False

    def image(self) -> _Image | None:
        """The image that is used."""
        if len(self.images) < 2:
            return self.images[0] if self.images else None
        return min(self.images, key=lambda image: _RANKS.get(image.ending, len(_RANKS)))

    def add(self, file: int, member: Member, ending: str, digest: Callable[[bytes], None]) -> None:
        """Adds a member of the open shard `file`; `digest` is called with the content of a text."""
        self.members.append(ending if member.size >= 0 else f"{ending} (a link)")
        if member.size < 0:
            return
        if ending in IMAGE_ENDINGS:
            if self.images:
                self.repeated |= any(image.ending == ending for image in self.images)
            self.images.append(_Image(ending, member.offset, member.size))
        elif ending in _TEXT_ENDINGS:
            self.repeated |= ending in self.texts
            text = os.pread(file, min(member.size, MAX_TEXT_BYTES), member.offset)
            self.texts.setdefault(ending, text)
            digest(text)


def read_groups(name: str, file: int, stem: str) -> "TarGroups":
    """The groups of a shard, which is read to its end.

    name: the shard in messages. file: its open descriptor. stem: what the ids of its samples begin with.
    Raises DataError for a shard that is damaged or cut short.
    """
    size = os.fstat(file).st_size
    digest = hashlib.sha256(f"{stem} {size}".encode())
    groups: dict[str, _Group] = {}
    dotted: list[tuple[str, Member]] = []
    for member in walk(name, file, size, digest.update):
        key, ending = key_and_ending(member.name)
        if not key:
            continue  # a hidden file, as macOS puts one beside each file
        groups.setdefault(key, _Group()).add(file, member, ending, digest.update)
        if "." in ending and ending.rpartition(".")[2] in IMAGE_ENDINGS + _TEXT_ENDINGS:
            dotted.append((key, member))
    if dotted:
        _separate(groups, dotted, file, digest.update)
    images = [image for group in groups.values() if (image := group.image()) is not None]
    for place in some_of(len(images)):
        digest.update(str(middle_key_at(file, images[place].offset, images[place].size)).encode())
    return TarGroups(groups, file, digest.digest())


def _separate(
    groups: dict[str, _Group],
    dotted: list[tuple[str, Member]],
    file: int,
    digest: Callable[[bytes], None],
) -> None:
    """Makes groups of their own of members whose names have more dots, where they are no further files of a sample.

    dotted: these members, each with its key up to the first dot. `0001.seg.png` beside `0001.jpg` stays a further file
    of 0001. `DSC.0001.jpg` is an image of its own if there is no image `DSC.jpg`, or a caption `DSC.0001.txt`.
    `0001.rgb.png`, `0001.mask.png` and `0001.txt` are one sample.
    """
    own: dict[str, _Group] = {}
    base: dict[str, str] = {}
    for key, member in dotted:
        whole, _, ending = member.name.removeprefix("./").rpartition(".")
        base[whole] = key
        own.setdefault(whole, _Group()).add(file, member, ending.lower(), lambda text: None)
    complete = {
        whole
        for whole, group in own.items()
        if group.images and (_captions(group.texts, Reading())[0] or "cls" in group.texts)
    }
    wholes: dict[str, list[str]] = {}
    for whole, key in base.items():
        wholes.setdefault(key, []).append(whole)
    joined = {
        key
        for key, names in wholes.items()
        if not (groups[key].images or complete.intersection(names))
        and len(groups[key].members) <= _SHOWN_MEMBERS
        and not any(name[len(key) + 1 :].isdigit() for name in names)
    }
    for whole, group in own.items():
        suffix = whole[len(base[whole]) + 1 :].lower()
        if (
            base[whole] in joined
        ):  # 0001.rgb.png, 0001.mask.png and 0001.txt, of which none is a sample of its own
            rest = groups[base[whole]]
            rest.images += [image._replace(ending=f"{suffix}.{image.ending}") for image in group.images]
            for ending, text in group.texts.items():
                rest.texts.setdefault(ending, text)
                digest(text)
            continue
        if groups[base[whole]].images and whole not in complete:
            continue
        groups[whole] = group
        for text in group.texts.values():
            digest(text)
        moved = {f"{suffix}.{ending}".lower() for ending in group.members}
        rest = groups[base[whole]]
        rest.members = [ending for ending in rest.members if ending not in moved]
    for key in set(base.values()):
        if not groups[key].members:
            del groups[key]


@dataclass(frozen=True)
class TarGroups:
    """The members of one shard by key, and a digest of its stem, size, headers, texts and some images.

    file: its open descriptor.
    """

    groups: dict[str, _Group]
    file: int
    digest: bytes

    @property
    def num_images(self) -> int:
        """The number of all samples with an image, usable or not."""
        return sum(bool(group.images) for group in self.groups.values())

    def samples(self, reading: Reading) -> Iterator[TarSample | BadSample]:
        """The usable samples in the shard's order, and the problems of these and of those left out."""
        for key, group in self.groups.items():
            captions, problems = _captions(group.texts, reading)
            label, image = -1, group.image()
            if "cls" in group.texts:
                label = _label(group.texts["cls"], reading.num_classes)
                problems += [] if label >= 0 else [("bad label", "")]
            if group.repeated:
                problems.append(("member given twice", ""))
            elif len(group.images) > 1 and image is not None:
                problems.append(("further image", f"{image.ending} is used; "))
            usable = image is not None and image.size > 0 and (bool(captions) or label >= 0)
            if image is None or image.size <= 0:
                problems.append(("no image" if image is None else "empty file", ""))
            elif not usable and not {reason for reason, _ in problems} - REMARKS:
                problems.append(_without_caption(group.texts))
            for problem, detail in problems:
                yield BadSample(key, problem, f"{detail}has {_listed(group.members)}")
            if usable and image is not None:
                picture = middle_key_at(self.file, image.offset, image.size)
                yield TarSample(key, captions, label, image.offset, image.size, picture)


def _listed(members: list[str]) -> str:
    more = len(members) - _SHOWN_MEMBERS
    return ", ".join(members[:_SHOWN_MEMBERS]) + (f" and {more} more" if more > 0 else "")


def _without_caption(texts: Mapping[str, bytes]) -> tuple[str, str]:
    """The problem of a sample without captions. A json's keys are named, since one of them can hold captions."""
    document = _document(texts)[0]
    if "txt" not in texts and document:
        keys = ", ".join(list(document)[:_SHOWN_MEMBERS])
        return "no caption", f"its json has {keys}; name one with --inputs.caption-columns; "
    return ("empty caption" if texts else "no caption"), ""


def _document(texts: Mapping[str, bytes]) -> tuple[dict[str, Any], bool]:
    """The object in a sample's json, and whether the json is damaged.

    A json that is a text or a list, in a sample without a .txt, holds the captions themselves.
    """
    if "json" not in texts:
        return {}, False
    try:
        document = json.loads(decode_text(texts["json"]))
    except (ValueError, RecursionError):
        return {}, True
    items = document if isinstance(document, list) else [document]
    if (
        "txt" not in texts
        and not isinstance(document, dict)
        and all(isinstance(each, str | dict) for each in items)
    ):
        return {"captions": items}, False
    return (document, False) if isinstance(document, dict) else ({}, False)


def _captions(texts: Mapping[str, bytes], reading: Reading) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
    """The captions of one sample, and what is wrong with the files that hold them, each with a detail.

    The .txt comes first, as in open_clip. The json's captions are taken where they hold all of the .txt's, or where
    there is none.
    """
    document, damaged = _document(texts)
    problems = [("damaged json", "")] if damaged else []
    within, bad_within = _captions_of_json(document, reading.caption_keys)
    beside: tuple[str, ...] = ()
    bad_beside = False
    if "txt" in texts and not reading.caption_keys:
        beside, bad_beside = clean_captions(file_texts(decode_text(texts["txt"])))
    captions, bad = beside, bad_beside
    if within and (set(beside) <= set(within) or " ".join(beside) in within):
        captions, bad = within, bad_within
    elif within and beside:
        problems.append(("captions differ", "the .txt is used, the json has another caption; "))
    return captions, problems + [("caption is not UTF-8", "")] * bad


def _captions_of_json(document: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
    """The captions under all of the keys, or the first of CAPTION_KEYS that has any; and whether one is damaged."""
    found: list[str] = []
    damaged = False
    for key in keys or CAPTION_KEYS:
        if key not in document:
            continue
        captions, bad = clean_captions(cell_texts(document.get(key)))
        found += captions
        damaged |= bad and bool(captions)
        if captions and not keys:
            break
    return tuple(found), damaged


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
