"""What operators ask of the owner of a partition: to send a dead letter again to its handler, or to let go of it.

Requests stand in the retry topic, so they reach the group that gave up, whoever owns the partition; each is obeyed once.
"""

import asyncio
import logging
from collections import deque

from headwater.runtime.assignment import key_of
from headwater.runtime.lane import NO_OFFSET, Attempted
from headwater.runtime.parking import Parking
from headwater.runtime.retry import Kind, said_by
from headwater.runtime.retry_topic import DISCARD, REDRIVE, Request, Resolved, TakenBack
from headwater.runtime.work import Work

logger = logging.getLogger(__name__)

REQUEST_SECONDS = 0.1  # before a request is looked at again whose key is at work


class Requests:
    def __init__(self, work: Work, parking: Parking) -> None:
        self._work = work
        self._parking = parking
        self._waiting: deque[Request] = deque()
        self._is_obeying = False
        self._is_pausing = False

    @property
    def has_due(self) -> bool:
        """Whether some can be looked at now."""
        return bool(self._waiting) and not self._is_pausing

    def read(self, record: Request | TakenBack | Resolved) -> None:
        """What the retry topic has, in order."""
        if isinstance(record, Request):
            self._waiting.append(record)
        else:
            answered = record.dead_offset
            self._waiting = deque(request for request in self._waiting if request.dead_offset != answered)

    def obey(self) -> None:
        """See that somebody works on them."""
        work = self._work
        is_free = not self._is_obeying and work.is_loaded and not work.has_strangers
        if self.has_due and is_free and not work.is_stopping and not work.pace.is_shut:
            self._is_obeying = True
            work.spawn(self._obey())

    async def _obey(self) -> None:
        """One request after the other, each once; those that can't be obeyed now are looked at again a little later."""
        work = self._work
        has_progress = True
        try:
            while self._waiting and has_progress:
                has_progress = False
                for _ in range(len(self._waiting)):
                    if not self._waiting or work.is_stopping or work.pace.is_shut:
                        return
                    request = self._waiting.popleft()
                    is_done = await self._obey_one(request)
                    if is_done is None:
                        self._waiting.append(request)
                        continue
                    has_progress = True
                    await work.insist("the answer to a request", lambda r=request, d=is_done: work.doors.answer(r, d))  # type: ignore[misc]
        finally:
            self._is_obeying = False
        if self._waiting:
            self._is_pausing = True
            asyncio.get_running_loop().call_later(REQUEST_SECONDS, self._look_again)

    def _look_again(self) -> None:
        self._is_pausing = False
        self.obey()

    async def _obey_one(self, request: Request) -> bool | None:
        """Whether it could be obeyed; None when that can't be said now: the event is at work, or can't be read."""
        work = self._work
        try:
            found = await work.doors.read_dead(request.dead_offset)
        except Exception as error:
            logger.warning("dead_letter_unreadable handler=%s partition=%d dead_offset=%d reason=%s",
                           work.policy.name, work.partition, request.dead_offset, said_by(error))  # fmt: skip
            return None
        letter, generation = found if found is not None else (None, 0)
        if letter is None or request.action not in (REDRIVE, DISCARD):
            logger.warning("request_refused action=%s dead_offset=%d reason=%s", request.action, request.dead_offset,
                           "there is no such dead letter" if letter is None else "it is not known")  # fmt: skip
            return False
        offset, key = letter.offset() or 0, key_of(letter)
        lane = work.lanes.by_key.get(key)
        if lane is not None and work.lanes.is_busy(lane, offset):
            return None
        held = lane.parked.attempt if lane is not None and lane.parked else None
        is_held = held is not None and held.held != NO_OFFSET and lane.parked.smallest == offset  # type: ignore[union-attr]
        if request.action == DISCARD:
            if is_held:
                assert lane is not None
                await work.send_done(offset, lane.key)
                self._parking.let_go(lane, offset)
            return True
        if not is_held and work.lanes.holds(key, offset):
            return True  # it is parked, and will be tried anyway
        now = work.doors.now_ms()
        attempted = Attempted(0, now, now, Kind.TRANSIENT, "redriven", is_redriven=True, generation=generation)
        place = await work.send_parked(letter, attempted)
        self._parking.put_back(letter, place, attempted)
        return True
