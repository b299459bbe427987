"""What keeps a run honest: stop requests, the list of bad samples, and whether a folder belongs to a configuration."""

import contextlib
import json
import signal
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from threetowers.config import RunConfig, as_plain, read_toml
from threetowers.errors import BadSample, DataError

MAY_DIFFER = {"log_every_steps", "keep_checkpoints", "inputs.workers", "checkpoint_every_steps"}
"""Keys that change neither what is seen nor what is computed, so a run may continue with others."""


class StopRequest:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a flag while the block lasts; the second SIGINT interrupts."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        with contextlib.suppress(ValueError):  # not the main thread: whoever runs it there has the signals
            self._before = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


class BadSamples:
    """Counts unusable samples by reason, names each once in bad_samples.jsonl, and stops above a share."""

    MIN_SEEN = 1_000  # below this many samples a share says little

    def __init__(self, folder: Path, max_share: float) -> None:
        self._path = folder / "bad_samples.jsonl"
        self._max_share = max_share
        self._named: set[tuple[str, str]] = set()
        self._reasons: Counter[str] = Counter()
        self._seen = self._met = 0
        if self._path.is_file():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    self._named.add((row["id"], row["reason"]))
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue  # a line torn by a kill; the sample is named again when it is met

    def add(self, problems: Iterable[BadSample], seen: int = 0) -> None:
        """Takes note of problems among `seen` samples read; raises DataError above the allowed share."""
        self._seen += seen
        for problem in problems:
            self._met += seen > 0
            self._reasons[problem.reason] += 1
            if (problem.id, problem.reason) not in self._named:
                self._named.add((problem.id, problem.reason))
                with self._path.open("a", encoding="utf-8") as file:
                    row = {"id": problem.id, "reason": problem.reason, "detail": problem.detail}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if self._seen >= self.MIN_SEEN and self._met > self._max_share * self._seen:
            raise DataError(
                f"{self._met} of {self._seen} samples could not be used, more than inputs.max_bad_share = "
                f"{self._max_share:g} allows. They are named in {self._path}"
            )

    def counts(self) -> dict[str, int]:
        return {f"data/bad/{reason}": count for reason, count in sorted(self._reasons.items())}


def differing_keys(path: Path, config: RunConfig) -> list[str]:
    """The keys, as `key: there → here`, in which a run folder's config.toml and a configuration differ."""
    there, here = _flat(read_toml(path)), _flat(as_plain(config))
    return [
        f"{key}: {there.get(key)!r} → {here.get(key)!r}"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and key not in MAY_DIFFER
    ]


def _flat(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
    return flat
