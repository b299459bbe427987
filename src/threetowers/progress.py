"""Progress of long work: one line that rewrites itself on a terminal, plain lines now and then elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import TextIO


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


def warn(text: str) -> None:
    """A line on standard error that the user should see at once."""
    if _send is None:
        print(f"threetowers: {text}", file=sys.stderr, flush=True)
    else:
        _send(text, text in _said)


def send_warnings(send: Callable[[str, bool], None]) -> None:
    """From now on this process hands its warnings to `send`, with whether each is to be said once, and shows none."""
    global _send
    _send = send


def be_quiet() -> None:
    """From now on this process shows no progress: another one speaks for it."""
    global _quiet
    _quiet = True


def warn_once(text: str, say: Callable[[str], None] = warn) -> None:
    """Says a line, as `warn` unless told otherwise, the first time in a process that it is given."""
    if text not in _said:
        _said.add(text)
        say(text)


class Progress:
    """Shows how much of a piece of work is done, its rate and the remaining time.

    done and total count `unit`s. Off a terminal, a line is written every `every_seconds` and at the end. Work that ends
    within `quiet_seconds` shows nothing.
    """

    def __init__(
        self, title: str, total: int, unit: str, *, done: int = 0, every_seconds: float = 10.0,
        quiet_seconds: float = 0.0, stream: TextIO | None = None,
    ) -> None:  # fmt: skip
        self.title, self.total, self.unit = title, total, unit
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._every = 0.2 if self._terminal else every_seconds
        self._first, self._quiet = done, quiet_seconds
        self._start = self._last = time.monotonic()

    def update(self, done: int, extra: str = "", *, force: bool = False) -> None:
        """Shows the state when a new line is due; `extra` is put at the end of the line."""
        now = time.monotonic()
        if _quiet or now - self._start < self._quiet:
            return
        finished = done >= self.total
        if not (finished or force) and now - self._last < self._every:
            return
        self._last = now
        rate = (done - self._first) / max(now - self._start, 1e-9)
        left = duration((self.total - done) / rate) if rate > 0 else "?"
        state = f"in {duration(now - self._start)}" if finished else f"{left} left"
        line = f"{self.title}: {done:,}/{self.total:,} {self.unit}, {rate:,.1f}/s, {state}"
        line += f" · {extra}" if extra else ""
        if self._terminal:
            self._stream.write("\r\x1b[K" + line + ("\n" if finished else ""))
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def clear(self) -> None:
        """Takes the line off a terminal, so that other lines can be written; the next update shows it again."""
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
