"""Three Kafka clients behind one face: what the suite of client behaviour is written in.

Each produces, consumes and joins groups with its own library, its own protocol versions and its own opinions.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import aiokafka
import confluent_kafka
import kafka

WAIT_SECONDS = 30.0


class Sent(NamedTuple):
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()


class Received(NamedTuple):
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()


class Client(Protocol):
    name: str
    codecs: tuple[str, ...]

    def produce(self, servers: str, topic: str, records: Sequence[Sent], **options: object) -> list[tuple[int, int]]:
        """(partition, offset) of each record, acknowledged by all."""

    def consume(self, servers: str, topic: str, count: int, group: str | None = None) -> list[Received]:
        """The first `count` records from the earliest; with a group they are committed."""


def wait_until(condition: Callable[[], bool], what: str, seconds: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


class Confluent:
    name = "confluent-kafka"
    codecs = ("none", "gzip", "snappy", "lz4", "zstd")

    def produce(
        self, servers: str, topic: str, records: Sequence[Sent], codec: str = "none", idempotent: bool = True
    ) -> list[tuple[int, int]]:
        producer = confluent_kafka.Producer(
            {"bootstrap.servers": servers, "enable.idempotence": idempotent, "compression.type": codec, "linger.ms": 5}
        )
        places: dict[int, tuple[int, int]] = {}

        def delivered(error: object, message: confluent_kafka.Message, place: int) -> None:
            assert error is None, error
            places[place] = (message.partition(), message.offset())

        for i, record in enumerate(records):
            producer.produce(
                topic, record.value, record.key, headers=list(record.headers),
                on_delivery=lambda error, message, i=i: delivered(error, message, i),
            )  # fmt: skip
        assert producer.flush(WAIT_SECONDS) == 0
        return [places[i] for i in range(len(records))]

    def consume(self, servers: str, topic: str, count: int, group: str | None = None) -> list[Received]:
        consumer = confluent_kafka.Consumer(
            {
                "bootstrap.servers": servers,
                "group.id": group or "none",
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
            }
        )
        try:
            if group is None:
                partitions = consumer.list_topics(topic, WAIT_SECONDS).topics[topic].partitions
                consumer.assign([confluent_kafka.TopicPartition(topic, index, 0) for index in partitions])
            else:
                consumer.subscribe([topic])
            found: list[Received] = []
            deadline = time.monotonic() + WAIT_SECONDS
            while len(found) < count:
                assert time.monotonic() < deadline, f"{len(found)} of {count} records"
                for message in consumer.consume(count - len(found), 0.2):
                    assert message.error() is None, message.error()
                    headers = tuple((name, value) for name, value in message.headers() or [])
                    found.append(
                        Received(message.partition(), message.offset(), message.key(), message.value(), headers)
                    )
            if group is not None:
                consumer.commit(asynchronous=False)
            return found
        finally:
            consumer.close()


class KafkaPython:
    name = "kafka-python"
    codecs = ("none", "gzip")

    def produce(
        self, servers: str, topic: str, records: Sequence[Sent], codec: str = "none", idempotent: bool = True
    ) -> list[tuple[int, int]]:
        producer = kafka.KafkaProducer(
            bootstrap_servers=servers,
            compression_type=None if codec == "none" else codec,
            acks="all",
            enable_idempotence=idempotent,
            linger_ms=5,
        )
        try:
            futures = [
                producer.send(topic, record.value, record.key, headers=list(record.headers)) for record in records
            ]
            metadata = [future.get(WAIT_SECONDS) for future in futures]
            return [(each.partition, each.offset) for each in metadata]
        finally:
            producer.close()

    def consume(self, servers: str, topic: str, count: int, group: str | None = None) -> list[Received]:
        consumer = kafka.KafkaConsumer(
            bootstrap_servers=servers, group_id=group, auto_offset_reset="earliest", enable_auto_commit=False,
            metadata_max_age_ms=1000,  # a topic that was made just now may be unknown to it at first
        )  # fmt: skip
        try:
            if group is None:
                partitions = [
                    kafka.TopicPartition(topic, index) for index in consumer.partitions_for_topic(topic) or ()
                ]
                consumer.assign(partitions)
                consumer.seek_to_beginning(*partitions)
            else:
                consumer.subscribe([topic])
            found: list[Received] = []
            deadline = time.monotonic() + WAIT_SECONDS
            while len(found) < count:
                assert time.monotonic() < deadline, f"{len(found)} of {count} records"
                for records in consumer.poll(200).values():
                    found += [Received(r.partition, r.offset, r.key, r.value, tuple(r.headers)) for r in records]
            if group is not None:
                consumer.commit()
            return found[:count]
        finally:
            consumer.close()


class AioKafka:
    name = "aiokafka"
    codecs = ("none", "gzip", "snappy", "lz4", "zstd")

    def produce(
        self, servers: str, topic: str, records: Sequence[Sent], codec: str = "none", idempotent: bool = True
    ) -> list[tuple[int, int]]:
        async def run() -> list[tuple[int, int]]:
            producer = aiokafka.AIOKafkaProducer(
                bootstrap_servers=servers,
                compression_type=None if codec == "none" else codec,
                acks="all",
                enable_idempotence=idempotent,
                linger_ms=5,
            )
            await producer.start()
            try:
                sent = [
                    await producer.send(topic, record.value, record.key, headers=list(record.headers))
                    for record in records
                ]
                return [(each.partition, each.offset) for each in await asyncio.gather(*sent)]
            finally:
                await producer.stop()

        return asyncio.run(asyncio.wait_for(run(), WAIT_SECONDS))

    def consume(self, servers: str, topic: str, count: int, group: str | None = None) -> list[Received]:
        async def run() -> list[Received]:
            consumer = aiokafka.AIOKafkaConsumer(
                topic,
                bootstrap_servers=servers,
                group_id=group,
                auto_offset_reset="earliest",
                enable_auto_commit=False,
            )
            await consumer.start()
            try:
                if group is None:
                    await consumer.seek_to_beginning()
                found: list[Received] = []
                while len(found) < count:
                    for records in (await consumer.getmany(timeout_ms=200)).values():
                        found += [Received(r.partition, r.offset, r.key, r.value, tuple(r.headers)) for r in records]
                if group is not None:
                    await consumer.commit()
                return found[:count]
            finally:
                await consumer.stop()

        return asyncio.run(asyncio.wait_for(run(), WAIT_SECONDS))


CLIENTS: tuple[Client, ...] = (Confluent(), KafkaPython(), AioKafka())  # type: ignore[assignment]
