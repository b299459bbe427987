"""The index of a set of shards, made from those of its shards in several processes.

Run as a module this is the process that indexes shards for another: a line of JSON in for each, a line out. Python's
own pools of processes would run a caller's script again in each process, or fork one that has threads.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from pathlib import Path

from threetowers.data.shards import remote
from threetowers.data.shards.columns import Columns
from threetowers.data.shards.index import (
    FRESH_SECONDS,
    Shard,
    check_stats,
    digest_of,
    found,
    index_folder,
    index_of,
    joined,
    kept,
    store_of,
    stored,
    stored_index,
)
from threetowers.errors import DataError
from threetowers.progress import Progress

WAIT_BYTES = 256 << 20
"""Of fresh shards; what is larger is worth the wait until it is old enough to be stored."""
PARALLEL_AFTER_SECONDS = 2.0
"""Work that would be done after this time ends sooner than other processes have started."""
DOWNLOADS = 4
"""Remote shards that are fetched at the same time."""


def find_shards(places: Sequence[tuple[str, str]], num_classes: int, title: str) -> list[Shard]:
    """The shards at paths or addresses, each given with its stem; remote ones never seen are fetched and indexed.

    Raises DataError when one is not there or cannot be read.
    """
    folders = {Path(place).parent for place, _ in places if not remote.is_address(place)}
    real = {folder: str(folder.resolve()) for folder in folders}
    unknown = [place for place, _ in places if remote.is_address(place) and not remote.known(place)]
    bar = Progress(f"{title}, fetching", len(unknown), "shards")
    lock, fetched = threading.Lock(), 0

    def find(given: tuple[str, str]) -> Shard:
        nonlocal fetched
        place, stem = given
        if not remote.is_address(place):
            return found(Path(place), stem, real[Path(place).parent])
        new = remote.known(place) is None
        note = remote.known(place) or remote.fetch(place)
        shard = Shard(place, stem, place, note.size, note.stamp, note.stats)
        if new:
            index_of(shard, num_classes)  # while it is surely there
            with lock:
                fetched += 1
                bar.update(fetched)
        return shard

    if not unknown:
        return [find(given) for given in places]
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        return list(pool.map(find, places))


def open_index(shards: Sequence[Shard], num_classes: int, title: str) -> Columns:
    """The index of a set of shards: mapped when it is in the cache, else made from what is missing there.

    num_classes: labels from here on are bad; 0: any label is taken. Raises DataError for a shard that cannot be
    read or holds another number of images than its `_stats.json` states.
    """
    if sum(shard.size for shard in shards if shard.fresh) > WAIT_BYTES:
        time.sleep(FRESH_SECONDS)
        shards = [replace(shard, fresh=False) for shard in shards]
    folder = None if any(shard.fresh for shard in shards) else index_folder()
    key = digest_of("set", [(shard.key(num_classes), shard.stats) for shard in shards])
    if folder and (whole := stored(folder, key, shards)):
        return whole
    parts = _indexes(shards, num_classes, title)
    for shard, part in zip(shards, parts, strict=True):
        check_stats(shard, part.number("images", 0))
    return parts[0] if len(parts) == 1 else kept(folder, key, joined(parts))


def _indexes(shards: Sequence[Shard], num_classes: int, title: str) -> list[Columns]:
    """The index of each shard: from the cache, by fetching remote ones, or by walking local ones."""
    done: list[Columns | None] = [stored_index(shard, num_classes) for shard in shards]
    missing = [place for place, index in enumerate(done) if index is None]
    work = _Work(title, [shards[place] for place in missing], num_classes)
    work.run()
    for place, index in zip(missing, work.indexes, strict=True):
        done[place] = index
    return [index for index in done if index is not None]


class _Work:
    """Shards to index, taken one by one by threads; one that goes wrong ends the work with its error."""

    def __init__(self, title: str, shards: Sequence[Shard], num_classes: int) -> None:
        self.title, self.shards, self.num_classes = title, shards, num_classes
        self.indexes: list[Columns | None] = [None] * len(shards)
        self._started, self._done = time.monotonic(), 0
        self._bar: Progress | None = None
        self._lock = threading.Lock()
        self._failed = False

    def run(self) -> None:
        far = [place for place, shard in enumerate(self.shards) if remote.is_address(shard.place)]
        near = sorted(set(range(len(self.shards))) - set(far))
        if far:
            self._in_threads(far, DOWNLOADS, processes=False)
        while near and not self._worth_processes(near):
            self._index(near.pop(0), None)
        if near:
            self._in_threads(near, len(os.sched_getaffinity(0)), processes=True)

    def _worth_processes(self, left: list[int]) -> bool:
        """Whether the rest would take longer alone than other processes take to start."""
        seconds = time.monotonic() - self._started
        slow = seconds > PARALLEL_AFTER_SECONDS
        return slow and seconds / max(self._done, 1) * len(left) > PARALLEL_AFTER_SECONDS

    def _in_threads(self, places: Sequence[int], most: int, *, processes: bool) -> None:
        queue = iter(places)

        def work() -> None:
            process = _start() if processes else None
            try:
                while not self._failed:
                    with self._lock:
                        place = next(queue, None)
                    if place is None:
                        return
                    self._index(place, process)
            except BaseException:
                self._failed = True
                raise
            finally:
                if process is not None:
                    process.communicate()  # the end of its input ends it

        num = min(most, len(places))
        with ThreadPoolExecutor(num) as pool:
            for future in [pool.submit(work) for _ in range(num)]:
                future.result()

    def _index(self, place: int, process: "subprocess.Popen[str] | None") -> None:
        shard = self.shards[place]
        if process is not None and store_of(shard) is not None:
            _ask(process, shard, self.num_classes)  # leaves the index in the cache
        self.indexes[place] = index_of(shard, self.num_classes)
        with self._lock:
            self._done += 1
            if self._bar is None and time.monotonic() - self._started > PARALLEL_AFTER_SECONDS:
                self._bar = Progress(self.title, len(self.shards), "shards", done=self._done)
            elif self._bar is not None:
                self._bar.update(self._done)


def _start() -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-P",
        "-m",
        "threetowers.data.shards.indexing",
    ]  # -P: no package of the current folder
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(process: "subprocess.Popen[str]", shard: Shard, num_classes: int) -> None:
    """Has the process index a shard; raises its DataError. A process that died leaves the shard to the caller."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps([astuple(shard), num_classes]) + "\n")
        process.stdin.flush()
    except OSError:
        return
    error = json.loads(process.stdout.readline() or "null")
    if error:
        raise DataError(error)


def _answer() -> None:
    for line in sys.stdin:
        shard, num_classes = json.loads(line)
        error = None
        try:
            index_of(Shard(*shard), num_classes)
        except DataError as problem:
            error = str(problem)
        print(json.dumps(error), flush=True)


if __name__ == "__main__":
    _answer()
