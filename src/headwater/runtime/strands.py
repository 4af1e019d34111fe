"""Threads for a sync handler: each takes strands, some events of one key, until none is left.

One thread works as long as it keeps up; another one joins for each millisecond in which strands still wait. So a handler
that computes runs in one thread without contention, and one that waits has up to all of them.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable

from headwater.runtime.daemon_executor import DaemonExecutor
from headwater.runtime.owner import Received, Strand

PATIENCE_SECONDS = 0.001
TURN_SECONDS = 0.05


class StrandPool:
    def __init__(
        self,
        attempt: Callable[[Received, int], None],
        executor: DaemonExecutor,
        threads: int,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
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
            strand.run(self._attempt)
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
                strand.owner.strand_over(strand)
