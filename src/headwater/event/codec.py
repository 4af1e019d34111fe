"""Events to bytes and back.

Without a schema the value is the envelope, as JSON. With one (`Topic(..., schema="avro")`) the value is the data, behind the
id of its schema, and the envelope is in the headers. In both, headers repeat what readers need without reading the value:
`headwater-event-id`, `-event-type`, `-event-version`, `-source`, `-correlation-id`, `-causation-id`, and `content-type`.

Decoding an envelope looks at `eventType` once and reads envelope and data in one pass. A type that the decoder was not made
for is `Unknown`: somebody else's event. Bytes that are no envelope, or data that is not what its type says, are
`Undecodable`.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, Union

import msgspec

from headwater.event.data_format import DataFormat, Read, Write, WriterSchema, data_format
from headwater.event.envelope import Cause, Envelope, Metadata, new_id, now
from headwater.event.event import Tombstone, event_type, event_upcasts, event_version, is_pydantic
from headwater.event.upcast import Upcasts, upcast, upcasts_from
from headwater.schema import wire_format
from headwater.schema.schema import SchemaType

CONTENT_TYPE = b"application/json"
CONTENT_TYPES = {
    SchemaType.AVRO: b"application/avro",
    SchemaType.JSON: CONTENT_TYPE,
    SchemaType.PROTOBUF: b"application/x-protobuf",
}
MAX_READERS = 1000

Headers = list[tuple[str, str | bytes | None]]


class Undecodable(ValueError):
    """The bytes are no event of ours; the message says what is wrong with them."""


class Unframed(Undecodable):
    """The value is not behind the id of a schema; it may be an envelope, of before the topic had schemas."""


class NoEnvelope(Undecodable):
    """The value is none of our envelopes; it may be an event's data, with the rest in the headers."""


class SchemaMissing(Undecodable):
    """The schema that the data was written with is not known yet; whoever can looks it up, and decodes again."""

    def __init__(self, id: int) -> None:
        super().__init__(f"the schema {id} is not known here")
        self.id = id


class Unknown(Exception):
    """A well-formed event of a type that is not listed: skipped, it is not for us."""


class Encoded(NamedTuple):
    event_id: str
    event_type: str
    value: bytes | None
    headers: Headers


class Framed(NamedTuple):
    """How the data of a class is written with its schema."""

    id: int
    type: SchemaType
    write: Write


_encoder = msgspec.json.Encoder()


def encode(
    event: object, source: str, cause: Cause, metadata: Metadata | None = None, framed: Framed | None = None
) -> Encoded:
    """An event, caused by `cause`, in its envelope, or behind the id of its schema. Raises Unencodable."""
    cls = type(event)
    is_tombstone = isinstance(event, Tombstone)
    envelope = Envelope(
        event_id=new_id(),
        event_type=event_type(cls),
        event_version=event_version(cls),
        timestamp=now(),
        source=source,
        correlation_id=cause.correlation_id,
        causation_id=cause.causation_id,
        data=event.model_dump(mode="json", by_alias=True) if is_pydantic(cls) and framed is None else event,  # type: ignore[attr-defined, arg-type]
        metadata=metadata or cause.metadata,
    )
    headers: Headers = [
        ("headwater-event-id", envelope.event_id.encode()),
        ("headwater-event-type", envelope.event_type.encode()),
        ("headwater-event-version", envelope.event_version.encode()),
        ("headwater-source", source.encode()),
        ("headwater-correlation-id", envelope.correlation_id.encode()),
        ("headwater-causation-id", (envelope.causation_id or "").encode()),
    ]
    value: bytes | None
    if framed is None and not is_tombstone:
        headers.append(("content-type", CONTENT_TYPE))
        value = _encoder.encode(envelope)
    else:
        headers += _more_headers(envelope)
        value = None
        if framed is not None:
            headers.append(("content-type", CONTENT_TYPES[framed.type]))
            value = wire_format.frame(framed.id, framed.write(event))
    return Encoded(envelope.event_id, envelope.event_type, value, headers)


def restamped(value: bytes | None, headers: Headers) -> tuple[bytes | None, Headers]:
    """An encoded event, as if it happened now."""
    at = now()
    names = [name for name, _ in headers]
    if "headwater-timestamp" in names:
        i = names.index("headwater-timestamp")
        return value, [*headers[:i], ("headwater-timestamp", at.isoformat().encode()), *headers[i + 1 :]]
    if value is None:
        return value, headers
    envelope = msgspec.json.decode(value, type=_RawEnvelope)
    return _encoder.encode(msgspec.structs.replace(envelope, timestamp=at)), headers


class _RawEnvelope(Envelope, frozen=True, rename="camel"):
    """An envelope whose data is left as it is."""

    data: msgspec.Raw


def _more_headers(envelope: Envelope) -> Headers:
    """What is in no value."""
    headers: Headers = [("headwater-timestamp", envelope.timestamp.isoformat().encode())]
    if envelope.metadata.user_id is not None:
        headers.append(("headwater-user-id", envelope.metadata.user_id.encode()))
    if envelope.metadata.session_id is not None:
        headers.append(("headwater-session-id", envelope.metadata.session_id.encode()))
    return headers


class Decoder:
    """Reads the events of some classes from their envelopes."""

    def __init__(self, classes: Sequence[type]) -> None:
        self._classes = {event_type(cls): cls for cls in classes}
        self._bare: dict[str, Callable[[bytes, str], Any]] = {}
        self._finish = {event_type(cls): _finisher(cls) for cls in classes if _needs_finishing(cls)}
        tagged = tuple(_tagged_envelope(cls) for cls in classes)
        self._decode = msgspec.json.Decoder(Union[tagged]).decode  # noqa: UP007 - made at run time
        self._decode_any = msgspec.json.Decoder(Envelope).decode

    def decode(self, value: bytes) -> Envelope:
        """Raises Undecodable, Unknown."""
        try:
            tagged = self._decode(value)
        except Exception as error:  # also what an event's own constructor raises, and JSON nested too deep
            raise self._why(value, error) from None
        data = tagged.data
        name = type(tagged).__struct_config__.tag
        if name in self._finish:
            try:
                data = self._finish[name](bytes(data), tagged.event_version)
            except Exception as error:
                raise Undecodable(f"the data is no {name}: {error}") from None
        return Envelope(
            tagged.event_id,
            name,
            tagged.event_version,
            tagged.timestamp,
            tagged.source,
            tagged.correlation_id,
            tagged.causation_id,
            data,
            tagged.metadata,
        )

    def decode_bare(self, value: bytes, headers: Headers, place: str, timestamp_ms: int) -> Envelope:
        """An event whose value is its data alone, with its type in a header: ours, or CloudEvents' (binary mode). Raises
        Undecodable, Unknown."""
        given = read_headers(headers)
        name = given.get("headwater-event-type") or given.get("ce_type", "").rpartition(".")[2]
        if not name:
            raise Undecodable("the value is no envelope, and no header says its type")
        if name not in self._classes:
            raise Unknown(name)
        cls = self._classes[name]
        version = given.get("headwater-event-version", event_version(cls))
        read = self._bare.get(name) or self._bare.setdefault(name, _finisher(cls))
        try:
            data = read(value, version)
        except Exception as error:
            raise Undecodable(f"the data is no {name}: {error}") from None
        return envelope_of(given, name, version, data, place, timestamp_ms)

    def _why(self, value: bytes, error: Exception) -> Exception:
        """The slow way, for what the fast one can't read."""
        try:
            envelope: Envelope = self._decode_any(value)
        except Exception as other:
            return NoEnvelope(f"the value is no envelope: {other}")
        if envelope.event_type not in self._classes:
            return Unknown(envelope.event_type)
        return Undecodable(f"the data is no {envelope.event_type}: {error}")


class FramedDecoder:
    """Reads the events of some classes by the schemas that they were written with."""

    def __init__(self, classes: Sequence[type], kind: SchemaType) -> None:
        self._classes = {event_type(cls): cls for cls in classes}
        self._kind = kind
        self._schemas: dict[int, WriterSchema] = {}
        self._readers: dict[tuple[int, str, str], Read] = {}

    def learn(self, id: int, schema: WriterSchema) -> None:
        """What was missing."""
        self._schemas[id] = schema

    def decode(self, value: bytes, headers: Headers, place: str, timestamp_ms: int) -> Envelope:
        """place: `<topic id>:<partition>:<offset>`, the id of an event that has none. Raises Undecodable (SchemaMissing when
        its schema must be looked up first), Unknown."""
        given = read_headers(headers)
        name = given.get("headwater-event-type") or given.get("ce_type", "").rpartition(".")[2]
        if name and name not in self._classes:
            raise Unknown(name)
        try:
            id, content = wire_format.unframe(value)
        except wire_format.NotFramed as error:
            raise Unframed(str(error)) from None
        if id not in self._schemas:
            raise SchemaMissing(id)
        schema = self._schemas[id]
        if schema.type is not self._kind:
            raise Undecodable(f"the schema {id} is {schema.type}, the topic's are {self._kind}")
        try:
            name = name or data_format(self._kind).name_of(schema, content)
            if name not in self._classes:
                raise Unknown(name)
            version = given.get("headwater-event-version", event_version(self._classes[name]))
            read = self._readers.get((id, name, version)) or self._reader(id, name, version, schema)
            data = read(content)
        except Unknown:
            raise
        except Exception as error:  # whatever a parser or an event's own constructor raises
            raise Undecodable(f"the data is no {name or 'event'}: {type(error).__name__}: {error}") from None
        return envelope_of(given, name, version, data, place, timestamp_ms)

    def _reader(self, id: int, name: str, version: str, schema: WriterSchema) -> Read:
        if len(self._readers) >= MAX_READERS:  # versions come from records: anybody may have written them
            self._readers.clear()
        reader = framed_reader(self._classes[name], version, schema, data_format(self._kind))
        self._readers[id, name, version] = reader
        return reader


def framed_reader(cls: type, version: str, schema: WriterSchema, form: DataFormat) -> Read:
    """Raises InvalidSchema."""
    upcasts = event_upcasts(cls)
    if not upcasts_from(version, upcasts):
        return form.reader(cls, schema)
    plain = form.plain_reader(schema)

    def read(data: bytes) -> Any:
        return _from_builtins(cls, upcast(plain(data), version, upcasts), form.KEPT)

    return read


def tombstone_of(topic: Any, key: bytes | None, headers: Headers, place: str, timestamp_ms: int) -> Envelope:
    """The envelope of a record without a value."""
    data = Tombstone(topic, key or b"")
    return envelope_of(read_headers(headers), event_type(Tombstone), "v1", data, place, timestamp_ms)


def read_headers(headers: Headers) -> dict[str, str]:
    """Those that the envelope is made of; of several with one name the first."""
    found: dict[str, str] = {}
    for name, value in headers:
        if name not in found and value is not None and (name.startswith(("headwater-", "ce_")) or name == "id"):
            found[name] = value if isinstance(value, str) else value.decode("utf-8", "replace")
    return found


def envelope_of(
    given: Mapping[str, str], name: str, version: str, data: object, place: str, timestamp_ms: int
) -> Envelope:
    """Ours, then CloudEvents' (binary mode), then Debezium's `id`; an event without an id is known by its place."""
    event_id = given.get("headwater-event-id") or given.get("ce_id") or given.get("id") or place
    return Envelope(
        event_id,
        name,
        version,
        _time(given.get("headwater-timestamp") or given.get("ce_time"), timestamp_ms),
        given.get("headwater-source") or given.get("ce_source", ""),
        given.get("headwater-correlation-id") or event_id,
        given.get("headwater-causation-id") or None,
        data,
        Metadata(given.get("headwater-user-id"), given.get("headwater-session-id")),
    )


def _time(text: str | None, timestamp_ms: int) -> datetime:
    """The record's own time where none is given, or nonsense is."""
    try:
        found = datetime.fromisoformat(text or "")
    except ValueError:
        found = datetime.fromtimestamp(max(0, timestamp_ms) / 1000, UTC)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _needs_finishing(cls: type) -> bool:
    return is_pydantic(cls) or bool(event_upcasts(cls))


def _finisher(cls: type) -> Callable[[bytes, str], Any]:
    """What makes an event of its data's JSON, by the version that it has."""
    upcasts: Upcasts = event_upcasts(cls)
    read = cls.model_validate_json if is_pydantic(cls) else msgspec.json.Decoder(cls).decode  # type: ignore[attr-defined]

    def finish(data: bytes, version: str) -> Any:
        if not upcasts_from(version, upcasts):
            return read(data)
        return _from_builtins(cls, upcast(msgspec.json.decode(data), version, upcasts), ())

    return finish


def _from_builtins(cls: type, data: dict[str, Any], kept: tuple[type, ...]) -> Any:
    """kept: types that the data has as they are, where JSON would have text."""
    if is_pydantic(cls):
        return cls.model_validate(data)  # type: ignore[attr-defined]
    return msgspec.convert(data, cls, builtin_types=kept)


def _tagged_envelope(cls: type) -> Any:
    """The envelope of one event class, told from the others by its `eventType`."""
    data = msgspec.Raw if _needs_finishing(cls) else cls
    return msgspec.defstruct(
        f"{event_type(cls)}Envelope",
        [
            ("event_id", str),
            ("event_version", str),
            ("timestamp", datetime),
            ("source", str),
            ("correlation_id", str),
            ("data", data),
            ("causation_id", str | None, None),
            ("metadata", Metadata, Metadata()),
        ],
        tag_field="eventType",
        tag=event_type(cls),
        rename="camel",
        frozen=True,
    )
