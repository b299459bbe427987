"""Shards at addresses that fsspec reads (`s3://`, `https://`, `file://` …), fetched whole into a folder of the cache.

The size and sha256 of a shard are noted when it is first fetched, and the note is kept when the shard is evicted. A
shard that is fetched again must agree with its note: an address whose content has changed is an error.
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
from threetowers.files import HELD, cache_folder, digest_file, replacing, write_whole

DEFAULT_CACHE_GB = 100.0
ATTEMPTS = 3
PAUSE_SECONDS = 1.0
"""Before the second attempt; four times as long before the third."""
ABANDONED_SECONDS = 24 * 3600.0
_PIECE = 1 << 20
T = TypeVar("T")

_open: "weakref.WeakValueDictionary[str, OpenFile]" = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Note:
    """What is noted about a shard when it is first fetched. stats: the text of its `_stats.json`, if it has one."""

    size: int
    sha256: str
    stats: str

    @property
    def stamp(self) -> int:
        """The first 60 bits of the digest."""
        return int(self.sha256[:15], 16)


def is_address(place: str) -> bool:
    """Whether a place is an address such as s3://…, and not a path."""
    return "://" in place


def redacted(address: str) -> str:
    """The address without its user, password and query, which may be secret. A path stays as it is."""
    if not is_address(address):
        return address
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def read_note(address: str) -> Note | None:
    """The note about a shard; None when it was never fetched, or when the note is damaged."""
    try:
        note = Note(**json.loads(_note(address).read_bytes()))
        int(note.sha256[:15], 16)
    except (OSError, ValueError, TypeError):
        return None
    return note if isinstance(note.size, int) and isinstance(note.stats, str) else None


def fetch(address: str) -> Note:
    """Fetches a shard unless it is in the cache; raises DataError when that fails."""
    with _locked(address):
        note = read_note(address)
        if note is None or _size(_local(address)) != note.size:
            note = _download(address, note)
    return note


def open_fetched(address: str, size: int, stamp: int, *, checked: bool = False) -> OpenFile:
    """Opens a shard of the cache, which is fetched when it is missing. An open shard is not evicted by this process.

    size, stamp: of the shard that was indexed; raises DataError when its address holds another by now.
    checked: compare the whole content with the noted digest, and fetch the shard again when it differs.
    """
    for _ in range(ATTEMPTS):
        note = fetch(address)
        if (note.size, note.stamp) != (size, stamp):
            raise _changed(address)
        path = _local(address)
        try:
            # Only a complete copy ever replaces the file, so what is opened after the check is sound too.
            is_sound = not checked or digest_file(path) == note.sha256
            file = OpenFile(str(path))
            os.utime(path)  # eviction starts with the oldest time
        except FileNotFoundError:  # another process has evicted it since
            continue
        if is_sound and os.fstat(file.number).st_size == size:
            _open[str(path)] = file
            return file
        path.unlink(missing_ok=True)
    raise DataError(
        f"{redacted(address)}: its copy at {_local(address)} does not stay whole; check that disk"
    )


def text_beside(address: str, name: str) -> str:
    """The text of a small file in the folder of a shard or one level up, fetched once; empty when there is none."""
    folder = address.partition("?")[0].rpartition("/")[0]
    copy = _folder() / f"{_key(folder)}-{name}"
    if copy.is_file():
        return copy.read_text("utf-8-sig", "replace")
    data = b""
    for place in (folder, folder.rpartition("/")[0]):
        data = data or (_small_file(f"{place}/{name}") if is_address(f"{place}/") else b"")
    write_whole(copy, data)
    return copy.read_text("utf-8-sig", "replace")


def _small_file(address: str) -> bytes:
    """The first mebibyte of a file; empty when it is not there."""

    def read(file: BinaryIO, size: int | None) -> bytes:
        return file.read(_PIECE)

    try:
        return _read(address, read)
    except FileNotFoundError:
        return b""


def _download(address: str, note: Note | None) -> Note:
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
        raise DataError(f"{redacted(address)}: there is no such shard") from error
    if note is None:
        bare, mark, query = address.partition("?")
        stats = _small_file(f"{bare.removesuffix('.tar')}_stats.json{mark}{query}")
        note = Note(size, sha256, stats.decode("utf-8", "replace"))
        write_whole(_note(address), json.dumps(asdict(note)))
    return note


def _changed(address: str) -> DataError:
    return DataError(
        f"{redacted(address)}: it is another file than when it was indexed. If that is meant, "
        f"delete {_note(address)} and start anew; results from before do not belong to it"
    )


def _read(address: str, read: Callable[[BinaryIO, int | None], T]) -> T:
    """What `read` makes of the open file and its size (None: unknown).

    Raises FileNotFoundError when there is no such file, and DataError when the last of several attempts fails.
    """
    try:
        import fsspec
    except ImportError as error:
        raise UsageError(
            f"{redacted(address)}: reading an address needs fsspec; pip install 'threetowers[remote]'"
        ) from error
    try:
        system, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:  # no such protocol, or one whose own package is missing
        raise UsageError(f"{redacted(address)}: {error}") from error
    for attempt in range(ATTEMPTS):
        try:
            with system.open(path, "rb") as file:
                return read(file, getattr(file, "size", None))
        except (FileNotFoundError, ThreeTowersError):
            raise
        except Exception as error:  # each protocol's package has errors of its own
            if attempt == ATTEMPTS - 1:
                reason = str(error).replace(address, redacted(address)) or type(error).__name__
                raise DataError(
                    f"{redacted(address)}: it cannot be fetched, {ATTEMPTS} times tried: {reason}"
                ) from error
            time.sleep(PAUSE_SECONDS * 4**attempt)
    raise AssertionError("unreachable")


def make_room(size: int, address: str) -> None:
    """Evicts the least recently used shards until `size` more bytes fit; never one that this process has open."""
    limit = _limit()
    if size > limit:
        raise DataError(
            f"{redacted(address)}: {size / 1e9:.1f} GB are more than the cache may hold ({limit / 1e9:g} GB); "
            "set THREETOWERS_CACHE_GB higher"
        )
    copies = []
    for path in _folder().iterdir():
        try:
            status = path.stat()
            if path.suffix == ".tmp" and status.st_mtime < time.time() - ABANDONED_SECONDS:
                path.unlink()
            elif path.suffix == ".tar":
                copies.append((status.st_mtime_ns, status.st_size, path))
        except FileNotFoundError:  # another process has evicted it
            continue
    total = size + sum(size for _, size, _ in copies)
    for _, freed, path in sorted(copies):
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


def _folder() -> Path:
    folder = cache_folder() / "remote"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be made ({error.strerror}); set THREETOWERS_CACHE to another folder"
        ) from error
    if not os.access(folder, os.W_OK):
        raise DataError(f"{folder} cannot be written; set THREETOWERS_CACHE to another folder")
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
    """Lets one process or thread at a time fetch a shard; the others wait and then find it in the cache."""
    with (_folder() / f"{_key(address)}.lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno in HELD:
                raise
            # a file system without locks: two may fetch the same shard, and each replaces it whole
        yield
