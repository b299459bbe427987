"""A strict reader of tar members: an archive that is damaged or cut short is an error, never a shorter list."""

import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from threetowers.errors import DataError

MAX_TEXT_BYTES = 1 << 20  # of a caption, label or metadata file; the rest is not read
_BLOCK = 512
_ZERO_BLOCK = bytes(_BLOCK)


class OpenFile:
    """An open file that is closed with its last reference. It is read with `pread`, so that forks can share it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Member(NamedTuple):
    """A file in a tar: its path there, and the position of its content in bytes; size -1: a link, without content."""

    name: str
    offset: int
    size: int


_REGULAR, _DIRECTORY, _LINKS, _EXTENDED = b"0\x007", b"5", b"12346", b"xgLK"
_PAX_KEYS = frozenset((*tarfile.PAX_FIELDS, "atime", "charset", "comment", "ctime", "hdrcharset"))
_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")


def walk(path: Path | str, file: int, file_size: int, digest: Callable[[bytes], None]) -> Iterator[Member]:
    """The files of a tar. Every header, every extent and the end are checked, and `digest` is called with the headers.

    The standard library's tarfile ends without an error at the first header that it cannot read, so that a damaged
    shard would come back short, and it takes three times as long.
    Raises DataError that says where the tar is damaged and how many files come before.
    """
    offset = count = 0
    override: dict[str, str] = {}  # name and size for the next member, from a GNU or PAX header
    while (header := os.pread(file, _BLOCK, offset)) != _ZERO_BLOCK:
        found = f"found {count} files in {file_size} bytes"
        if offset == 0 and header.startswith(b"version https://git-lfs"):
            raise DataError(
                f"{path}: it is a pointer of Git LFS, not the shard itself; fetch it with git lfs pull"
            )
        if len(header) < _BLOCK:
            raise _damaged(
                path, f"it is cut short: expected another file or the end mark at byte {offset}, {found}"
            )
        size, kind = _number(header[124:136]), header[156]
        if size is None or _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * 32:
            if offset == 0 and header.startswith(_COMPRESSED):
                raise DataError(f"{path}: it is compressed; unpack it to a plain .tar first")
            raise _damaged(path, f"expected a file's header at byte {offset}, {found} before it")
        digest(header)
        if kind not in _EXTENDED and "size" in override:
            size = _number(override["size"].encode(), base=10) or 0
        content = offset + _BLOCK
        offset = content + (0 if kind in _DIRECTORY + _LINKS else -(-size // _BLOCK) * _BLOCK)
        if offset > file_size:
            raise _damaged(path, f"it is cut short: a file needs the bytes up to {offset}, {found}")
        if kind in _EXTENDED:
            text = os.pread(file, min(size, MAX_TEXT_BYTES), content)
            digest(text)
            try:
                override |= _override(kind, text)
            except ValueError as error:
                raise _damaged(path, f"the extended header at byte {content} is damaged, {found}") from error
            continue
        count += 1
        if kind in _REGULAR + _LINKS:
            yield Member(override.get("path") or _name(header), content, size if kind in _REGULAR else -1)
        elif kind not in _DIRECTORY:
            raise _damaged(path, f"the file at byte {content} is of a kind ({chr(kind)!r}) that is not read")
        override = {}
    _check_end(path, file, offset, file_size, f"found {count} files in {file_size} bytes")


def _damaged(path: Path | str, what: str) -> DataError:
    return DataError(f"{path}: {what}. Fetch or write this shard again")


def _check_end(path: Path | str, file: int, offset: int, file_size: int, found: str) -> None:
    """Raises DataError unless the tar ends as it must: with two zero blocks, filled up to a record.

    Other data after them means that files are lost, and so do more zeros, which a download leaves that reserved its
    space and did not finish.
    """
    length = 0
    while chunk := os.pread(file, 1 << 20, offset + length):
        if chunk.count(0) != len(chunk):
            raise _damaged(path, f"it ends at byte {offset}, but more data follows; {found} before that")
        length += len(chunk)
    if length < 2 * _BLOCK or file_size % _BLOCK:
        raise _damaged(
            path, f"it is cut short: expected two empty blocks of 512 bytes at byte {offset}; {found}"
        )
    if length > 2 * _BLOCK + tarfile.RECORDSIZE:
        raise _damaged(path, f"it ends at byte {offset}, but {length} zeros follow; {found} before that")


def _override(kind: int, content: bytes) -> dict[str, str]:
    """The `path` and `size` that a GNU or PAX header states for the next member; raises ValueError if damaged."""
    if kind in b"Kg":  # a link's target, and defaults for all members
        return {}
    if kind in b"L":
        return {"path": content.partition(b"\0")[0].decode(errors="replace")}
    fields: dict[str, str] = {}
    while content:
        length = int(content.partition(b" ")[0])
        record, content = content[:length], content[max(length, 1) :]
        key, equals, value = record.partition(b" ")[2].decode(errors="replace").partition("=")
        is_pax = key in _PAX_KEYS or ("." in key and not key.startswith("GNU.sparse"))
        if not (equals and value.endswith("\n") and is_pax):
            raise ValueError(key)
        fields[key] = value[:-1]
    return {key: fields[key] for key in ("path", "size") if key in fields}


def _number(field: bytes, base: int = 8) -> int | None:
    """A number in a header, in digits or in GNU's base 256; None when it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    try:
        return int(digits, base) if digits.isdigit() else None if digits else 0
    except ValueError:  # an 8 or 9 among octal digits
        return None


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode(errors="replace")
