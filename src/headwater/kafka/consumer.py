"""Consuming: the one consumer of a group member, to be used by one thread.

Defaults that matter: cooperative-sticky assignment; commits are ours alone; the client's own queue is bounded, and it
goes on fetching 5 ms after the queue was full instead of after a whole second (`fetch.queue.backoff.ms`).
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import confluent_kafka
from confluent_kafka import OFFSET_BEGINNING, KafkaError, KafkaException, Message, TopicPartition

from headwater.kafka.client_config import for_consumer
from headwater.kafka.client_config import logger as client_logger
from headwater.kafka.producer import Headers
from headwater.settings import Settings

logger = logging.getLogger(__name__)

QUEUED_KBYTES = 16 * 1024
COMMITTED_SECONDS = 30.0
TELL_SECONDS = 30.0
FINAL = (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED)

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
        "auto.offset.reset": "error",  # see `begin_at_committed`
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
        config = consumer_config(settings, group)
        self._group = group
        self._consumer = confluent_kafka.Consumer({**config, "on_commit": self._answered}, logger=client_logger)
        self.commits_under_way = 0
        self.on_refused: Rebalance = lambda places: None
        """Told of commits that were refused."""
        self._is_incremental = "cooperative" in str(config["partition.assignment.strategy"]) or (
            config.get("group.protocol") == "consumer"
        )
        self._told: dict[str, float] = {}

    def subscribe(self, topics: list[str], assigned: Rebalance, revoked: Rebalance, lost: Rebalance) -> None:
        self._consumer.subscribe(
            topics,
            on_assign=lambda _, partitions: assigned(partitions),
            on_revoke=lambda _, partitions: revoked(partitions),
            on_lost=lambda _, partitions: lost(partitions),
        )

    def begin_at_committed(self, partitions: list[TopicPartition]) -> None:
        """In `assigned`: each partition begins where the group committed, or at its earliest record.

        This is said explicitly, because with `auto.offset.reset` the client would also jump, in silence, where a
        committed offset is no longer in the log. Raises KafkaException.
        """
        found = self._consumer.committed(partitions, timeout=COMMITTED_SECONDS)
        places = [
            TopicPartition(place.topic, place.partition, place.offset if place.offset >= 0 else OFFSET_BEGINNING)
            for place in found
        ]
        if self._is_incremental:
            self._consumer.incremental_assign(places)
        else:
            self._consumer.assign(places)

    def take(self, count: int, seconds: float) -> list[Message]:
        """Wait for one record, then take what is there. Raises ConsumerFailed for an error that won't go away."""
        first = self._consumer.poll(seconds)
        if first is None:
            return []
        messages = [first, *self._consumer.consume(count - 1, 0)]
        if any(message.error() is not None for message in messages):
            messages = [message for message in messages if not self._is_error(message)]
        return messages

    def poll_paused(self, seconds: float) -> None:
        """Answer the group and take nothing."""
        self._consumer.pause(self._consumer.assignment())
        self._consumer.poll(seconds)

    def _is_error(self, message: Message) -> bool:
        """Whether it is an error; one that goes away is told once in a while. Raises ConsumerFailed."""
        error = message.error()
        if error is None:
            return False
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            raise ConsumerFailed(
                f"{self._group} has committed an offset of {message.topic()}-{message.partition()} that is not in the log "
                f"any more ({error.str()}): retention has passed it, and events were not handled.\n"
                f"  `headwater groups reset {self._group} --topic {message.topic()} --to earliest --execute` goes on "
                "with what is left."
            )
        if error.fatal() or error.code() in FINAL:
            raise ConsumerFailed(f"{self._group}: {error.str()}")
        self._tell(error.str())
        return True

    def commit_soon(self, offsets: list[TopicPartition]) -> None:
        """Answered inside a later poll. One at a time: see `commits_under_way`."""
        if offsets:
            self.commits_under_way += 1
            try:
                self._consumer.commit(offsets=offsets, asynchronous=True)
            except KafkaException as error:
                self._answered(error.args[0], offsets)

    def commit_now(self, offsets: list[TopicPartition]) -> None:
        """In `revoked`, where nothing can be polled: wait for the answer."""
        if offsets:
            try:
                self._consumer.commit(offsets=offsets, asynchronous=False)
            except KafkaException as error:
                self._tell(f"commit: {error.args[0].str()}")

    def _answered(self, error: KafkaError | None, places: list[TopicPartition]) -> None:
        self.commits_under_way = max(0, self.commits_under_way - 1)
        refused = places if error is not None else [place for place in places if place.error is not None]
        if refused:
            self._tell(f"commit: {error.str() if error is not None else refused[0].error}")
            self.on_refused(refused)

    def _tell(self, text: str) -> None:
        """Once in a while: the client tries again by itself."""
        if time.monotonic() - self._told.get(text, -TELL_SECONDS) >= TELL_SECONDS:
            self._told[text] = time.monotonic()
            logger.warning("consumer_error group=%s error=%s", self._group, text)

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
        config = {**consumer_config(settings, "headwater-reader"), "enable.partition.eof": True}
        self._consumer = confluent_kafka.Consumer(config)
        self._consumer.assign([TopicPartition(topic, index, offset) for (topic, index), offset in starts.items()])

    def take(self, count: int, seconds: float) -> tuple[list[Message], set[tuple[str, int]]]:
        """Records, and the partitions whose end was reached. Raises ConsumerFailed."""
        messages, ended = [], set()
        for message in self._consumer.consume(count, seconds):
            error = message.error()
            if error is None:
                messages.append(message)
            elif error.code() == KafkaError._PARTITION_EOF:
                ended.add((message.topic() or "", message.partition() or 0))
            else:
                raise ConsumerFailed(error.str())
        return messages, ended

    def close(self) -> None:
        self._consumer.close()


def headers_of(message: Message) -> Headers:
    found: Any = message.headers()
    return [(name, value) for name, value in found or []]
