"""Events of one key, one after the other: handled, tried again in place, and parked or given up on if that fails."""

import asyncio
import logging

from headwater.runtime.assignment import Failure, Received, Stopped
from headwater.runtime.frontier import Waiting
from headwater.runtime.lane import Attempted, Key, Lane, Verdict
from headwater.runtime.parking import Parking
from headwater.runtime.retry import CONFLICT_PAUSES, IN_PLACE_PAUSES, IN_PLACE_SECONDS, GivingUp, Kind, said_by
from headwater.runtime.work import FIRST_TROUBLE_SECONDS, LONGEST_TROUBLE_SECONDS, Work

logger = logging.getLogger(__name__)


class LaneRunner:
    def __init__(self, work: Work, parking: Parking) -> None:
        self._work = work
        self._parking = parking

    def arrive(self, event: Received) -> Lane[Received] | None:
        """Its lane, when the event is to be handled now."""
        work = self._work
        offset, key = event.offset() or 0, event.key()
        if not work.takes_all and work.is_skipped(offset):
            work.settled(event)
            return None
        verdict, lane = work.lanes.arrive(offset, offset if key is None else key, event)
        if verdict is Verdict.RUN:
            return lane
        if verdict is Verdict.SETTLED:
            work.settled(event)
        elif verdict is Verdict.PARK:
            assert lane is not None
            self._parking.begin(lane)
        return None

    def next_of(self, lane: Lane[Received]) -> tuple[int, Received] | None:
        """The event at work is settled: the next one of its key, if the key goes on."""
        following = self._work.lanes.next_of(lane)
        if following is None and lane.parked:  # a redrive came in between
            self._parking.schedule(lane)
            if lane.queue and not lane.is_parking:
                self._parking.begin(lane)
        return following

    async def run_lane(
        self, lane: Lane[Received], event: Received, failure: Failure | None = None, *, is_probe: bool = False
    ) -> None:
        """Events of one key until it is free, or parks; takes over a slot, and gives it back. failure: of an attempt
        which was made already. While the breaker is open each event waits for its turn, but the one that is the probe."""
        work = self._work
        try:
            while True:
                if failure is None:
                    if work.is_stopping and not work.policy.settles_first:
                        raise Stopped
                    while work.pace.breaker.is_open and not is_probe and not work.is_stopping:
                        is_probe = await work.without_slot(work.wait_for_turn())
                    failure = await work.attempt(lane.key, event, None)
                if failure is not None and not await self.overcome(lane, event, failure):
                    return
                work.settled(event)
                following = self.next_of(lane)
                if following is None:
                    return
                event, failure, is_probe = following[1], None, False
        finally:
            work.release_slot()

    async def run_when_free(self, lane: Lane[Received], event: Received, failure: Failure | None = None) -> None:
        """The same, for who has no slot yet."""
        await self._work.slot()
        await self.run_lane(lane, event, failure)

    async def overcome(self, lane: Lane[Received], event: Received, failure: Failure) -> bool:
        """Try again in place, or park, or give up. True when the event is settled and the lane may go on; False when the
        lane parks. Raises Stopped."""
        work = self._work
        policy, pace = work.policy, work.pace
        offset = event.offset() or 0
        first_failed_ms = work.doors.now_ms()
        loop = asyncio.get_running_loop()
        ends = loop.time() + IN_PLACE_SECONDS
        tries = 0
        while True:
            error, epoch = failure
            kind = policy.kinds.of(error)
            logger.log(
                logging.WARNING if not tries else logging.DEBUG,
                "handler_failed handler=%s topic=%s partition=%d offset=%d class=%s error=%s",
                policy.name, work.assignment.topic, work.partition, offset, kind, said_by(error),
                exc_info=error if not tries and kind is not Kind.POISON else None,
            )  # fmt: skip
            if policy.settles_first or (kind is Kind.POISON and policy.retry is not None):
                pace.probe_again(epoch)
                break
            pauses = CONFLICT_PAUSES if kind is Kind.CONFLICT else IN_PLACE_PAUSES
            if kind is Kind.UNAVAILABLE:
                pace.unavailable(epoch, said_by(error))
            elif pace.breaker.is_open:
                pace.failed(lane.key, epoch, said_by(error))
            elif policy.retry is None:
                await self._hold_on(lane.key, tries, error)
            elif tries < len(pauses) and loop.time() + pauses[tries] < ends:
                await work.pause(pauses[tries])
            else:
                pace.failed(lane.key, epoch, said_by(error))
                if not pace.breaker.is_open:
                    break
            is_probe = False
            while pace.breaker.is_open and not is_probe:
                is_probe = await work.without_slot(work.wait_for_turn())
            tries += 1
            again = await work.attempt(lane.key, event, None)
            if again is None:
                work.stuck.pop(lane.key, None)
                return True
            failure = again
        if policy.retry is None:
            return True  # at most once, and nowhere to put it: it was logged
        attempted = Attempted(1, 0, first_failed_ms, kind, said_by(error), generation=work.generation_of(offset))
        if kind is Kind.POISON or policy.settles_first or policy.retry.attempts <= 1:
            dead_offset = await work.send_dead(event, attempted)
            if policy.giving_up is GivingUp.SKIP or dead_offset is None or policy.settles_first:
                return True
            attempted = attempted._replace(held=dead_offset)
        else:
            attempted = attempted._replace(due_ms=self._parking.due_ms(1))
        self._parking.begin(lane, event, attempted)
        return False

    async def _hold_on(self, key: Key, tries: int, error: BaseException) -> None:
        """Without a retry topic: the key waits, the frontier with it, and the group says so."""
        work = self._work
        before = work.stuck.get(key)
        since = before.since_ms if before is not None else work.doors.now_ms()
        work.stuck[key] = Waiting(f"an event failed {tries + 1} times: {said_by(error)}", since)
        work.look_later()
        await work.without_slot(work.pause(min(FIRST_TROUBLE_SECONDS * 2 ** min(tries, 20), LONGEST_TROUBLE_SECONDS)))
