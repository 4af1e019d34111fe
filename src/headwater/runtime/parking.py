"""The parked events of a partition: written to the retry topic in order, and tried again when they are due.

What waits behind a failed event of its key is parked with it, one record after the acknowledgement of the one before.
Of each key only the smallest offset is tried. A few megabytes of events are kept at hand; others are read back.
"""

import asyncio
import heapq
import logging

from headwater.runtime.assignment import Failure, ReadBack, Received, key_of
from headwater.runtime.frontier import Waiting
from headwater.runtime.lane import NO_OFFSET, Attempted, Key, Lane
from headwater.runtime.pace import Worker
from headwater.runtime.retry import GivingUp, Kind, said_by
from headwater.runtime.retry_topic import Done, ParkedRecord
from headwater.runtime.work import FIRST_TROUBLE_SECONDS, LONGEST_TROUBLE_SECONDS, Work

logger = logging.getLogger(__name__)

CACHE_BYTES = 8 * 1024 * 1024


class Parking:
    def __init__(self, work: Work, worker: Worker) -> None:
        """worker: who is told when there is a slot."""
        self._work = work
        self._worker = worker
        self._due: list[tuple[int, int, Key]] = []
        self._due_count = 0
        self._timer: asyncio.TimerHandle | None = None
        self._cache: dict[int, Received] = {}
        self._cache_bytes = 0
        self._strangers: dict[int, ParkedRecord] = {}
        """Parked from a topic of the same name that is no more."""
        self._is_burying = False
        self._unreadable: dict[Key, float] = {}
        """Keys whose first parked event could not be read back, with the pause before the next try."""

    # The takeover

    def read(self, record: ParkedRecord | Done) -> None:
        """What the retry topic has, in order."""
        lanes = self._work.lanes
        if isinstance(record, ParkedRecord) and record.topic_id != self._work.assignment.topic_id:
            self._strangers[record.source.offset] = record
        elif isinstance(record, ParkedRecord):
            lanes.load(
                key_of(ReadBack(record, self._work.partition)), record.source.offset, record.place, record.attempted
            )
        elif self._strangers.pop(record.offset, None) is None:
            lanes.unload(record.key if record.key is not None else record.offset, record.offset)

    def loaded(self) -> list[int]:
        """All of it was read: the offsets that are parked."""
        found: list[int] = []
        for lane in list(self._work.lanes.by_key.values()):
            if lane.parked:
                self.schedule(lane)
                found.extend(lane.parked)
        self._work.has_strangers = bool(self._strangers)
        self._work.pace.count_parked()
        return found

    def bury_strangers(self) -> None:
        """What was parked when the topic had another id can't be told apart from this topic's events: it is set aside,
        before anything else is begun. Records are kept by their offsets: a later done record could be another event's."""
        work = self._work
        if self._strangers and not self._is_burying and work.is_loaded and not work.pace.is_shut:
            self._is_burying = True
            work.spawn(self._bury_strangers())

    async def _bury_strangers(self) -> None:
        work = self._work
        now = work.doors.now_ms()
        try:
            while self._strangers and not work.pace.is_shut:
                if work.is_stopping and not work.policy.settles_first:
                    break
                offset, record = next(iter(self._strangers.items()))
                before = record.attempted or Attempted(0, now, now, Kind.POISON, "")
                reason = "the topic was deleted and made again while this was parked"
                attempted = before._replace(kind=Kind.POISON, error=reason, held=NO_OFFSET)
                await work.send_dead(ReadBack(record, work.partition), attempted)
                if not any(lane.parked and offset in lane.parked for lane in work.lanes.by_key.values()):
                    await work.send_done(offset, key_of(ReadBack(record, work.partition)))
                del self._strangers[offset]
        finally:
            self._is_burying = False
        work.has_strangers = bool(self._strangers)
        if not work.has_strangers:
            self._worker.go_on()

    # Parking

    def begin(self, lane: Lane[Received], event: Received | None = None, attempted: Attempted | None = None) -> None:
        first = (event.offset() or 0, event) if event is not None else None
        self._work.lanes.begin_parking(lane, first)
        if lane.parked and not lane.is_retrying:  # a redrive came in between, and was due while this one was at work
            self.schedule(lane)
        self._work.spawn(self._park(lane, attempted))

    async def _park(self, lane: Lane[Received], attempted: Attempted | None) -> None:
        """The queue of a key, one after the other. attempted: of the first."""
        work = self._work
        lanes, doors = work.lanes, work.doors
        while (found := lanes.next_to_park(lane)) is not None:
            offset, event = found
            if attempted is not None or doors.is_wanted(event):
                generation = work.generation_of(offset)
                if attempted is None and generation:  # it must be known when the replay is over
                    now = doors.now_ms()
                    attempted = Attempted(0, now, now, Kind.TRANSIENT, "waits behind its key", generation=generation)
                place = await work.send_parked(event, attempted)
                was_parked = bool(lane.parked)
                lanes.is_parked(lane, offset, place, attempted)
                self._keep(offset, event)
                if not was_parked:
                    work.pace.count_parked()
                if not lane.is_retrying and lane.parked is not None and lane.parked.smallest == offset:
                    self.schedule(lane)
            else:
                assert lane.queue is not None
                lane.queue.popleft()
            attempted = None
            work.settled(event)
            if work.is_stopping and not work.policy.settles_first:
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

    def put_back(self, letter: Received, place: int, attempted: Attempted) -> None:
        """A dead letter that is to be tried again; its parked record is acknowledged."""
        work = self._work
        offset = letter.offset() or 0
        lane = work.lanes.load(key_of(letter), offset, place, attempted)
        self._forget(offset)
        self._keep(offset, letter)
        if not lane.is_retrying:
            self.schedule(lane)
        work.pace.count_parked()

    def let_go(self, lane: Lane[Received], offset: int) -> None:
        """It was held, and is discarded; its done record is acknowledged."""
        self._forget(offset)
        self._work.lanes.is_done(lane, offset)
        if lane.parked:
            self.schedule(lane)
        else:
            self._work.lanes.end_retry(lane)
        self._work.pace.count_parked()

    # Trying again

    def schedule(self, lane: Lane[Received]) -> None:
        """The key's first parked event is tried when it is due."""
        assert lane.parked
        attempt = lane.parked.attempt
        if attempt is not None and attempt.held != NO_OFFSET:
            return
        due = attempt.due_ms if attempt is not None else 0
        if lane.key in self._unreadable:
            due = max(due, self._work.doors.now_ms() + round(self._unreadable[lane.key] * 1000))
        self._due_count += 1
        heapq.heappush(self._due, (due, self._due_count, lane.key))
        self._set_timer()

    @property
    def has_due(self) -> bool:
        return bool(self._strangers) or self._is_one_due

    @property
    def _is_one_due(self) -> bool:
        return bool(self._due) and self._due[0][0] <= self._work.doors.now_ms()

    def try_one(self) -> bool:
        """Try one that is due, if there is one."""
        lane = self._pop_due()
        if lane is None:
            return False
        work = self._work
        work.take_slot()
        work.lanes.begin_retry(lane)
        work.spawn(self._retry(lane))
        return True

    def stop(self) -> None:
        """Nothing more falls due."""
        if self._timer is not None:
            self._timer.cancel()

    def _set_timer(self) -> None:
        work = self._work
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._due and not work.is_stopping and not work.pace.breaker.is_open and work.is_loaded:
            seconds = max(0.0, (self._due[0][0] - work.doors.now_ms()) / 1000)
            self._timer = asyncio.get_running_loop().call_later(seconds, self.wake)

    def _pop_due(self) -> Lane[Received] | None:
        """A key whose first parked event is due."""
        now = self._work.doors.now_ms()
        while self._due and self._due[0][0] <= now:
            due, _, key = heapq.heappop(self._due)
            lane = self._work.lanes.by_key.get(key)
            if lane is None or not lane.parked or lane.is_retrying or lane.is_at_work:
                continue
            attempt = lane.parked.attempt
            if (attempt.due_ms if attempt is not None else 0) <= due and (attempt is None or attempt.held == NO_OFFSET):
                return lane
        return None

    def wake(self) -> None:
        """Try what is due, as far as there are slots."""
        work = self._work
        if work.is_stopping or not work.may_begin:
            return
        while work.pace.free > 0 and self.try_one():
            pass
        if self._is_one_due:
            work.pace.wants_slot(self._worker)
        else:
            self._set_timer()

    async def _retry(self, lane: Lane[Received]) -> None:
        """The parked events of a key, as long as they succeed; takes over a slot, and gives it back. While the breaker is
        open one event is the probe."""
        work = self._work
        lanes = work.lanes
        try:
            while lane.parked:
                offset, attempted = lane.parked.smallest, lane.parked.attempt
                if work.is_stopping or work.pace.is_shut or (attempted is not None and not self._is_due(attempted)):
                    break
                event, was_open = self._cache.get(offset), work.pace.breaker.is_open
                if event is None:
                    event = await work.without_slot(self._read_back(lane.key, offset, lane.parked.place))
                if event is None or (work.pace.breaker.is_open and not was_open):
                    break
                if work.policy.settles_first:
                    await work.send_done(offset, lane.key)
                failure = await work.attempt(lane.key, event, attempted)
                if failure is not None and not await self._retry_failed(lane, event, attempted, failure):
                    break
                if not work.policy.settles_first:
                    await work.send_done(offset, lane.key)
                self._forget(offset)
                lanes.is_done(lane, offset)
                work.pace.count_parked()
                work.look_later()
                if work.pace.breaker.is_open:
                    break
        finally:
            work.release_slot()
            lane.is_retrying = False  # in any case: a later owner finds the truth in the retry topic
        lanes.end_retry(lane)
        if lane.parked:
            self.schedule(lane)
        elif lane.queue and not lane.is_parking and not lane.is_at_work:
            self.begin(lane)

    def _is_due(self, attempted: Attempted) -> bool:
        return attempted.held == NO_OFFSET and attempted.due_ms <= self._work.doors.now_ms()

    async def _retry_failed(
        self, lane: Lane[Received], event: Received, attempted: Attempted | None, failure: Failure
    ) -> bool:
        """True when it was given up on, and the next of the key may go."""
        work = self._work
        policy, pace = work.policy, work.pace
        offset = event.offset() or 0
        error, epoch = failure
        kind = policy.kinds.of(error)
        said = said_by(error)
        now = work.doors.now_ms()
        if policy.settles_first:  # its done record is written: this was the only time
            pace.probe_again(epoch)
        elif kind is Kind.UNAVAILABLE:
            pace.unavailable(epoch, said)
            return False
        elif kind is not Kind.POISON:
            pace.failed_again(epoch)
            outage = pace.breaker.outage
            if outage is not None and outage.is_unavailable:
                return False  # it counts as no attempt
        else:
            pace.probe_again(epoch)
        before = attempted or Attempted(0, 0, now, kind, said, generation=work.generation_of(offset))
        after = before._replace(attempts=before.attempts + 1, kind=kind, error=said)
        assert policy.retry is not None
        logger.warning(
            "retry_failed handler=%s topic=%s partition=%d offset=%d attempt=%d class=%s error=%s",
            policy.name, work.assignment.topic, work.partition, offset, after.attempts, kind, said,
        )  # fmt: skip
        if kind is Kind.POISON or after.attempts >= policy.retry.attempts or policy.settles_first:
            dead_offset = await work.send_dead(event, after)
            if policy.giving_up is GivingUp.SKIP or dead_offset is None or policy.settles_first:
                return True
            after = after._replace(held=dead_offset)
        else:
            after = after._replace(due_ms=self.due_ms(after.attempts))
        place = await work.send_parked(event, after)
        work.lanes.is_parked(lane, offset, place, after)
        return False

    def due_ms(self, attempts: int) -> int:
        work = self._work
        assert work.policy.retry is not None
        return work.doors.now_ms() + round(work.policy.retry.pause_seconds(attempts, work.chance) * 1000)

    async def _read_back(self, key: Key, offset: int, place: int) -> Received | None:
        """From the retry topic, with some that come next. None when it can't be read now: its key stands, the group says
        so, and it is tried again later."""
        work = self._work
        event: Received | None = None
        reason = f"there is no parked record at {place} of the retry topic"
        try:
            for record in await work.doors.read_back(place):
                if record.source.offset == offset and record.place == place:
                    event = ReadBack(record, work.partition)
                elif record.topic_id == work.assignment.topic_id and work.lanes.holds(
                    key_of(ReadBack(record, work.partition)), record.source.offset
                ):
                    self._keep(record.source.offset, ReadBack(record, work.partition))
        except Exception as error:
            reason = said_by(error)
        if event is not None:
            self._unreadable.pop(key, None)
            work.stuck.pop(key, None)
            return event
        logger.error("read_back_failed handler=%s partition=%d offset=%d reason=%s",
                     work.policy.name, work.partition, offset, reason)  # fmt: skip
        self._unreadable[key] = min(self._unreadable.get(key, FIRST_TROUBLE_SECONDS / 2) * 2, LONGEST_TROUBLE_SECONDS)
        if key not in work.stuck:
            work.stuck[key] = Waiting(f"the parked event {offset} can't be read back: {reason}", work.doors.now_ms())
            work.look_later()
        work.pace.probe_again()
        return None
