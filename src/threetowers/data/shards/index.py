"""What lies where in tar shards, so that a set is walked once and from then on only mapped.

Each shard's index is a file of columns in the cache folder, named by the shard's real path, size and time of
change; the indexes of a set are laid end to end in one more file. Whatever is wrong with such a file, it is made anew.
"""

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from threetowers.data.order import hash64
from threetowers.data.shards import remote
from threetowers.data.shards.columns import Column, Columns, packed, write_columns
from threetowers.data.shards.groups import Found, Shelf
from threetowers.data.shards.remote import shown
from threetowers.data.shards.tar import OpenFile
from threetowers.errors import BadSample, DataError
from threetowers.files import cache_folder, replacing

VERSION = 1
FRESH_SECONDS = 2.0
"""A shard written so lately may be written again within one tick of its file's clock: its index is not stored."""

# n samples, S shards, q problems. Texts are UTF-8 laid end to end; their ends count from the start of the column.
COLUMNS = {
    "keys_ends": "I64", "captions_ends": "I64", "problems_ends": "I64",  # [n], [n], [3 q]: id, reason, detail
    "offsets": "I64", "sizes": "I64",  # [n], where the image lies in its shard
    "draws": "U64",  # [n], the hash by which `split` draws for seed 0
    "counts": "I64", "images": "I64",  # [S], usable samples; all images, as `_stats.json` counts them
    "labels": "I32",  # [n], -1: none
    "keys": "U8", "captions": "U8", "problems": "U8", "digests": "U8",  # digests: [32 S]
}  # fmt: skip
_PER_SAMPLE = ("keys_ends", "captions_ends", "offsets", "sizes", "draws", "labels")


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar as it was found: where it lies, how the ids of its samples begin, and what tells its versions apart.

    place: its path or address. identity: its real path or address. stamp: its time of change in ns, or the first
    digits of a fetched shard's digest. stats: what its `_stats.json` says. fresh: whether it was just written.
    """

    place: str
    stem: str
    identity: str
    size: int
    stamp: int
    stats: str = ""
    fresh: bool = False

    def key(self, num_classes: int) -> str:
        return digest_of("shard", self.identity, self.size, self.stamp, self.stem, num_classes)

    def opened(self, *, checked: bool = False) -> OpenFile:
        """The shard's file, a remote one fetched; raises OSError when it is another than was found.

        checked: hold a fetched shard against its whole digest, not its size alone.
        """
        if remote.is_address(self.place):
            return remote.opened(self.place, self.size, self.stamp, checked=checked)
        file = OpenFile(self.place)
        status = os.fstat(file.number)
        changed = status.st_mtime_ns != self.stamp and not self.fresh  # some disks round fresh times later
        if changed or status.st_size != self.size:
            raise OSError("the shard has changed since it was indexed")
        return file


def digest_of(*parts: object) -> str:
    """The key of an index: a hex digest of what it was made from and of the index format."""
    return hashlib.sha256(repr((VERSION, *parts)).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def found(path: Path, stem: str, real_folder: str) -> Shard:
    """The shard at a path, as the file system states it; real_folder: the real path of the folder it lies in."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: it cannot be read: {error.strerror or error}") from error
    identity = os.path.realpath(path) if path.is_symlink() else f"{real_folder}/{path.name}"
    stats = path.with_name(f"{path.stem}_stats.json")
    text = stats.read_text("utf-8", "replace") if stats.is_file() else ""
    fresh = status.st_mtime > time.time() - FRESH_SECONDS
    return Shard(str(path), stem, identity, status.st_size, status.st_mtime_ns, text, fresh)


def index_of(shard: Shard, num_classes: int) -> Columns:
    """The index of one shard, stored or made; raises DataError when the shard cannot be read."""
    whole = stored_index(shard, num_classes)
    return whole or kept(store_of(shard), shard.key(num_classes), read_shard(shard, num_classes))


def stored_index(shard: Shard, num_classes: int) -> Columns | None:
    """The shard's index when the cache holds one that is sound."""
    folder = store_of(shard)
    return stored(folder, shard.key(num_classes), [shard]) if folder else None


def store_of(shard: Shard) -> Path | None:
    """The folder for the shard's index; None when it must stay in memory."""
    return None if shard.fresh else index_folder()


def index_folder() -> Path | None:
    """Where indexes are kept; None, with a warning, when that cannot be written."""
    folder = cache_folder() / "index"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        warnings.warn(
            f"{folder} cannot be written, so shards are indexed anew each time they are opened; "
            "set THREETOWERS_CACHE to another folder",
            stacklevel=2,
        )
        return None
    return folder


def kept(folder: Path | None, key: str, columns: dict[str, Column]) -> Columns:
    """The columns as an index under the folder, in memory without one; raises DataError when the disk refuses."""
    if folder is None:
        return Columns(packed(key, columns), key)
    path = folder / f"{key}.safetensors"
    try:
        with replacing(path) as file:
            write_columns(file, key, columns)
    except OSError as error:
        raise DataError(
            f"{path}: the index cannot be written ({error.strerror or error}); "
            "make room, or set THREETOWERS_CACHE to another folder"
        ) from error
    return Columns(path, key)


def stored(folder: Path, key: str, shards: Sequence[Shard]) -> Columns | None:
    """The index under this key; None when there is none or it does not describe these shards soundly."""
    path = folder / f"{key}.safetensors"
    if not path.is_file():
        return None
    try:
        columns = Columns(path, key)
        return columns if _is_sound(columns, shards) else None
    except DataError:
        return None


def _is_sound(columns: Columns, shards: Sequence[Shard]) -> bool:
    """Whether counts agree; for a single shard also whether every image lies in it (else seen to when it is read)."""
    if columns.names() != set(COLUMNS) or columns.length("counts") != len(shards):
        return False
    counts = columns.array("counts")
    num = int(counts.sum())
    sound = bool((counts >= 0).all()) and all(columns.length(name) == num for name in _PER_SAMPLE)
    sound &= columns.length("images") == len(shards) and columns.length("digests") == 32 * len(shards)
    sound &= columns.length("problems_ends") % 3 == 0
    if sound and len(shards) == 1:
        offsets, sizes = columns.array("offsets"), columns.array("sizes")
        sound = bool(((offsets > 0) & (sizes > 0) & (offsets <= shards[0].size - sizes)).all())
    return sound


def read_shard(shard: Shard, num_classes: int) -> dict[str, Column]:
    """The columns of one shard, by walking it."""
    try:
        file = shard.opened(checked=True)
        shelf = Shelf(shown(shard.place), file.number, shard.stem)
        status = os.fstat(file.number)
    except OSError as error:
        raise DataError(f"{shown(shard.place)}: it cannot be read: {error.strerror or error}") from error
    if status.st_size != shard.size:
        raise DataError(f"{shown(shard.place)}: it changes while it is read; open it when it is complete")
    samples: list[Found] = []
    problems: list[str] = []
    for sample in shelf.samples(num_classes):
        if isinstance(sample, BadSample):
            problems += [f"{shard.stem}/{sample.id}", sample.reason, sample.detail]
        else:
            samples.append(sample)
    columns = {
        "offsets": [sample.offset for sample in samples],
        "sizes": [sample.size for sample in samples],
        "draws": [hash64("split", 0, f"{shard.stem}/{sample.key}") for sample in samples],
        "labels": [sample.label for sample in samples],
        "counts": [len(samples)],
        "images": [shelf.images],
        "digests": list(shelf.digest),
    }
    out = {
        name: _column(COLUMNS[name], np.array(values, _NUMPY[COLUMNS[name]]))
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


def joined(parts: Sequence[Columns]) -> dict[str, Column]:
    """The columns of a set from those of its shards, one shard in memory at a time."""

    def values(name: str) -> Iterator[np.ndarray]:
        base = 0
        for part in parts:
            yield part.array(name) + base if name.endswith("_ends") else part.array(name)
            base += part.length(name.removesuffix("_ends"))

    return {
        name: Column(dtype, sum(part.length(name) for part in parts), values(name))
        for name, dtype in COLUMNS.items()
    }


def check_stats(shard: Shard, images: int) -> None:
    """Compares a shard's images with the count that img2dataset wrote beside it; raises DataError when they differ."""
    if not shard.stats:
        return
    folder, _, file = shown(shard.place).rpartition("/")
    name = f"{file.removesuffix('.tar')}_stats.json"
    try:
        expected = json.loads(shard.stats)["successes"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder}/{name} is damaged; write the shard again, or delete this file") from error
    if expected != images:
        raise DataError(
            f"{shown(shard.place)}: expected {expected} images by {name}, found {images}. Fetch the shard again, "
            f"or delete {name} if samples were left out on purpose"
        )
