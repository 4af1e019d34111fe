"""A topic's records to events: with and without schemas, bare data, tombstones.

Schemas that are not known are looked up where that may block: `decode` raises SchemaMissing, `look_up` learns it, and then
`decode` knows; `decode_now` does all three.
"""

from collections.abc import Sequence
from typing import Protocol

from headwater.event.codec import (
    Decoder,
    FramedDecoder,
    Headers,
    NoEnvelope,
    SchemaMissing,
    Undecodable,
    Unframed,
    Unknown,
    tombstone_of,
)
from headwater.event.data_format import WriterSchema
from headwater.event.envelope import Envelope
from headwater.event.event import Tombstone
from headwater.event.topic import Topic
from headwater.runtime.assignment import Received


class SchemaSource(Protocol):
    def look_up(self, id: int) -> WriterSchema | None:
        """None when there is no such schema. Blocks. Raises RegistryUnreachable."""


class TopicDecoder:
    """Of the classes that somebody wants of a topic."""

    def __init__(self, topic: Topic, classes: Sequence[type], topic_id: str, schemas: SchemaSource) -> None:
        """Raises TypeError for a class that is no event."""
        events = [cls for cls in classes if cls is not Tombstone]
        self._topic = topic
        self._topic_id = topic_id
        self._schemas = schemas
        self._takes_tombstones = Tombstone in classes
        self._decoder = Decoder(events)
        self._framed_decoder = FramedDecoder(events, topic.schema) if topic.schema is not None else None

    def decode(self, record: Received) -> Envelope:
        """Raises Unknown, Undecodable (SchemaMissing, when its schema must be looked up first)."""
        value = record.value()
        if value is None:
            return self._decode_tombstone(record)
        if self._framed_decoder is not None:
            try:
                return self._framed_decoder.decode(value, *self._around(record))
            except Unframed as error:
                try:
                    return self._decoder.decode(value)
                except NoEnvelope:
                    raise error from None
        try:
            return self._decoder.decode(value)
        except NoEnvelope:
            return self._decoder.decode_bare(value, *self._around(record))

    def look_up(self, id: int) -> None:
        """Blocks. Raises RegistryUnreachable, Undecodable."""
        assert self._framed_decoder is not None
        schema = self._schemas.look_up(id)
        if schema is None:
            raise Undecodable(f"the registry knows no schema {id}")
        self._framed_decoder.learn(id, schema)

    def decode_now(self, record: Received) -> Envelope:
        """Blocks when its schema must be looked up. Raises Unknown, Undecodable, RegistryUnreachable."""
        try:
            return self.decode(record)
        except SchemaMissing as missing:
            self.look_up(missing.id)
            return self.decode(record)

    def _decode_tombstone(self, record: Received) -> Envelope:
        if not self._topic.is_compacted:
            raise Undecodable("the record has no value: a tombstone, in a topic that is not compacted")
        if not self._takes_tombstones:
            raise Unknown("a tombstone: there is nothing any more under this key")
        return tombstone_of(self._topic, record.key(), *self._around(record))

    def _around(self, record: Received) -> tuple[Headers, str, int]:
        """What an envelope is made of where the value has none: headers, place, time."""
        place = f"{self._topic_id}:{record.partition()}:{record.offset()}"
        return list(record.headers() or ()), place, record.timestamp()[1]
