"""Sync handlers: events of one key go to a thread together, as a strand.

One thread works as long as it keeps up; another one joins for each millisecond in which strands still wait. So a handler
that computes runs in one thread without contention, and one that waits has up to all of them.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from headwater.event.codec import Unknown
from headwater.runtime import crash_point
from headwater.runtime.assignment import Failure, Received
from headwater.runtime.daemon_executor import DaemonExecutor
from headwater.runtime.lane import Key, Lane
from headwater.runtime.lane_runner import LaneRunner
from headwater.runtime.work import Work

STRAND_EVENTS = 32
PATIENCE_SECONDS = 0.001
TURN_SECONDS = 0.05


class Strand:
    """Some events of one key, for a thread."""

    __slots__ = ("count", "epoch", "error", "events", "lane", "runner", "settled")

    def __init__(
        self, runner: "StrandRunner", lane: Lane[Received], events: list[tuple[int, Received]], epoch: int
    ) -> None:
        self.runner = runner
        self.epoch = epoch
        self.lane = lane
        self.events = events
        self.count = 0
        """How many were handled; written by the thread."""
        self.settled = 0
        self.error: BaseException | None = None

    def run(self, begin: Callable[[], None], attempt: Callable[[Received, int], None]) -> None:
        """In a thread. `begin` comes before the look at whether it may go on: what it takes for the attempt's transaction
        can't be a later one then."""
        runner = self.runner
        for offset, event in self.events:
            begin()
            if runner.is_cut_off or runner.work.pace.breaker.epoch != self.epoch:
                return
            note = runner.work.doors.note
            note("start", o=offset, n=1)
            try:
                if crash_point.hook is not None:
                    crash_point.reached("in_handler")
                attempt(event, runner.work.generation_of(offset))
            except Unknown:
                note("skip", o=offset)
            except BaseException as error:
                note("fail", o=offset, n=1)
                self.error = error
                return
            else:
                if crash_point.hook is not None:
                    crash_point.reached("after_effect")
                note("ok", o=offset, n=1)
            self.count += 1


class Threads(Protocol):
    def put(self, strand: Strand) -> None: ...


class StrandRunner:
    def __init__(self, work: Work, lanes: LaneRunner, threads: Threads, over: Callable[[], None]) -> None:
        """over: told when a strand ends while stopping."""
        self.work = work
        self._lanes = lanes
        self._threads = threads
        self._over = over
        self._running: set[Strand] = set()
        work.settle_running = self._settle_running

    def _settle_running(self) -> bool:
        for strand in self._running:
            self._settle(strand)
        return bool(self._running)

    def pump(self) -> None:
        """See that threads work, if there is something to do."""
        work = self.work
        fresh: dict[Key, Strand] = {}
        epoch = work.pace.breaker.epoch
        while work.can_take():
            event = work.incoming.popleft()
            key = event.key()
            strand = fresh.get(key) if key is not None and work.takes_all else None
            if strand is not None and not strand.lane.queue and len(strand.events) < STRAND_EVENTS:
                strand.events.append((event.offset() or 0, event))
                continue
            lane = self._lanes.arrive(event)
            if lane is not None:
                fresh[lane.key] = Strand(self, lane, [(event.offset() or 0, event)], epoch)
        for strand in fresh.values():
            self._begin(strand)

    def _begin(self, strand: Strand) -> None:
        self._running.add(strand)
        self._threads.put(strand)

    def _settle(self, strand: Strand) -> None:
        count = strand.count
        for _, event in strand.events[strand.settled : count]:
            self.work.settled(event)
        if count > strand.settled and (strand.epoch or self.work.pace.breaker.has_failures):
            self.work.pace.succeeded(strand.lane.key, strand.epoch)
        strand.settled = count

    def ended(self, strand: Strand) -> None:
        """On the loop."""
        work = self.work
        self._running.discard(strand)
        if work.is_cancelled:
            self._over()
            return
        self._settle(strand)
        lane, rest = strand.lane, strand.events[strand.count :]
        if rest:
            if lane.queue is None:
                lane.queue = deque()
            lane.queue.extendleft(reversed(rest[1:]))
        may_begin = not work.is_stopping or work.policy.settles_first
        if strand.error is not None:
            work.spawn(self._lanes.run_when_free(lane, rest[0][1], Failure(strand.error, strand.epoch)))
        elif rest and may_begin:
            self._go_on_alone(lane, rest[0][1])
        elif rest:
            pass  # stopping: they stay unsettled
        elif lane.queue and not lane.parked and may_begin:
            if work.pace.breaker.is_open:
                self._go_on_alone(lane, lane.queue.popleft()[1])
            else:
                events = [lane.queue.popleft() for _ in range(min(len(lane.queue), STRAND_EVENTS))]
                self._begin(Strand(self, lane, events, work.pace.breaker.epoch))
        else:
            self._lanes.next_of(lane)
        if work.is_stopping:
            self._over()

    def _go_on_alone(self, lane: Lane[Received], event: Received) -> None:
        """One by one: the breaker is open, or was meanwhile."""
        self.work.spawn(self._lanes.run_when_free(lane, event))

    @property
    def is_cut_off(self) -> bool:
        """Whether nothing more may begin, in any thread. What was settled first is now or never."""
        return self.work.is_cancelled or (self.work.is_stopping and not self.work.policy.settles_first)


class StrandPool:
    def __init__(
        self,
        begin: Callable[[], None],
        attempt: Callable[[Received, int], None],
        executor: DaemonExecutor,
        threads: int,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._begin = begin
        self._attempt = attempt
        self._executor = executor
        self._threads = threads
        self._loop = loop
        self._ready: deque[Strand] = deque()
        self._over: deque[Strand | None] = deque()
        self._active = 0
        self._lock = threading.Lock()
        self._timer: asyncio.TimerHandle | None = None

    def put(self, strand: Strand) -> None:
        self._ready.append(strand)
        if self._active == 0:
            self._one_more()
        if self._timer is None and self._active < self._threads:
            self._timer = self._loop.call_later(PATIENCE_SECONDS, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._ready and self._active < self._threads:
            self._one_more()
            self._timer = self._loop.call_later(PATIENCE_SECONDS, self._look)

    def _one_more(self) -> None:
        self._active += 1
        self._executor.submit(self._work)

    def _work(self) -> None:
        """In a thread: for a turn, then others that wait for the executor go first."""
        turn_ends = time.monotonic() + TURN_SECONDS
        while True:
            if time.monotonic() > turn_ends:
                self._executor.submit(self._work)
                return
            try:
                strand = self._ready.popleft()
            except IndexError:
                self._tell(None)
                return
            strand.run(self._begin, self._attempt)
            self._tell(strand)

    def _tell(self, strand: Strand | None) -> None:
        with self._lock:
            is_first = not self._over
            self._over.append(strand)
        if is_first:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the application is gone
                self._loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        with self._lock:
            over = list(self._over)
            self._over.clear()
        for strand in over:
            if strand is None:
                self._active -= 1
                if self._ready and self._active == 0:
                    self._one_more()  # put between its last look and now
            else:
                strand.runner.ended(strand)
