"""Producing: a confluent-kafka producer, its poll thread, and acknowledgements for the event loop.

Records of one key keep their order and are written once per send (idempotence); the partition is always Kafka's own
choice for the key, murmur2, so that producers in any language agree. Acknowledgements come back in batches: one wake-up
of the loop for all that a poll delivered.
"""

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from enum import StrEnum
from typing import NamedTuple

import confluent_kafka

from headwater.kafka.client_config import for_producer
from headwater.kafka.client_config import logger as client_logger
from headwater.settings import Settings

silent = logging.getLogger("headwater.kafka.silent")
silent.disabled = True

Headers = list[tuple[str, str | bytes | None]]

FLUSH_SECONDS = 20.0
POLL_SECONDS = 0.1
RETRY_SECONDS = 30.0
FULL_SECONDS = 0.005  # between tries while the client's queue is full


class Profile(StrEnum):
    """How a producer weighs latency against throughput; the seed's five settings are those of THROUGHPUT."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"


PROFILES: dict[Profile, dict[str, str | int]] = {
    Profile.LATENCY: {"linger.ms": 0, "compression.type": "none"},
    # Sarama's Flush.Bytes 16384, Flush.Messages 100 and MaxMessages 1000: librdkafka sends a batch when it has 16,384
    # bytes or 1,000 messages, or has lingered, whichever comes first.
    Profile.THROUGHPUT: {
        "linger.ms": 5,
        "compression.type": "snappy",
        "batch.size": 16384,
        "batch.num.messages": 1000,
    },
}

ALWAYS: dict[str, str | int | bool] = {
    "acks": "all",
    "enable.idempotence": True,
    "partitioner": "murmur2_random",
    "message.max.bytes": 104857600,  # the topic's max.message.bytes decides, not the client
}


# The broker waits this long for a process that was killed inside a transaction. The back-off is that between a commit and
# the next begin, when the coordinator still writes: the client's own 100 ms would be most of a small transaction's time.
TRANSACTIONAL = {"transaction.timeout.ms": "10000", "retry.backoff.ms": "5", "log_level": "3"}


class NotPublished(Exception):
    """The broker did not acknowledge; the message says why. Whether it is in the log is not known."""

    lacks_transactions = False
    """The cluster has none, or not for this producer."""

    def __init__(self, message: str, *, is_about_the_record: bool = False) -> None:
        """is_about_the_record: another one would be taken."""
        super().__init__(message)
        self.is_about_the_record = is_about_the_record


def _not_published(topic: str, error: confluent_kafka.KafkaError) -> NotPublished:
    return NotPublished(f"{topic}: {error.str()}", is_about_the_record=error.code() in ABOUT_THE_RECORD)


ABOUT_THE_RECORD = (
    confluent_kafka.KafkaError.MSG_SIZE_TOO_LARGE,
    confluent_kafka.KafkaError.RECORD_LIST_TOO_LARGE,
    confluent_kafka.KafkaError.INVALID_RECORD,
    confluent_kafka.KafkaError.UNKNOWN_TOPIC_OR_PART,
    confluent_kafka.KafkaError._UNKNOWN_TOPIC,
    confluent_kafka.KafkaError._UNKNOWN_PARTITION,
    confluent_kafka.KafkaError.TOPIC_EXCEPTION,
    confluent_kafka.KafkaError.TOPIC_AUTHORIZATION_FAILED,
)


class Acknowledged(NamedTuple):
    topic: str
    partition: int
    offset: int


def producer_config(settings: Settings, profile: Profile) -> dict[str, str | int | bool]:
    return {
        "bootstrap.servers": settings.bootstrap_servers,
        **PROFILES[profile],
        **ALWAYS,
        **for_producer(settings.kafka),
    }


class QueueFull(Exception):
    """The client holds as many records as it may: wait a little."""


class KafkaProducer:
    """One producer for a process; `send` from any thread.

    After an error that the client can't recover from, everything that is under way is failed, and so is all that is
    sent from then on; `on_fatal` is told, once, in the poll thread.
    """

    def __init__(
        self,
        settings: Settings,
        profile: Profile = Profile.LATENCY,
        on_fatal: "Callable[[NotPublished], None]" = lambda error: None,
        *,
        is_quiet: bool = False,
    ) -> None:
        """is_quiet: the client logs nothing, not even what is fatal: all of it comes as an error, too."""
        self._producer = confluent_kafka.Producer(
            {**producer_config(settings, profile), "error_cb": self._error},
            logger=silent if is_quiet else client_logger,
        )
        self._on_fatal = on_fatal
        self._fatal: NotPublished | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="producer", daemon=True)
        self._thread.start()

    def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers,
        done: "Callable[[Acknowledged | NotPublished], None]",
        *,
        partition: int = -1,
        block: bool = True,
    ) -> None:
        """`done` is called in the poll thread. While the client's queue is full it blocks, or raises QueueFull."""

        def delivered(error: confluent_kafka.KafkaError | None, message: confluent_kafka.Message) -> None:
            if error is not None:
                done(_not_published(topic, error))
            else:
                done(Acknowledged(topic, message.partition() or 0, message.offset() or 0))

        while True:
            if self._fatal is not None or self._stopping.is_set():
                done(self._fatal or NotPublished(f"{topic}: the producer is closed"))
                return
            try:
                self._producer.produce(topic, value, key, partition=partition, headers=headers, on_delivery=delivered)
                return
            except BufferError:
                if not block:
                    raise QueueFull from None
                time.sleep(FULL_SECONDS)
            except confluent_kafka.KafkaException as error:
                done(_not_published(topic, error.args[0]))
                return

    def send_in_order(
        self,
        records: "Sequence[tuple[str, bytes | None, bytes | None, Headers]]",
        answered: "Callable[[int, NotPublished | None], None]",
        first: int = 0,
    ) -> int:
        """Topics, keys, values and headers, from place `first` on. How far it has come: to the end, to the first one that there
        is no room for, or behind the first one that was refused.

        answered: called with each one's place, None when it was acknowledged; in the poll thread, of one that was refused in
        this one.
        """
        produce = self._producer.produce
        for place in range(first, len(records)):
            topic, key, value, headers = records[place]
            if self._fatal is not None or self._stopping.is_set():
                answered(place, self._fatal or NotPublished(f"{topic}: the producer is closed"))
                return place + 1
            try:
                produce(topic, value, key, headers=headers, on_delivery=functools.partial(_tell, answered, place))
            except BufferError:
                return place
            except confluent_kafka.KafkaException as error:
                answered(place, _not_published(topic, error.args[0]))
                return place + 1
        return len(records)

    def send_and_wait(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers) -> Acknowledged:
        """For threads without a loop. Raises NotPublished."""
        future: Future[Acknowledged] = Future()
        self.send(topic, key, value, headers, lambda result: _settle(future, result))
        return future.result()

    def flush(self, seconds: float = FLUSH_SECONDS) -> int:
        """How many records are still under way after that time."""
        try:
            return int(self._producer.flush(seconds))
        except confluent_kafka.KafkaException:  # after a fatal error; everything under way is told of it
            return len(self._producer)

    def close(self, seconds: float = FLUSH_SECONDS) -> int:
        """Wait for what is under way, at most so long; what is left is failed. How many those were."""
        left = self.flush(seconds)
        if left:
            self._give_up()
        self._stopping.set()
        self._thread.join()
        return left

    def _give_up(self) -> None:
        self._producer.purge()
        self._producer.flush(1.0)  # which delivers the failures

    def _error(self, error: confluent_kafka.KafkaError) -> None:
        """Called by `poll`; anything that is not fatal the client retries by itself."""
        if error.fatal() and self._fatal is None:
            self._fatal = NotPublished(error.str())

    def _poll(self) -> None:
        told = False
        while not self._stopping.is_set():
            try:
                self._producer.poll(POLL_SECONDS)
            except confluent_kafka.KafkaException as error:
                self._error(error.args[0])
            if self._fatal is not None and not told:
                told = True
                self._give_up()
                self._on_fatal(self._fatal)


def _tell(
    answered: "Callable[[int, NotPublished | None], None]",
    place: int,
    error: confluent_kafka.KafkaError | None,
    message: confluent_kafka.Message,
) -> None:
    answered(place, None if error is None else _not_published(message.topic() or "", error))


WITHOUT_TRANSACTIONS = (
    confluent_kafka.KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    confluent_kafka.KafkaError.UNSUPPORTED_VERSION,
    confluent_kafka.KafkaError._UNSUPPORTED_FEATURE,
)


class TransactionalProducer(KafkaProducer):
    """One transaction after the other; `send` between `begin` and `commit`. Each method raises NotPublished."""

    def __init__(
        self, settings: Settings, transactional_id: str, seconds: float = 30.0, *, is_quiet: bool = False
    ) -> None:
        super().__init__(
            replace(settings, kafka={**TRANSACTIONAL, **settings.kafka, "transactional.id": transactional_id}),
            Profile.THROUGHPUT,
            is_quiet=is_quiet,
        )
        try:
            self._told(lambda: self._producer.init_transactions(seconds))
        except NotPublished:
            self.close(0.0)
            raise

    def begin(self) -> None:
        self._told(self._producer.begin_transaction)

    def commit(self, offsets: "list[confluent_kafka.TopicPartition]", group_metadata: object, seconds: float) -> None:
        """With the offsets of the group that the metadata is of."""
        if offsets:
            self._told(lambda: self._producer.send_offsets_to_transaction(offsets, group_metadata, seconds))
        self._told(lambda: self._producer.commit_transaction(seconds))

    def abort(self, seconds: float = 10.0) -> None:
        """As far as it can be told; the broker aborts it anyway when its time is over."""
        with contextlib.suppress(confluent_kafka.KafkaException):
            self._producer.purge()
            self._producer.abort_transaction(seconds)

    def _told(self, call: "Callable[[], object]") -> None:
        deadline = time.monotonic() + RETRY_SECONDS
        while True:
            try:
                call()
                return
            except confluent_kafka.KafkaException as error:
                trouble = error.args[0]
                if not trouble.retriable() or time.monotonic() > deadline:
                    refused = NotPublished(trouble.str())
                    refused.lacks_transactions = trouble.code() in WITHOUT_TRANSACTIONS
                    raise refused from None


def _settle(future: "Future[Acknowledged]", result: Acknowledged | NotPublished) -> None:
    if isinstance(result, NotPublished):
        future.set_exception(result)
    else:
        future.set_result(result)


class LoopProducer:
    """A producer whose acknowledgements are awaited on one event loop."""

    def __init__(self, producer: KafkaProducer, loop: asyncio.AbstractEventLoop) -> None:
        self._producer = producer
        self._loop = loop
        self._lock = threading.Lock()
        self._done: list[tuple[asyncio.Future[Acknowledged], Acknowledged | NotPublished]] = []

    async def send(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Headers, *, partition: int = -1
    ) -> Acknowledged:
        """Raises NotPublished."""
        future: asyncio.Future[Acknowledged] = self._loop.create_future()

        def done(result: Acknowledged | NotPublished) -> None:
            self._acknowledged(future, result)

        while True:
            try:
                self._producer.send(topic, key, value, headers, done, partition=partition, block=False)
                return await future
            except QueueFull:
                await asyncio.sleep(FULL_SECONDS)

    def _acknowledged(self, future: "asyncio.Future[Acknowledged]", result: Acknowledged | NotPublished) -> None:
        """In the poll thread, or where `send` was refused."""
        with self._lock:
            self._done.append((future, result))
            first = len(self._done) == 1
        if first:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            done, self._done = self._done, []
        for future, result in done:
            if future.done():
                continue  # whoever waited was cancelled
            if isinstance(result, NotPublished):
                future.set_exception(result)
            else:
                future.set_result(result)
