"""Group commit: one sync for all who wait.

The loop writes and marks a log dirty; at the end of its turn everything that is dirty is synced together, and
`on_durable` tells how far each log is on the disk. While one round is under way the next one gathers: back to back,
without a timer. A round that would be short and has one waiter is done in the loop itself, because handing it to the
thread and back costs more than the sync; any other goes to the one flusher thread.

A failed sync ends the process: the kernel tells of it once and drops the pages, and a second sync would "succeed", as
PostgreSQL found out in 2018. The broker starts again and recovers from what is on the disk.

`SteppedFlusher` does the same without loop or thread, for tests and simulations.
"""

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from headwater.broker.log.partition_log import FlushWork, PartitionLog

logger = logging.getLogger(__name__)

INLINE_SECONDS = 0.0004  # a sync that has lately taken longer goes to the thread
SMOOTHING = 0.2

OnDurable = Callable[[PartitionLog, FlushWork], None]


class Flusher(Protocol):
    def mark_dirty(self, log: PartitionLog, waiters: int = 1) -> None:
        """The log has bytes that must be synced; `waiters` requests wait for them."""

    def flush_now(self, log: PartitionLog) -> None:
        """Sync before returning: for the few writes that everything else depends on."""

    def close(self) -> None:
        """Sync what is dirty and stop."""


def sync(log: PartitionLog, work: FlushWork) -> None:
    """Raises OSError: nothing is known of the bytes then."""
    for file in work.files:
        file.sync()
    for directory in work.directories:
        log.file_system.sync_directory(directory)


def die(error: OSError) -> None:
    """Nobody may go on as if the bytes were safe."""
    logger.critical("sync_failed error=%s", error)
    logging.shutdown()
    os._exit(70)


class SteppedFlusher:
    """Syncs what is dirty when it is told to: group commit without loop or thread, for tests and simulations."""

    def __init__(self, on_durable: OnDurable) -> None:
        self._on_durable = on_durable
        self._dirty: dict[PartitionLog, None] = {}

    def mark_dirty(self, log: PartitionLog, waiters: int = 1) -> None:
        self._dirty[log] = None

    def step(self) -> None:
        dirty, self._dirty = self._dirty, {}
        for log in dirty:
            self.flush_now(log)

    def flush_now(self, log: PartitionLog) -> None:
        self._dirty.pop(log, None)
        work = log.begin_flush()
        sync(log, work)
        log.flushed(work)
        self._on_durable(log, work)

    def close(self) -> None:
        self.step()


class GroupCommitFlusher:
    """The flusher of a running broker. Everything but `_run` is called on the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_durable: OnDurable) -> None:
        self._loop = loop
        self._on_durable = on_durable
        self._dirty: dict[PartitionLog, None] = {}
        self._waiters = 0
        self._scheduled = False
        self._in_flight: list[tuple[PartitionLog, FlushWork]] = []
        self._mean_seconds = 0.0
        self._rounds: queue.SimpleQueue[list[tuple[PartitionLog, FlushWork]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def mark_dirty(self, log: PartitionLog, waiters: int = 1) -> None:
        self._dirty[log] = None
        self._waiters += waiters
        if not self._scheduled and not self._in_flight:
            self._scheduled = True
            self._loop.call_soon(self._begin_round)

    def flush_now(self, log: PartitionLog) -> None:
        if any(log is other for other, _ in self._in_flight):
            self._join_round()  # what is under way must be on the disk before what comes behind it counts
        self._dirty.pop(log, None)
        work = log.begin_flush()
        self._sync_all([(log, work)])
        self._finish([(log, work)])

    def close(self) -> None:
        while self._in_flight:
            self._join_round()
        if self._dirty:
            round_ = self._take_round()
            self._sync_all(round_)
            self._finish(round_)
        if self._thread is not None:
            self._rounds.put(None)
            self._thread.join()

    def _take_round(self) -> list[tuple[PartitionLog, FlushWork]]:
        round_ = [(log, log.begin_flush()) for log in self._dirty]
        self._dirty.clear()
        self._waiters = 0
        return round_

    def _begin_round(self) -> None:
        self._scheduled = False
        if self._in_flight or not self._dirty:
            return
        inline = self._waiters <= 1 and len(self._dirty) == 1 and self._mean_seconds < INLINE_SECONDS
        round_ = self._take_round()
        if inline:
            self._sync_all(round_)
            self._finish(round_)
            return
        self._in_flight = round_
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="flusher", daemon=True)
            self._thread.start()
        self._rounds.put(round_)

    def _sync_all(self, round_: list[tuple[PartitionLog, FlushWork]]) -> None:
        started = time.perf_counter()
        try:
            for log, work in round_:
                sync(log, work)
        except OSError as error:
            die(error)
        self._mean_seconds += SMOOTHING * (time.perf_counter() - started - self._mean_seconds)

    def _run(self) -> None:
        while (round_ := self._rounds.get()) is not None:
            self._sync_all(round_)
            try:
                self._loop.call_soon_threadsafe(self._round_done, round_)
            except RuntimeError:
                return  # the loop was closed without `close`: the process is going down

    def _round_done(self, round_: list[tuple[PartitionLog, FlushWork]]) -> None:
        if self._in_flight is not round_:
            return  # `close` was faster
        self._in_flight = []
        self._finish(round_)
        if self._dirty and not self._scheduled:
            self._begin_round()

    def _join_round(self) -> None:
        """Wait for the thread: it syncs the round, and syncing once more is harmless and tells when it is done."""
        round_, self._in_flight = self._in_flight, []
        self._sync_all(round_)
        self._finish(round_)

    def _finish(self, round_: list[tuple[PartitionLog, FlushWork]]) -> None:
        for log, work in round_:
            log.flushed(work)
            self._on_durable(log, work)
