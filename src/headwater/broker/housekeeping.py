"""What a broker does by itself from time to time: retention, expiry, checkpoints, idle connections.

Each task is a function of the node that can be called at any moment, by the timer or by a test with its own clock.
"""

import asyncio
import logging
from collections.abc import Callable

from headwater.broker.dispatch import Dispatcher
from headwater.broker.log.retention import new_log_start_offset
from headwater.broker.node import Node, storage_error

logger = logging.getLogger(__name__)

IDLE_CHECK_SECONDS = 60.0
PRODUCER_EXPIRY_CHECK_SECONDS = 600.0
FLUSH_CHECK_SECONDS = 3.0  # Kafka's log.flush.scheduler.interval.ms, where `flush.ms` is set


def enforce_retention(node: Node) -> None:
    """Segments that are too old or too many go."""
    now_ms = node.clock.now_ms()
    for partition in node.partitions.values():
        try:
            start = new_log_start_offset(partition.log, now_ms, partition.high_watermark.offset)
        except OSError as error:
            storage_error(error)
            continue
        if start > partition.log.log_start_offset:
            node.delete_before(partition, start)


def expire_producers(node: Node) -> None:
    before_ms = node.clock.now_ms() - node.config.number("producer.id.expiration.ms")
    for partition in node.partitions.values():
        partition.log.producers.expire(before_ms)


def flush_by_time(node: Node) -> None:
    """`flush.ms`: what has waited that long is synced, where not every batch is anyway."""
    now_ms = node.clock.now_ms()
    for partition in node.partitions.values():
        if partition.log.is_dirty and now_ms - partition.last_flush_ms >= partition.config.flush_ms:
            partition.last_flush_ms = now_ms
            node.flusher.mark_dirty(partition.log, waiters=2)


def write_checkpoints(node: Node) -> None:
    try:
        node.write_checkpoints()
    except OSError as error:
        storage_error(error)


class Housekeeping:
    """The tasks on their timers."""

    def __init__(self, node: Node, dispatcher: Dispatcher, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timers: dict[str, asyncio.TimerHandle] = {}
        config = node.config
        self._every(
            "retention", config.number("log.retention.check.interval.ms") / 1000, lambda: enforce_retention(node)
        )
        self._every("producers", PRODUCER_EXPIRY_CHECK_SECONDS, lambda: expire_producers(node))
        self._every("offsets", config.number("offsets.retention.check.interval.ms") / 1000, node.groups.expire_offsets)
        self._every(
            "checkpoints",
            config.number("log.flush.offset.checkpoint.interval.ms") / 1000,
            lambda: write_checkpoints(node),
        )
        self._every("flush", FLUSH_CHECK_SECONDS, lambda: flush_by_time(node))
        self._idle_seconds = config.number("connections.max.idle.ms") / 1000
        self._every("idle", min(IDLE_CHECK_SECONDS, self._idle_seconds), lambda: self._close_idle(dispatcher))

    def _every(self, name: str, seconds: float, task: Callable[[], None]) -> None:
        def run() -> None:
            self._timers[name] = self._loop.call_later(seconds, run)
            task()

        self._timers[name] = self._loop.call_later(seconds, run)

    def _close_idle(self, dispatcher: Dispatcher) -> None:
        before = self._loop.time() - self._idle_seconds
        for connection in list(dispatcher.connections):
            if connection.last_active < before and connection.delay is None:
                connection.close_idle()

    def stop(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
