"""What other processes leave of this machine: memory, and cores."""

import contextlib
import os
import re
import time
from pathlib import Path

_CGROUPS = (  # of a container: limit, use, and the statistics with what could be given back
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
LEAST_SECONDS = 5.0
"""A shorter time says little: the kernel counts in hundredths of a second, and loads come and go."""


def free_memory() -> int | None:
    """Bytes that processes of this machine, or of this container, can still take; None when it cannot be found out."""
    found = []
    lines = _read("/proc/meminfo").splitlines()
    found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    for places in _CGROUPS:
        limit, used, statistics = (_read(place).strip() for place in places)
        if limit.isdigit() and used.isdigit():
            cached = [int(line.split()[1]) for line in statistics.splitlines() if "inactive_file" in line]
            found.append(int(limit) - int(used) + max(cached, default=0))
    return max(min(found), 0) if found else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


class PeakMemory:
    """How far the resident memory of this process rises from here; Linux counts it, elsewhere it is not known."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what there is at present
        self._before = self._highest()
        self.known = self._before > 0

    @staticmethod
    def _highest() -> int:
        try:
            status = Path("/proc/self/status").read_text(encoding="utf-8")
        except OSError:
            return 0
        found = re.search(r"VmHWM:\s*(\d+) kB", status)
        return int(found[1]) * 1024 if found else 0

    def peak(self, times: float) -> int:
        """The highest so far in bytes, had the rise been so many times as large."""
        return self._before + round((self._highest() - self._before) * times)


class OtherLoad:
    """The cores that processes other than this one and its descendants keep busy, on Linux.

    The number of threads is not changed by itself, since the last bits of every result depend on it. proc: where the
    kernel's counters are.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._then = self._now()
        self._said = False

    def cores(self) -> float | None:
        """Cores kept busy since the last answer; None when that is less than LEAST_SECONDS ago, or is not known."""
        if self._then is None or time.monotonic() - self._then[0] < LEAST_SECONDS:
            return None  # before all processes are looked at, since a run asks often
        now = self._now()
        if now is None:
            return None
        (seconds, busy, own), self._then = (a - b for a, b in zip(now, self._then, strict=True)), now
        return max(busy - max(own, 0.0), 0.0) / seconds

    def remark(self, threads: int) -> str:
        """A line for the user, once, when fewer cores are free than this process has threads; else an empty text."""
        if self._said:
            return ""
        busy, cores = self.cores(), os.cpu_count() or 1
        if busy is None or threads - (cores - busy) < 0.5:
            return ""
        self._said = True
        text = f"other processes keep {busy:.1f} of {cores} cores busy, so this goes slower than it could"
        free = max(round(cores - busy), 1)
        return f"{text}; a start with OMP_NUM_THREADS={free} may be faster" if free < threads else text

    def _now(self) -> tuple[float, float, float] | None:
        """The clock, and the seconds of all processors and of this process and its descendants."""
        try:
            # user, nice, system, idle, iowait, irq, softirq
            fields = [int(word) for word in (self._proc / "stat").read_text().split()[1:8]]
            spent, parents = self._processes()
        except (OSError, ValueError, IndexError):
            return None
        tree = {os.getpid()}
        while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
            tree |= more
        ticks = os.sysconf("SC_CLK_TCK")
        busy = sum(fields) - fields[3] - fields[4]
        return time.monotonic(), busy / ticks, sum(spent.get(pid, 0) for pid in tree) / ticks

    def _processes(self) -> tuple[dict[int, int], dict[int, int]]:
        """Of every process the ticks that it and its ended children have taken, and its parent."""
        spent, parents = {}, {}
        for entry in self._proc.iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                words = (entry / "stat").read_text().rpartition(")")[2].split()  # a name may hold spaces
            except OSError:  # it has ended
                continue
            spent[int(entry.name)] = sum(map(int, words[11:15]))
            parents[int(entry.name)] = int(words[1])
        return spent, parents
