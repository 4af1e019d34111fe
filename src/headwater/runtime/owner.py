"""The owner of a partition, for one assignment of it: takes its events through the lanes, and keeps the promises.

An event that fails is tried in place for at most two seconds; then it is parked in the retry topic with everything
behind it in its key, one record after the acknowledgement of the one before, and counts as settled. Parked events are
tried when they are due, smallest offset of a key first. What is given up on goes to the dead-letter topic.

    handled            settle
    failed             in place -> parked -> settle
    poison, spent      dead letter -> settle
    retry handled      done record -> the next of the key
    retry failed       parked record again, with one attempt more
    retry given up     dead letter -> done record (skip), or parked record that is held (hold)

All of it runs on the event loop. Async handlers run in *runners*: tasks that take one event after the other as long as
handlers don't wait; when one does, another runner takes over. So a handler that never waits costs no task, and one that
waits delays nobody. Sync handlers run in threads, batch handlers one batch at a time.

A cancelled attempt is no failure: nothing of it is parked or settled. What an owner does after its partition is gone
changes nothing: its frontier is read no more, and the records it may still write state true facts.
"""

import asyncio
import heapq
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import NamedTuple, Protocol, TypeVar

from headwater.event.codec import Unknown
from headwater.kafka.producer import NotPublished
from headwater.runtime import crash_point
from headwater.runtime.frontier import Frontier, Progress, Waiting, encode_metadata, finished_offsets
from headwater.runtime.lane import NO_OFFSET, Attempted, Key, Lane, Lanes, Verdict
from headwater.runtime.pace import Pace
from headwater.runtime.retry import (
    CONFLICT_PAUSES,
    IN_PLACE_PAUSES,
    IN_PLACE_SECONDS,
    FailureKinds,
    GivingUp,
    Kind,
    Retry,
    said_by,
)
from headwater.runtime.retry_topic import DISCARD, REDRIVE, ParkedRecord, Request, Resolved, RetryRecord, TakenBack

logger = logging.getLogger(__name__)

TURN_SECONDS = 0.005  # of handlers that never wait, before others have their turn
PROGRESS_SECONDS = 0.2  # between looks at how far it has come
FIRST_TROUBLE_SECONDS = 0.1
LONGEST_TROUBLE_SECONDS = 30.0
CACHE_BYTES = 8 * 1024 * 1024  # of parked events that are kept at hand; the others are read back when they are due
STRAND_EVENTS = 32
REQUEST_SECONDS = 0.1  # before an operator's request is looked at again whose key is at work

T = TypeVar("T")


class Received(Protocol):
    """A record of the source topic: a client's message, or what was read back from the retry topic."""

    def offset(self) -> int | None: ...
    def key(self) -> bytes | None: ...
    def value(self) -> bytes | None: ...
    def timestamp(self) -> tuple[int, int]: ...


class Doors(Protocol):
    """What an owner needs of the outside. Each `send` returns when it is acknowledged and raises NotPublished."""

    async def attempt(self, event: Received, attempted: Attempted | None, generation: int) -> None:
        """Call the handler and publish what it returns. Raises what it raises, Undecodable, and Unknown for an event that
        is not for it."""

    async def attempt_batch(self, events: Sequence[Received], generation: int) -> list[BaseException | None]:
        """An outcome per event. Raises what the handler raises."""

    def is_wanted(self, event: Received) -> bool:
        """Whether the handler is for events of this type; also true for what can't be decoded."""

    async def send_parked(self, event: Received, attempted: Attempted | None) -> int:
        """Its place in the retry topic."""

    async def send_done(self, event_offset: int, key: Key) -> None: ...

    async def send_dead(self, event: Received, attempted: Attempted) -> int | None:
        """The dead letter's offset; None when it turns out that the event was handled (inbox)."""

    async def read_back(self, place: int) -> list[ParkedRecord]:
        """What the retry topic has from that place on, at least the record there. Raises ConsumerFailed."""

    async def read_dead(self, dead_offset: int) -> tuple[Received, int] | None:
        """With the inbox generation that it was given up in; None when retention has taken it."""

    async def answer(self, request: Request, done: bool) -> None:
        """The request was obeyed, or (not `done`) can't be."""

    def now_ms(self) -> int: ...

    def note(self, event: str, **fields: object) -> None:
        """A line of the history."""


class Policy(NamedTuple):
    """What a handler wants, as far as its owners must know."""

    name: str
    retry: Retry | None
    giving_up: GivingUp
    kinds: FailureKinds
    settles_first: bool = False
    """At most once: an event is settled before it is handled, and failing it once is the end of it."""
    batch: int = 0
    """How many events a batch handler gets at most; 0 for a handler of single events."""
    outside_effects: bool = False


class Assignment(NamedTuple):
    topic: str
    partition: int
    token: int
    frontier: int | None
    """As committed; None for a group that begins."""
    progress: Progress
    topic_id: str = ""


class Stopped(Exception):
    """The partition is being given up: what is at hand stays unsettled."""


class Failure(NamedTuple):
    """An attempt that failed."""

    error: BaseException
    epoch: int
    """Of the breaker, when it began."""


class Strand:
    """Some events of one key, for a thread."""

    __slots__ = ("count", "epoch", "error", "events", "lane", "owner", "settled")

    def __init__(self, owner: "Owner", lane: Lane[Received], events: list[tuple[int, Received]], epoch: int) -> None:
        self.owner = owner
        self.epoch = epoch
        self.lane = lane
        self.events = events
        self.count = 0
        """How many were handled; written by the thread."""
        self.settled = 0
        self.error: BaseException | None = None

    def run(self, attempt: Callable[[Received, int], None]) -> None:
        """In a thread."""
        owner = self.owner
        for offset, event in self.events:
            if owner.is_cut_off or owner.breaker_epoch != self.epoch:
                return
            note = owner.note
            note("start", o=offset, n=1)
            try:
                if crash_point.hook is not None:
                    crash_point.reached("in_handler")
                attempt(event, owner.generation_of(offset))
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


class Strands(Protocol):
    """Threads for a sync handler's strands."""

    def put(self, strand: Strand) -> None: ...


class Owner:
    def __init__(
        self,
        policy: Policy,
        assignment: Assignment,
        doors: Doors,
        pace: Pace,
        *,
        strands: Strands | None = None,
        space: Callable[[], None] = lambda: None,
        failed: Callable[[Exception], None] = lambda error: None,
        chance: random.Random | None = None,
        writes_history: bool = False,
    ) -> None:
        """strands: where a sync handler runs. space: called when buffered events were settled; failed: when the owner
        itself breaks."""
        self.policy = policy
        self.assignment = assignment
        self.partition = assignment.partition
        self.committable: tuple[int, str] | None = None
        """The frontier and its metadata; None before there is one. Read by the consumer thread."""
        self.last_committed: tuple[int, str] | None = None
        """Kept by who commits in transactions."""
        self.taken = 0
        self.taken_bytes = 0
        """Handed over so far; counted by the consumer thread, which bounds what is taken and not done."""
        self.done = 0
        self.done_bytes = 0
        self.first_waiting_ms: int | None = None
        """The time of the first event that is not settled; read by who watches the lag."""
        self.stopped = threading.Event()
        self.is_stopping = False
        self._doors = doors
        self.note = doors.note
        self._pace = pace
        self._strands = strands
        self._space = space
        self._failed = failed
        self._chance = chance or random.Random()
        self._writes_history = writes_history
        replay = assignment.progress.replay
        self._replay = replay
        self._finished = finished_offsets(assignment.frontier or 0, assignment.progress.done)
        self._finished_end = max(self._finished, default=0)
        self._frontier = Frontier(assignment.frontier)
        self.lanes: Lanes[Received] = Lanes(replayed_below=replay.until if replay else 0)
        self._incoming: deque[Received] = deque()
        self._waiting_times: deque[tuple[int, int]] = deque()
        self._is_loaded = policy.retry is None
        self._is_cancelled = False
        self._blocked: Waiting | None = None
        """A record can't be written: nothing more is taken."""
        self._stuck: dict[Key, Waiting] = {}
        """Without a retry topic: keys whose event is tried in place until it works. The others go on."""
        self._baton: object | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: set[Strand] = set()
        self._stop_asked = asyncio.Event()
        self._due: list[tuple[int, int, Key]] = []
        self._due_count = 0
        self._retry_timer: asyncio.TimerHandle | None = None
        self._progress_timer: asyncio.TimerHandle | None = None
        self._cache: dict[int, Received] = {}
        self._cache_bytes = 0
        self._slots_held = 0
        self._requests: deque[Request] = deque()
        self._is_obeying = False
        self._is_burying = False
        self._strangers: dict[int, ParkedRecord] = {}
        """Parked from a topic of the same name that is no more."""

    # Life

    def start(self) -> None:
        """On the loop, before anything else."""
        self._pace.join(self)
        assignment = self.assignment
        self.note(
            "assign",
            i=assignment.topic_id,
            o=assignment.frontier,
            n=self.policy.retry.attempts if self.policy.retry is not None else None,
            hold=self.policy.giving_up is GivingUp.HOLD,
            replay=assignment.progress.replay is not None,
        )
        if assignment.progress.replay is not None:
            self.look()

    def loaded(self) -> None:
        """The retry topic was read up to where it ended when the partition was assigned."""
        self._is_loaded = True
        for lane in list(self.lanes.by_key.values()):
            if lane.parked:
                self._schedule(lane)
                for offset in lane.parked if self._writes_history else ():
                    self.note("load", o=offset)
        self._pace.count_parked()
        self.go_on()

    async def _bury_strangers(self) -> None:
        """What was parked when the topic had another id can't be told apart from this topic's events: set aside."""
        now = self._doors.now_ms()
        while self._strangers and not self.is_stopping and not self._pace.is_shut:
            offset, record = next(iter(self._strangers.items()))
            before = record.attempted or Attempted(0, now, now, Kind.POISON, "")
            reason = "the topic was deleted and made again while this was parked"
            attempted = before._replace(kind=Kind.POISON, error=reason, held=NO_OFFSET)
            await self._send_dead(ReadBack(record), attempted)
            key = record.source.key if record.source.key is not None else offset
            if not self.lanes.holds(key, offset):
                await self._send_done(offset, key)
            del self._strangers[offset]
        self._is_burying = False

    def add(self, messages: Sequence[Received]) -> None:
        """Records of the source, in order."""
        if self.is_stopping:
            return
        if self.policy.settles_first:
            self._frontier.advance((messages[-1].offset() or 0) + 1)
        else:
            self._frontier.take([message.offset() or 0 for message in messages])
        at = messages[0].timestamp()[1]
        if not self._waiting_times or at - self._waiting_times[-1][1] >= 1000:  # one a second is enough to tell the lag
            self._waiting_times.append((messages[0].offset() or 0, at))
        self._incoming.extend(messages)
        self._look_later()
        self._pump()

    def stop(self) -> None:
        """Begin nothing more; `stopped` is set when what is at work is done."""
        if self.is_stopping:
            return
        self.is_stopping = True
        self._stop_asked.set()
        if self._retry_timer is not None:
            self._retry_timer.cancel()
        if self.policy.settles_first:
            self._pump()  # what is at hand is committed already: it is now or never
        self._check_stopped()

    def cancel(self) -> None:
        """The time for stopping is over: async handlers are cancelled, their events stay unsettled."""
        self._is_cancelled = True
        self._incoming.clear()
        self._stop_asked.set()
        for task in list(self._tasks):
            task.cancel()
        self._check_stopped()

    def _check_stopped(self) -> None:
        if (
            self.is_stopping
            and not self.stopped.is_set()
            and not self._tasks
            and (self._is_cancelled or not self._running)
        ):
            if self.policy.settles_first and self._incoming and not self._is_cancelled:
                return
            self.look()
            self._pace.leave(self)
            while self._slots_held:  # of tasks that were cut off before they could give theirs back
                self._release_slot()
            if self._progress_timer is not None:
                self._progress_timer.cancel()
            self.note("revoke")
            self.stopped.set()

    def _take_slot(self) -> None:
        self._slots_held += 1
        self._pace.free -= 1

    def _release_slot(self) -> bool:
        """Whether somebody waited for it."""
        if self._slots_held <= 0:
            return False
        self._slots_held -= 1
        return self._pace.release()

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_over)

    def _task_over(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, Stopped):
            logger.error("owner_failed handler=%s partition=%d", self.policy.name, self.partition, exc_info=error)
            if isinstance(error, Exception):
                self._failed(error)  # a partition that stands still in silence would be worse than an end
        if self.is_stopping:
            self._check_stopped()

    # How far it has come

    def _look_later(self) -> None:
        if self._progress_timer is None and not self.stopped.is_set():
            self._progress_timer = asyncio.get_running_loop().call_later(PROGRESS_SECONDS, self.look)

    def look(self) -> None:
        """Say the frontier, and why it stands."""
        self._progress_timer = None
        for strand in self._running:
            self._settle_strand(strand)
        offset = self._frontier.offset
        if offset is None:
            return
        if self._finished and self._frontier.position > self._finished_end:
            self._finished.clear()
        self.lanes.forget_floors((self._incoming[0].offset() or 0) if self._incoming else self._frontier.position)
        replay = self._replay
        if replay is not None and offset >= replay.until:
            replay = self._replay = None
        outage = self._pace.breaker.outage
        waiting = self._blocked or next(iter(self._stuck.values()), None)
        if outage is not None:
            waiting = Waiting(outage.reason, outage.since_ms)
        progress = Progress(self._frontier.done_beyond(), waiting, self.lanes.parked_keys, replay)
        self.committable = (offset, encode_metadata(progress))
        times = self._waiting_times
        while len(times) > 1 and times[1][0] <= offset:
            times.popleft()
        self.first_waiting_ms = times[0][1] if times and not self._frontier.is_clear else None
        if not self._frontier.is_clear or self._running or waiting is not None:
            self._look_later()

    def _settled(self, event: Received) -> None:
        self._frontier.settle(event.offset() or 0)
        self.done += 1
        self.done_bytes += len(event.value() or b"")
        if not self.done & 63 or self._frontier.is_clear:
            self._space()
            self._look_later()

    def generation_of(self, offset: int) -> int:
        """Of the inbox."""
        replay = self._replay
        return replay.generation if replay is not None and offset < replay.until else 0

    @property
    def parked_keys(self) -> int:
        return self.lanes.parked_keys

    # Taking events

    def go_on(self) -> None:
        self._obey_requests()
        if self._strangers and not self._is_burying and self._is_loaded and not self._pace.is_shut:
            self._is_burying = True
            self._spawn(self._bury_strangers())
        self._wake_retries()
        self._pump()
        self._look_later()

    @property
    def is_idle(self) -> bool:
        """Whether all that it was given is settled and nothing is at work."""
        return self._frontier.is_clear and not self._tasks and not self._running

    @property
    def is_loaded(self) -> bool:
        """Whether it knows what is parked, and may begin."""
        return self._is_loaded

    @property
    def has_due(self) -> bool:
        """Whether something is to be done without a new event."""
        if not self._is_loaded or self.is_stopping:
            return False
        return bool(self._requests) or (bool(self._due) and self._due[0][0] <= self._doors.now_ms())

    def offer_probe(self) -> bool:
        """While the breaker is open: one event that is not at work. Rather one that was not tried yet: those that are
        parked have failed before. Where too many are parked, they are what must become less."""
        if not self._is_loaded or self.is_stopping:
            return False
        if self._pace.breaker.is_crowded:
            lane = self._pop_due()
            if lane is not None:
                self._begin_retry(lane)
            return lane is not None
        for _ in range(len(self._incoming)):
            event = self._incoming.popleft()
            lane = self._arrive(event)
            if lane is not None:
                self._take_slot()
                self._spawn(self._run_lane(lane, event))
                return True
        lane = self._pop_due()
        if lane is not None:
            self._begin_retry(lane)
            return True
        return False

    def _can_take(self) -> bool:
        pace = self._pace
        if (
            not self._incoming
            or not self._is_loaded
            or self._blocked is not None
            or pace.breaker.is_open
            or pace.is_shut
        ):
            return False
        if self.is_stopping and (self._is_cancelled or not self.policy.settles_first):
            return False
        if pace.free <= 0:
            pace.wants_slot(self)
            return False
        return True

    def _pump(self) -> None:
        """See that somebody works, if there is something to do."""
        if self._baton is None and self._can_take():
            if self._strands is not None and not self.policy.batch:
                self._fill_strands()
            elif self.policy.batch:
                self._baton = self
                self._spawn(self._run_batches())
            else:
                self._baton = self
                self._spawn(self._run())
        elif self.is_stopping:
            self._check_stopped()

    def _arrive(self, event: Received) -> Lane[Received] | None:
        """Its lane, when the event is to be handled now."""
        offset, key = event.offset() or 0, event.key()
        if (self._finished or self._replay is not None) and self._is_skipped(offset):
            self._settled(event)
            return None
        verdict, lane = self.lanes.arrive(offset, offset if key is None else key, event)
        if verdict is Verdict.RUN:
            return lane
        if verdict is Verdict.SETTLED:
            self._settled(event)
        elif verdict is Verdict.PARK:
            assert lane is not None
            self._begin_parking(lane)
        return None

    def _is_skipped(self, offset: int) -> bool:
        """It was finished before a restart, or a replay leaves it out."""
        if offset in self._finished:
            self._finished.discard(offset)
            return True
        replay = self._replay
        if replay is None or offset >= replay.until:
            return False
        silent = self.policy.outside_effects and not replay.outside_effects
        return silent or not replay.start <= offset < replay.end

    async def _run(self) -> None:
        """A runner: one event after the other, until it is no more the one that takes them."""
        loop = asyncio.get_running_loop()
        baton: object = object()
        self._baton = baton
        loop.call_soon(self._pass_on, baton)
        turn_ends = time.perf_counter() + TURN_SECONDS
        while self._can_take():
            event = self._incoming.popleft()
            lane = self._arrive(event)
            if lane is None:
                continue
            self._take_slot()
            failure = await self._attempt(lane.key, event, None)
            following: tuple[int, Received] | None = None
            if failure is None:
                self._settled(event)
                following = self._next_of(lane)
            if self._baton is baton:  # the handler did not wait
                if failure is not None:
                    self._spawn(self._run_lane(lane, event, failure))
                elif following is not None:
                    self._spawn(self._run_lane(lane, following[1]))
                else:
                    self._release_slot()
                if time.perf_counter() > turn_ends:
                    break
                continue
            if failure is not None:
                await self._run_lane(lane, event, failure)
            elif following is not None:
                await self._run_lane(lane, following[1])
            elif self._release_slot():
                loop.call_soon(self._pump)  # another partition was waiting for a slot: its turn
                return
            if self._baton is not None:
                return
            self._baton = baton = object()
            loop.call_soon(self._pass_on, baton)
            turn_ends = time.perf_counter() + TURN_SECONDS
        if self._baton is baton:
            self._baton = None
            if self._incoming:
                loop.call_soon(self._pump)

    def _pass_on(self, baton: object) -> None:
        """If that runner still has it, its handler waits: somebody else goes on."""
        if self._baton is baton:
            self._baton = None
            self._pump()

    def _next_of(self, lane: Lane[Received]) -> tuple[int, Received] | None:
        """The event at work is settled: the next one of its key, if the key goes on."""
        following = self.lanes.next_of(lane)
        if following is None and lane.parked:  # a redrive came in between
            self._schedule(lane)
            if lane.queue and not lane.is_parking:
                self._begin_parking(lane)
        return following

    async def _attempt(self, key: Key, event: Received, attempted: Attempted | None) -> Failure | None:
        """None when it is handled. Raises Stopped when it was cut off."""
        offset = event.offset() or 0
        pace = self._pace
        epoch = pace.breaker.epoch
        doors = self._doors
        generation = attempted.generation if attempted is not None else self.generation_of(offset)
        doors.note("start", o=offset, n=attempted.attempts + 1 if attempted else 1)
        if crash_point.hook is not None:
            crash_point.reached("in_handler")
        try:
            await doors.attempt(event, attempted, generation)
        except Unknown:
            doors.note("skip", o=offset)
            if epoch:
                pace.probe_again()
            return None
        except Exception as error:
            failure = Failure(error, epoch)
        except asyncio.CancelledError as error:  # the handler's own is a failure like any other
            if self._is_cancelled:
                raise Stopped from None
            failure = Failure(error, epoch)
        else:
            if self._is_cancelled:
                raise Stopped
            if crash_point.hook is not None:
                crash_point.reached("after_effect")
            if attempted is not None and attempted.is_redriven:
                doors.note("ok", o=offset, n=attempted.attempts + 1, r=1)
            else:
                doors.note("ok", o=offset, n=attempted.attempts + 1 if attempted else 1)
            if epoch or pace.breaker.has_failures:
                pace.succeeded(key, epoch)
            return None
        if self._is_cancelled:
            raise Stopped
        doors.note("fail", o=offset, n=attempted.attempts + 1 if attempted else 1)
        return failure

    async def _run_lane(self, lane: Lane[Received], event: Received, failure: Failure | None = None) -> None:
        """Events of one key until it is free, or parks; takes over a slot, and gives it back. failure: of an attempt
        which was made already."""
        try:
            following: tuple[int, Received] | None = (event.offset() or 0, event)
            while following is not None:
                _, event = following
                if failure is None:
                    if self.is_stopping and not self.policy.settles_first:
                        raise Stopped
                    failure = await self._attempt(lane.key, event, None)
                if failure is not None and not await self._overcome(lane, event, failure):
                    return
                failure = None
                self._settled(event)
                following = self._next_of(lane)
        finally:
            self._release_slot()

    # Failures

    async def _overcome(self, lane: Lane[Received], event: Received, failure: Failure) -> bool:
        """Try again in place, or park, or give up. True when the event is settled and the lane may go on; False when the
        lane parks. Raises Stopped."""
        policy, pace = self.policy, self._pace
        offset = event.offset() or 0
        first_failed_ms = self._doors.now_ms()
        loop = asyncio.get_running_loop()
        ends = loop.time() + IN_PLACE_SECONDS
        tries = 0
        while True:
            error, epoch = failure
            kind = policy.kinds.of(error)
            logger.log(
                logging.WARNING if not tries else logging.DEBUG,
                "handler_failed handler=%s topic=%s partition=%d offset=%d class=%s error=%s",
                policy.name, self.assignment.topic, self.partition, offset, kind, said_by(error),
                exc_info=error if not tries and kind is not Kind.POISON else None,
            )  # fmt: skip
            if policy.settles_first or (kind is Kind.POISON and policy.retry is not None):
                pace.probe_again()
                break
            pauses = CONFLICT_PAUSES if kind is Kind.CONFLICT else IN_PLACE_PAUSES
            if kind is Kind.UNAVAILABLE:
                pace.unavailable(epoch, said_by(error))
            elif pace.breaker.is_open:
                pace.failed(lane.key, epoch, said_by(error))
            elif policy.retry is None:
                await self._hold_on(lane.key, tries, error)
            elif tries < len(pauses) and loop.time() + pauses[tries] < ends:
                await self._pause(pauses[tries])
            else:
                pace.failed(lane.key, epoch, said_by(error))
                if not pace.breaker.is_open:
                    break
            if pace.breaker.is_open:
                self._release_slot()  # what waits for the outage to end takes no slot from a probe
                try:
                    await self._wait_for_turn()
                finally:
                    self._take_slot()
            tries += 1
            again = await self._attempt(lane.key, event, None)
            if again is None:
                self._stuck.pop(lane.key, None)
                return True
            failure = again
        attempted = Attempted(1, 0, first_failed_ms, kind, said_by(error), generation=self.generation_of(offset))
        if kind is Kind.POISON or policy.settles_first or policy.retry is None or policy.retry.attempts <= 1:
            dead_offset = await self._send_dead(event, attempted)
            if policy.giving_up is GivingUp.SKIP or dead_offset is None or policy.settles_first:
                return True
            attempted = attempted._replace(held=dead_offset)
        else:
            attempted = attempted._replace(due_ms=self._due_ms(1))
        self._begin_parking(lane, event, attempted)
        return False

    def _due_ms(self, attempts: int) -> int:
        assert self.policy.retry is not None
        return self._doors.now_ms() + round(self.policy.retry.pause_seconds(attempts, self._chance) * 1000)

    async def _hold_on(self, key: Key, tries: int, error: BaseException) -> None:
        """Without a retry topic: the key waits, the frontier with it, and the group says so."""
        before = self._stuck.get(key)
        since = before.since_ms if before is not None else self._doors.now_ms()
        self._stuck[key] = Waiting(f"an event failed {tries + 1} times: {said_by(error)}", since)
        self._look_later()
        await self._pause(min(FIRST_TROUBLE_SECONDS * 2 ** min(tries, 20), LONGEST_TROUBLE_SECONDS))

    async def _pause(self, seconds: float) -> None:
        """Raises Stopped."""
        if not self.is_stopping:
            waiter = asyncio.get_running_loop().create_future()
            handle = asyncio.get_running_loop().call_later(seconds, _wake, waiter)
            stop = asyncio.get_running_loop().create_task(self._stop_asked.wait())
            try:
                await asyncio.wait((waiter, stop), return_when=asyncio.FIRST_COMPLETED)
            finally:
                handle.cancel()
                stop.cancel()
        if self.is_stopping:
            raise Stopped

    async def _wait_for_turn(self) -> None:
        """Raises Stopped."""
        self._look_later()
        turn = asyncio.get_running_loop().create_task(self._pace.wait_for_turn())
        stop = asyncio.get_running_loop().create_task(self._stop_asked.wait())
        try:
            await asyncio.wait((turn, stop), return_when=asyncio.FIRST_COMPLETED)
        finally:
            turn.cancel()
            stop.cancel()
        if self.is_stopping:
            raise Stopped

    async def _insist(self, what: str, send: Callable[[], Awaitable[T]]) -> T:
        """Until it is acknowledged. What can't be written stops its partition, loudly. Raises Stopped."""
        pause = FIRST_TROUBLE_SECONDS
        while True:
            try:
                result = await send()
                if self._blocked is not None:
                    self._blocked = None
                    self.go_on()
                return result
            except NotPublished as error:
                reason = f"{what} can't be written: {error}"
            logger.error("partition_stopped handler=%s topic=%s partition=%d reason=%s",
                         self.policy.name, self.assignment.topic, self.partition, reason)  # fmt: skip
            since = self._blocked.since_ms if self._blocked is not None else self._doors.now_ms()
            self._blocked = Waiting(reason, since)
            self._look_later()
            await self._pause(pause)
            pause = min(pause * 2, LONGEST_TROUBLE_SECONDS)

    async def _send_dead(self, event: Received, attempted: Attempted) -> int | None:
        if crash_point.hook is not None:
            crash_point.reached("before_dead_ack")
        dead_offset = await self._insist("the dead letter", lambda: self._doors.send_dead(event, attempted))
        if dead_offset is not None:
            if crash_point.hook is not None:
                crash_point.reached("after_dead_ack")
            self._doors.note("dead", o=event.offset(), n=attempted.attempts, d=dead_offset)
        return dead_offset

    async def _send_parked(self, event: Received, attempted: Attempted | None) -> int:
        if crash_point.hook is not None:
            crash_point.reached("before_park_ack")
        place = await self._insist("the parked record", lambda: self._doors.send_parked(event, attempted))
        if crash_point.hook is not None:
            crash_point.reached("after_park_ack")
        self._doors.note("park", o=event.offset(), n=attempted.attempts if attempted is not None else 0)
        return place

    async def _send_done(self, offset: int, key: Key) -> None:
        if crash_point.hook is not None:
            crash_point.reached("before_done_ack")
        await self._insist("the done record", lambda: self._doors.send_done(offset, key))
        if crash_point.hook is not None:
            crash_point.reached("after_done_ack")
        self._doors.note("done", o=offset)

    # Parking

    def _begin_parking(
        self, lane: Lane[Received], event: Received | None = None, attempted: Attempted | None = None
    ) -> None:
        first = (event.offset() or 0, event) if event is not None else None
        self.lanes.begin_parking(lane, first)
        if lane.parked and not lane.is_retrying:  # a redrive came in between, and was due while this one was at work
            self._schedule(lane)
        self._spawn(self._park(lane, attempted))

    async def _park(self, lane: Lane[Received], attempted: Attempted | None) -> None:
        """The queue of a key, one after the other. attempted: of the first."""
        lanes, doors = self.lanes, self._doors
        while (found := lanes.next_to_park(lane)) is not None:
            offset, event = found
            if attempted is not None or doors.is_wanted(event):
                generation = self.generation_of(offset)
                if attempted is None and generation:  # it must be known when the replay is over
                    now = doors.now_ms()
                    attempted = Attempted(0, now, now, Kind.TRANSIENT, "waits behind its key", generation=generation)
                place = await self._send_parked(event, attempted)
                was_parked = bool(lane.parked)
                lanes.is_parked(lane, offset, place, attempted)
                self._keep(offset, event)
                if not was_parked:
                    self._pace.count_parked()
                if not lane.is_retrying and lane.parked is not None and lane.parked.smallest == offset:
                    self._schedule(lane)
            else:
                assert lane.queue is not None
                lane.queue.popleft()
            attempted = None
            self._settled(event)
            if self.is_stopping:
                return
        lanes.end_parking(lane)

    def _keep(self, offset: int, event: Received) -> None:
        size = len(event.value() or b"") + 200
        if self._cache_bytes + size <= CACHE_BYTES and offset not in self._cache:
            self._cache[offset] = event
            self._cache_bytes += size

    def _forget(self, offset: int) -> None:
        event = self._cache.pop(offset, None)
        if event is not None:
            self._cache_bytes -= len(event.value() or b"") + 200

    # Parked events

    def _schedule(self, lane: Lane[Received]) -> None:
        """The key's first parked event is tried when it is due."""
        assert lane.parked
        attempt = lane.parked.attempt
        if attempt is not None and attempt.held != NO_OFFSET:
            return
        self._due_count += 1
        heapq.heappush(self._due, (attempt.due_ms if attempt is not None else 0, self._due_count, lane.key))
        self._set_retry_timer()

    def _set_retry_timer(self) -> None:
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry_timer = None
        if self._due and not self.is_stopping and not self._pace.breaker.is_open and self._is_loaded:
            seconds = max(0.0, (self._due[0][0] - self._doors.now_ms()) / 1000)
            self._retry_timer = asyncio.get_running_loop().call_later(seconds, self._wake_retries)

    def _pop_due(self) -> Lane[Received] | None:
        """A key whose first parked event is due."""
        now = self._doors.now_ms()
        while self._due and self._due[0][0] <= now:
            due, _, key = heapq.heappop(self._due)
            lane = self.lanes.by_key.get(key)
            if lane is None or not lane.parked or lane.is_retrying or lane.is_at_work:
                continue
            attempt = lane.parked.attempt
            if (attempt.due_ms if attempt is not None else 0) <= due and (attempt is None or attempt.held == NO_OFFSET):
                return lane
        return None

    def _wake_retries(self) -> None:
        pace = self._pace
        if self.is_stopping or not self._is_loaded or pace.breaker.is_open or pace.is_shut or self._blocked is not None:
            return
        while self._pace.free > 0:
            lane = self._pop_due()
            if lane is None:
                break
            self._begin_retry(lane)
        if self._due and self._due[0][0] <= self._doors.now_ms():
            self._pace.wants_slot(self)
        else:
            self._set_retry_timer()

    def _begin_retry(self, lane: Lane[Received]) -> None:
        self._take_slot()
        self.lanes.begin_retry(lane)
        self._spawn(self._retry(lane))

    async def _retry(self, lane: Lane[Received]) -> None:
        """The parked events of a key, as long as they succeed; takes over a slot, and gives it back."""
        lanes = self.lanes
        try:
            while lane.parked:
                offset, attempted = lane.parked.smallest, lane.parked.attempt
                if self.is_stopping or self._pace.is_shut or (attempted is not None and not self._is_due(attempted)):
                    break
                event = await self._read_back(offset, lane.parked.place)
                if event is None:
                    break
                if self.policy.settles_first:
                    await self._send_done(offset, lane.key)
                failure = await self._attempt(lane.key, event, attempted)
                if failure is not None and not await self._retry_failed(lane, event, attempted, failure):
                    break
                if not self.policy.settles_first:
                    await self._send_done(offset, lane.key)
                self._forget(offset)
                lanes.is_done(lane, offset)
                self._pace.count_parked()
                self._look_later()
        finally:
            self._release_slot()
            lane.is_retrying = False  # in any case: a later owner finds the truth in the retry topic
        lanes.end_retry(lane)
        if lane.parked:
            self._schedule(lane)
        elif lane.queue and not lane.is_parking and not lane.is_at_work:
            self._begin_parking(lane)

    def _is_due(self, attempted: Attempted) -> bool:
        return attempted.held == NO_OFFSET and attempted.due_ms <= self._doors.now_ms()

    async def _retry_failed(
        self, lane: Lane[Received], event: Received, attempted: Attempted | None, failure: Failure
    ) -> bool:
        """True when it was given up on, and the next of the key may go."""
        policy, pace = self.policy, self._pace
        offset = event.offset() or 0
        error, epoch = failure
        kind = policy.kinds.of(error)
        said = said_by(error)
        now = self._doors.now_ms()
        if kind is Kind.UNAVAILABLE:
            pace.unavailable(epoch, said)
            return False
        if kind is not Kind.POISON:
            pace.failed_again(epoch)
            outage = pace.breaker.outage
            if outage is not None and outage.is_unavailable:
                return False  # it counts as no attempt
        else:
            pace.probe_again()
        before = attempted or Attempted(0, 0, now, kind, said, generation=self.generation_of(offset))
        after = before._replace(attempts=before.attempts + 1, kind=kind, error=said)
        assert policy.retry is not None
        logger.warning(
            "retry_failed handler=%s topic=%s partition=%d offset=%d attempt=%d class=%s error=%s",
            policy.name, self.assignment.topic, self.partition, offset, after.attempts, kind, said,
        )  # fmt: skip
        if kind is Kind.POISON or after.attempts >= policy.retry.attempts or policy.settles_first:
            dead_offset = await self._send_dead(event, after)
            if policy.giving_up is GivingUp.SKIP or dead_offset is None:
                return True
            after = after._replace(held=dead_offset)
        else:
            after = after._replace(due_ms=self._due_ms(after.attempts))
        place = await self._send_parked(event, after)
        self.lanes.is_parked(lane, offset, place, after)
        return False

    async def _read_back(self, offset: int, place: int) -> Received | None:
        """From the cache, or from the retry topic, with some that come next."""
        event = self._cache.get(offset)
        if event is not None:
            return event
        pause = FIRST_TROUBLE_SECONDS
        while True:
            try:
                for record in await self._doors.read_back(place):
                    if record.source.offset == offset and record.place == place:
                        event = ReadBack(record)
                    elif self.lanes.holds(_key_of(record), record.source.offset):
                        self._keep(record.source.offset, ReadBack(record))
                if event is not None:
                    return event
                reason = f"there is no parked record at {place} of the retry topic"
            except Exception as error:
                reason = said_by(error)
            logger.error("read_back_failed handler=%s partition=%d offset=%d reason=%s",
                         self.policy.name, self.partition, offset, reason)  # fmt: skip
            try:
                await self._pause(pause)
            except Stopped:
                return None
            pause = min(pause * 2, LONGEST_TROUBLE_SECONDS)

    # The retry topic: what is found at the takeover, and what operators ask for

    def read_retry_topic(self, records: Sequence[RetryRecord]) -> None:
        """In order. Parked and done count at the takeover only: those written by others later matter at the next one."""
        for record in records:
            if isinstance(record, Request):
                self._requests.append(record)
            elif isinstance(record, TakenBack | Resolved):
                answered = record.dead_offset
                self._requests = deque(request for request in self._requests if request.dead_offset != answered)
            elif self._is_loaded:
                continue
            elif isinstance(record, ParkedRecord) and record.topic_id != self.assignment.topic_id:
                self._strangers[record.source.offset] = record
            elif isinstance(record, ParkedRecord):
                self.lanes.load(_key_of(record), record.source.offset, record.place, record.attempted)
            elif self._strangers.pop(record.offset, None) is None:
                self.lanes.unload(record.key if record.key is not None else record.offset, record.offset)
        self._obey_requests()

    def _obey_requests(self) -> None:
        is_free = not self._is_obeying and self._is_loaded and not self.is_stopping and not self._pace.is_shut
        if self._requests and is_free:
            self._is_obeying = True
            self._spawn(self._obey())

    async def _obey(self) -> None:
        """One request after the other."""
        try:
            while self._requests and not self.is_stopping and not self._pace.is_shut:
                request = self._requests.popleft()
                is_done = await self._obey_one(request)
                if is_done is None:
                    self._requests.append(request)
                    await self._pause(REQUEST_SECONDS)
                    continue
                await self._insist("the answer to a request", lambda r=request, d=is_done: self._doors.answer(r, d))  # type: ignore[misc]
        finally:
            self._is_obeying = False

    async def _obey_one(self, request: Request) -> bool | None:
        """Whether it could be obeyed; None when that can't be said now: the event is at work, or can't be read."""
        try:
            found = await self._doors.read_dead(request.dead_offset)
        except Exception as error:
            logger.warning("dead_letter_unreadable handler=%s partition=%d dead_offset=%d reason=%s",
                           self.policy.name, self.partition, request.dead_offset, said_by(error))  # fmt: skip
            return None
        letter, generation = found if found is not None else (None, 0)
        if letter is None or request.action not in (REDRIVE, DISCARD):
            logger.warning("request_refused action=%s dead_offset=%d reason=%s", request.action, request.dead_offset,
                           "there is no such dead letter" if letter is None else "it is not known")  # fmt: skip
            return False
        offset, key = letter.offset() or 0, letter.key()
        lane = self.lanes.by_key.get(offset if key is None else key)
        if lane is not None and self.lanes.is_busy(lane, offset):
            return None
        held = lane.parked.attempt if lane is not None and lane.parked else None
        is_held = held is not None and held.held != NO_OFFSET and lane.parked.smallest == offset  # type: ignore[union-attr]
        if request.action == DISCARD:
            if is_held:
                assert lane is not None
                await self._send_done(offset, lane.key)
                self._forget(offset)
                self.lanes.is_done(lane, offset)
                self._free_or_schedule(lane)
            return True
        if not is_held and self.lanes.holds(offset if key is None else key, offset):
            return True  # it is parked, and will be tried anyway
        now = self._doors.now_ms()
        attempted = Attempted(0, now, now, Kind.TRANSIENT, "redriven", is_redriven=True, generation=generation)
        place = await self._send_parked(letter, attempted)
        lane = self.lanes.load(offset if key is None else key, offset, place, attempted)
        self._forget(offset)
        self._keep(offset, letter)
        if not lane.is_retrying:
            self._schedule(lane)
        self._pace.count_parked()
        return True

    def _free_or_schedule(self, lane: Lane[Received]) -> None:
        if lane.parked:
            self._schedule(lane)
        else:
            lane.is_retrying = False
            self.lanes.end_retry(lane)

    # Sync handlers

    def _fill_strands(self) -> None:
        """Events of one key go to a thread together."""
        assert self._strands is not None
        fresh: dict[Key, Strand] = {}
        epoch = self._pace.breaker.epoch
        while self._can_take():
            event = self._incoming.popleft()
            key = event.key()
            strand = fresh.get(key) if key is not None and not self._finished and self._replay is None else None
            if strand is not None and len(strand.events) < STRAND_EVENTS:
                strand.events.append((event.offset() or 0, event))
                continue
            lane = self._arrive(event)
            if lane is not None:
                fresh[lane.key] = Strand(self, lane, [(event.offset() or 0, event)], epoch)
        for strand in fresh.values():
            self._begin_strand(strand)

    def _begin_strand(self, strand: Strand) -> None:
        assert self._strands is not None
        self._running.add(strand)
        self._strands.put(strand)

    def _settle_strand(self, strand: Strand) -> None:
        count = strand.count
        for _, event in strand.events[strand.settled : count]:
            self._settled(event)
        if count > strand.settled and (strand.epoch or self._pace.breaker.has_failures):
            self._pace.succeeded(strand.lane.key, strand.epoch)
        strand.settled = count

    def strand_over(self, strand: Strand) -> None:
        """On the loop."""
        self._running.discard(strand)
        if self._is_cancelled:
            self._check_stopped()
            return
        self._settle_strand(strand)
        lane, rest = strand.lane, strand.events[strand.count :]
        if rest:
            if lane.queue is None:
                lane.queue = deque()
            lane.queue.extendleft(reversed(rest[1:]))
        if strand.error is not None:
            self._take_slot()
            self._spawn(self._run_lane(lane, rest[0][1], Failure(strand.error, strand.epoch)))
        elif rest and not self.is_stopping:
            self._spawn(self._resume(lane, rest[0][1]))  # the breaker opened meanwhile
        elif rest:
            pass  # stopping
        elif lane.queue and not lane.parked and not self.is_stopping:
            events = [lane.queue.popleft() for _ in range(min(len(lane.queue), STRAND_EVENTS))]
            self._begin_strand(Strand(self, lane, events, self._pace.breaker.epoch))
        else:
            self._next_of(lane)
        if self.is_stopping:
            self._check_stopped()

    async def _resume(self, lane: Lane[Received], event: Received) -> None:
        await self._wait_for_turn()
        self._take_slot()
        await self._run_lane(lane, event)

    @property
    def breaker_epoch(self) -> int:
        return self._pace.breaker.epoch

    @property
    def is_cut_off(self) -> bool:
        """Whether nothing more may begin, in any thread. What was settled first is now or never."""
        return self._is_cancelled or (self.is_stopping and not self.policy.settles_first)

    # Batch handlers

    async def _run_batches(self) -> None:
        """One batch at a time; what fails goes on alone, key by key."""
        try:
            while self._can_take():
                batch: list[tuple[Lane[Received], Received]] = []
                lanes: dict[Key, Lane[Received]] = {}
                while self._incoming and len(batch) < self.policy.batch:
                    event = self._incoming[0]
                    if batch and self.generation_of(event.offset() or 0) != self.generation_of(
                        batch[0][1].offset() or 0
                    ):
                        break
                    self._incoming.popleft()
                    key = event.key()
                    lane = lanes.get(key) if key is not None and not self._finished and self._replay is None else None
                    if lane is None:
                        lane = self._arrive(event)
                    if lane is not None:
                        lanes[lane.key] = lane
                        batch.append((lane, event))
                if batch:
                    await self._handle_batch(batch)
        finally:
            self._baton = None
        if self._incoming:
            asyncio.get_running_loop().call_soon(self._pump)

    async def _handle_batch(self, batch: list[tuple[Lane[Received], Received]]) -> None:
        doors, pace = self._doors, self._pace
        epoch = pace.breaker.epoch
        events = [event for _, event in batch]
        for event in events:
            doors.note("start", o=event.offset(), n=1)
        outcomes: list[BaseException | None]
        attempted = True
        try:
            outcomes = await doors.attempt_batch(events, self.generation_of(events[0].offset() or 0))
        except asyncio.CancelledError:
            if self._is_cancelled:
                raise Stopped from None
            outcomes, attempted = [None] * len(events), False
        except Exception:
            outcomes, attempted = [None] * len(events), False  # one by one, which tells whose it was
        if self._is_cancelled:
            raise Stopped
        if attempted and crash_point.hook is not None:
            crash_point.reached("after_effect")
        bad: dict[Key, list[tuple[Received, BaseException | None]]] = {}
        for (lane, event), outcome in zip(batch, outcomes, strict=True):
            if not attempted or outcome is not None or lane.key in bad:
                bad.setdefault(lane.key, []).append((event, outcome))
            else:
                doors.note("ok", o=event.offset(), n=1)
                self._settled(event)
        if attempted and len(bad) < len(batch) and (epoch or pace.breaker.has_failures):
            pace.succeeded(batch[0][0].key, epoch)
        alone: deque[tuple[Lane[Received], Received, Failure | None]] = deque()
        for lane in {lane.key: lane for lane, _ in batch}.values():
            if lane.key not in bad:
                following = self._next_of(lane)
                if following is not None:
                    alone.append((lane, following[1], None))
                continue
            (event, error), *rest = bad[lane.key]
            if lane.queue is None:
                lane.queue = deque()
            lane.queue.extendleft((later.offset() or 0, later) for later, _ in reversed(rest))
            alone.append((lane, event, Failure(error, epoch) if error is not None else None))
        for _ in range(max(1, min(len(alone), pace.free)) if alone else 0):
            self._spawn(self._run_alone(alone))

    async def _run_alone(self, lanes: "deque[tuple[Lane[Received], Received, Failure | None]]") -> None:
        """One key after the other."""
        while lanes and not self.is_stopping:
            lane, event, failure = lanes.popleft()
            if failure is None and self._pace.breaker.is_open:
                await self._wait_for_turn()
            self._take_slot()
            await self._run_lane(lane, event, failure)


class ReadBack:
    """A parked record, as the source had it."""

    __slots__ = ("source",)

    def __init__(self, record: ParkedRecord) -> None:
        self.source = record.source

    def offset(self) -> int:
        return self.source.offset

    def key(self) -> bytes | None:
        return self.source.key

    def value(self) -> bytes | None:
        return self.source.value

    def timestamp(self) -> tuple[int, int]:
        return (1, self.source.timestamp_ms)


def _key_of(record: ParkedRecord) -> Key:
    return record.source.key if record.source.key is not None else record.source.offset


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
