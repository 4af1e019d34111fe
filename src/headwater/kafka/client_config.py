"""Which of the client's properties go to whom: HEADWATER_KAFKA_* is one set for consumers, producers and admin clients.

librdkafka warns about each property that is not its kind's, so each gets its own. A property that is on neither list is
for all: addresses, security, time-outs of connections. What the client logs goes to the logger `headwater.kafka.client`.
"""

import logging
import time
from collections.abc import Mapping

CONSUMER_ONLY = (
    "auto.commit.",
    "auto.offset.reset",
    "check.crcs",
    "client.rack",
    "enable.auto.",
    "enable.partition.eof",
    "fetch.",
    "group.",
    "heartbeat.interval.ms",
    "isolation.level",
    "max.partition.fetch.bytes",
    "max.poll.interval.ms",
    "partition.assignment.strategy",
    "queued.",
    "session.timeout.ms",
)
PRODUCER_ONLY = (
    "acks",
    "batch.",
    "compression.",
    "delivery.",
    "enable.gapless.guarantee",
    "enable.idempotence",
    "linger.ms",
    "message.send.max.retries",
    "message.timeout.ms",
    "partitioner",
    "queue.buffering.",
    "request.required.acks",
    "request.timeout.ms",
    "retries",
    "sticky.partitioning.linger.ms",
    "transaction.timeout.ms",
    "transactional.id",
)


def for_consumer(properties: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in properties.items() if not name.startswith(PRODUCER_ONLY)}


def for_producer(properties: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in properties.items() if not name.startswith(CONSUMER_ONLY)}


def for_admin(properties: Mapping[str, str]) -> dict[str, str]:
    return for_consumer(for_producer(properties))


class OncePerKind(logging.Filter):
    """The client says the same of every connection, again and again: each kind of line once in a while."""

    def __init__(self, seconds: float = 30.0) -> None:
        super().__init__()
        self._seconds = seconds
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.getMessage().split(" ", 1)[0]
        now = time.monotonic()
        if now - self._said.get(kind, -self._seconds) < self._seconds:
            return False
        self._said[kind] = now
        return True


logger = logging.getLogger("headwater.kafka.client")
logger.addFilter(OncePerKind())
