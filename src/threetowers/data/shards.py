"""Tar shards as webdataset and img2dataset write them: read by offset, checked strictly, never extracted.

A sample is the group of members that share their path up to the first dot of the file name: `00012.jpg`,
`00012.txt` (captions, one per line), `00012.json` (img2dataset's metadata), `00012.cls` (class index).
CLIP_benchmark's `classnames.txt` and `zeroshot_classification_templates.txt` are read where they stand beside the
shards or one folder up. Nothing in a shard is executed: no pickle, no `pipe:`, and names are keys, never paths.
"""

import hashlib
import itertools
import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path

from threetowers.data.sources import Record, Texts, clean_captions, decode_text
from threetowers.data.tar import MAX_TEXT_BYTES, walk
from threetowers.errors import BadSample, DataError, UsageError

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
"""Endings taken for images: lower case, without the dot."""


@dataclass(frozen=True, slots=True)
class ShardSample:
    """One sample to write. image: the encoded file; extension: its ending, without the dot."""

    key: str
    image: bytes
    extension: str
    captions: tuple[str, ...] = ()
    label: int | None = None


def write_shards(
    directory: str | Path, samples: Iterable[ShardSample], *, shard_size: int = 2500
) -> list[Path]:
    """Writes `00000.tar`, `00001.tar`, … and their `_stats.json`; the same samples always give the same bytes.

    Samples are sorted by key inside a shard; a shard appears under its name only when it is complete. Returns the
    shards' paths. Raises UsageError when the folder holds shards already, DataError for a sample that could not
    be read back.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise UsageError(f"{folder} holds shards already; delete them or choose another folder")
    paths: list[Path] = []
    stream = iter(samples)
    while batch := sorted(itertools.islice(stream, shard_size), key=lambda sample: sample.key):
        path = folder / f"{len(paths):05d}.tar"
        stats = json.dumps({"count": len(batch), "successes": len(batch)})
        _write_atomically(path, _shard_bytes(path, batch))
        _write_atomically(_stats_path(path), stats.encode())
        paths.append(path)
    return paths


def _shard_bytes(path: Path, samples: Sequence[ShardSample]) -> bytes:
    buffer, previous = BytesIO(), None
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for sample in samples:
            if sample.key == previous:
                raise DataError(f"{path}: the key {sample.key!r} is given twice")
            if (
                not sample.key
                or _key_and_ending(f"{sample.key}.x") != (sample.key, "x")
                or "\0" in sample.key
            ):
                raise DataError(f"{path}: the key {sample.key!r} is empty, hidden or has a dot")
            if sample.extension not in IMAGE_ENDINGS:
                raise DataError(
                    f"{path}: {sample.key!r} ends in {sample.extension!r}; known: {', '.join(IMAGE_ENDINGS)}"
                )
            previous = sample.key
            members = {sample.extension: sample.image}
            if sample.captions or sample.label is None:
                members["txt"] = "\n".join(clean_captions(sample.captions)[0]).encode()
            if sample.label is not None:
                members["cls"] = str(sample.label).encode()
            for ending, data in sorted(members.items()):
                member = tarfile.TarInfo(f"{sample.key}.{ending}")  # owner, group and time are 0
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    return buffer.getvalue()


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _stats_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}_stats.json")


class _Descriptor:
    """An open file that closes when its last user lets go; `pread` keeps no position, so forks may share it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=256)  # fewer than any system's limit of open files
def _descriptor(path: str, size: int, mtime_ns: int) -> _Descriptor:
    """The shard's file, opened on first use in each process; size and time tell its versions apart."""
    descriptor = _Descriptor(path)
    if os.fstat(descriptor.number).st_size != size:
        raise OSError("the shard has changed since it was indexed")
    return descriptor


@dataclass(eq=False)
class ShardSource:
    """The samples of tar shards in the shards' order; implements Source. Made by `open_shards`.

    shards: path, size in bytes and modification time of each. Only this index and the captions are held and
    pickled; a sample's id is `shard/key`.
    """

    name: str
    layout: str
    class_names: Sequence[str] = ()
    templates: Sequence[str] = ()
    fingerprint: str = ""
    problems: Sequence[BadSample] = field(init=False)
    shards: list[tuple[str, int, int]] = field(default_factory=list)
    _problems: list[BadSample] = field(default_factory=list)
    _ids: Texts = field(default_factory=Texts)
    _captions: Texts = field(default_factory=Texts)
    _labels: "array[int]" = field(default_factory=lambda: array("q"))
    _shard: "array[int]" = field(default_factory=lambda: array("l"))
    _offsets: "array[int]" = field(default_factory=lambda: array("q"))
    _sizes: "array[int]" = field(default_factory=lambda: array("q"))

    def __post_init__(self) -> None:
        self.problems = self._problems

    def __len__(self) -> int:
        return len(self._ids)

    def record(self, index: int) -> Record:
        captions, label = self._captions[index], self._labels[index]
        return Record(
            self._ids[index], tuple(captions.split("\n")) if captions else (), label if label >= 0 else None
        )

    def image(self, index: int) -> bytes:
        shard, size = self.shards[self._shard[index]], self._sizes[index]
        try:
            descriptor = _descriptor(
                *shard
            )  # held while reading: another thread may push it out of the cache
            data = os.pread(descriptor.number, size, self._offsets[index])
        except OSError as error:
            raise BadSample(self._ids[index], "unreadable", f"{shard[0]}: {error}") from error
        if len(data) != size:
            raise BadSample(self._ids[index], "unreadable", f"{shard[0]}: {len(data)} of {size} bytes")
        return data

    def _add(self, id: str, group: "_Group") -> None:
        """Takes one sample of the last shard, or says in `problems` why not; some problems leave it usable."""
        captions, reason = _captions(group.texts)
        label, members = -1, ", ".join(group.members)
        findings = [reason] if reason else []
        if "cls" in group.texts:
            label = _label(group.texts["cls"], len(self.class_names))
            findings += ["bad label"] if label < 0 else []
        if group.repeated:
            findings.append("member given twice")
        usable = group.size > 0 and (bool(captions) or label >= 0)
        if group.size <= 0:
            findings.append("empty file" if group.size == 0 else "no image")
        elif not usable and not findings:
            findings.append("empty caption" if group.texts else "no caption")
        self._problems += [BadSample(id, finding, f"has {members}") for finding in findings]
        if usable:
            self._ids.append(id)
            self._captions.append("\n".join(captions))
            self._labels.append(label)
            self._shard.append(len(self.shards) - 1)
            self._offsets.append(group.offset)
            self._sizes.append(group.size)


def names_shards(path: str) -> bool:
    """Whether a path means tar shards: one that is there, a range or join of them, or a folder that holds some."""
    several = "::" in path or (path.endswith(".tar") and "{" in path)
    foreign = path.startswith("pipe:") or "://" in path  # refused by `open_shards`, with the reason
    place = Path(path)
    return several or foreign or (place.suffix == ".tar" and place.is_file()) or bool(_shards_in(place))


def _shards_in(folder: Path) -> list[Path]:
    return sorted(shard for shard in folder.glob("*.tar") if not shard.name.startswith("."))


def open_shards(path: str) -> ShardSource:
    """The samples of a folder of shards, one shard, a range `x/{00000..00011}.tar`, or several joined by `::`.

    Raises DataError when a shard is missing, cut short or damaged, or holds another number of images than its
    `_stats.json` states; the message names the shard, what was expected and what was found.
    """
    paths = _expand(path)
    stems = [shard.stem for shard in paths]
    if len(set(stems)) < len(stems):  # joined folders number their shards alike
        common = os.path.commonpath([shard.parent.resolve() for shard in paths])
        stems = [shard.resolve().with_suffix("").relative_to(common).as_posix() for shard in paths]
    folder = Path(path) if Path(path).is_dir() else paths[0].parent
    source = ShardSource(
        name=paths[0].stem if len(paths) == 1 else folder.resolve().name,
        layout=f"{len(paths)} tar shard{'s' if len(paths) > 1 else ''}",
        class_names=_lines_beside(folder, "classnames.txt"),
        templates=[
            template.replace("{c}", "{}")
            for template in _lines_beside(folder, "zeroshot_classification_templates.txt")
        ],
    )
    digest = hashlib.sha256(repr((source.class_names, source.templates)).encode())
    for shard, stem in zip(paths, stems, strict=True):
        try:
            digest.update(_read_shard(source, shard, stem))
        except OSError as error:
            raise DataError(f"{shard}: it cannot be read: {error.strerror or error}") from error
    source.fingerprint = digest.hexdigest()
    return source


def _expand(path: str) -> list[Path]:
    """The shards that a path names, each checked to be there once."""
    paths: list[Path] = []
    for part in path.split("::"):
        if part.startswith("pipe:") or "://" in part:
            raise UsageError(
                f"{part}: only files are read, no commands and no addresses; fetch the shards first"
            )
        if Path(part).is_dir():
            found = _shards_in(Path(part))
            if not found:
                raise DataError(f"{part}: there is no .tar in this folder")
            paths += found
        else:
            paths += [Path(name) for name in _expand_braces(part)]
    missing = [str(shard) for shard in paths if not shard.is_file()]
    if missing:
        raise DataError(
            f"{path}: expected {len(paths)} shards, found {len(paths) - len(missing)}; "
            f"missing: {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
        )
    if len({shard.resolve() for shard in paths}) < len(paths):
        raise UsageError(f"{path}: a shard is named twice")
    return paths


def _expand_braces(path: str) -> list[str]:
    """`a{08..10}.tar` as a08.tar, a09.tar, a10.tar; `{x,y}` as both; several braces multiply."""
    brace = re.search(r"\{([^{}]*)\}", path)
    if not brace:
        return [path]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
    if bounds:
        names = [f"{i:0{len(bounds[1])}d}" for i in range(int(bounds[1]), int(bounds[2]) + 1)]
    else:
        names = brace[1].split(",")
    ends = _expand_braces(path[brace.end() :])
    return [path[: brace.start()] + name + end for name in names for end in ends]


def _lines_beside(folder: Path, name: str) -> list[str]:
    """The lines of CLIP_benchmark's file in the folder or its parent; none when there is no such file."""
    for file in (folder / name, folder.resolve().parent / name):
        if file.is_file():
            lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
            return [line.strip() for line in lines if line.strip()]
    return []


@dataclass(slots=True)
class _Group:
    """What a shard holds under one key; size -1: no image."""

    offset: int = 0
    size: int = -1
    texts: dict[str, bytes] = field(default_factory=dict)
    members: list[str] = field(default_factory=list)
    repeated: bool = False


def _read_shard(source: ShardSource, path: Path, stem: str) -> bytes:
    """Adds the shard's samples; returns a digest of its name, size, headers and texts."""
    file = _Descriptor(str(path))
    status = os.fstat(file.number)
    digest = hashlib.sha256(f"{stem} {status.st_size}".encode())
    groups: dict[str, _Group] = {}
    for member in walk(path, file.number, status.st_size, digest.update):
        key, ending = _key_and_ending(member.name)
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
            text = os.pread(file.number, min(member.size, MAX_TEXT_BYTES), member.offset)
            group.texts.setdefault(ending, text)
            digest.update(text)
    _check_stats(path, sum(group.size >= 0 for group in groups.values()))
    source.shards.append((str(path), status.st_size, status.st_mtime_ns))
    for key, group in groups.items():
        source._add(f"{stem}/{key}", group)
    return digest.digest()


def _check_stats(shard: Path, found: int) -> None:
    path = _stats_path(shard)
    if not path.is_file():
        return
    try:
        expected = json.loads(path.read_bytes())["successes"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged; write the shard again, or delete this file") from error
    if expected != found:
        raise DataError(
            f"{shard}: expected {expected} images by {path.name}, found {found}. Fetch the shard again, "
            f"or delete {path.name} if samples were left out on purpose"
        )


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


def _key_and_ending(name: str) -> tuple[str, str]:
    """webdataset's rule: ("a/0001", "jpg") for `./a/0001.JPG`; the key is empty for folders and hidden files."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, ending = file.partition(".")
    return (folder + slash + stem if stem else ""), ending.lower()
