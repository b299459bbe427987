"""What progress shows on a terminal, in a notebook and elsewhere, and the settings of the allocator."""

import io
import os
import platform
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest

from threetowers import progress
from threetowers.progress import Progress, clear_line, duration, say, warn
from threetowers.run.allocator import keep_freed_memory

SOURCE = Path(__file__).parents[1] / "src"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(progress, "_shown", None)


def plain(text: str) -> str:
    """The text without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def screen(written: str) -> list[str]:
    """The lines that a terminal shows: of each, what was written after it was cleared last."""
    return [line.rstrip("\r").split("\r\x1b[K")[-1] for line in plain(written).split("\n")]


def drawn(columns: int, monkeypatch: pytest.MonkeyPatch, extra: str = "", done: int = 123) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    bar = Progress("training 3t-main-warm", 1000, "steps", stream=stream)
    bar._start -= 100  # as if so many seconds had passed
    bar.update(done, extra, force=True)
    return screen(stream.getvalue())[0]


def test_durations_for_people() -> None:
    assert [duration(s) for s in (0.2, 59.4, 185, 7805)] == ["0 s", "59 s", "3 min 05 s", "2 h 10 min"]


def test_plain_lines_off_a_terminal_and_one_line_on_it() -> None:
    plain_stream, terminal = io.StringIO(), Terminal()
    for stream in (plain_stream, terminal):
        bar = Progress("work", 1000, "steps", done=990, every_seconds=1e9, stream=stream)
        for done in range(991, 1001):
            bar.update(done, "loss 1.0")
    assert plain_stream.getvalue().count("\n") == 1, "only the end, when little time has passed"
    assert re.fullmatch(r"work: 1,000/1,000 steps, [0-9,.]+/s, in 0 s · loss 1.0\n", plain_stream.getvalue())
    assert terminal.getvalue().startswith("\r") and terminal.getvalue().endswith("\n")
    assert re.fullmatch(
        r"work ━{10} 1,000/1,000 steps, [0-9,.]+/s, in 0 s · loss 1.0", screen(terminal.getvalue())[0]
    )


def test_the_time_is_told_while_nothing_is_done() -> None:
    stream = io.StringIO()
    bar = Progress("work", 10, "steps", stream=stream)
    bar._start -= 100
    bar.update(0, force=True)
    assert stream.getvalue() == "work: 0/10 steps, 0.0/s, 1 min 40 s so far\n"


@pytest.mark.parametrize("term", ["dumb", "unknown", "DUMB"])
def test_a_terminal_without_control_codes_gets_plain_lines(
    term: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    stream = Terminal()
    Progress("work", 10, "rows", stream=stream).update(10)
    assert re.fullmatch(r"work: 10/10 rows, [0-9,.]+/s, in 0 s\n", stream.getvalue())


def test_the_bar_is_as_long_as_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    for done, filled in ((0, 0), (300, 3), (500, 5), (1000, 10)):
        line = drawn(80, monkeypatch, done=done)
        assert line.count("━") == filled
        assert line.index("1,000 steps") == line.index("/") + 1
        assert line.index(f"{done:,}/") == len("training 3t-main-warm ") + 10 + 1, (
            "numbers stay in their place"
        )


def test_without_colours_no_colour_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "NO_COLOR"):
        if name:
            monkeypatch.setenv(name, "1")
        stream = Terminal()
        Progress("work", 10, "rows", stream=stream).update(5, force=True)
        assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", stream.getvalue())) == (not name)


def test_a_line_fits_into_the_terminal_and_keeps_what_matters_most(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = "loss 3.123 (img-txt 3.12 img-third 2.11), waiting for data 3%"
    for columns in (1, 3, 9, 18, 25, 34, 40, 41, 60, 79, 100, 101, 133):
        for text in ("", extra, "größer 大きい" * 9, "two\nlines"):
            line = drawn(columns, monkeypatch, text)
            assert len(line) < max(columns, 2) and "\n" not in line
    assert drawn(40, monkeypatch, extra) == "123/1,000 steps, 11 min 53 s left · lo…"
    assert drawn(60, monkeypatch, extra) == "training 3t-main-warm 123/1,000 steps, 11 min 53 s left"
    wide = drawn(160, monkeypatch, extra)
    assert wide.startswith("training 3t-main-warm ━━╺") and wide.endswith(
        f"1.2/s, 11 min 53 s left · {extra}"
    )


def test_a_warning_takes_the_place_of_an_unfinished_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = Progress("work", 10, "rows")
    bar.update(5, force=True)
    warn("look out")
    bar.update(6, force=True)
    say("and here")
    bar.update(10)
    lines = screen(stream.getvalue())
    assert lines[:2] == ["threetowers: look out", "threetowers: and here"]
    assert lines[2].startswith("work ━") and lines[3:] == [""]
    before = stream.getvalue()
    clear_line()
    bar.clear()
    assert stream.getvalue() == before, "a finished bar stays"


def test_one_work_inside_another(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    outer = Progress("outer", 2, "runs", stream=stream)
    outer.update(1, force=True)
    inner = Progress("inner", 2, "steps", stream=stream)
    inner.update(1, force=True)
    assert screen(stream.getvalue())[0].startswith("inner")
    outer.update(1, force=True)
    inner.update(2)
    outer.update(2)
    lines = screen(stream.getvalue())
    assert [line.split(" ")[0] for line in lines] == ["inner", "outer", ""]


def test_the_rate_counts_only_what_this_process_did() -> None:
    stream = io.StringIO()
    bar = Progress("work", 1_000_000, "rows", done=999_999, stream=stream)
    bar._start -= 10  # as if ten seconds had passed
    bar.update(1_000_000)
    assert "0.1/s" in stream.getvalue()


def test_work_that_ends_soon_shows_nothing() -> None:
    for stream in (io.StringIO(), Terminal()):
        bar = Progress("work", 10, "rows", every_seconds=0.0, quiet_seconds=5.0, stream=stream)
        bar.update(5)
        bar.update(10)
        assert not stream.getvalue()
        bar._start -= 5  # as if five seconds had passed
        bar.update(10)
        assert "10/10 rows" in plain(stream.getvalue())


WORK = """
import sys, threading, time
from threetowers.progress import Progress, warn
bar = Progress("work", 1000, "steps")
bar.update(100, force=True)
warn("look out")
for done in range(200, {last}):
    bar.update(done)
    time.sleep(0.001)
print(threading.active_count(), "rich" in sys.modules, flush=True)
{end}
"""


def in_a_terminal(code: str, interrupt_at: str = "", columns: int = 70) -> str:
    """All that a process writes to a pseudo-terminal of its own; it gets ^C when some text is on it."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment["PYTHONPATH"] = str(SOURCE)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    written = b""
    try:
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux says so when the other end is closed
                piece = b""
            if not piece:
                break
            written += piece
            if interrupt_at and interrupt_at in plain(written.decode(errors="replace")):
                process.send_signal(signal.SIGINT)
                interrupt_at = ""
        process.wait(30)
    finally:
        process.kill()
        os.close(ours)
    return written.decode()


def test_what_a_terminal_shows_at_the_end() -> None:
    written = in_a_terminal(WORK.format(last=1001, end=""))
    lines = screen(written.replace("\r\n", "\n"))
    assert lines[0] == "threetowers: look out"
    assert re.fullmatch(r"work ━{10} 1,000/1,000 steps, [0-9,.]+/s, in \d+ s", lines[1])
    assert lines[2:] == ["1 True", ""], "no thread is started"
    assert "\x1b[?25l" not in written, "the cursor is never hidden"


def test_an_interrupted_command_ends_on_a_line_of_its_own() -> None:
    end = """
import signal
from threetowers import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
def wait(words):
    bar = Progress("waiting", 10, "steps")
    bar.update(5, force=True)
    time.sleep(60)
cli.VERBS["wait"] = wait
cli.main(["wait"])
"""
    written = in_a_terminal(WORK.format(last=201, end=end), interrupt_at="5/10 steps")
    lines = screen(written.replace("\r\n", "\n").replace("^C", ""))
    assert lines[-2:] == ["threetowers: interrupted; the same command continues", ""]
    assert "\x1b[?25l" not in written


def test_rich_is_not_imported_where_there_is_no_terminal() -> None:
    code = WORK.format(last=1001, end="") + "from threetowers import cli\nprint('rich' in sys.modules)\n"
    environment = dict(os.environ, PYTHONPATH=str(SOURCE))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.stdout == "1 False\nFalse\n", done.stderr
    assert "\r" not in done.stderr and "\x1b" not in done.stderr


def test_a_notebook_shows_one_bar_that_is_updated() -> None:
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    code = """
import sys, threading
sys.modules["ipywidgets"] = None  # a plain Jupyter has none
from threetowers.progress import Progress, warn
bar = Progress("a <b> & c", 4, "steps")
for done in range(1, 5):
    bar.update(done, "loss <1", force=True)
warn("look out")
print(threading.current_thread().name, "rich" in sys.modules)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    client.NotebookClient(notebook, timeout=60).execute()
    outputs = notebook.cells[0].outputs
    bars = [each for each in outputs if each.output_type == "display_data"]
    assert len(bars) == 1, "each state takes the place of the one before"
    assert '<progress value="4" max="4" aria-label="a &lt;b&gt; &amp; c"' in bars[0].data["text/html"]
    assert "loss &lt;1" in bars[0].data["text/html"] and "<b>" not in bars[0].data["text/html"]
    assert bars[0].data["text/plain"].startswith("a <b> & c: 4/4 steps, ")
    texts = {each.name: each.text for each in outputs if each.output_type == "stream"}
    assert texts == {"stderr": "threetowers: look out\n", "stdout": "MainThread False\n"}


def test_glibc_takes_the_settings() -> None:
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
