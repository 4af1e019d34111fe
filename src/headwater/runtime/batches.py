"""Batch handlers: one batch at a time; what fails of it goes on alone, key by key."""

import asyncio
from collections import deque

from headwater.runtime import crash_point
from headwater.runtime.assignment import Failure, Received, Stopped
from headwater.runtime.lane import Key, Lane
from headwater.runtime.lane_runner import LaneRunner
from headwater.runtime.work import Work


class BatchRunner:
    def __init__(self, work: Work, lanes: LaneRunner) -> None:
        self._work = work
        self._lanes = lanes
        self._is_at_work = False

    def pump(self) -> None:
        """See that somebody works, if there is something to do."""
        if not self._is_at_work and self._work.can_take():
            self._is_at_work = True
            self._work.spawn(self._run())

    async def _run(self) -> None:
        work = self._work
        try:
            while work.can_take():
                batch: list[tuple[Lane[Received], Received]] = []
                lanes: dict[Key, Lane[Received]] = {}
                while work.incoming and len(batch) < work.policy.batch:
                    event = work.incoming[0]
                    if batch and work.generation_of(event.offset() or 0) != work.generation_of(
                        batch[0][1].offset() or 0
                    ):
                        break
                    work.incoming.popleft()
                    key = event.key()
                    lane = lanes.get(key) if key is not None and work.takes_all else None
                    if lane is None or lane.queue:
                        lane = self._lanes.arrive(event)
                    if lane is not None:
                        lanes[lane.key] = lane
                        batch.append((lane, event))
                if batch:
                    await self._handle_batch(batch)
        finally:
            self._is_at_work = False
        if work.incoming:
            asyncio.get_running_loop().call_soon(self.pump)

    async def _handle_batch(self, batch: list[tuple[Lane[Received], Received]]) -> None:
        work = self._work
        doors, pace = work.doors, work.pace
        epoch = pace.breaker.epoch
        events = [event for _, event in batch]
        for event in events:
            doors.note("start", o=event.offset(), n=1)
        outcomes: list[BaseException | None]
        attempted = True
        try:
            outcomes = await doors.attempt_batch(events, work.generation_of(events[0].offset() or 0))
        except (GeneratorExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            if work.is_cancelled:
                raise Stopped from None
            if work.policy.settles_first:
                outcomes = [error] * len(events)  # this was the only time
            else:
                outcomes, attempted = [None] * len(events), False  # one by one, which tells whose it was
        if work.is_cancelled:
            raise Stopped
        if attempted and crash_point.hook is not None:
            crash_point.reached("after_effect")
        if work.policy.settles_first:
            await self._settle_first(batch, outcomes, epoch)
            return
        bad: dict[Key, list[tuple[Received, BaseException | None]]] = {}
        for (lane, event), outcome in zip(batch, outcomes, strict=True):
            if not attempted or outcome is not None or lane.key in bad:
                bad.setdefault(lane.key, []).append((event, outcome))
            else:
                doors.note("ok", o=event.offset(), n=1)
                work.settled(event)
        if attempted and len(bad) < len(batch) and (epoch or pace.breaker.has_failures):
            pace.succeeded(batch[0][0].key, epoch)
        alone: list[tuple[Lane[Received], Received, Failure | None]] = []
        for lane in {lane.key: lane for lane, _ in batch}.values():
            if lane.key not in bad:
                following = self._lanes.next_of(lane)
                if following is not None:
                    alone.append((lane, following[1], None))
                continue
            (event, outcome), *rest = bad[lane.key]
            if lane.queue is None:
                lane.queue = deque()
            lane.queue.extendleft((later.offset() or 0, later) for later, _ in reversed(rest))
            alone.append((lane, event, Failure(outcome, epoch) if outcome is not None else None))
        for lane, event, failure in alone:
            work.spawn(self._lanes.run_when_free(lane, event, failure))

    async def _settle_first(
        self, batch: list[tuple[Lane[Received], Received]], outcomes: list[BaseException | None], epoch: int
    ) -> None:
        """At most once: each outcome is final."""
        for (lane, event), outcome in zip(batch, outcomes, strict=True):
            if outcome is None:
                self._work.doors.note("ok", o=event.offset(), n=1)
            else:
                self._work.doors.note("fail", o=event.offset(), n=1)
                await self._lanes.overcome(lane, event, Failure(outcome, epoch))
            self._work.settled(event)
        for lane in {lane.key: lane for lane, _ in batch}.values():
            following = self._lanes.next_of(lane)
            if following is not None:
                self._work.spawn(self._lanes.run_when_free(lane, following[1]))
