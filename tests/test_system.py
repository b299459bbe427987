"""What other processes leave: memory and cores, from counters as the kernel writes them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from threetowers import system
from threetowers.system import OtherLoad, free_memory

TICKS = os.sysconf("SC_CLK_TCK")


def test_free_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = free_memory()
    assert whole is not None and whole > 2**20
    names = tuple(str(tmp_path / name) for name in ("limit", "use", "statistics"))
    (tmp_path / "limit").write_text("1000000\n")
    (tmp_path / "use").write_text("900000\n")
    (tmp_path / "statistics").write_text("active_file 7\ninactive_file 50000\n")
    monkeypatch.setattr(system, "_CGROUPS", (names,))
    assert free_memory() == 150_000
    (tmp_path / "limit").write_text("max\n")
    assert (free_memory() or 0) > 2**20
    (tmp_path / "limit").write_text("800000\n")
    (tmp_path / "statistics").write_text("")
    assert free_memory() == 0


class Counters:
    """A folder like /proc with this process, a child of it and another one; seconds used by each so far."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.clock = folder, 1_000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.clock)
        self.write(0, 0, 0)

    def write(self, own: float, child: float, other: float) -> None:
        busy = int((own + child + other) * TICKS)
        (self.folder / "stat").write_text(f"cpu  {busy} 0 0 99999 555 0 0 0 0 0\ncpu0 1 1 1 1\n")
        for pid, parent, used in ((os.getpid(), 1, own), (700_001, os.getpid(), child), (700_002, 1, other)):
            (self.folder / str(pid)).mkdir(exist_ok=True)
            fields = ["S", str(parent), *["0"] * 9, str(int(used * TICKS)), "0", "0", "0", "20"]
            (self.folder / str(pid) / "stat").write_text(f"{pid} (a (name) of three) {' '.join(fields)}\n")


@pytest.fixture
def counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counters:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    return Counters(tmp_path, monkeypatch)


def test_cores_of_others_do_not_count_this_process_and_its_children(counters: Counters) -> None:
    load = OtherLoad(counters.folder)
    counters.write(own=12, child=9, other=15)
    assert load.cores() is None, "no time has passed"
    counters.clock += 10
    assert load.cores() == pytest.approx(1.5, abs=0.01)
    counters.clock += 10
    assert load.cores() == pytest.approx(0.0), "since the last answer"


@pytest.mark.parametrize(
    ("other", "threads", "said"),
    [
        (0.0, 4, ""),
        (0.4, 4, ""),
        (
            1.0,
            4,
            "1.0 of 4 cores busy, so this goes slower than it could; a start with OMP_NUM_THREADS=3 may",
        ),
        (3.0, 4, "OMP_NUM_THREADS=1"),
        (2.0, 2, ""),
    ],
)
def test_a_run_says_once_that_cores_are_taken(
    counters: Counters, other: float, threads: int, said: str
) -> None:
    load = OtherLoad(counters.folder)
    lines = []
    for second in (10, 20):
        counters.clock += 10
        counters.write(own=second, child=second, other=other * second)
        lines.append(load.remark(threads))
    assert said in lines[0] and bool(said) == bool(lines[0]) and not lines[1]


def test_without_counters_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = OtherLoad(tmp_path)
    monkeypatch.setattr(time, "monotonic", lambda: 1e9)
    assert load.cores() is None and load.remark(64) == ""


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the counters are Linux's")
def test_the_counters_of_this_machine_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "LEAST_SECONDS", 0.4)
    load = OtherLoad()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.6: pass"], check=True)
    cores = load.cores()
    assert cores is not None and 0 <= cores <= (os.cpu_count() or 1) + 0.1
