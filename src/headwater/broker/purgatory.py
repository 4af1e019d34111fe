"""Requests that wait: completed exactly once, by a condition or by their deadline.

A delay is tried when something that it watches has changed; many changes in one turn of the loop are one try. When its
deadline comes it is made to answer with what there is. Upstream: DelayedOperation, DelayedFetch.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol


class Watchable(Protocol):
    """What a delay waits on: it calls `changed` on each delay in `delays` when it changes."""

    delays: "dict[Delay, None]"


class Delay:
    __slots__ = ("_complete", "_done", "_loop", "_scheduled", "_timer", "_try_complete", "_watched")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        watched: list[Watchable],
        max_wait_ms: int,
        try_complete: Callable[[], bool],
        complete: Callable[[], None],
    ) -> None:
        """`try_complete` answers if it can and says so; `complete` answers in any case."""
        self._loop = loop
        self._watched = watched
        self._try_complete = try_complete
        self._complete = complete
        self._scheduled = False
        self._done = False
        for item in watched:
            item.delays[self] = None
        self._timer = loop.call_later(max_wait_ms / 1000, self._expire)

    def changed(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._try)

    def cancel(self) -> None:
        """Nobody waits any more: the connection is closed."""
        if not self._done:
            self._finish()

    def _try(self) -> None:
        self._scheduled = False
        if not self._done and self._try_complete():
            self._finish()

    def _expire(self) -> None:
        if not self._done:
            self._finish()
            self._complete()

    def _finish(self) -> None:
        self._done = True
        self._timer.cancel()
        for item in self._watched:
            item.delays.pop(self, None)
