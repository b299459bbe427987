"""What a run writes about itself: metrics.jsonl for programs, events.log for people."""

import json
import time
from pathlib import Path
from typing import Any


class RunLog:
    """Appends to a run folder's metrics.jsonl and events.log."""

    def __init__(self, folder: Path) -> None:
        self._metrics = folder / "metrics.jsonl"
        self._events = folder / "events.log"

    def rewind(self, step: int) -> None:
        """Drops the metrics of steps after `step`, and a line torn by a kill, so that a continued run repeats none."""
        if not self._metrics.is_file():
            return
        kept = [
            line for line in self._metrics.read_text(encoding="utf-8").splitlines() if _step(line) <= step
        ]
        partial = self._metrics.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(self._metrics)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """One row: the step and the values by metric path."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def event(self, text: str) -> None:
        """One line with the time; also shown on the terminal by whoever calls, never here."""
        with self._events.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        return float("inf")
