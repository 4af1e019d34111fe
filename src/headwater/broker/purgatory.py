"""Requests that wait: completed exactly once, by a condition or by their deadline.

A delay is tried when something that it watches has changed; many changes in one turn of the loop are one try. When its
deadline comes it is made to answer with what there is. Upstream: DelayedOperation, DelayedFetch.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)


class Watchable(Protocol):
    """What a delay waits on: it calls `changed` on each delay in `delays` when it changes."""

    delays: "dict[Delay, None]"


class Delay:
    __slots__ = ("_complete", "_done", "_failed", "_loop", "_scheduled", "_timer", "_try_complete", "_watched")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        watched: list[Watchable],
        max_wait_ms: int,
        try_complete: Callable[[], bool],
        complete: Callable[[], None],
        failed: Callable[[], None],
    ) -> None:
        """`try_complete` answers if it can and says so; `complete` answers in any case; `failed` gives up."""
        self._loop = loop
        self._watched = watched
        self._try_complete = try_complete
        self._complete = complete
        self._failed = failed
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
        if not self._done:
            try:
                if self._try_complete():
                    self._finish()
            except Exception:
                self._fail()

    def _expire(self) -> None:
        if not self._done:
            self._finish()
            try:
                self._complete()
            except Exception:
                self._fail()

    def _fail(self) -> None:
        """It can't be answered: its connection ends, nobody else's."""
        logger.exception("delay_failed")
        self._finish()
        self._failed()

    def _finish(self) -> None:
        self._done = True
        self._timer.cancel()
        for item in self._watched:
            item.delays.pop(self, None)
