"""Files that appear whole or not at all, their digests, and the header of safetensors files.

Everything that the project writes goes through here: runs, stores, checkpoints, indexes and reports.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

HEADER_LENGTH = 8
"""Bytes that state the length of a safetensors header, little-endian."""

HELD = (errno.EACCES, errno.EAGAIN)
"""Errors of a lock that another process has; with any other, the file system has no locks."""


def cache_folder() -> Path:
    """The folder for what can be made again, such as indexes: `$THREETOWERS_CACHE`, else `~/.cache/threetowers`."""
    given = os.environ.get("THREETOWERS_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "threetowers"


def nearest_folder(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists: the disk that will hold what is written there."""
    absolute = path.absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.exists())


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` when the block ends, and leaves nothing behind when it fails.

    sync: wait until the content and the name are on the disk, so that a power failure loses neither.
    """
    with writing_aside(path, sync=sync) as temporary, temporary.open("w+b") as file:
        yield file


@contextlib.contextmanager
def writing_aside(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """As `replacing`, for writers that take a path: the block writes to the path that it is given."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.touch()
        mode = (
            temporary.stat().st_mode
        )  # as the umask says; some libraries write files that only their owner may read
        yield temporary
        temporary.chmod(mode)
        if sync:
            sync_to_disk(temporary)
        temporary.replace(path)
        if sync:
            sync_to_disk(path.parent)
    except OSError as error:
        if error.filename == str(temporary):  # the name that the user knows
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes, *, sync: bool = False) -> None:
    """Writes a small file in one piece; text is UTF-8, and lone surrogates pass. See `replacing`."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    with replacing(path, sync=sync) as file:
        file.write(data)


def sync_to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_entries(
    tensors: Mapping[str, tuple[str, Sequence[int], int]],
) -> tuple[dict[str, dict[str, Any]], int]:
    """The entries of a safetensors header for tensors laid end to end, and the bytes that they take together.

    tensors: dtype in the format's names (F32, I64 …), shape and size in bytes by name, in the order in which they lie.
    Format: https://github.com/huggingface/safetensors.

    >>> tensor_entries({"a": ("U8", [2], 2), "b": ("U8", [1], 1)})[0]["b"]
    {'dtype': 'U8', 'shape': [1], 'data_offsets': [2, 3]}
    """
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        start, end = end, end + size
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return entries, end


def pack_header(text: str) -> bytes:
    """A safetensors header as it stands in the file: its length, then its JSON, padded to a multiple of 8 bytes."""
    data = text.encode()
    data += b" " * (-len(data) % HEADER_LENGTH)
    return len(data).to_bytes(HEADER_LENGTH, "little") + data


def unpack_header(content: memoryview, largest: int) -> tuple[dict[str, Any], int]:
    """The JSON of a safetensors header, and where the tensors begin; content: the file, or its first bytes.

    Raises ValueError when there is no header, when it is longer than `largest` bytes, or when it is no JSON object.
    """
    size = int.from_bytes(content[:HEADER_LENGTH], "little")
    if not 0 < size <= min(len(content) - HEADER_LENGTH, largest):
        raise ValueError("it has no header")
    header = json.loads(bytes(content[HEADER_LENGTH : HEADER_LENGTH + size]))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, HEADER_LENGTH + size


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the safetensors library raises about the disk into the OSError that it stands for, naming `path`."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from None
