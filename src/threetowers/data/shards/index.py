"""The index of tar shards: the position, captions and label of every sample, made once and kept in the cache folder.

Each shard's index is a file of columns whose name depends on the shard's real path, size and time of change. The
indexes of a set are concatenated in one more file. An index that is missing, damaged or out of date is made again.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from threetowers.data.copies import find_copies
from threetowers.data.order import hash64
from threetowers.data.shards import remote
from threetowers.data.shards.columns import Column, Columns, pack_columns, write_columns
from threetowers.data.shards.groups import Reading, TarSample, read_groups
from threetowers.data.shards.remote import redacted
from threetowers.data.shards.tar import OpenFile
from threetowers.errors import BadSample, DataError
from threetowers.files import cache_folder, replacing
from threetowers.progress import warn_once

VERSION = 4
FRESH_SECONDS = 2.0
"""A shard written less long ago may be written again with the same time of change, so its index is not stored."""

# n samples, S shards, q problems. Texts are concatenated in UTF-8; a text's end counts from the start of the column.
COLUMNS = {
    "keys_ends": "I64", "captions_ends": "I64", "problems_ends": "I64",  # [n], [n], [3 q]: id, reason, detail
    "offsets": "I64", "sizes": "I64",  # [n], position of the image in its shard in bytes
    "draws": "U64",  # [n], the hash by which `split` draws for seed 0
    "counts": "I64", "images": "I64",  # [S], usable samples; all images, as `_stats.json` counts them
    "labels": "I32",  # [n], -1: none
    "keys": "U8", "captions": "U8", "problems": "U8", "digests": "U8",  # digests: [32 S]
}  # fmt: skip
SHARD_COLUMNS = COLUMNS | {"pictures": "U64"}
"""A shard has in addition the `middle_key` of each image, [n]."""
SET_COLUMNS = COLUMNS | {"copies": "I64", "firsts": "I64"}
"""A set has in addition, of the m samples with the image of an earlier one, their numbers and those of the first; [m].
The draw of such a sample is that of the first."""
_PER_SAMPLE = ("keys_ends", "captions_ends", "offsets", "sizes", "draws", "labels", "pictures")


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar file and its version.

    place: its path or address. stem: what the ids of its samples begin with. identity: its real path or address.
    stamp: its time of change in ns, or the first digits of a fetched shard's digest. stats: the text of its
    `_stats.json`. fresh: whether it was written less than FRESH_SECONDS ago.
    """

    place: str
    stem: str
    identity: str
    size: int
    stamp: int
    stats: str = ""
    fresh: bool = False

    def key(self, reading: Reading) -> str:
        """The name of the shard's index."""
        read = (reading.num_classes, reading.caption_keys)
        return index_key("shard", self.identity, self.size, self.stamp, self.stem, *read)

    def open(self, *, checked: bool = False) -> OpenFile:
        """Opens the shard, which is fetched if it is remote; raises OSError when it has changed.

        checked: verify the whole digest of a fetched shard, not only its size.
        """
        if remote.is_address(self.place):
            return remote.open_fetched(self.place, self.size, self.stamp, checked=checked)
        file = OpenFile(self.place)
        status = os.fstat(file.number)
        changed = status.st_mtime_ns != self.stamp and not self.fresh  # some file systems round times later
        if changed or status.st_size != self.size:
            raise OSError("the shard has changed since it was indexed")
        return file


class TarIndex:
    """The index of one shard or of a set of them; raises DataError where its file is damaged.

    columns: as in COLUMNS. They are mapped from a file, so that the pickle of an index is a path.
    """

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.num_copies = columns.length("copies") if "copies" in columns.names() else 0

    def __reduce__(self) -> tuple[type["TarIndex"], tuple[Columns]]:
        return TarIndex, (self.columns,)

    def __len__(self) -> int:
        return self.columns.length("labels")

    @property
    def counts(self) -> np.ndarray:
        """The number of samples in each shard, int64 [S]."""
        return self.columns.array("counts")

    @property
    def digests(self) -> bytes:
        """The digests of the shards, one after the other."""
        return self.columns.array("digests").tobytes()

    @property
    def draws(self) -> np.ndarray:
        """`hash64("split", 0, id)` of every sample, uint64 [n]."""
        return self.columns.array("draws")

    def key(self, index: int) -> str:
        return self.columns.text("keys", index)

    def captions(self, index: int) -> tuple[str, ...]:
        captions = self.columns.text("captions", index)
        return tuple(captions.split("\n")) if captions else ()

    def label(self, index: int) -> int | None:
        label = self.columns.number("labels", index)
        return label if label >= 0 else None

    @cached_property
    def _copies(self) -> np.ndarray:
        return self.columns.array("copies")

    def first(self, index: int) -> int:
        """The number of the first sample with the same image, which can be the sample itself."""
        if not self.num_copies:
            return index
        place = int(self._copies.searchsorted(index))
        is_copy = place < self.num_copies and self._copies[place] == index
        return self.columns.number("firsts", place) if is_copy else index

    def extent(self, index: int) -> tuple[int, int]:
        """Offset and size in bytes of the sample's image in its shard."""
        return self.columns.number("offsets", index), self.columns.number("sizes", index)

    @property
    def num_problems(self) -> int:
        return self.columns.length("problems_ends") // 3

    def problem(self, index: int) -> BadSample:
        return BadSample(*(self.columns.text("problems", 3 * index + part) for part in range(3)))


def index_key(*parts: object) -> str:
    """The name of an index: a hex digest of what it was made from and of the format's version."""
    return hashlib.sha256(repr((VERSION, *parts)).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def stat_shard(path: Path, stem: str, real_folder: str) -> Shard:
    """The shard at a path; real_folder: the real path of its folder. Raises DataError when it cannot be read."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: it cannot be read: {error.strerror or error}") from error
    identity = os.path.realpath(path) if path.is_symlink() else f"{real_folder}/{path.name}"
    stats = path.with_name(f"{path.stem}_stats.json")
    text = stats.read_text("utf-8", "replace") if stats.is_file() else ""
    fresh = status.st_mtime > time.time() - FRESH_SECONDS
    return Shard(str(path), stem, identity, status.st_size, status.st_mtime_ns, text, fresh)


def index_shard(shard: Shard, reading: Reading) -> TarIndex:
    """The index of one shard, loaded or made; raises DataError when the shard cannot be read."""
    index = load_shard_index(shard, reading)
    return index or save_index(folder_for(shard), shard.key(reading), read_shard(shard, reading))


def load_shard_index(shard: Shard, reading: Reading) -> TarIndex | None:
    """The shard's index when the cache holds one that is sound."""
    folder = folder_for(shard)
    return load_index(folder, shard.key(reading), [shard]) if folder else None


def folder_for(shard: Shard) -> Path | None:
    """The folder for the shard's index; None when the index must stay in memory."""
    return None if shard.fresh else index_folder()


def index_folder() -> Path | None:
    """The folder of the indexes; None, with a line on standard error, when it cannot be written."""
    folder = cache_folder() / "index"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        warn_once(
            f"{folder} cannot be written, so shards are indexed again each time they are opened; "
            "set THREETOWERS_CACHE to another folder"
        )
        return None
    return folder


def save_index(folder: Path | None, key: str, columns: dict[str, Column]) -> TarIndex:
    """Writes an index and maps it; without a folder it stays in memory. Raises DataError when it cannot be written."""
    if folder is None:
        return TarIndex(Columns(pack_columns(key, columns), key))
    path = folder / f"{key}.safetensors"
    try:
        with replacing(path) as file:
            write_columns(file, key, columns)
    except OSError as error:
        raise DataError(
            f"{path}: the index cannot be written ({error.strerror or error}); "
            "make room, or set THREETOWERS_CACHE to another folder"
        ) from error
    return TarIndex(Columns(path, key))


def load_index(folder: Path, key: str, shards: Sequence[Shard]) -> TarIndex | None:
    """The index under this key; None when there is none, or when it is damaged or does not fit the shards."""
    path = folder / f"{key}.safetensors"
    if not path.is_file():
        return None
    try:
        columns = Columns(path, key)
        return TarIndex(columns) if _is_sound(columns, shards) else None
    except DataError:
        return None


def _is_sound(columns: Columns, shards: Sequence[Shard]) -> bool:
    """Whether the counts agree and, for a single shard, every image lies inside it.

    The images of a set of shards are checked when they are read.
    """
    names = columns.names()
    if names not in (set(SHARD_COLUMNS), set(SET_COLUMNS)) or columns.length("counts") != len(shards):
        return False
    if "copies" in names and columns.length("copies") != columns.length("firsts"):
        return False
    counts = columns.array("counts")
    num = int(counts.sum())
    sound = bool((counts >= 0).all()) and all(
        columns.length(name) == num for name in _PER_SAMPLE if name in names
    )
    sound &= columns.length("images") == len(shards) and columns.length("digests") == 32 * len(shards)
    sound &= columns.length("problems_ends") % 3 == 0
    if sound and len(shards) == 1:
        offsets, sizes = columns.array("offsets"), columns.array("sizes")
        sound = bool(((offsets > 0) & (sizes > 0) & (offsets <= shards[0].size - sizes)).all())
    return sound


def read_shard(shard: Shard, reading: Reading) -> dict[str, Column]:
    """The columns of one shard, made by reading it; raises DataError when it cannot be read."""
    place = redacted(shard.place)
    try:
        file = shard.open(checked=True)
        groups = read_groups(place, file.number, shard.stem)
        status = os.fstat(file.number)
    except OSError as error:
        raise DataError(f"{place}: it cannot be read: {error.strerror or error}") from error
    if status.st_size != shard.size:
        raise DataError(f"{place}: it changes while it is read; open it when it is complete")
    samples: list[TarSample] = []
    problems: list[str] = []
    for sample in groups.samples(reading):
        if isinstance(sample, BadSample):
            problems += [f"{shard.stem}/{sample.id}", sample.reason, sample.detail]
        else:
            samples.append(sample)
    columns = {
        "offsets": [sample.offset for sample in samples],
        "sizes": [sample.size for sample in samples],
        "draws": [hash64("split", 0, f"{shard.stem}/{sample.key}") for sample in samples],
        "pictures": [sample.picture for sample in samples],
        "labels": [sample.label for sample in samples],
        "counts": [len(samples)],
        "images": [groups.num_images],
        "digests": list(groups.digest),
    }
    out = {
        name: _column(SHARD_COLUMNS[name], np.array(values, _NUMPY[SHARD_COLUMNS[name]]))
        for name, values in columns.items()
    }
    for name, texts in (
        ("keys", [sample.key for sample in samples]),
        ("captions", ["\n".join(sample.captions) for sample in samples]),
        ("problems", problems),
    ):
        data = [text.encode("utf-8", "surrogatepass") for text in texts]
        out[name] = _column("U8", np.frombuffer(b"".join(data), np.uint8))
        out[f"{name}_ends"] = _column("I64", np.cumsum([len(text) for text in data], dtype=np.int64))
    return out


_NUMPY = {"I64": np.int64, "U64": np.uint64, "I32": np.int32, "U8": np.uint8}


def _column(dtype: str, values: np.ndarray) -> Column:
    return Column(dtype, len(values), [values])


def join_columns(indexes: Sequence[TarIndex], read: Callable[[int, int, int], bytes]) -> dict[str, Column]:
    """The columns of a set, made from the indexes of its shards with few of them in memory at a time.

    read: the image at an offset in bytes and of a size in a shard, given by its number; raises OSError.
    """
    parts = [index.columns for index in indexes]

    def values(name: str) -> Iterator[np.ndarray]:
        base = 0
        for part in parts:
            yield part.array(name) + base if name.endswith("_ends") else part.array(name)
            base += part.length(name.removesuffix("_ends"))
            part.release()

    lengths = dict.fromkeys(SHARD_COLUMNS, 0)
    for part in parts:
        for name in SHARD_COLUMNS:
            lengths[name] += part.length(name)
        part.release()

    def whole(name: str) -> np.ndarray:
        column, start = np.empty(lengths[name], _NUMPY[SHARD_COLUMNS[name]]), 0
        for part in values(name):
            column[start : start + len(part)] = part
            start += len(part)
        return column

    joined = {name: Column(dtype, lengths[name], values(name)) for name, dtype in COLUMNS.items()}
    ends, offsets, sizes = whole("counts").cumsum(), whole("offsets"), whole("sizes")

    def read_image(index: int) -> bytes:
        return read(int(ends.searchsorted(index, "right")), int(offsets[index]), int(sizes[index]))

    copies, firsts = find_copies(sizes, whole("pictures").__getitem__, read_image)
    if len(copies):
        draws = whole("draws")
        draws[copies] = draws[firsts]
        joined["draws"] = _column("U64", draws)
    return joined | {"copies": _column("I64", copies), "firsts": _column("I64", firsts)}


def check_stats(shard: Shard, index: TarIndex) -> None:
    """Raises DataError when a shard has not as many images as img2dataset's `_stats.json` beside it says."""
    images = index.columns.number("images", 0)
    if not shard.stats:
        return
    folder, _, file = redacted(shard.place).rpartition("/")
    name = f"{file.removesuffix('.tar')}_stats.json"
    try:
        expected = json.loads(shard.stats)["successes"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder}/{name} is damaged; write the shard again, or delete this file") from error
    if expected != images:
        raise DataError(
            f"{redacted(shard.place)}: expected {expected} images by {name}, found {images}. Fetch the shard again, "
            f"or delete {name} if samples were left out on purpose"
        )
