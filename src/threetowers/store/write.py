"""An unfinished store, which survives kills and which several processes can fill.

The file has its final size and layout from the start. The work is divided into chunks of samples. Each chunk is written
to its place, synced to the disk, and marked as done by a small file. A process continues with the chunks that have no
marker.

The processes may be on several machines with one file system. Clients of a network file system remember for seconds
that a file was not there, and keep the pages of files that they have read. So markers are listed, not asked for one by
one, and the file is opened for writing alone until it is complete.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from threetowers.errors import BadSample, DataError, UsageError
from threetowers.files import digest_file, sync_to_disk, write_whole
from threetowers.store.read import (
    DESCRIPTION_FILE,
    FEATURES_FILE,
    Contents,
    Layout,
    Store,
    is_store,
    layout,
)

BAD_FILE = "bad_samples.jsonl"
_WIDE_FILE = "too-wide"


@dataclass(frozen=True)
class Work:
    """An unfinished store: the file at its final size, and a marker for each chunk that is in it."""

    folder: Path
    contents: Contents
    chunk: int

    @property
    def layout(self) -> Layout:
        return layout(self.contents)

    @property
    def path(self) -> Path:
        return self.folder / FEATURES_FILE

    def samples(self, number: int) -> range:
        return range(number * self.chunk, min((number + 1) * self.chunk, self.contents.num_samples))

    def marker(self, number: int) -> Path:
        return self.folder / "chunks" / f"{number:06d}.json"

    @property
    def num_chunks(self) -> int:
        return -(-self.contents.num_samples // self.chunk)

    def missing(self) -> list[int]:
        """The chunks that are not finished; raises FileNotFoundError where the work is no longer there."""
        names = {path.name for path in (self.folder / "chunks").iterdir()}
        return [number for number in range(self.num_chunks) if self.marker(number).name not in names]

    def begin(self, first: np.ndarray | None) -> "Work":
        """Makes the file, or checks that what is there is the same work; any number of processes may do so at once.

        Returns the work with the chunks of what is there, which another number of processes may have begun.
        """
        plan = self.folder / "plan.json"
        mine, chunk = self.contents.as_dict(), self.chunk
        if plan.is_file():
            found = json.loads(plan.read_text(encoding="utf-8"))
            chunk = int(found.get("chunk", chunk))
            differing = [
                key for key in mine if key != "spec" and json.loads(json.dumps(mine[key])) != found.get(key)
            ]
            if differing:
                raise UsageError(
                    f"{self.folder}: unfinished work on other embeddings ({', '.join(differing)} differ); "
                    "delete that folder, or give another --out"
                )
        else:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            free, size = shutil.disk_usage(self.folder.parent).free, self.layout.size
            if free < size:
                raise DataError(
                    f"{self.folder.parent}: the embeddings take {size / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are "
                    "free; give a folder on a larger disk"
                )
        (self.folder / "chunks").mkdir(parents=True, exist_ok=True)
        with _opened(self.path, os.O_WRONLY | os.O_CREAT) as file:
            os.ftruncate(file, self.layout.size)
            os.pwrite(file, self.layout.header, 0)
            if first is not None:
                os.pwrite(file, first.tobytes(), self.layout.slots["first"].offset)
            os.fsync(file)
        write_whole(plan, json.dumps({**mine, "chunk": chunk}), sync=True)
        return replace(self, chunk=chunk)

    def write(
        self,
        number: int,
        arrays: Mapping[str, np.ndarray],
        starts: Mapping[str, int],
        bad: Sequence[BadSample],
    ) -> None:
        """Puts a chunk's arrays at their rows of the file, and marks it when they are on the disk."""
        if self.marker(number).is_file():
            return  # another process did the same chunk
        with _opened(self.path, os.O_WRONLY) as file:
            for key, array in arrays.items():
                slot = self.layout.slots[key]
                row = slot.size // max(slot.shape[0], 1)
                _write_at(file, np.ascontiguousarray(array).tobytes(), slot.offset + starts[key] * row)
            os.fsync(file)
        lines = [{"id": each.id, "reason": each.reason, "detail": each.detail} for each in bad]
        write_whole(self.marker(number), json.dumps(lines, ensure_ascii=False), sync=True)

    def too_wide(self) -> bool:
        return (self.folder / _WIDE_FILE).is_file()

    def mark_too_wide(self) -> None:
        """Tells every process at this work that it has to be done in fp32."""
        with contextlib.suppress(
            FileNotFoundError
        ):  # another process has finished the store in fp32, and this folder is gone
            (self.folder / _WIDE_FILE).touch()


def even_chunk(num: int, processes: int, most: int, multiple: int) -> int:
    """Samples in a chunk, at most `most`, of which as many processes as can be get equally many.

    multiple: of which it is one, up to `most`.

    >>> even_chunk(40_000, 8, 4_096, 16), even_chunk(40, 8, 4_096, 16)
    (2512, 16)
    """
    rounds = max(-(-num // (processes * most)), 1)
    share = max(-(-num // (processes * rounds)), 1)
    return min(-(-share // multiple) * multiple, most)


@contextlib.contextmanager
def unless_made(out: Path) -> Iterator[None]:
    """A block that ends without an error where its files are gone since another process has made the store of them."""
    try:
        yield
    except FileNotFoundError:
        if not is_store(out):
            raise


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """The file's descriptor. Errors of calls on it name the path, which those of the system do not."""
    file = os.open(path, flags, 0o666)  # less what the umask takes
    try:
        yield file
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(file)


def _write_at(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def finish(work: Work, out: Path) -> Store:
    """Makes a store of finished work; of several processes that do so at once the first one's stays."""
    store = Store(work.folder, work.contents)
    if not store.usable.any():
        shutil.rmtree(work.folder)
        raise DataError(
            f"{work.contents.spec}: not one of {work.contents.num_samples} samples could be read and embedded"
        )
    lines = [
        line
        for number in range(work.num_chunks)
        for line in json.loads(work.marker(number).read_text("utf-8"))
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(work.folder / BAD_FILE, text, sync=True)
    described = work.contents.as_dict() | {
        "num_usable": int(store.usable.sum()),
        "mean_square_norm": store.mean_square_norm(),
        "sha256": digest_file(work.path),
    }
    description = json.dumps(described, indent=2, ensure_ascii=False)
    write_whole(work.folder / DESCRIPTION_FILE, description, sync=True)
    try:
        work.folder.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST) or not is_store(out):
            raise
    sync_to_disk(out.parent)
    shutil.rmtree(out / "chunks", ignore_errors=True)
    (out / "plan.json").unlink(missing_ok=True)
    for kind in ("fp16", "bf16"):
        shutil.rmtree(out.parent / f".{out.name}.{kind}.partial", ignore_errors=True)
    return Store(out, work.contents)
