"""The doors of one partition's owner: calls to the handler, records to the retry and dead-letter topics, the history."""

import time
from collections.abc import Callable
from typing import Protocol

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from headwater.event.codec import Undecodable, Unknown
from headwater.kafka.consumer import Message, headers_of
from headwater.kafka.producer import Acknowledged, Headers, NotPublished
from headwater.runtime.assignment import Assignment, ReadBack, Received
from headwater.runtime.delivery import Calls
from headwater.runtime.handler import Handler
from headwater.runtime.history import History
from headwater.runtime.lane import Attempted, Key
from headwater.runtime.retry import Delivery, said_by
from headwater.runtime.retry_reader import RetryReader
from headwater.runtime.retry_topic import (
    ParkedRecord,
    Request,
    Resolved,
    SourceRecord,
    Unreadable,
    dead_headers,
    encode_done,
    encode_parked,
    offset_key,
    parked_value,
    read_dead_letter,
)
from headwater.store import inbox
from headwater.store.database import Database


class Sender(Protocol):
    """A producer, or the transaction that is open."""

    async def send(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Headers, *, partition: int
    ) -> Acknowledged: ...


class PartitionDoors:
    def __init__(
        self,
        handler: Handler,
        assignment: Assignment,
        calls: Calls,
        producer: Sender,
        reader: RetryReader,
        *,
        owner_name: str,
        database: Database | None,
        history: History | None,
        dead_lettered: Callable[[SourceRecord, Attempted], None],
    ) -> None:
        self._handler = handler
        self._assignment = assignment
        self._calls = calls
        self._producer = producer
        self._reader = reader
        self._owner_name = owner_name
        self._database = database
        self._history = history
        self._dead_lettered = dead_lettered
        self.attempt = calls.attempt
        self.attempt_batch = calls.attempt_batch
        self.is_wanted = calls.is_wanted
        self.note = _nothing if history is None else self._write

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def _write(self, event: str, **fields: object) -> None:
        assert self._history is not None
        self._history.write(event, self._handler.group, self._assignment.partition, self._assignment.token, **fields)

    # Records

    async def send_parked(self, event: Received, attempted: Attempted | None) -> int:
        source = as_source(event)
        headers = encode_parked(source, self._assignment.topic_id, attempted, self._owner_name)
        return await self._send_retry(offset_key(source.offset), parked_value(source), headers)

    async def send_done(self, event_offset: int, key: Key) -> None:
        headers = encode_done(key if isinstance(key, bytes) else None)
        await self._send_retry(offset_key(event_offset), None, headers)

    async def _send_retry(
        self, key: bytes, value: bytes | None, headers: "list[tuple[str, str | bytes | None]]"
    ) -> int:
        partition = self._assignment.partition
        sent = await self._producer.send(self._handler.retry_topic, key, value, headers, partition=partition)
        return sent.offset

    async def send_dead(self, event: Received, attempted: Attempted) -> int | None:
        source = as_source(event)
        if self._handler.delivery is Delivery.EFFECTIVELY_ONCE and not await self._give_up(event, attempted):
            return None
        assignment = self._assignment
        headers = dead_headers(
            source,
            assignment.topic_id,
            attempted,
            self._owner_name,
            (assignment.topic, assignment.partition, self._handler.group),
            self.now_ms(),
        )
        sent = await self._producer.send(
            self._handler.dead_topic, source.key, source.value, headers, partition=assignment.partition
        )
        self._dead_lettered(source, attempted)
        return sent.offset

    async def _give_up(self, event: Received, attempted: Attempted) -> bool:
        """Whether it really is given up: an event that was handled after all is no dead letter."""
        assert self._database is not None
        try:
            event_id = self._calls.decode(event).event_id
        except (Undecodable, Unknown):
            return True  # nobody can have handled it

        def give_up(session: object) -> bool:
            return inbox.give_up(session, self._handler.group, event_id, attempted.generation)  # type: ignore[arg-type]

        try:
            async with self._database.async_sessions() as session, session.begin():
                return bool(await session.run_sync(give_up))
        except SQLAlchemyError as error:
            raise NotPublished(f"the inbox can't be written: {said_by(error)}") from None

    async def read_back(self, place: int) -> list[ParkedRecord]:
        return await self._reader.read_back(self._assignment.partition, place)

    async def read_dead(self, dead_offset: int) -> tuple[Received, int] | None:
        message = await self._reader.read_dead(self._assignment.partition, dead_offset)
        if message is None:
            return None
        try:
            letter = read_dead_letter(
                self._assignment.partition, dead_offset, message.key(), message.value(), headers_of(message)
            )
        except Unreadable:
            return None
        if letter.topic_id != self._assignment.topic_id:
            return None  # of a topic of the same name that is no more
        event = ReadBack(ParkedRecord(letter.source, letter.topic_id, None), self._assignment.partition)
        return event, letter.attempted.generation

    async def answer(self, request: Request, done: bool) -> None:
        if done:
            resolved = msgspec.json.encode(Resolved(request.action, self.now_ms()))
            await self._send_retry(offset_key(request.dead_offset, b"d"), resolved, [])
        await self._send_retry(offset_key(request.dead_offset, b"r"), None, [])


def as_source(event: Received) -> SourceRecord:
    if isinstance(event, ReadBack):
        return event.source
    assert isinstance(event, Message)
    return SourceRecord(
        event.offset() or 0, event.key(), event.value(), headers_of(event), (event.timestamp() or (0, -1))[1]
    )


def _nothing(event: str, **fields: object) -> None:
    """Without a history."""
