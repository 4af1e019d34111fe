"""Consuming: the one consumer of a group member, to be used by one thread.

Defaults that matter: cooperative-sticky assignment; commits are ours alone; the client's own queue is bounded, and it
goes on fetching 5 ms after the queue was full instead of after a whole second (`fetch.queue.backoff.ms`).
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import confluent_kafka
from confluent_kafka import OFFSET_BEGINNING, KafkaError, KafkaException, Message, TopicPartition

from headwater.kafka.client_config import for_consumer
from headwater.kafka.client_config import logger as client_logger
from headwater.kafka.producer import Headers
from headwater.settings import Settings

logger = logging.getLogger(__name__)

QUEUED_KBYTES = 16 * 1024
COMMITTED_SECONDS = 2.0  # for one try
CLOSE_SECONDS = 5.0
TELL_SECONDS = 30.0
TROUBLE_SECONDS = 0.2
FINAL = (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED)

__all__ = [
    "Begun",
    "ConsumerFailed",
    "Gone",
    "KafkaConsumer",
    "KafkaException",
    "Message",
    "OutOfRange",
    "Rebalance",
    "TopicPartition",
    "consumer_config",
    "headers_of",
]

Rebalance = Callable[[list[TopicPartition]], None]


CLASSIC_ONLY = ("partition.assignment.strategy", "session.timeout.ms", "heartbeat.interval.ms")
"""With the protocol of KIP-848 these are the broker's to say, and the client refuses them."""


def consumer_config(settings: Settings, group: str, protocol: str | None = None) -> dict[str, str | int | bool]:
    config = _consumer_config(settings, group)
    if protocol is not None:
        config["group.protocol"] = protocol
    if config.get("group.protocol") == "consumer":
        for name in CLASSIC_ONLY:
            config.pop(name, None)
    return config


def _consumer_config(settings: Settings, group: str) -> dict[str, str | int | bool]:
    return {
        "bootstrap.servers": settings.bootstrap_servers,
        "client.id": f"{socket.gethostname()}-{os.getpid()}",  # who is shown as a group's member
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


class Gone(ConsumerFailed):
    """The offset is not in the log any more."""

    def __init__(self, message: str, partition: int) -> None:
        super().__init__(message)
        self.partition = partition


class OutOfRange(Exception):
    """The committed offset is not in the log any more; the message says what to do."""

    def __init__(self, topic: str, partition: int, message: str) -> None:
        super().__init__(message)
        self.topic = topic
        self.partition = partition


class Begun(NamedTuple):
    """Where a partition begins that was assigned."""

    partition: int
    committed: int | None
    metadata: str


class KafkaConsumer:
    def __init__(self, settings: Settings, group: str, protocol: str | None = None) -> None:
        config = consumer_config(settings, group, protocol)
        self._group = group
        self._consumer = confluent_kafka.Consumer({**config, "on_commit": self._answered}, logger=client_logger)
        self.commits_under_way = 0
        self.on_refused: Rebalance = lambda places: None
        """Told of commits that were refused."""
        self.on_committed: Rebalance = lambda places: None
        """Told of commits that were acknowledged."""
        self._is_incremental = config.get("group.protocol") == "consumer" or "cooperative" in str(
            config["partition.assignment.strategy"]
        )
        self._told: dict[str, float] = {}
        self._trouble: list[Exception] = []

    def subscribe(self, topics: list[str], assigned: Rebalance, revoked: Rebalance, lost: Rebalance) -> None:
        self._consumer.subscribe(
            topics,
            on_assign=lambda _, partitions: assigned(partitions),
            on_revoke=lambda _, partitions: revoked(partitions),
            on_lost=lambda _, partitions: lost(partitions),
        )

    def begin_at_committed(
        self, partitions: list[TopicPartition], is_given_up: Callable[[], bool] = lambda: False
    ) -> list[Begun]:
        """In `assigned`: each partition begins where the group committed, or at its earliest record.

        This is said explicitly, because with `auto.offset.reset` the client would also jump, in silence, where a
        committed offset is no longer in the log. While the broker is away it tries again, until `is_given_up`: then
        nothing is assigned.
        """
        found = self._committed(partitions, is_given_up)
        places = _beginnings(found)
        if self._is_incremental:
            self._consumer.incremental_assign(places)
        else:
            self._consumer.assign(places)
        return [_begun(place) for place in found]

    def seek_to_committed(self, partitions: list[TopicPartition], is_given_up: Callable[[], bool]) -> list[Begun]:
        """Of partitions that are assigned: as if they had just been."""
        found = self._committed(partitions, is_given_up)
        for place in _beginnings(found):
            try:
                self._consumer.seek(place)
            except KafkaException:  # it has stopped fetching, after an offset that was not in the log
                self._begin_at(place)
        return [_begun(place) for place in found]

    def _begin_at(self, place: TopicPartition) -> None:
        """Raises KafkaException."""
        if self._is_incremental:
            self._consumer.incremental_unassign([place])
            self._consumer.incremental_assign([place])
        else:
            others = [each for each in self._consumer.assignment() if each.partition != place.partition]
            self._consumer.assign([*self._consumer.position(others), place])

    def _committed(self, partitions: list[TopicPartition], is_given_up: Callable[[], bool]) -> list[TopicPartition]:
        while partitions:
            try:
                found = list(self._consumer.committed(partitions, timeout=COMMITTED_SECONDS))
                refused = [place for place in found if place.error is not None]
                if not refused:
                    return found
                self._tell(f"committed offsets: {refused[0].error}")
                time.sleep(0.1)
            except KafkaException as error:
                self._tell(f"committed offsets: {error.args[0].str()}")
            if is_given_up():
                break
        return []

    def end_offset(self, topic: str, partition: int) -> int:
        """Raises KafkaException."""
        return int(self._consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=COMMITTED_SECONDS)[1])

    def earliest(self, topic: str, partition: int) -> int:
        """Raises KafkaException."""
        return int(self._consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=COMMITTED_SECONDS)[0])

    def begin_at_earliest(self, topic: str, partition: int, is_given_up: Callable[[], bool]) -> None:
        """Read on at the earliest record, after an offset that was not in the log any more: there the client has stopped
        fetching, and can't seek. While the broker is away it tries again, until `is_given_up` or the partition is gone."""
        while not is_given_up() and any(each.partition == partition for each in self._consumer.assignment()):
            try:
                self._begin_at(TopicPartition(topic, partition, self.earliest(topic, partition)))
                return
            except KafkaException as error:
                self._tell(f"begin at the earliest record: {error.args[0].str()}")
                time.sleep(TROUBLE_SECONDS)

    def seek(self, topic: str, partition: int, offset: int) -> None:
        """Read on from there."""
        self._consumer.seek(TopicPartition(topic, partition, offset))

    def group_metadata(self) -> object:
        """For a transaction that commits this group's offsets (KIP-447). In the thread that takes."""
        return self._consumer.consumer_group_metadata()

    def take(self, count: int, seconds: float) -> list[Message]:
        """Wait for one record, then take what is there. Raises ConsumerFailed for an error that won't go away, and
        OutOfRange."""
        self._raise_trouble()
        first = self._consumer.poll(seconds)
        if first is None:
            return []
        messages = [first, *self._consumer.consume(count - 1, 0)]
        if any(message.error() is not None for message in messages):
            self._trouble += [trouble for message in messages if (trouble := self._trouble_of(message)) is not None]
            messages = [message for message in messages if message.error() is None]
            if not messages:
                self._raise_trouble()
        return messages

    def _raise_trouble(self) -> None:
        """After the records that came with it: they must not be lost. Raises ConsumerFailed, OutOfRange."""
        if self._trouble:
            raise self._trouble.pop(0)

    def poll_paused(self, seconds: float) -> None:
        """Answer the group and take nothing. Raises ConsumerFailed."""
        self._consumer.pause(self._consumer.assignment())
        message = self._consumer.poll(seconds)
        trouble = self._trouble_of(message) if message is not None else None
        if isinstance(trouble, ConsumerFailed):
            raise trouble

    def _trouble_of(self, message: Message) -> Exception | None:
        """An error that won't go away; one that does is told once in a while."""
        error = message.error()
        if error is None:
            return None
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            return OutOfRange(
                message.topic() or "",
                message.partition() or 0,
                f"{self._group} has committed an offset of {message.topic()}-{message.partition()} that is not in the log "
                f"any more ({error.str()}): retention has passed it, and events were not handled.\n"
                f"  `headwater groups reset {self._group} --topic {message.topic()} --to earliest --execute` goes on "
                "with what is left.",
            )
        if error.fatal() or error.code() in FINAL:
            return ConsumerFailed(f"{self._group}: {error.str()}")
        self._tell(error.str())
        return None

    def commit_soon(self, offsets: list[TopicPartition]) -> None:
        """Answered inside a later poll. One at a time: see `commits_under_way`."""
        if offsets:
            self.commits_under_way += 1
            try:
                self._consumer.commit(offsets=offsets, asynchronous=True)
            except KafkaException as error:
                self._answered(error.args[0], offsets)

    def commit_now(self, offsets: list[TopicPartition]) -> bool:
        """Wait for the answer, and say whether it was yes: in `revoked`, where nothing can be polled."""
        if offsets:
            try:
                answered = self._consumer.commit(offsets=offsets, asynchronous=False) or []
            except KafkaException as error:
                self._tell(f"commit: {error.args[0].str()}")
                return False
            refused = [place for place in answered if place.error is not None]
            if refused:
                self._tell(f"commit: {refused[0].error}")
                return False
            self.on_committed(offsets)
        return True

    def _answered(self, error: KafkaError | None, places: list[TopicPartition]) -> None:
        self.commits_under_way = max(0, self.commits_under_way - 1)
        refused = places if error is not None else [place for place in places if place.error is not None]
        if refused:
            self._tell(f"commit: {error.str() if error is not None else refused[0].error}")
            self.on_refused(refused)
        else:
            self.on_committed(places)

    def _tell(self, text: str) -> None:
        """Once in a while: the client tries again by itself."""
        if time.monotonic() - self._told.get(text, -TELL_SECONDS) >= TELL_SECONDS:
            self._told[text] = time.monotonic()
            logger.warning("consumer_error group=%s error=%s", self._group, text)

    def pause(self, partitions: list[TopicPartition]) -> None:
        self._consumer.pause(partitions)

    def resume(self, partitions: list[TopicPartition]) -> None:
        self._consumer.resume(partitions)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Leave the group. The client waits without a bound for a broker that is away; then it is left behind."""
        closing = threading.Thread(target=self._consumer.close, name="closing", daemon=True)
        closing.start()
        closing.join(seconds)
        if closing.is_alive():
            logger.warning("group_not_left group=%s effect=its session runs out", self._group)


def _beginnings(found: list[TopicPartition]) -> list[TopicPartition]:
    return [
        TopicPartition(place.topic, place.partition, place.offset if place.offset >= 0 else OFFSET_BEGINNING)
        for place in found
    ]


def _begun(place: TopicPartition) -> Begun:
    return Begun(place.partition, place.offset if place.offset >= 0 else None, place.metadata or "")


def headers_of(message: Message) -> Headers:
    found: Any = message.headers()
    return [(name, value) for name, value in found or []]
