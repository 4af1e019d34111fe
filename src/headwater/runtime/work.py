"""What one assignment of a partition has at work: its tasks and slots, what is settled, and what it writes.

State that everything around an owner shares, and the steps that all of it is made of: an attempt, a record that is sent
until it is acknowledged, a wait that a stop ends.
"""

import asyncio
import logging
import random
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TypeVar

from headwater.event.codec import Unknown
from headwater.kafka.producer import NotPublished
from headwater.runtime import crash_point
from headwater.runtime.assignment import Assignment, Doors, Failure, Policy, Received, Stopped
from headwater.runtime.frontier import Frontier, Progress, Waiting, encode_metadata, finished_offsets
from headwater.runtime.lane import Attempted, Key, Lanes
from headwater.runtime.pace import Pace, Worker

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.2  # between looks at how far it has come
FIRST_TROUBLE_SECONDS = 0.1
LONGEST_TROUBLE_SECONDS = 30.0

T = TypeVar("T")


class Work:
    def __init__(
        self,
        policy: Policy,
        assignment: Assignment,
        doors: Doors,
        pace: Pace,
        worker: Worker,
        *,
        over: Callable[[], None],
        space: Callable[[], None],
        failed: Callable[[Exception], None],
        chance: random.Random | None,
    ) -> None:
        """worker: goes on when there is a slot, or a record can be written again. over: told when a task ends while
        stopping; space: when buffered events were settled; failed: when a task breaks."""
        self.policy = policy
        self.assignment = assignment
        self.partition = assignment.partition
        self.doors = doors
        self.pace = pace
        self.chance = chance or random.Random()
        self._worker = worker
        self._over = over
        self._space = space
        self._failed = failed
        self.is_loaded = policy.retry is None
        """Whether it is known what is parked."""
        self.is_stopping = False
        self.is_cancelled = False
        self.stop_asked = asyncio.Event()
        self.stopped = threading.Event()
        self.incoming: deque[Received] = deque()
        replay = assignment.progress.replay
        self.replay = replay
        self.lanes: Lanes[Received] = Lanes(replayed_below=replay.until if replay else 0)
        self.frontier = Frontier(assignment.frontier)
        self.began_at = assignment.frontier
        """Where the group had come; for one that begins, its first event."""
        self.finished = finished_offsets(assignment.frontier or 0, assignment.progress.done)
        """Beyond the frontier, by an owner before this one."""
        self._finished_end = max(self.finished, default=0)
        self.committable: tuple[int, str] | None = None
        """The frontier and its metadata; None before there is one. Read by the consumer thread."""
        self.first_waiting_ms: int | None = None
        """The time of the first event that is not settled."""
        self.done = 0
        self.done_bytes = 0
        self.settle_running: Callable[[], bool] = lambda: False
        """Settle what threads have handled meanwhile; whether they are at work."""
        self._blocked: dict[object, Waiting] = {}
        """Records that can't be written, one entry for each that is being tried: nothing more is taken."""
        self.has_strangers = False
        """Parked records of a topic of the same name that is no more: nothing is begun before they are set aside."""
        self.stuck: dict[Key, Waiting] = {}
        """Keys that stand while the others go on: without a retry topic, those whose event is tried in place until it
        works; with one, those whose parked event can't be read."""
        self.tasks: set[asyncio.Task[None]] = set()
        self._slots_held = 0
        self._waiting_times: deque[tuple[int, int]] = deque()
        self._look_timer: asyncio.TimerHandle | None = None

    # Tasks and slots

    def take_slot(self) -> None:
        self._slots_held += 1
        self.pace.free -= 1

    async def slot(self) -> None:
        """Take one, when there is one."""
        await self.pace.slot()
        self._slots_held += 1

    async def without_slot(self, wait: Awaitable[T]) -> T:
        """What waits takes no slot from others; it goes on when there is one again."""
        self.release_slot()
        try:
            result = await wait
            await self.slot()
        except BaseException:
            self.take_slot()  # whoever holds it gives it back on the way out
            raise
        return result

    def release_slot(self) -> bool:
        """Whether somebody waited for it."""
        if self._slots_held <= 0:
            return False
        self._slots_held -= 1
        return self.pace.release()

    def close(self) -> None:
        """Nothing is at work any more."""
        self.look()
        self.pace.leave(self._worker)
        while self._slots_held:  # of tasks that were cut off before they could give theirs back
            self.release_slot()
        if self._look_timer is not None:
            self._look_timer.cancel()
        self.doors.note("revoke")
        self.stopped.set()

    def spawn(self, work: Coroutine[object, object, None]) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # it has ended: what was left of it is being thrown away
            work.close()
            return
        task = loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._task_over)

    def _task_over(self, task: "asyncio.Task[None]") -> None:
        self.tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, Stopped):
            logger.error("owner_failed handler=%s partition=%d", self.policy.name, self.partition, exc_info=error)
            # A partition that stands still in silence would be worse than an end.
            self._failed(error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}"))
        if self.is_stopping:
            self._over()

    # How far it has come

    def take(self, messages: Sequence[Received]) -> None:
        """Records of the source, in order."""
        if self.began_at is None:
            self.began_at = messages[0].offset()
        if self.policy.settles_first:
            self.frontier.advance((messages[-1].offset() or 0) + 1)
        else:
            self.frontier.take([message.offset() or 0 for message in messages])
        at = messages[0].timestamp()[1]
        if not self._waiting_times or at - self._waiting_times[-1][1] >= 1000:  # one a second is enough to tell the lag
            self._waiting_times.append((messages[0].offset() or 0, at))
        self.incoming.extend(messages)
        self.look_later()

    def look_later(self) -> None:
        if self._look_timer is None and not self.stopped.is_set():
            self._look_timer = asyncio.get_running_loop().call_later(PROGRESS_SECONDS, self.look)

    def look(self) -> None:
        """Say the frontier, and why it stands."""
        self._look_timer = None
        is_busy = self.settle_running()
        offset = self.frontier.offset
        if offset is None:
            return
        if self.finished and self.frontier.position > self._finished_end:
            self.finished.clear()
        self.lanes.forget_floors((self.incoming[0].offset() or 0) if self.incoming else self.frontier.position)
        replay = self.replay
        if replay is not None and offset >= replay.until:
            replay = self.replay = None
        outage = self.pace.breaker.outage
        waiting = next(iter([*self._blocked.values(), *self.stuck.values()]), None)
        if outage is not None:
            waiting = Waiting(outage.reason, outage.since_ms)
        progress = Progress(self.frontier.done_beyond(), waiting, self.lanes.parked_keys, replay)
        self.committable = (offset, encode_metadata(progress))
        times = self._waiting_times
        while len(times) > 1 and times[1][0] <= offset:
            times.popleft()
        self.first_waiting_ms = times[0][1] if times and not self.frontier.is_clear else None
        if not self.frontier.is_clear or is_busy or waiting is not None:
            self.look_later()

    def settled(self, event: Received) -> None:
        self.frontier.settle(event.offset() or 0)
        self.done += 1
        self.done_bytes += len(event.value() or b"")
        if not self.done & 63 or self.frontier.is_clear:
            self._space()
            self.look_later()

    def generation_of(self, offset: int) -> int:
        """Of the inbox."""
        replay = self.replay
        return replay.generation if replay is not None and offset < replay.until else 0

    @property
    def takes_all(self) -> bool:
        """Whether nothing that arrives is skipped."""
        return not self.finished and self.replay is None

    def is_skipped(self, offset: int) -> bool:
        """It was finished before a restart, or a replay leaves it out."""
        if offset in self.finished:
            self.finished.discard(offset)
            return True
        replay = self.replay
        if replay is None or offset >= replay.until:
            return False
        silent = self.policy.outside_effects and not replay.outside_effects
        return silent or not replay.start <= offset < replay.end

    # Steps

    @property
    def may_begin(self) -> bool:
        """Whether anything may be begun but a probe."""
        pace = self.pace
        is_ready = self.is_loaded and not self.has_strangers and not self._blocked
        return is_ready and not pace.breaker.is_open and not pace.is_shut

    def can_take(self) -> bool:
        """Whether an event may be begun that is not parked."""
        pace = self.pace
        if not self.incoming or not self.may_begin:
            return False
        if self.is_stopping and (self.is_cancelled or not self.policy.settles_first):
            return False
        if pace.free <= 0:
            pace.wants_slot(self._worker)
            return False
        return True

    async def attempt(self, key: Key, event: Received, attempted: Attempted | None) -> Failure | None:
        """None when it is handled. Raises Stopped when it was cut off."""
        offset = event.offset() or 0
        pace = self.pace
        epoch = pace.breaker.epoch
        doors = self.doors
        generation = attempted.generation if attempted is not None else self.generation_of(offset)
        doors.note("start", o=offset, n=attempted.attempts + 1 if attempted else 1)
        if crash_point.hook is not None:
            crash_point.reached("in_handler")
        try:
            await doors.attempt(event, attempted, generation)
        except Unknown:
            doors.note("skip", o=offset)
            if epoch:
                pace.probe_again(epoch)
            return None
        except (GeneratorExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # whatever it is: the handler's own SystemExit or CancelledError as well
            if self.is_cancelled:
                raise Stopped from None
            failure = Failure(error, epoch)
        else:
            if self.is_cancelled:
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
        if self.is_cancelled:
            raise Stopped
        doors.note("fail", o=offset, n=attempted.attempts + 1 if attempted else 1)
        return failure

    async def pause(self, seconds: float) -> None:
        """Raises Stopped. What was settled first is now or never: only being cut off ends its pause."""
        if self.policy.settles_first:
            await asyncio.sleep(seconds)
            return
        if not self.is_stopping:
            waiter = asyncio.get_running_loop().create_future()
            handle = asyncio.get_running_loop().call_later(seconds, _wake, waiter)
            stop = asyncio.get_running_loop().create_task(self.stop_asked.wait())
            try:
                await asyncio.wait((waiter, stop), return_when=asyncio.FIRST_COMPLETED)
            finally:
                handle.cancel()
                stop.cancel()
        if self.is_stopping:
            raise Stopped

    async def wait_for_turn(self) -> bool:
        """While the breaker is open; whether this one is the probe now. Raises Stopped."""
        self.look_later()
        turn = asyncio.get_running_loop().create_task(self.pace.wait_for_turn())
        stop = asyncio.get_running_loop().create_task(self.stop_asked.wait())
        try:
            await asyncio.wait((turn, stop), return_when=asyncio.FIRST_COMPLETED)
        finally:
            turn.cancel()
            stop.cancel()
        if self.is_stopping:
            raise Stopped
        return turn.result()

    async def insist(self, what: str, send: Callable[[], Awaitable[T]]) -> T:
        """Until it is acknowledged. What can't be written stops its partition, loudly. Raises Stopped."""
        pause = FIRST_TROUBLE_SECONDS
        this = object()
        try:
            while True:
                try:
                    return await send()
                except NotPublished as error:
                    reason = f"{what} can't be written: {error}"
                logger.error("partition_stopped handler=%s topic=%s partition=%d reason=%s",
                             self.policy.name, self.assignment.topic, self.partition, reason)  # fmt: skip
                since = self._blocked[this].since_ms if this in self._blocked else self.doors.now_ms()
                self._blocked[this] = Waiting(reason, since)
                self.look_later()
                await self.pause(pause)
                pause = min(pause * 2, LONGEST_TROUBLE_SECONDS)
        finally:
            may_go_on = not self.is_stopping or self.policy.settles_first
            if self._blocked.pop(this, None) is not None and not self._blocked and may_go_on:
                self._worker.go_on()

    async def send_dead(self, event: Received, attempted: Attempted) -> int | None:
        if crash_point.hook is not None:
            crash_point.reached("before_dead_ack")
        dead_offset = await self.insist("the dead letter", lambda: self.doors.send_dead(event, attempted))
        if dead_offset is not None:
            if crash_point.hook is not None:
                crash_point.reached("after_dead_ack")
            self.doors.note("dead", o=event.offset(), n=attempted.attempts, d=dead_offset)
        return dead_offset

    async def send_parked(self, event: Received, attempted: Attempted | None) -> int:
        if crash_point.hook is not None:
            crash_point.reached("before_park_ack")
        place = await self.insist("the parked record", lambda: self.doors.send_parked(event, attempted))
        if crash_point.hook is not None:
            crash_point.reached("after_park_ack")
        self.doors.note("park", o=event.offset(), n=attempted.attempts if attempted is not None else 0)
        return place

    async def send_done(self, offset: int, key: Key) -> None:
        if crash_point.hook is not None:
            crash_point.reached("before_done_ack")
        await self.insist("the done record", lambda: self.doors.send_done(offset, key))
        if crash_point.hook is not None:
            crash_point.reached("after_done_ack")
        self.doors.note("done", o=offset)


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
