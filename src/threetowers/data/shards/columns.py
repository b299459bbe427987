"""A file of columns in the layout of safetensors, which is mapped into memory and verified by checksums.

Such a file lies in a cache, where it can be damaged or replaced. The header holds a checksum of itself and of each
mebibyte of the columns. No byte is used before its mebibyte has been verified, once in each process.
"""

import io
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from threetowers.errors import DataError
from threetowers.files import HEADER_LENGTH, pack_header, tensor_entries, unpack_header

FORMAT = "threetowers columns 1"
CHUNK = 1 << 20
CHECKED_AT_OPENING = 128 * CHUNK
"""A file up to this size is verified when it is opened, which takes 0.05 s; a larger one when it is used."""
_MAX_HEADER = 64 << 20
_DTYPES: dict[str, "np.dtype[Any]"] = {
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}
_CODES = {"I64": "q", "U64": "Q", "I32": "i", "U8": "B"}


class Column(NamedTuple):
    """A column to write: its dtype, its length, and the arrays that it is the concatenation of."""

    dtype: str
    length: int
    parts: Iterable[np.ndarray]


def write_columns(file: BinaryIO, key: str, columns: Mapping[str, Column]) -> None:
    """Writes the columns one part at a time; `key` says what they describe and must be given to read them."""
    ordered = sorted(columns.items(), key=lambda item: -_DTYPES[item[1].dtype].itemsize)  # keeps all aligned
    header, end = tensor_entries(
        {
            name: (column.dtype, [column.length], column.length * _DTYPES[column.dtype].itemsize)
            for name, column in ordered
        }
    )
    file.write(_header(header, key, [0] * -(-end // CHUNK)))
    sums, filled = [], 0
    running = 0
    for _, column in ordered:
        length = 0
        for part in column.parts:
            data = np.ascontiguousarray(part, _DTYPES[column.dtype]).data.cast("B")
            length += len(part)
            file.write(data)
            while data.nbytes:
                piece = data[: CHUNK - filled]
                running, filled = zlib.crc32(piece, running), filled + piece.nbytes
                data = data[piece.nbytes :]
                if filled == CHUNK:
                    sums.append(running)
                    running = filled = 0
        assert length == column.length
    file.seek(0)
    file.write(_header(header, key, sums + ([running] if filled else [])))


def _header(columns: Mapping[str, Any], key: str, sums: list[int]) -> bytes:
    """The header, with a checksum of itself; its length does not depend on the values of the sums."""

    def pack(own_sum: int) -> bytes:
        about = {
            "format": FORMAT,
            "key": key,
            "chunks": "".join([f"{s:08x}" for s in sums]),
            "header": f"{own_sum:08x}",
        }
        return pack_header(json.dumps({"__metadata__": about, **columns}))

    return pack(zlib.crc32(pack(0)[HEADER_LENGTH:]))


class Columns:
    """The columns of a file, or of bytes of the same layout. The pickle of a file's columns is its path.

    A mapped file counts as an open one until `release`. Raises DataError, here and in every method, when the file is
    damaged, of another format or of another key.
    """

    def __init__(self, place: Path | bytes, key: str) -> None:
        self._open(place, key)
        if self._data.nbytes <= CHECKED_AT_OPENING:
            self._check(0, self._data.nbytes)

    def _open(self, place: Path | bytes, key: str) -> None:
        self.place, self.key = place, key
        try:
            raw = (
                np.memmap(place, np.uint8, "r") if isinstance(place, Path) else np.frombuffer(place, np.uint8)
            )
        except OSError as error:
            raise DataError(f"{place!s}: it cannot be read: {error.strerror or error}") from error
        except ValueError as error:  # numpy cannot map an empty file
            raise self._damaged(str(error)) from error
        whole = memoryview(raw)  # type: ignore[arg-type]
        try:
            header, start = unpack_header(whole, _MAX_HEADER)
            about = header.pop("__metadata__")
            self._sums = [int(about["chunks"][at : at + 8], 16) for at in range(0, len(about["chunks"]), 8)]
            valid = about["format"] == FORMAT and about["key"] == key
            valid = valid and _header(header, key, self._sums) == bytes(whole[:start])
            self._data = whole[start:]
            bounds = {name: entry["data_offsets"] for name, entry in header.items()}
            valid = valid and len(self._sums) == -(-self._data.nbytes // CHUNK)
            if not valid or max([0, *(end for _, end in bounds.values())]) != self._data.nbytes:
                raise ValueError("of another version, about other data or cut short")
            self._starts = {name: start for name, (start, _) in bounds.items()}
            self._views: dict[str, memoryview[int]] = {
                name: self._data[slice(*bounds[name])].cast(_CODES[entry["dtype"]])  # type: ignore[call-overload]
                for name, entry in header.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise self._damaged(f"its header cannot be used ({error})") from error
        self._checked = bytearray(len(self._sums))

    def __getstate__(self) -> tuple[Path | bytes, str]:
        return self.place, self.key

    def __setstate__(self, state: tuple[Path | bytes, str]) -> None:
        self._open(*state)

    def release(self) -> None:
        """Unmaps the file, once no array of it is in use; it is mapped again, and verified again, when it is needed."""
        if isinstance(self.place, Path):
            self._views, self._data = _Unmapped(self), memoryview(b"")

    def names(self) -> set[str]:
        return set(self._starts)

    def length(self, name: str) -> int:
        return len(self._views[name])

    def number(self, name: str, index: int) -> int:
        """One number of a column; index: 0 or more. Raises IndexError."""
        view = self._views[name]
        start = self._starts[name] + index * view.itemsize
        if index < len(view) and not self._checked[start // CHUNK]:
            self._check(start, start + 1)
        return int(view[index])

    def text(self, name: str, index: int) -> str:
        """One text of the column `name`; the column `name_ends` says where each text ends."""
        end = self.number(f"{name}_ends", index)
        start = self.number(f"{name}_ends", index - 1) if index else 0
        if not 0 <= start <= end <= len(self._views[name]):
            raise self._damaged(f"the {name} of sample {index} lie outside of it")
        self._check(self._starts[name] + start, self._starts[name] + end)
        return str(self._views[name][start:end], "utf-8", "surrogatepass")

    def array(self, name: str) -> np.ndarray:
        """A whole column, as a read-only view of the mapped file."""
        view = self._views[name]
        self._check(self._starts[name], self._starts[name] + view.nbytes)
        return np.frombuffer(view, np.dtype(view.format))

    def _check(self, start: int, stop: int) -> None:
        """Verifies the checksum of every chunk with bytes from start to stop, each chunk once."""
        for chunk in range(start // CHUNK, -(-stop // CHUNK)):
            if not self._checked[chunk]:
                if zlib.crc32(self._data[chunk * CHUNK : (chunk + 1) * CHUNK]) != self._sums[chunk]:
                    raise self._damaged(f"the bytes from {chunk * CHUNK} of its data have changed")
                self._checked[chunk] = 1

    def _damaged(self, what: str) -> DataError:
        name = self.place if isinstance(self.place, Path) else "an index in memory"
        return DataError(f"{name}: {what}. Delete this file and start again: it is made anew")


class _Unmapped(dict[str, "memoryview[int]"]):
    """The views of columns whose file is not mapped: the first that is asked for maps it."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    def __missing__(self, name: str) -> "memoryview[int]":
        self._columns._open(self._columns.place, self._columns.key)
        return self._columns._views[name]


def pack_columns(key: str, columns: Mapping[str, Column]) -> bytes:
    """The content of the file that `write_columns` writes, for `Columns` in memory."""
    file = io.BytesIO()
    write_columns(file, key, columns)
    return file.getvalue()
