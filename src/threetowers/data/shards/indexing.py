"""Makes the index of a set of shards: remote shards in threads, local ones here or in several processes.

The processes come from joblib (loky) and start as clean interpreters. Those of `multiprocessing` would run the caller's
script again, or be forks of a process that may have threads.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from threetowers.data.shards import remote
from threetowers.data.shards.groups import Reading
from threetowers.data.shards.handles import read_extent
from threetowers.data.shards.index import (
    FRESH_SECONDS,
    Shard,
    TarIndex,
    check_stats,
    folder_for,
    index_folder,
    index_key,
    index_shard,
    join_columns,
    load_index,
    load_shard_index,
    save_index,
    stat_shard,
)
from threetowers.progress import Progress

WAIT_BYTES = 256 << 20
"""For more bytes of fresh shards it pays to wait until they are old enough for their indexes to be stored."""
PARALLEL_AFTER_SECONDS = 2.0
"""Work that takes less time than this ends sooner than other processes have started."""
DOWNLOADS = 4
"""Remote shards that are fetched at the same time."""
T = TypeVar("T")
R = TypeVar("R")


def find_shards(places: Sequence[tuple[str, str]], reading: Reading, title: str) -> list[Shard]:
    """The shards at paths or addresses, each given with its stem.

    Remote shards are fetched and indexed if they never were. Raises DataError when a shard cannot be read.
    """
    folders = {Path(place).parent for place, _ in places if not remote.is_address(place)}
    real = {folder: str(folder.resolve()) for folder in folders}
    num_unknown = sum(remote.is_address(place) and not remote.read_note(place) for place, _ in places)
    bar = Progress(f"{title}, fetching", num_unknown, "shards")
    lock, num_fetched = threading.Lock(), 0

    def find(given: tuple[str, str]) -> Shard:
        nonlocal num_fetched
        place, stem = given
        if not remote.is_address(place):
            return stat_shard(Path(place), stem, real[Path(place).parent])
        known = remote.read_note(place)
        note = known or remote.fetch(place)
        shard = Shard(place, stem, place, note.size, note.stamp, note.stats)
        if known is None:
            index_shard(shard, reading)  # at once, since the shard may be evicted
            with lock:
                num_fetched += 1
                bar.update(num_fetched)
        return shard

    return _in_threads(find, places) if num_unknown else [find(given) for given in places]


def open_index(shards: Sequence[Shard], reading: Reading, title: str) -> TarIndex:
    """The index of a set of shards: loaded from the cache, or made from the indexes of its shards.

    Raises DataError for a shard that cannot
    be read or has not as many images as its `_stats.json` says.
    """
    if sum(shard.size for shard in shards if shard.fresh) > WAIT_BYTES:
        time.sleep(FRESH_SECONDS)
        shards = [replace(shard, fresh=False) for shard in shards]
    folder = None if any(shard.fresh for shard in shards) else index_folder()
    key = index_key("set", [(shard.key(reading), shard.stats) for shard in shards])
    if folder and (index := load_index(folder, key, shards)):
        return index
    indexes = _Work(title, shards, reading).run()
    for shard, index in zip(shards, indexes, strict=True):
        check_stats(shard, index)
        index.columns.release()  # a set can have more shards than files may be open

    def read(number: int, offset: int, size: int) -> bytes:
        return read_extent(shards[number], offset, size)

    return save_index(folder, key, join_columns(indexes, read))


class _Work:
    """The indexing of those shards of a set whose indexes the cache does not hold."""

    def __init__(self, title: str, shards: Sequence[Shard], reading: Reading) -> None:
        self.title, self.shards, self.reading = title, shards, reading
        self._start = time.monotonic()
        self._indexes: dict[int, TarIndex] = {}
        self._num_missing = self._num_done = 0
        self._bar: Progress | None = None
        self._lock = threading.Lock()

    def run(self) -> list[TarIndex]:
        """The index of each shard; the first error ends the work."""
        for number, shard in enumerate(self.shards):
            if index := load_shard_index(shard, self.reading):
                self._keep(number, index)
        missing = [number for number in range(len(self.shards)) if number not in self._indexes]
        self._start, self._num_missing = time.monotonic(), len(missing)
        far = [number for number in missing if remote.is_address(self.shards[number].place)]
        _in_threads(self._index, far)
        near = [number for number in missing if number not in self._indexes]
        while near and not self._worth_processes(len(near)):
            self._index(near.pop(0))
        if near:
            self._index_in_processes([number for number in near if folder_for(self.shards[number])])
        for number in near:
            if number not in self._indexes:
                self._index(number)
        return [self._indexes[number] for number in range(len(self.shards))]

    def _worth_processes(self, num_left: int) -> bool:
        """Whether the rest would take longer here than other processes take to start."""
        seconds = time.monotonic() - self._start
        slow = seconds > PARALLEL_AFTER_SECONDS
        return slow and seconds / max(self._num_done, 1) * num_left > PARALLEL_AFTER_SECONDS

    def _index_in_processes(self, numbers: Sequence[int]) -> None:
        """Indexes shards in several processes; where that fails, the shards that are left stay without index."""
        import joblib  # here, since it takes 20 ms that most commands can do without
        from joblib.externals.loky import get_reusable_executor

        tasks = (joblib.delayed(_store_index)(n, self.shards[n], self.reading) for n in numbers)
        num_jobs = min(joblib.cpu_count(), max(len(numbers), 1))
        try:
            pool = joblib.Parallel(
                num_jobs, "loky", batch_size=1, max_nbytes=None, return_as="generator_unordered"
            )
            for number in pool(tasks):
                self._index(number)
        except (BrokenProcessPool, OSError):  # a process died, or none could be started
            return
        finally:
            get_reusable_executor().shutdown()  # else the processes would stay for minutes

    def _keep(self, number: int, index: TarIndex) -> None:
        index.columns.release()  # a set can have more shards than files may be open
        self._indexes[number] = index

    def _index(self, number: int) -> None:
        self._keep(number, index_shard(self.shards[number], self.reading))
        with self._lock:
            self._num_done += 1
            if self._bar is None and time.monotonic() - self._start > PARALLEL_AFTER_SECONDS:
                self._bar = Progress(self.title, self._num_missing, "shards", done=self._num_done)
            elif self._bar is not None:
                self._bar.update(self._num_done)


def _store_index(number: int, shard: Shard, reading: Reading) -> int:
    """Leaves the index of a shard in the cache, and returns the shard's number; runs in another process."""
    index_shard(shard, reading)
    return number


def _in_threads(do: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """What `do` returns for each item, computed by several threads; an error cancels the items that wait."""
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        try:
            return list(pool.map(do, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
