"""Consuming: the one consumer of a group member, to be used by one thread.

Defaults that matter: cooperative-sticky assignment; commits are ours alone; the client's own queue is bounded, and it
goes on fetching 5 ms after the queue was full instead of after a whole second (`fetch.queue.backoff.ms`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import confluent_kafka
from confluent_kafka import KafkaException, Message, TopicPartition

from headwater.kafka.client_config import for_consumer
from headwater.kafka.producer import Headers
from headwater.settings import Settings

QUEUED_KBYTES = 16 * 1024

__all__ = [
    "ConsumerFailed",
    "KafkaConsumer",
    "KafkaException",
    "KafkaReader",
    "Message",
    "Rebalance",
    "TopicPartition",
    "consumer_config",
    "headers_of",
]

Rebalance = Callable[[list[TopicPartition]], None]


def consumer_config(settings: Settings, group: str) -> dict[str, str | int | bool]:
    return {
        "bootstrap.servers": settings.bootstrap_servers,
        "partition.assignment.strategy": "cooperative-sticky",
        "auto.offset.reset": "earliest",
        "fetch.queue.backoff.ms": 5,
        "queued.max.messages.kbytes": QUEUED_KBYTES,
        **for_consumer(settings.kafka),
        "group.id": group,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
    }


class ConsumerFailed(Exception):
    """The client gave up; the message says why."""


class KafkaConsumer:
    def __init__(self, settings: Settings, group: str) -> None:
        self._consumer = confluent_kafka.Consumer(consumer_config(settings, group))

    def subscribe(self, topics: list[str], assigned: Rebalance, revoked: Rebalance, lost: Rebalance) -> None:
        self._consumer.subscribe(
            topics,
            on_assign=lambda _, partitions: assigned(partitions),
            on_revoke=lambda _, partitions: revoked(partitions),
            on_lost=lambda _, partitions: lost(partitions),
        )

    def take(self, count: int, seconds: float) -> list[Message]:
        """Wait for one record, then take what is there. Raises ConsumerFailed for an error that won't go away."""
        first = self._consumer.poll(seconds)
        if first is None:
            return []
        messages = [first, *self._consumer.consume(count - 1, 0)]
        if any(message.error() is not None for message in messages):
            messages = [message for message in messages if not self._is_error(message)]
        return messages

    def _is_error(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return False
        if error.fatal():
            raise ConsumerFailed(error.str())
        return True  # the client retries by itself and tells what happens

    def commit(self, offsets: list[TopicPartition]) -> None:
        """Raises KafkaException."""
        self._consumer.commit(offsets=offsets, asynchronous=False)

    def pause(self, partitions: list[TopicPartition]) -> None:
        self._consumer.pause(partitions)

    def resume(self, partitions: list[TopicPartition]) -> None:
        self._consumer.resume(partitions)

    def close(self) -> None:
        """Leave the group."""
        self._consumer.close()


class KafkaReader:
    """Reads given partitions from given offsets, without a group."""

    def __init__(self, settings: Settings, starts: Mapping[tuple[str, int], int]) -> None:
        self._consumer = confluent_kafka.Consumer({**consumer_config(settings, "headwater-reader")})
        self._consumer.assign([TopicPartition(topic, index, offset) for (topic, index), offset in starts.items()])

    def take(self, count: int, seconds: float) -> list[Message]:
        """Raises ConsumerFailed."""
        messages = self._consumer.consume(count, seconds)
        for message in messages:
            error = message.error()
            if error is not None:
                raise ConsumerFailed(error.str())
        return messages

    def close(self) -> None:
        self._consumer.close()


def headers_of(message: Message) -> Headers:
    found: Any = message.headers()
    return [(name, value) for name, value in found or []]
