"""Shards at addresses that fsspec reads (`s3://`, `https://`, `file://` …), fetched whole into a folder of the cache.

A shard is taken to be as it was when it was first fetched: its size and sha256 are noted then and outlive it, so
that it can be evicted and fetched again, and an address that comes to hold something else is an error.
"""

import fcntl
import hashlib
import json
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from threetowers.data.shards.tar import OpenFile
from threetowers.errors import DataError, ThreeTowersError, UsageError
from threetowers.files import cache_folder, replacing

DEFAULT_CACHE_GB = 100.0
ATTEMPTS = 3
PAUSE_SECONDS = 1.0
"""Before the second attempt; four times as long before the third."""
ABANDONED_SECONDS = 24 * 3600.0
_PIECE = 1 << 20
T = TypeVar("T")

_open: "weakref.WeakValueDictionary[str, OpenFile]" = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Fetched:
    """What is noted of a shard when it is first fetched; stats: the text of its `_stats.json`, empty without one."""

    size: int
    sha256: str
    stats: str

    @property
    def stamp(self) -> int:
        """The first 60 bits of the digest."""
        return int(self.sha256[:15], 16)


def is_address(place: str) -> bool:
    """Whether a place is an address, as s3://…, and no path."""
    return "://" in place


def shown(address: str) -> str:
    """The address without what may be secret in it: user, password and query. A path stays as it is."""
    if not is_address(address):
        return address
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def known(address: str) -> Fetched | None:
    """What was noted of a shard when it was first fetched; None when it never was, or the note is damaged."""
    try:
        note = Fetched(**json.loads(_note(address).read_bytes()))
        int(note.sha256[:15], 16)
    except (OSError, ValueError, TypeError):
        return None
    return note if isinstance(note.size, int) and isinstance(note.stats, str) else None


def fetch(address: str) -> Fetched:
    """Fetches a shard unless it lies in the cache already; raises DataError when that cannot be done."""
    with _locked(address):
        note = known(address)
        if note is None or _size(_local(address)) != note.size:
            note = _download(address, note)
    return note


def opened(address: str, size: int, stamp: int, *, checked: bool = False) -> OpenFile:
    """A fetched shard, open, so that this process does not evict it; raises DataError when it is another by now.

    checked: hold it against its digest, and fetch it anew when it differs.
    """
    for _ in range(ATTEMPTS):
        note = fetch(address)
        if (note.size, note.stamp) != (size, stamp):
            raise _changed(address)
        path = _local(address)
        try:
            file = OpenFile(str(path))
            os.utime(path)  # eviction goes by it
        except FileNotFoundError:  # another process has evicted it since
            continue
        if os.fstat(file.number).st_size == size and not (checked and _digest(file) != note.sha256):
            _open[str(path)] = file
            return file
        path.unlink(missing_ok=True)
    raise DataError(f"{shown(address)}: its copy at {_local(address)} does not stay whole; check that disk")


def text_beside(address: str, name: str) -> str:
    """The text of a small file in the shard's folder or its parent, empty when there is none; asked for once."""
    folder = address.partition("?")[0].rpartition("/")[0]
    copy = _folder() / f"{_key(folder)}-{name}"
    if copy.is_file():
        return copy.read_text("utf-8-sig", "replace")
    data = b""
    for place in (folder, folder.rpartition("/")[0]):
        data = data or (_small_file(f"{place}/{name}") if is_address(f"{place}/") else b"")
    with replacing(copy) as file:
        file.write(data)
    return copy.read_text("utf-8-sig", "replace")


def _small_file(address: str) -> bytes:
    """The first mebibyte of a file; empty when it is not there."""

    def read(file: BinaryIO, size: int | None) -> bytes:
        return file.read(_PIECE)

    try:
        return _read(address, read)
    except FileNotFoundError:
        return b""


def _download(address: str, note: Fetched | None) -> Fetched:
    path = _local(address)

    def copy(source: BinaryIO, size: int | None) -> tuple[int, str]:
        make_room(size or 0, address)
        digest, length = hashlib.sha256(), 0
        with replacing(path) as file:
            while piece := source.read(_PIECE):
                file.write(piece)
                digest.update(piece)
                length += len(piece)
            if size is not None and length != size:
                raise OSError(f"expected {size} bytes, found {length}")
            if note is not None and digest.hexdigest() != note.sha256:
                raise _changed(address)
        return length, digest.hexdigest()

    try:
        size, sha256 = _read(address, copy)
    except FileNotFoundError as error:
        raise DataError(f"{shown(address)}: there is no such shard") from error
    if note is None:
        bare, mark, query = address.partition("?")
        stats = _small_file(f"{bare.removesuffix('.tar')}_stats.json{mark}{query}")
        note = Fetched(size, sha256, stats.decode("utf-8", "replace"))
        with replacing(_note(address)) as file:
            file.write(json.dumps(asdict(note)).encode())
    return note


def _changed(address: str) -> DataError:
    return DataError(
        f"{shown(address)}: it is another file than when it was indexed. If that is meant, "
        f"delete {_note(address)} and start anew; results from before do not belong to it"
    )


def _read(address: str, read: Callable[[BinaryIO, int | None], T]) -> T:
    """What `read` makes of the open file and its size; raises FileNotFoundError, else DataError after the last try."""
    try:
        import fsspec
    except ImportError as error:
        raise UsageError(
            f"{shown(address)}: reading an address needs fsspec; pip install 'threetowers[remote]'"
        ) from error
    try:
        system, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:  # no such protocol, or one whose own package is missing
        raise UsageError(f"{shown(address)}: {error}") from error
    for attempt in range(ATTEMPTS):
        try:
            with system.open(path, "rb") as file:
                return read(file, getattr(file, "size", None))
        except (FileNotFoundError, ThreeTowersError):
            raise
        except Exception as error:  # each protocol's package has errors of its own
            if attempt == ATTEMPTS - 1:
                reason = str(error).replace(address, shown(address)) or type(error).__name__
                raise DataError(
                    f"{shown(address)}: it cannot be fetched, {ATTEMPTS} times tried: {reason}"
                ) from error
            time.sleep(PAUSE_SECONDS * 4**attempt)
    raise AssertionError("unreachable")


def make_room(size: int, address: str) -> None:
    """Evicts the shards not used for longest until `size` more bytes fit; never one that this process has open."""
    limit = _limit()
    if size > limit:
        raise DataError(
            f"{shown(address)}: {size / 1e9:.1f} GB are more than the cache may hold ({limit / 1e9:g} GB); "
            "set THREETOWERS_CACHE_GB higher"
        )
    kept = []
    for path in _folder().iterdir():
        try:
            status = path.stat()
            if path.suffix == ".tmp" and status.st_mtime < time.time() - ABANDONED_SECONDS:
                path.unlink()
            elif path.suffix == ".tar":
                kept.append((status.st_mtime_ns, status.st_size, path))
        except FileNotFoundError:  # another process has evicted it
            continue
    total = size + sum(size for _, size, _ in kept)
    for _, freed, path in sorted(kept):
        if total <= limit:
            return
        if str(path) not in _open:
            path.unlink(missing_ok=True)
            total -= freed


def _limit() -> float:
    text = os.environ.get("THREETOWERS_CACHE_GB", "") or str(DEFAULT_CACHE_GB)
    try:
        limit = float(text) * 1e9
    except ValueError:
        limit = -1.0
    if not limit > 0:
        raise UsageError(f"THREETOWERS_CACHE_GB is {text!r}; give a number of gigabytes above 0")
    return limit


def _digest(file: OpenFile) -> str:
    digest, offset = hashlib.sha256(), 0
    while piece := os.pread(file.number, _PIECE, offset):
        digest.update(piece)
        offset += len(piece)
    return digest.hexdigest()


def _folder() -> Path:
    folder = cache_folder() / "remote"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be made ({error.strerror}); set THREETOWERS_CACHE to another folder"
        ) from error
    return folder


def _key(address: str) -> str:
    return hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _local(address: str) -> Path:
    return _folder() / f"{_key(address)}.tar"


def _note(address: str) -> Path:
    return _folder() / f"{_key(address)}.json"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


@contextmanager
def _locked(address: str) -> Iterator[None]:
    """Lets one process or thread at a time fetch a shard; the others find it there."""
    with (_folder() / f"{_key(address)}.lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
