"""Progress lines, and the settings of the allocator."""

import io
import platform

from threetowers.progress import Progress, duration
from threetowers.run.allocator import keep_freed_memory


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_durations_for_people() -> None:
    assert [duration(s) for s in (0.2, 59.4, 185, 7805)] == ["0 s", "59 s", "3 min 05 s", "2 h 10 min"]


def test_plain_lines_off_a_terminal_and_one_line_on_it() -> None:
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        bar = Progress("work", 1000, "steps", done=990, every_seconds=1e9, stream=stream)
        for done in range(991, 1001):
            bar.update(done, "loss 1.0")
    assert plain.getvalue().count("\n") == 1, "only the end, when little time has passed"
    assert "work: 1,000/1,000 steps" in plain.getvalue() and "loss 1.0" in plain.getvalue()
    assert terminal.getvalue().startswith("\r") and terminal.getvalue().endswith("\n")


def test_the_rate_counts_only_what_this_process_did() -> None:
    stream = io.StringIO()
    bar = Progress("work", 1_000_000, "rows", done=999_999, stream=stream)
    bar._start -= 10  # as if ten seconds had passed
    bar.update(1_000_000)
    assert "0.1/s" in stream.getvalue()


def test_work_that_ends_soon_shows_nothing() -> None:
    stream = io.StringIO()
    bar = Progress("work", 10, "rows", every_seconds=0.0, quiet_seconds=5.0, stream=stream)
    bar.update(5)
    bar.update(10)
    assert not stream.getvalue()
    bar._start -= 5  # as if five seconds had passed
    bar.update(10)
    assert "work: 10/10 rows" in stream.getvalue()


def test_glibc_takes_the_settings() -> None:
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
