"""Whatever becomes of a loader worker ends in a result or in an error of one line, and never in waiting for ever."""

import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from threetowers import progress
from threetowers.data import workers
from threetowers.data.workers import read_ahead
from threetowers.errors import BadSample, DataError

SOURCE = Path(workers.__file__).parents[1]
TASKS = list(range(8))


class OddError(Exception):
    """It cannot be made again from its arguments."""

    def __init__(self, one: int, *, other: int) -> None:
        super().__init__(f"{one} and {other}")


class Reads:
    """Items of a tensor and a number. At one task a fault strikes, always or, with a marker file, once."""

    def __init__(self, fault: Callable[[], object], marker: Path | None = None) -> None:
        self.fault, self.marker, self.parent = fault, marker, os.getpid()

    def __getitem__(self, task: int) -> tuple[Tensor, int]:
        if task == 5 and os.getpid() != self.parent and not (self.marker and self.marker.exists()):
            if self.marker:
                self.marker.touch()
            self.fault()
        return torch.full((300,), task), task


def raising(make: Callable[[], BaseException]) -> Callable[[], object]:
    def fault() -> None:
        raise make()

    return fault


def local_error() -> Exception:
    class LocalError(Exception):
        pass

    return LocalError("it cannot be pickled")


def signalled(number: signal.Signals) -> Callable[[], object]:
    return lambda: os.kill(os.getpid(), number)


def half_a_message() -> None:
    """Begins to send an item and dies."""
    frame: Any = sys._getframe()
    while "data_queue" not in frame.f_locals:
        frame = frame.f_back
    queue = frame.f_locals["data_queue"]
    queue._wlock.acquire()  # else the message could fall into the middle of another worker's
    os.write(queue._writer.fileno(), struct.pack("!i", 100_000) + b"x")
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    monkeypatch.setattr(workers, "STALL_SECONDS", 0.4)
    monkeypatch.setattr(workers, "HUNG_SECONDS", 0.8)
    monkeypatch.setattr(progress, "_said", set())


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    def late(*_: object) -> None:
        pytest.fail("still waiting")  # no Exception, which could be taken for a death

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


DEATHS: dict[str, Callable[[], object]] = {
    "killed": signalled(signal.SIGKILL),
    "bus error": signalled(signal.SIGBUS),
    "segmentation fault": signalled(signal.SIGSEGV),
    "interrupted": raising(KeyboardInterrupt),
    "exit": lambda: os._exit(0),
    "half a message": half_a_message,
    "hung": hang,
}


@pytest.mark.parametrize("fault", DEATHS.values(), ids=DEATHS)
def test_a_worker_that_dies_or_hangs_is_started_again_where_it_was(
    fault: Callable[[], object], tmp_path: Path
) -> None:
    said = list[str]()
    items = list(read_ahead(Reads(fault, tmp_path / "struck"), TASKS, 2, name="photos", say=said.append))
    assert [number for _, number in items] == TASKS
    assert all(torch.equal(tensor, torch.full((300,), number)) for tensor, number in items)
    assert sum("a loader worker died" in line for line in said) == 1


@pytest.mark.parametrize("name", ["killed", "hung"])
def test_workers_that_always_die_or_hang_end_in_an_error(name: str) -> None:
    said = list[str]()
    with pytest.raises(
        DataError, match=r"photos: .* 3 times in a row before batch 10[0-5]: .*--inputs\.workers"
    ):
        list(read_ahead(Reads(DEATHS[name]), TASKS, 2, name="photos", first=100, say=said.append))


ERRORS: dict[str, tuple[Callable[[], BaseException], type[Exception], str]] = {
    "of a local class": (local_error, DataError, "LocalError: it cannot be pickled"),
    "that cannot be made again": (lambda: OddError(1, other=2), DataError, "OddError: 1 and 2"),
    "of many lines": (lambda: ValueError("first\nsecond"), DataError, "ValueError: first "),
    "of memory": (MemoryError, DataError, "found no memory; give fewer --inputs.workers"),
    "that ends a program": (lambda: SystemExit(3), DataError, "SystemExit: 3"),
    "of the system": (lambda: OSError(5, "Input/output error", "a.tar"), OSError, "a.tar"),
    "that a user can correct": (lambda: DataError("row 7: no"), DataError, "row 7: no"),
    "about a sample": (lambda: BadSample("a.jpg", "empty file"), DataError, "a.jpg"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_in_a_worker_arrives_in_one_line(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, kind, words = ERRORS[name]
    with pytest.raises(kind, match=words) as caught:
        list(read_ahead(Reads(raising(make)), TASKS, 2, name="photos"))
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


def test_an_item_that_cannot_be_pickled_ends_in_an_error() -> None:
    class Lambdas:
        def __getitem__(self, task: int) -> Callable[[], int]:
            return lambda: task

    with pytest.raises(DataError, match="a loader worker failed with"):
        list(read_ahead(Lambdas(), TASKS, 2, name="photos"))


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_without_shared_memory_items_come_through_the_pipe(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SMALL_BYTES", 0)
    full = "unable to write to file </torch_%d>: No space left on device (28)"
    monkeypatch.setattr(
        torch.UntypedStorage, "_share_fd_cpu_", lambda _: raising(lambda: error(full % time.time_ns()))()
    )
    said = list[str]()
    for name in ("photos", "again"):
        items = list(read_ahead(Reads(lambda: None), TASKS, 2, name=name, say=said.append))
        assert len(items) == 8
        assert all(torch.equal(tensor, torch.full((300,), number)) for tensor, number in items)
    assert len(said) == 1 and "No space left on device" in said[0] and "--shm-size" in said[0]


def test_small_tensors_need_no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", lambda _: raising(lambda: OSError("full"))())
    said = list[str]()
    items = list(read_ahead(Reads(lambda: None), TASKS, 2, name="photos", say=said.append))
    assert all(torch.equal(tensor, torch.full((300,), number)) for tensor, number in items) and not said


def test_workers_end_with_a_killed_parent_whatever_they_have_made() -> None:
    """Each item fills the pipe, which the other worker keeps open."""
    program = (
        "import os, signal, torch\nfrom threetowers.data.workers import read_ahead\n"
        "class Reads:\n    def __getitem__(self, task): return [os.getpid(), *torch.zeros(9, 10_000)]\n"
        "items = read_ahead(Reads(), list(range(99)), 2, name='photos')\n"
        "print(*sorted({next(items)[0] for _ in range(4)}), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60)
    pids = [int(word) for word in result.stdout.split()]
    assert result.returncode == -signal.SIGKILL and len(pids) == 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("size", ["4k", "200k", "1m"])
def test_a_small_dev_shm_is_said_once_and_does_no_harm(size: str) -> None:
    """In a mount namespace of its own, with a /dev/shm of this size."""
    program = (
        "import torch\nfrom threetowers.data.workers import read_ahead\n"
        "class Reads:\n    def __getitem__(self, task): return torch.full((200_000,), task)\n"
        "items = list(read_ahead(Reads(), list(range(9)), 2, name='photos'))\n"
        "assert [int(item[-1]) for item in items] == list(range(9))"
    )
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec {sys.executable} -c "$PROGRAM"'
    probe = subprocess.run(
        ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True
    )
    if probe.returncode:
        pytest.skip("no mount namespaces here")
    environment = os.environ | {"PROGRAM": program, "PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", mount], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) <= 3 and "Traceback" not in done.stderr
    assert "shared memory is short" in done.stderr or "cannot be started" in done.stderr


@pytest.mark.parametrize("most", [0, 1])
@pytest.mark.filterwarnings("error")
def test_workers_that_cannot_be_started_are_done_without(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fork, started = os.fork, list[int]()

    def refuse() -> int:
        if len(started) == most:
            raise OSError(11, "Resource temporarily unavailable")
        started.append(fork())
        return started[-1]

    monkeypatch.setattr(os, "fork", refuse)
    said = list[str]()
    for name in ("photos", "again"):
        items = list(read_ahead(Reads(lambda: None), TASKS, 2, name=name, say=said.append))
        assert [number for _, number in items] == TASKS
    assert len(said) == 1 and "cannot be started" in said[0] and "--inputs.workers" in said[0]


def test_more_workers_than_cores_are_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    list(read_ahead(Reads(lambda: None), TASKS[:2], (os.cpu_count() or 1) + 1, name="photos"))
    assert not [each for each in recwarn if "worker" in str(each.message)]


def test_loading_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    list(read_ahead(Reads(lambda: None), TASKS, 2, name="photos"))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_loader_reads_ahead_in_the_one_safe_way() -> None:
    users = [path.name for path in SOURCE.rglob("*.py") if "DataLoader(" in path.read_text(encoding="utf-8")]
    assert users == ["workers.py"]
