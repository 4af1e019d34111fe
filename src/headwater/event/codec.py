"""Events to bytes and back: JSON, with the envelope as the value.

Headers repeat what readers need without reading the value: `headwater-event-id`, `-event-type`, `-event-version`,
`-source`, `-correlation-id`, `-causation-id`, and `content-type`.

Decoding looks at `eventType` once and reads envelope and data in one pass. A type that the decoder was not made for is
`Unknown`: somebody else's event. Bytes that are no envelope, or data that is not what its type says, are `Undecodable`.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple, Union

import msgspec

from headwater.event.envelope import Cause, Envelope, Metadata, new_id, now
from headwater.event.event import event_type, event_version, is_pydantic

CONTENT_TYPE = b"application/json"

Headers = list[tuple[str, str | bytes | None]]


class Undecodable(ValueError):
    """The bytes are no event of ours; the message says what is wrong with them."""


class Unknown(Exception):
    """A well-formed event of a type that is not listed: skipped, it is not for us."""


class Encoded(NamedTuple):
    event_id: str
    event_type: str
    value: bytes
    headers: Headers


_encoder = msgspec.json.Encoder()


def encode(event: object, source: str, cause: Cause, metadata: Metadata | None = None) -> Encoded:
    """An event in its envelope, caused by `cause`."""
    cls = type(event)
    data = event.model_dump(mode="json", by_alias=True) if is_pydantic(cls) else event  # type: ignore[attr-defined, arg-type]
    envelope = Envelope(
        event_id=new_id(),
        event_type=event_type(cls),
        event_version=event_version(cls),
        timestamp=now(),
        source=source,
        correlation_id=cause.correlation_id,
        causation_id=cause.causation_id,
        data=data,
        metadata=metadata or cause.metadata,
    )
    headers: Headers = [
        ("headwater-event-id", envelope.event_id.encode()),
        ("headwater-event-type", envelope.event_type.encode()),
        ("headwater-event-version", envelope.event_version.encode()),
        ("headwater-source", source.encode()),
        ("headwater-correlation-id", envelope.correlation_id.encode()),
        ("headwater-causation-id", (envelope.causation_id or "").encode()),
        ("content-type", CONTENT_TYPE),
    ]
    return Encoded(envelope.event_id, envelope.event_type, _encoder.encode(envelope), headers)


class Decoder:
    """Reads the events of some classes."""

    def __init__(self, classes: Sequence[type]) -> None:
        self._pydantic = {
            event_type(cls): cls.model_validate_json for cls in classes if hasattr(cls, "model_validate_json")
        }
        self._known = {event_type(cls) for cls in classes}
        tagged = tuple(_tagged_envelope(cls) for cls in classes)
        self._decode = msgspec.json.Decoder(Union[tagged]).decode  # noqa: UP007 - made at run time
        self._decode_any = msgspec.json.Decoder(Envelope).decode

    def decode(self, value: bytes | None) -> Envelope:
        """Raises Undecodable, Unknown."""
        if value is None:
            raise Undecodable("the record has no value: a tombstone is no event")
        try:
            tagged = self._decode(value)
        except Exception as error:  # also what an event's own constructor raises, and JSON nested too deep
            raise self._why(value, error) from None
        data = tagged.data
        name = type(tagged).__struct_config__.tag
        if name in self._pydantic:
            try:
                data = self._pydantic[name](bytes(data))
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

    def _why(self, value: bytes, error: Exception) -> Exception:
        """The slow way, for what the fast one can't read."""
        try:
            envelope: Envelope = self._decode_any(value)
        except Exception as other:
            return Undecodable(f"the value is no envelope: {other}")
        if envelope.event_type not in self._known:
            return Unknown(envelope.event_type)
        return Undecodable(f"the data is no {envelope.event_type}: {error}")


def _tagged_envelope(cls: type) -> Any:
    """The envelope of one event class, told from the others by its `eventType`."""
    data = msgspec.Raw if hasattr(cls, "model_validate") else cls
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
