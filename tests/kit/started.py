"""`threetowers train` with two processes as a user starts it, and what it prints."""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kit.processes import SECONDS
from kit.runs import logged
from threetowers.config import RunConfig
from threetowers.settings import write_config

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")


def command(config: RunConfig, folder: Path, *words: str) -> list[str]:
    file = folder.with_suffix(".toml")
    write_config(config, file)
    return [sys.executable, "-m", "threetowers", "train", str(file), "--out", str(folder), *words]


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


class Started:
    """`threetowers train` with two processes, and what it prints.

    launcher: the program and the options that start them, instead of --processes.
    """

    def __init__(self, config: RunConfig, folder: Path, launcher: Sequence[str] = ()) -> None:
        words = command(config, folder, *(() if launcher else ("--processes", "2")))
        if launcher:
            words = [*launcher, *words[1:]]
        self.folder, self._said = folder, folder.with_suffix(".out")
        with self._said.open("a", encoding="utf-8") as file:
            self._before = file.tell()
            self.process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)

    @property
    def said(self) -> str:
        """What it has printed so far."""
        return self._said.read_bytes()[self._before :].decode()

    def wait_for(self, step: int) -> None:
        """Until a step is in the log."""
        path = self.folder / "metrics.jsonl"
        self._wait(lambda: path.is_file() and max(logged(self.folder).keys() or {0}) >= step)

    def wait_for_line(self, pattern: str) -> str:
        """Until a line is printed in which the pattern is found; the line."""
        self._wait(lambda: re.search(pattern, self.said) is not None)
        return next(line for line in self.said.splitlines() if re.search(pattern, line))

    def _wait(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 4 * SECONDS
        while not is_so():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def rank(self, rank: int) -> int:
        """The process id of a rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in children:
            if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                return int(child)
        raise AssertionError(f"no process of rank {rank} among {children}")

    def end(self) -> tuple[int, str]:
        """Exit code, and what was printed."""
        code = self.process.wait(timeout=4 * SECONDS)
        return code, self.said
