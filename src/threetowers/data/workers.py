"""Reads ahead in worker processes, in order, whatever becomes of a worker.

A worker can die, hang, run out of memory or shared memory, or fail with an error that cannot be pickled. Each of these
ends in a result, in a restart where the work was, or in an error of one line; none leaves the caller waiting.
"""

import io
import math
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling
from torch.utils.data._utils.worker import ManagerWatchdog
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from threetowers.errors import DataError, ThreeTowersError
from threetowers.progress import warn, warn_once

MAX_DEATHS = 3  # of workers in a row, before anything arrives
STALL_SECONDS = 30.0
HUNG_SECONDS = 1_800.0  # then the workers are ended, and started again
REMEDY = "give fewer --inputs.workers (`embed`: --workers; a finished run: inputs.workers in its config.toml), or 0"
PICKLE_PROTOCOL = 5
SMALL_BYTES = 2**19
"""Tensors up to this size travel among the bytes of an item. For each in shared memory the worker is asked for a file,
and it answers only between two steps of its reading."""

K = TypeVar("K", contravariant=True)
T = TypeVar("T", covariant=True)


_sharers = 1


def share_workers(processes: int) -> None:
    """From now on `read_ahead` starts its share of the loader workers, as so many processes like this one read."""
    global _sharers
    _sharers = processes


class Reads(Protocol[K, T]):
    """What makes an item of a task; picklable where worker processes do not fork."""

    def __getitem__(self, task: K, /) -> T: ...


def read_ahead(
    reads: Reads[K, T],
    tasks: Sequence[K],
    workers: int,
    *,
    name: str,
    first: int = 0,
    pin_memory: bool = False,
    say: Callable[[str], None] = warn,
) -> Iterator[T]:
    """The items of the tasks in their order, read ahead by worker processes; 0 workers: read in this one.

    When workers die or hang, all are started again at the first item that has not arrived. name: of the data, for
    messages. first: the number of the first task in messages. say: called with messages about workers and about items
    that are late. Raises the errors of reading that a user can correct, and DataError when workers keep failing.
    """
    done = deaths = 0
    shared = True
    workers = -(-workers // _sharers)  # none stays none, and some stay at least one
    while workers and done < len(tasks):
        try:
            iterator = _start(_Packing(reads, name, shared), tasks[done:], workers, pin_memory)
        except (OSError, ImportError, RuntimeError) as error:  # no process, thread or semaphore to be had
            warn_once(
                f"loader workers cannot be started ({error}); reading without them. To avoid this, {REMEDY}",
                say,
            )
            break
        with _Watch(iterator, say, can_block=not pin_memory) as watch:
            while done < len(tasks):
                try:
                    packed = watch.next()
                    item = packed.take()
                except Exception as error:  # reading raises nothing here: the item could not be delivered
                    reason = watch.ended or str(error).partition("\n")[0] or type(error).__name__
                    break
                if isinstance(item, Exception):
                    raise item
                if packed.short and shared:
                    shared = False
                    warn_once(_short_of_shared_memory(packed.short), say)
                yield item
                done, deaths = done + 1, 0
            else:
                return
            watch.broken = True
        deaths += 1
        shared = shared and "DataLoader worker" in reason and "Bus error" not in reason
        if deaths == MAX_DEATHS:
            raise DataError(
                f"{name}: loader workers died {deaths} times in a row before batch {first + done}: {reason}. Usually "
                f"memory is short: {REMEDY}"
            )
        say(f"a loader worker died ({reason}); starting again at batch {first + done}")
    for task in tasks[done:]:
        item = reads[task]
        yield item.pin_memory() if pin_memory else item  # type: ignore[attr-defined]


def _short_of_shared_memory(reason: str) -> str:
    return (
        f"shared memory is short, so loader workers send batches through pipes, which is slower ({reason}). Give "
        "/dev/shm more room (a container: docker run --shm-size 8g), or fewer --inputs.workers"
    )


def _start(packing: "_Packing", tasks: Sequence[Any], workers: int, pin_memory: bool) -> "_Loading":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
        loader: DataLoader[Any] = DataLoader(
            packing,  # type: ignore[arg-type]
            sampler=tasks,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # the loader must not draw from the generator that dropout uses
            pin_memory=pin_memory,
            worker_init_fn=_end_with_parent,
        )
    iterator = _Loading(loader)
    _keep_worker_deaths_to_the_queue()
    return iterator


def _end_with_parent(worker: int) -> None:
    """Ends this loader worker soon after its parent, however that ended.

    torch's worker leaves its loop then, and waits at its end until all that it has made is read. The pipe for it stays
    open in the other workers, so that they would wait for each other.
    """

    def watch() -> None:
        watchdog = ManagerWatchdog()  # type: ignore[no-untyped-call]
        while watchdog.is_alive():  # type: ignore[no-untyped-call]
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Loading(_MultiProcessingDataLoaderIter):
    """The iterator of a DataLoader, which can also be left without asking its workers to stop."""

    _shutdown = True
    """Until torch has made its queues; it would look for them when it is deleted."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._workers: list[Any] = []
        self._index_queues: list[Any] = []
        self._worker_pids_set = False
        try:
            super().__init__(loader)
        except BaseException:
            self.leave()
            raise

    def kill(self) -> None:
        """Ends the workers that live."""
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()

    def leave(self) -> None:
        """Ends the workers; torch itself would take locks for that which a dead worker may hold."""
        self.kill()
        self._shutdown = True
        for queue in self._index_queues:
            queue.cancel_join_thread()
            queue.close()
        if self._worker_pids_set:
            signal_handling._remove_worker_pids(id(self))  # type: ignore[attr-defined]
            self._worker_pids_set = False


def _as_it_is(item: Any) -> Any:
    return item


class _Packing:
    """The dataset of a loader: items that are pickled already, errors among them.

    torch pickles in a thread of the worker. An item that this thread cannot pickle, or has no shared memory for, never
    arrives, and the caller waits for ever.
    """

    def __init__(self, reads: Reads[Any, Any], name: str, shared: bool) -> None:
        self._reads, self._name, self._shared = reads, name, shared

    def __getitem__(self, task: Any) -> "_Packed":
        try:
            return _pack(self._reads[task], self._shared)
        except ThreeTowersError as error:
            return _pack(error, False)
        except OSError as error:
            return _pack(OSError(error.errno, error.strerror or str(error), error.filename), False)
        except (Exception, SystemExit) as error:
            return _pack(self._failure(error), False)

    def _failure(self, error: BaseException) -> DataError:
        if isinstance(error, MemoryError):
            return DataError(f"{self._name}: a loader worker found no memory; {REMEDY}, or a smaller batch")
        text = str(error).strip().partition("\n")[0][:300]
        frames = traceback.extract_tb(error.__traceback__)
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        return DataError(
            f"{self._name}: a loader worker failed with {type(error).__name__}: {text}{where}. With --inputs.workers 0 "
            "the whole traceback is shown"
        )


class _Packed:
    """An item on its way from a worker. short: why its tensors travel among the bytes, where shared memory failed."""

    def __init__(self, data: bytes, short: str = "") -> None:
        self.data, self.short = data, short
        self._taken: Any = None
        self._error: Exception | None = None

    def take(self) -> Any:
        """The item; raises whatever keeps it from being opened, such as the death of the worker that holds it."""
        if self._error is not None:
            raise self._error
        return ForkingPickler.loads(self.data) if self._taken is None else self._taken

    def pin_memory(self) -> "_Packed":
        """Opens the item in page-locked memory; called in a thread of DataLoader."""
        try:
            item = ForkingPickler.loads(self.data)
            self._taken = item if isinstance(item, Exception) else item.pin_memory()
        except Exception as error:  # raised in the thread, it would arrive with a traceback as its text
            self._error = error
        return self


def _pack(item: Any, shared: bool) -> _Packed:
    short = ""
    if shared:
        try:
            return _Packed(_pickled(item, SMALL_BYTES))
        except (RuntimeError, OSError) as error:  # /dev/shm is full, or no file descriptor is left
            short = str(error).partition("\n")[0].rpartition(": ")[2]  # without the name of a temporary file
    return _Packed(_pickled(item, math.inf), short)


def _pickled(item: Any, largest: float) -> bytes:
    data = io.BytesIO()
    _Pickler(data, largest).dump(item)
    return data.getvalue()


class _Pickler(ForkingPickler):
    """Pickles tensors of up to `largest` bytes as their bytes, where torch would put all into shared memory."""

    def __init__(self, data: io.BytesIO, largest: float) -> None:
        super().__init__(data, PICKLE_PROTOCOL)
        self._largest = largest

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.nbytes <= self._largest:
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


class _Watch:
    """Waits for the items of a loading, says when one is late, and ends workers that hang.

    can_block: whether waiting can block for good, in the reading of a message that a dead worker began.
    """

    def __init__(self, iterator: Any, say: Callable[[str], None], *, can_block: bool = True) -> None:
        self._iterator = iterator
        self._say, self._can_block = say, can_block
        self._since = math.inf
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.ended = ""
        """Why the workers were ended here."""
        self.broken = False
        """Whether a worker has died, so that the others cannot be asked to stop."""

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self.broken:
            self._iterator.leave()
        else:
            self._iterator._shutdown_workers()
            self._iterator.kill()

    def next(self) -> Any:
        """The next item, which is watched while it is waited for."""
        self._since = time.monotonic()
        try:
            return next(self._iterator)
        finally:
            self._since = math.inf

    def _watch(self) -> None:
        said = 0.0
        while not self._done.wait(STALL_SECONDS / 4):
            waited = time.monotonic() - self._since
            said = min(said, max(waited, 0.0))
            # torch finds a dead worker within seconds, unless it reads what that worker did not write to its end
            dead = waited >= STALL_SECONDS and not all(
                worker.is_alive() for worker in self._iterator._workers
            )
            if waited >= HUNG_SECONDS or dead:
                self.ended = "it died while it sent a batch" if dead else f"no batch for {waited:.0f} s"
                self._iterator.kill()
                if self._can_block:
                    self._iterator._worker_result_queue._writer.close()  # the last one: reading ends
                return
            if waited >= said + STALL_SECONDS:
                said = waited
                self._say(
                    f"no batch for {waited:.0f} s: the disk, the network or the decoding of images is slow or stuck"
                )


def _keep_worker_deaths_to_the_queue() -> None:
    """Removes torch's SIGCHLD handler, which would raise in the middle of a training step.

    The loader's queue notices a death as well, when the next batch is fetched.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "__module__", "") == "torch.utils.data._utils.signal_handling":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
