"""Async handlers: runners take one event after the other as long as handlers don't wait.

When one waits, another runner takes over. So a handler that never waits costs no task, and one that waits delays nobody.
"""

import asyncio
import time

from headwater.runtime.assignment import Received
from headwater.runtime.lane_runner import LaneRunner
from headwater.runtime.work import Work

TURN_SECONDS = 0.005  # of handlers that never wait, before others have their turn


class AsyncRunner:
    def __init__(self, work: Work, lanes: LaneRunner) -> None:
        self._work = work
        self._lanes = lanes
        self._baton: object | None = None
        """Of the runner that takes events."""

    def pump(self) -> None:
        """See that somebody works, if there is something to do."""
        if self._baton is None and self._work.can_take():
            self._baton = self
            self._work.spawn(self._run())

    async def _run(self) -> None:
        """A runner: one event after the other, until it is no more the one that takes them."""
        work = self._work
        loop = asyncio.get_running_loop()
        baton: object = object()
        self._baton = baton
        loop.call_soon(self._pass_on, baton)
        turn_ends = time.perf_counter() + TURN_SECONDS
        while work.can_take():
            event = work.incoming.popleft()
            lane = self._lanes.arrive(event)
            if lane is None:
                continue
            work.take_slot()
            failure = await work.attempt(lane.key, event, None)
            following: tuple[int, Received] | None = None
            if failure is None:
                work.settled(event)
                following = self._lanes.next_of(lane)
            if self._baton is baton:  # the handler did not wait
                if failure is not None:
                    work.spawn(self._lanes.run_lane(lane, event, failure))
                elif following is not None:
                    work.spawn(self._lanes.run_lane(lane, following[1]))
                else:
                    work.release_slot()
                if time.perf_counter() > turn_ends:
                    break
                continue
            if failure is not None:
                await self._lanes.run_lane(lane, event, failure)
            elif following is not None:
                await self._lanes.run_lane(lane, following[1])
            elif work.release_slot():
                loop.call_soon(self.pump)  # another partition was waiting for a slot: its turn
                return
            if self._baton is not None:
                return
            self._baton = baton = object()
            loop.call_soon(self._pass_on, baton)
            turn_ends = time.perf_counter() + TURN_SECONDS
        if self._baton is baton:
            self._baton = None
            if work.incoming:
                loop.call_soon(self.pump)

    def _pass_on(self, baton: object) -> None:
        """If that runner still has it, its handler waits: somebody else goes on."""
        if self._baton is baton:
            self._baton = None
            self.pump()
