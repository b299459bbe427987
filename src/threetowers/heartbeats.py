"""Which of several processes the others wait for, and which is slow: each tells its place, and one of them compares.

    with told(store, rank, size):  # a thread tells the store of torch.distributed where this process is
        with PLACE.named("forward"):
            ...
        with PLACE.collective():
            ...

The main thread only sets attributes of PLACE. Every EVERY seconds a thread writes them to the store as the heartbeat of
the process. A process that is stopped, or whose machine cannot be reached, has no new heartbeat. One that hangs still
has, and its place stays behind that of the others, which wait for it in a collective. Rank 0 compares all heartbeats.
Every other process looks whether a lower rank still has one, and the lowest that does not find any compares instead.

A place is the number of collectives that a process has entered, and the number of phases since. All processes enter the
same in the same order, so the places of a run can be compared, whatever the clocks of its machines say.
"""

import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from threetowers.progress import duration, say

EVERY = 3.0
"""Seconds between two heartbeats of a process, and between two looks at those of the others."""
LATE = 20.0
"""Seconds without a heartbeat, or that others wait for a process, after which it is named; with two of the pauses above
that is less than 30."""
PATIENT = 300.0
"""The same in phases whose parts may be long and differ between processes, or are done by rank 0 alone."""
SLOW_STEPS, SLOW_ROW, SLOW_RATIO, SLOW_SHARE = 40, 3, 1.5, 0.1
"""A process is slow when over so many steps, so many times in a row, its own part took so many times the median and the
difference is more than this share of a step. One long step, after which all goes well, is in one of these alone."""
MOST_LINES = 4  # at a time; a stalled file system may hold up a thousand processes

DOING = {
    "starting": "opening the data and the towers, or storing embeddings",
    "data": "reading its batch",
    "validation": "validating",
    "checkpoint": "saving a checkpoint",
    "log": "writing the log",
    "other": "between two steps",
}
"""What a process does in a phase, where the name of the phase does not say it."""
LONG = ("starting", "validation")
REMEDIES = {
    "starting": "That may be normal, since opening data and storing embeddings can take long",
    "validation": "That may be normal; a larger --eval-every-steps or less validation data makes it rarer or shorter",
    "data": "Look at the file system that its data lies on",
    "checkpoint": "Look at the file system of the run folder",
    "log": "Look at the file system of the run folder",
}


class Place:
    """Where the main thread of this process is, and how long its own part of the steps takes."""

    def __init__(self) -> None:
        self.step, self.phase, self.inside = 0, "starting", False
        self.collectives = self.phases = 0
        self.since = time.monotonic()
        self.steps, self.own_seconds, self.seconds = 0, 0.0, 0.0
        self._begin: float | None = None
        self._waited = 0.0

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """A block that is a phase of the step; the first one after `step_done` begins the next step."""
        self.phase, self.since = name, time.monotonic()
        self.phases += 1
        if self._begin is None:
            self._begin, self._waited = self.since, 0.0
        yield
        self.phase = "other"

    @contextmanager
    def collective(self) -> Iterator[None]:
        """A block that ends when all processes have entered it."""
        self.since, self.phases, self.inside = time.monotonic(), 0, True
        self.collectives += 1
        yield
        now = time.monotonic()
        self._waited += now - self.since
        self.since, self.inside = now, False

    def step_done(self, step: int) -> None:
        """Ends the step with this number. What is done before the next one begins is nobody's part of a step."""
        self.step = step
        if self._begin is not None:
            seconds = time.monotonic() - self._begin
            self.steps += 1
            self.seconds += seconds
            self.own_seconds += seconds - self._waited
            self._begin = None


PLACE = Place()
"""That of this process, as torch.distributed has one default group in a process."""


def phases_told(within: Callable[[str], AbstractContextManager[Any]]) -> Callable[..., Any]:
    """The context of a phase that PLACE names, around another context of it."""

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        with PLACE.named(name), within(name):
            yield

    return phase


@dataclass(frozen=True)
class Beat:
    """A heartbeat. still: seconds since the place was reached. own_seconds: of `seconds`, those not in collectives."""

    count: int
    host: str
    pid: int
    step: int
    phase: str
    place: tuple[int, int]
    inside: bool
    still: float
    steps: int = 0
    own_seconds: float = 0.0
    seconds: float = 0.0
    ended: bool = False

    def who(self, rank: int) -> str:
        return f"rank {rank} (process {self.pid} on {self.host})"

    def doing(self) -> str:
        """What the process did when it gave this sign."""
        if self.inside:
            return f"waiting for the others after step {self.step}"
        return f"{DOING.get(self.phase, f'in the phase {self.phase!r}')} after step {self.step}"


@dataclass
class _Heard:
    """The last heartbeat of a process, and when it was new. judged_from: not called late before."""

    beat: Beat
    at: float
    judged_from: float
    first: Beat


@dataclass
class Watch:
    """What the heartbeats say; knows no store and no clock.

    rank: that of this process. Times are those of its clock, in seconds.
    """

    rank: int
    heard: dict[int, _Heard] = field(default_factory=dict)
    said: dict[int, tuple[str, float]] = field(default_factory=dict)
    """Of each rank that was named and has not recovered, why, and since when it is so."""
    slow: dict[int, int] = field(default_factory=dict)
    """How many times in a row each rank was slow."""
    looked: float | None = None

    def hear(self, rank: int, beat: Beat, now: float) -> None:
        """Takes the newest heartbeat of a rank, which may be the one before."""
        known = self.heard.get(rank)
        if known is None:
            self.heard[rank] = _Heard(beat, now, now, beat)
        elif beat.count != known.beat.count:
            if self.silent(rank, now):  # it needs a while to reach the others
                known.judged_from = now + LATE
            known.beat, known.at = beat, now

    def silent(self, rank: int, now: float) -> bool:
        """Whether a process has given no sign for too long."""
        return not self.heard[rank].beat.ended and now - self.heard[rank].at > LATE

    def woke(self, now: float) -> None:
        """Begins again where this process itself was stopped, and so cannot know how long the others were."""
        if self.looked is not None and now - self.looked > LATE / 2:
            for known in self.heard.values():
                known.at, known.judged_from = now, now + LATE
        self.looked = now

    def leave(self, rank: int, now: float) -> list[str]:
        """What is to be said when a lower rank compares from now on."""
        lines = [self._recovered(rank, now)] if rank in self.said else []
        self.said.clear()
        return lines

    def look(self, now: float) -> list[str]:
        """What is to be said now: who is named, who has recovered, and who is slow."""
        found = self._problems(now)
        lines = [self._recovered(rank, now) for rank in list(self.said) if rank not in found]
        new = [rank for rank in found if self.said.get(rank, ("",))[0] != found[rank][0]]
        for rank in new:
            self.said[rank] = found[rank][:2]
        lines += [found[rank][2] for rank in new[:MOST_LINES]]
        if len(new) > MOST_LINES:
            lines.append(f"and {len(new) - MOST_LINES} more: ranks {', '.join(map(str, new[MOST_LINES:]))}")
        return lines + self._slow()

    def _recovered(self, rank: int, now: float) -> str:
        why, since = self.said.pop(rank)
        if self.heard[rank].beat.ended:
            return f"rank {rank} has ended"
        what = "gives signs of life again" if why == "silent" else "goes on"
        return f"rank {rank} {what}, after {duration(now - since)}"

    def _problems(self, now: float) -> dict[int, tuple[str, float, str]]:
        """Why a rank is named, since when it is so, and the line."""
        found: dict[int, tuple[str, float, str]] = {}
        alive = {}
        for rank, known in self.heard.items():
            if known.beat.ended:
                continue
            if rank != self.rank and self.silent(rank, now):
                found[rank] = "silent", known.at, _silent_line(rank, known.beat, now - known.at)
            else:
                alive[rank] = known
        waiting: dict[tuple[int, int], float] = {}  # by place, the longest
        for known in alive.values():
            if known.beat.inside:
                seconds = known.beat.still + now - known.at
                waiting[known.beat.place] = max(seconds, waiting.get(known.beat.place, 0.0))
        for rank, known in alive.items():
            beat = known.beat
            waited = max((seconds for place, seconds in waiting.items() if place > beat.place), default=0.0)
            if now > known.judged_from and waited > (PATIENT if beat.phase in LONG else LATE):
                found[rank] = (
                    "late",
                    now - waited,
                    _late_line(rank, beat, waited, beat.still + now - known.at),
                )
        return found

    def _slow(self) -> list[str]:
        """Names each slow process once."""
        heard = {rank: known for rank, known in self.heard.items() if not known.beat.ended}
        if len(heard) < 2 or any(
            known.beat.steps - known.first.steps < SLOW_STEPS for known in heard.values()
        ):
            return []
        own, whole = {}, {}
        for rank, known in heard.items():
            steps = known.beat.steps - known.first.steps
            own[rank] = (known.beat.own_seconds - known.first.own_seconds) / steps
            whole[rank] = (known.beat.seconds - known.first.seconds) / steps
            known.first = known.beat
        usual = statistics.median_low(own.values())
        lines = []
        for rank in own:
            if not (own[rank] > SLOW_RATIO * usual and own[rank] - usual > SLOW_SHARE * whole[rank]):
                if self.slow.get(rank, 0) < SLOW_ROW:  # one that was named stays so
                    self.slow[rank] = 0
                continue
            self.slow[rank] = self.slow.get(rank, 0) + 1
            if self.slow[rank] == SLOW_ROW:
                lines.append(
                    f"{heard[rank].beat.who(rank)} takes {own[rank]:.3g} s for its part of a step, where "
                    f"{usual:.3g} s are usual, and the others wait for it. Look for other "
                    "processes on its machine, a slower disk, or a processor or GPU that is throttled"
                )
        return lines


def _silent_line(rank: int, beat: Beat, seconds: float) -> str:
    return (
        f"{beat.who(rank)} has given no sign of life for {duration(seconds)}; it was {beat.doing()}. It is stopped, or "
        f"its machine cannot be reached. `ps -o stat,wchan {beat.pid}` there shows its state, and `kill -CONT "
        f"{beat.pid}` lets a stopped one (T) go on. If it does not come back, end the run; the same command continues "
        "from the last checkpoint"
    )


def _late_line(rank: int, beat: Beat, waited: float, still: float) -> str:
    remedy = REMEDIES.get(beat.phase)
    return (
        f"the others have waited {duration(waited)} for {beat.who(rank)}, which has been {beat.doing()} for "
        f"{duration(still)}. "
        + (f"{remedy}. " if remedy else "")
        + f"`py-spy dump --pid {beat.pid}` there shows what "
        "it does"
    )


@contextmanager
def told(store: Store, rank: int, size: int) -> Iterator[None]:
    """Tells the place of this process, and names processes that are missing or slow, while the block lasts.

    store: that of the process group; a clone of it is used, since one blocked call would hold up all others.
    """
    own = store.clone()
    own.set_timeout(timedelta(seconds=LATE))
    end = threading.Event()
    thread = threading.Thread(target=_beat, args=(own, rank, size, end), name="heartbeats", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(LATE)


def _beat(store: Store, rank: int, size: int, end: threading.Event) -> None:
    """The thread: until the end, or until the store is gone with the launcher."""
    watch, count = Watch(rank), 0
    with suppress(RuntimeError):
        while not end.is_set():
            _tell(store, rank, count)
            for line in _looked(store, watch, size):
                say(
                    line
                )  # not as `warn`, which all processes but the first keep to themselves while they start
            count += 1
            end.wait(EVERY)
        _tell(store, rank, count, ended=True)


def _tell(store: Store, rank: int, count: int, ended: bool = False) -> None:
    at = PLACE
    beat = Beat(
        count, platform.node(), os.getpid(), at.step, at.phase, (at.collectives, at.phases), at.inside,
        time.monotonic() - at.since, at.steps, at.own_seconds, at.seconds, ended,
    )  # fmt: skip
    store.set(_key(rank), json.dumps(asdict(beat)))


def _looked(store: Store, watch: Watch, size: int) -> list[str]:
    """Reads the heartbeats that matter to this process, and what it has to say of them."""
    watch.woke(time.monotonic())
    for rank in range(watch.rank):
        if not _heard(store, watch, [rank]):
            return []
        now = time.monotonic()
        if not (watch.heard[rank].beat.ended or watch.silent(rank, now)):
            return watch.leave(rank, now)
    if not _heard(store, watch, list(range(watch.rank, size))):
        return []
    return watch.look(time.monotonic())


def _heard(store: Store, watch: Watch, ranks: list[int]) -> bool:
    """Hears the heartbeats of these ranks; False while one of them has not told its first."""
    keys = [_key(rank) for rank in ranks]
    if not store.check(keys):
        return False
    for rank, text in zip(ranks, store.multi_get(keys), strict=True):
        values = json.loads(text)
        watch.hear(rank, Beat(**{**values, "place": tuple(values["place"])}), time.monotonic())
    return True


def _key(rank: int) -> str:
    return f"threetowers/heartbeat/{rank}"
