"""Progress of long work: a bar on a terminal and in a notebook, plain lines now and then elsewhere.

On a terminal the bar is one line that rewrites itself. The cursor stays visible, the standard streams stay as they are,
and no thread is started. A process that is killed therefore leaves the terminal in order, and a line that somebody else
prints cannot be overwritten. rich draws the line; it is imported when the first line is due.
"""

import functools
import html
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

TERMINAL_SECONDS = 0.2
"""The time between two states of a bar on a terminal."""
NOTEBOOK_SECONDS = 0.5
"""The same in a notebook, which keeps every state on its way to the browser."""
WIDE = 100
"""From so many columns on the bar has twice the width."""
BAR = 10
"""Columns of the bar on a terminal of ordinary width."""
LEAST = 5
"""Less of a text than so many columns is not shown."""


def duration(seconds: float) -> str:
    """Seconds as people write them.

    >>> [duration(seconds) for seconds in (42, 185, 7800)]
    ['42 s', '3 min 05 s', '2 h 10 min']
    """
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


_said: set[str] = set()
_send: Callable[[str, bool], None] | None = None
_quiet = False
_shown: TextIO | None = None  # the terminal that ends in an unfinished line


def say(text: str) -> None:
    """A line on standard error, below what a terminal shows already; also of a process that hands its warnings on."""
    clear_line()
    print(f"threetowers: {text}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """A line on standard error that the user should see at once."""
    if _send is None:
        say(text)
    else:
        _send(text, text in _said)


def send_warnings(send: Callable[[str, bool], None]) -> None:
    """From now on this process hands its warnings to `send`, with whether each is to be said once, and shows none."""
    global _send
    _send = send


class Detail(str):
    """A line of a check that reports nothing amiss; it is shown only to those who ask for details."""


def be_quiet() -> None:
    """From now on this process shows no progress: another one speaks for it."""
    global _quiet
    _quiet = True


def warn_once(text: str, say: Callable[[str], None] = warn) -> None:
    """Says a line, as `warn` unless told otherwise, the first time in a process that it is given."""
    if text not in _said:
        _said.add(text)
        say(text)


def clear_line() -> None:
    """Takes an unfinished bar off the terminal, so that other lines can be written; its next update shows it again."""
    global _shown
    if _shown is not None:
        _shown.write("\r\x1b[K")
        _shown.flush()
        _shown = None


@dataclass(frozen=True)
class _State:
    title: str
    done: int
    total: int
    unit: str
    rate: float
    time: str
    """The remaining time, or how long it has taken where all or nothing is done."""
    extra: str

    @property
    def finished(self) -> bool:
        return self.done >= self.total

    @property
    def count(self) -> str:
        return f"{self.done:,}/{self.total:,} {self.unit}"

    def text(self) -> str:
        line = f"{self.title}: {self.count}, {self.rate:,.1f}/s, {self.time}"
        return line + (f" · {self.extra}" if self.extra else "")


class Progress:
    """Shows how much of a piece of work is done, its rate and the remaining time.

    done and total count `unit`s. Off a terminal, a line is written every `every_seconds` and at the end. Work that ends
    within `quiet_seconds` shows nothing. Of several at once the terminal shows the one that was updated last.
    """

    def __init__(
        self, title: str, total: int, unit: str, *, done: int = 0, every_seconds: float = 10.0,
        quiet_seconds: float = 0.0, stream: TextIO | None = None,
    ) -> None:  # fmt: skip
        self.title, self.total, self.unit = title, total, unit
        stream = stream or sys.stderr
        self._show: Callable[[_State], None]
        if stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown"):
            self._show, self._every = _Terminal(stream), TERMINAL_SECONDS
        elif _of_notebook(stream):
            self._show, self._every = _Cell(), NOTEBOOK_SECONDS
        else:
            self._show, self._every = functools.partial(_as_line, stream), every_seconds
        self._first, self._quiet = done, quiet_seconds
        self._start = self._last = time.monotonic()

    def update(self, done: int, extra: str = "", *, force: bool = False) -> None:
        """Shows the state when it is due; `extra` is put at its end."""
        now = time.monotonic()
        if _quiet or now - self._start < self._quiet:
            return
        finished = done >= self.total
        if not (finished or force) and now - self._last < self._every:
            return
        self._last = now
        rate = (done - self._first) / max(now - self._start, 1e-9)
        passed = duration(now - self._start)
        left = f"{duration((self.total - done) / rate)} left" if rate > 0 else f"{passed} so far"
        state = f"in {passed}" if finished else left
        self._show(_State(self.title, done, self.total, self.unit, rate, state, extra))

    def clear(self) -> None:
        """Takes the bar off a terminal, so that other lines can be written; the next update shows it again."""
        clear_line()


def _as_line(stream: TextIO, state: _State) -> None:
    stream.write(state.text() + "\n")
    stream.flush()


# On a terminal.


class _Terminal:
    """Shows states in one line that rewrites itself."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._console: Any = None

    def __call__(self, state: _State) -> None:
        global _shown
        drawn = self._drawn(state)
        _shown = self._stream  # before it is true, for an interrupt in the midst of the next line
        self._stream.write("\r\x1b[K" + drawn + ("\n" if state.finished else ""))
        self._stream.flush()
        if state.finished:
            _shown = None

    def _drawn(self, state: _State) -> str:
        """The state with the colours of the terminal.

        What does not fit is left out: first the end of `extra`, then the bar, the rate, and the end of the title.
        """
        from rich.console import Console
        from rich.progress_bar import ProgressBar
        from rich.segment import Segments
        from rich.text import Text

        self._console = self._console or Console(file=self._stream, force_terminal=True, force_jupyter=False)
        room = self._console.width - 1  # a terminal may begin a line when the last column is written
        count, rate = (state.count, "progress.download"), f", {state.rate:,.1f}/s"
        time = (state.time, "progress.remaining")
        title, numbers = Text(" ".join(state.title.split())), Text.assemble(count, rate, ", ", time)
        if title.cell_len + 1 + numbers.cell_len > room:
            numbers = Text.assemble(count, ", ", time)
            _cut(numbers, room)
            _cut(title, room - numbers.cell_len - 1)
        parts: list[Any] = [title, Text(" " if title else ""), numbers]
        spare = room - sum(part.cell_len for part in parts)
        width = 2 * BAR if room >= WIDE else BAR
        if spare > width:
            bar = ProgressBar(max(state.total, 1), state.done, width)
            # without colours a bar is only as long as what is done; rendered lines are filled up with blanks
            lines = self._console.render_lines(bar, self._console.options.update_width(width))
            parts[2:2] = [Segments(lines[0]) if lines else Text(" " * width), Text(" ")]
            spare -= width + 1
        if state.extra:
            extra = Text(f" · {' '.join(state.extra.split())}", "dim")
            _cut(extra, spare)
            parts.append(extra)
        with self._console.capture() as captured:
            for part in parts:
                self._console.print(part, end="", no_wrap=True, overflow="crop")
        drawn: str = captured.get().replace("\n", "")
        return drawn


def _cut(text: Any, room: int) -> None:
    """Shortens a text of rich to so many columns; to nothing where only some letters of it would be left."""
    if text.cell_len > room:
        text.truncate(room if room > LEAST else 0, overflow="ellipsis" if room > LEAST else "crop")


# In a notebook.


def _of_notebook(stream: TextIO) -> bool:
    """Whether the stream ends under a cell. The kernels of Jupyter have a class of their own for it."""
    kernel = sys.modules.get("ipykernel.iostream")
    return kernel is not None and isinstance(stream, kernel.OutStream)


class _Cell:
    """Shows states as HTML in one place under a cell. Jupyter needs no extension for it, unlike for a widget."""

    def __init__(self) -> None:
        self._place: Any = None

    def __call__(self, state: _State) -> None:
        import IPython.display

        display: Any = IPython.display.display  # it has no types
        bar = (
            f'<progress value="{state.done}" max="{max(state.total, 1)}" aria-label="{html.escape(state.title)}" '
            'style="width: 16em; vertical-align: middle"></progress>'
        )
        text = f'<span style="font-variant-numeric: tabular-nums">{html.escape(state.text())}</span>'
        content = {"text/plain": state.text(), "text/html": f"<div>{bar} {text}</div>"}
        if self._place is None:
            self._place = display(content, raw=True, display_id=True)
        else:
            self._place.update(content, raw=True)
