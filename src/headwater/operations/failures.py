"""What failed in a group: parked keys, dead letters, and what is asked and done about them.

All of it is read from the group's own topics, on any Kafka; a redrive or a discard is a request that the owner of the
partition obeys, so nothing here competes with a running application.

Dead letters of Spring (`kafka_dlt-*`) and of Kafka Connect (`__connect.errors.*`) are listed too, by the name of their
topic; they have no owner of ours that could obey.
"""

import os
import socket
import time
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

import msgspec

from headwater.kafka.admin import KafkaAdmin
from headwater.kafka.consumer import Message, headers_of
from headwater.kafka.producer import Acknowledged, Headers, KafkaProducer, NotPublished
from headwater.kafka.reader import Told, read_all
from headwater.runtime.lane import NO_OFFSET, Attempted
from headwater.runtime.retry_topic import (
    DeadLetter,
    Done,
    ParkedRecord,
    Request,
    Resolved,
    SourceRecord,
    Unreadable,
    offset_key,
    read_dead_letter,
    read_retry_record,
)
from headwater.settings import Settings


class State(StrEnum):
    """What was done about a dead letter."""

    WAITING = "waiting"
    REQUESTED = "requested"
    REDRIVEN = "redrive"
    DISCARDED = "discard"


class Letter(NamedTuple):
    letter: DeadLetter
    state: State
    is_held: bool
    """Whether its key waits for a decision."""


class ParkedKey(NamedTuple):
    """A key that waits: its first parked event, and how many wait with it."""

    topic: str
    partition: int
    key: bytes | None
    offset: int
    events: int
    attempted: Attempted | None


class Failures(NamedTuple):
    parked: list[ParkedKey]
    letters: list[Letter]


class Filter(NamedTuple):
    """Which dead letters; what is None lets all pass."""

    reason: str | None = None
    kind: str | None = None
    key: bytes | None = None
    since_ms: int | None = None
    until_ms: int | None = None
    partition: int | None = None
    offset: int | None = None
    """Of the source."""

    def passes(self, letter: DeadLetter) -> bool:
        attempted, source = letter.attempted, letter.source
        return (
            (self.reason is None or self.reason.lower() in attempted.error.lower())
            and (self.kind is None or self.kind == attempted.kind)
            and (self.key is None or self.key == source.key)
            and (self.since_ms is None or letter.given_up_ms >= self.since_ms)
            and (self.until_ms is None or letter.given_up_ms < self.until_ms)
            and (self.partition is None or self.partition == letter.partition)
            and (self.offset is None or self.offset == source.offset)
        )


class TopicsOf(NamedTuple):
    """A source topic of a group, and the topics of what failed in it."""

    source: str
    retry: str
    dead: str


def topics_of(admin: KafkaAdmin, group: str) -> list[TopicsOf]:
    """Those that exist. Raises AdminError."""
    names = set(admin.topic_names())
    ending = f".{group}.retry"
    found = []
    for name in sorted(names):
        if name.endswith(ending) and f"{name.removesuffix(ending)}.{group}.dead" in names:
            source = name.removesuffix(ending)
            found.append(TopicsOf(source, name, f"{source}.{group}.dead"))
    return found


def read_failures(
    settings: Settings, admin: KafkaAdmin, topics: TopicsOf, progress: Told | None = None, *, letters: bool = True
) -> Failures:
    """Parked keys, and dead letters with what was done about them. Raises AdminError, ConsumerFailed."""
    parked: dict[tuple[int, int], ParkedRecord] = {}
    requested: set[tuple[int, int]] = set()
    resolved: dict[tuple[int, int], Resolved] = {}
    for message in read_all(settings, admin, [topics.retry], progress):
        partition = message.partition() or 0
        try:
            record = read_retry_record(message.key(), message.value(), headers_of(message), message.offset() or 0)
        except Unreadable:
            continue
        if isinstance(record, ParkedRecord):
            without_value = record.source._replace(value=None, headers=[])
            parked[partition, record.source.offset] = record._replace(source=without_value)
        elif isinstance(record, Done):
            parked.pop((partition, record.offset), None)
        elif isinstance(record, Request):
            requested.add((partition, record.dead_offset))
        elif isinstance(record, Resolved):
            resolved[partition, record.dead_offset] = record
        else:
            requested.discard((partition, record.dead_offset))
    held = {
        (partition, record.attempted.held)
        for (partition, _), record in parked.items()
        if record.attempted is not None and record.attempted.held != NO_OFFSET
    }
    found = []
    if letters:
        for message in read_all(settings, admin, [topics.dead], progress):
            place = (message.partition() or 0, message.offset() or 0)
            letter = letter_of(message)
            if letter is None:
                continue
            state = State.WAITING
            if place in requested:
                state = State.REQUESTED
            elif place in resolved:
                state = State(resolved[place].action)
            found.append(Letter(letter, state, place in held))
    return Failures(_by_key(topics.source, parked), found)


def _by_key(topic: str, parked: dict[tuple[int, int], ParkedRecord]) -> list[ParkedKey]:
    keys: dict[tuple[int, bytes | int], list[ParkedRecord]] = {}
    for (partition, offset), record in sorted(parked.items(), key=lambda each: each[0]):
        keys.setdefault((partition, record.source.key if record.source.key is not None else offset), []).append(record)
    return [
        ParkedKey(topic, partition, records[0].source.key, records[0].source.offset, len(records), records[0].attempted)
        for (partition, _), records in keys.items()
    ]


def letter_of(message: Message) -> DeadLetter | None:
    """Ours, Spring's or Kafka Connect's; None for a record that says nothing of where it came from."""
    headers = headers_of(message)
    place = (message.partition() or 0, message.offset() or 0)
    try:
        return read_dead_letter(*place, message.key(), message.value(), headers)
    except Unreadable:
        pass
    values = {name: value.encode() if isinstance(value, str) else value or b"" for name, value in headers}
    at = (message.timestamp() or (0, 0))[1]
    if "kafka_dlt-original-topic" in values:
        partition, offset = (
            _number(values, "kafka_dlt-original-partition"),
            _number(values, "kafka_dlt-original-offset"),
        )
        topic, group = values["kafka_dlt-original-topic"], values.get("kafka_dlt-original-consumer-group", b"")
        error = (values.get("kafka_dlt-exception-fqcn", b""), values.get("kafka_dlt-exception-message", b""))
    elif "__connect.errors.topic" in values:
        partition = int(values.get("__connect.errors.partition", b"0") or 0)
        offset = int(values.get("__connect.errors.offset", b"0") or 0)
        topic, group = values["__connect.errors.topic"], values.get("__connect.errors.connector.name", b"")
        error = (
            values.get("__connect.errors.exception.class.name", b""),
            values.get("__connect.errors.exception.message", b""),
        )
    else:
        return None
    said = b": ".join(error).decode("utf-8", "replace")
    source = SourceRecord(offset, message.key(), message.value(), headers, at)
    return DeadLetter(
        partition, place[1], source, topic.decode(), group.decode(), "", Attempted(0, 0, at, "unknown", said), at
    )


def _number(values: dict[str, bytes], name: str) -> int:
    return int.from_bytes(values.get(name, b"\0"), "big", signed=True)


def ask(
    settings: Settings,
    topics: TopicsOf,
    letters: Sequence[DeadLetter],
    action: str,
    per_second: float | None = None,
    progress: Told | None = None,
) -> None:
    """Requests for the owners of their partitions, each acknowledged. Raises NotPublished."""
    producer = KafkaProducer(settings)
    by = f"{os.environ.get('USER', 'unknown')}@{socket.gethostname()}"
    failures: list[NotPublished] = []

    def told(result: Acknowledged | NotPublished) -> None:
        if isinstance(result, NotPublished):
            failures.append(result)

    try:
        begun = time.monotonic()
        for count, letter in enumerate(letters):
            if per_second is not None:
                time.sleep(max(0.0, begun + count / per_second - time.monotonic()))
            request = Request(action, letter.dead_offset, by, time.time_ns() // 1_000_000)
            headers: Headers = []
            producer.send(
                topics.retry, offset_key(letter.dead_offset, b"r"), msgspec.json.encode(request), headers, told,
                partition=letter.partition,
            )  # fmt: skip
            if progress is not None:
                progress(count + 1, len(letters))
        left = producer.flush()
    finally:
        producer.close()
    if failures or left:
        raise failures[0] if failures else NotPublished(f"{left} requests were not acknowledged in time")


def wait_obeyed(
    settings: Settings, admin: KafkaAdmin, topics: TopicsOf, letters: Sequence[DeadLetter], seconds: float
) -> int:
    """How many requests are still waiting after that time: their owners are busy, or the application is not running."""
    wanted = {(letter.partition, letter.dead_offset) for letter in letters}
    deadline = time.monotonic() + seconds
    while True:
        failures = read_failures(settings, admin, topics)
        left = {
            (each.letter.partition, each.letter.dead_offset)
            for each in failures.letters
            if each.state is State.REQUESTED
        } & wanted
        if not left or time.monotonic() > deadline:
            return len(left)
        time.sleep(0.3)
