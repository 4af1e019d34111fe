"""The records of `_schemas`, in Confluent's format: JSON keys with a fixed order of fields, JSON values.

    {"keytype":"SCHEMA","subject":"orders-value","version":1,"magic":1}
    {"subject":"orders-value","version":1,"id":1,"schema":"...","deleted":false}

A null value takes back what its key said. What isn't known here (records of a newer registry) is left alone.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from headwater.schema.schema import Reference


class SchemaKey(msgspec.Struct, frozen=True, kw_only=True, tag_field="keytype", tag="SCHEMA"):
    subject: str
    version: int
    magic: int = 1


class ConfigKey(msgspec.Struct, frozen=True, kw_only=True, tag_field="keytype", tag="CONFIG"):
    subject: str | None = None
    magic: int = 0


class ModeKey(msgspec.Struct, frozen=True, kw_only=True, tag_field="keytype", tag="MODE"):
    subject: str | None = None
    magic: int = 0


class DeleteSubjectKey(msgspec.Struct, frozen=True, kw_only=True, tag_field="keytype", tag="DELETE_SUBJECT"):
    subject: str
    magic: int = 0


class NoopKey(msgspec.Struct, frozen=True, kw_only=True, tag_field="keytype", tag="NOOP"):
    magic: int = 0


Key = SchemaKey | ConfigKey | ModeKey | DeleteSubjectKey | NoopKey


class SchemaValue(msgspec.Struct, frozen=True, kw_only=True):
    subject: str
    version: int
    id: int
    schemaType: str | None = None
    references: list[Reference] | None = None
    metadata: Mapping[str, Any] | None = None
    ruleSet: Mapping[str, Any] | None = None
    schema: str
    deleted: bool = False


class ConfigValue(msgspec.Struct, frozen=True, kw_only=True):
    alias: str | None = None
    normalize: bool | None = None
    compatibilityLevel: str | None = None
    compatibilityGroup: str | None = None
    defaultMetadata: Mapping[str, Any] | None = None
    overrideMetadata: Mapping[str, Any] | None = None
    defaultRuleSet: Mapping[str, Any] | None = None
    overrideRuleSet: Mapping[str, Any] | None = None


class ModeValue(msgspec.Struct, frozen=True, kw_only=True):
    mode: str


class DeleteSubjectValue(msgspec.Struct, frozen=True, kw_only=True):
    subject: str
    version: int


VALUES: dict[type[msgspec.Struct], type[msgspec.Struct]] = {
    SchemaKey: SchemaValue,
    ConfigKey: ConfigValue,
    ModeKey: ModeValue,
    DeleteSubjectKey: DeleteSubjectValue,
}


class Record(NamedTuple):
    key: Key
    value: SchemaValue | ConfigValue | ModeValue | DeleteSubjectValue | None


class UnknownRecord(Exception):
    """A record that is none of these; the message says why."""


_key_decoder = msgspec.json.Decoder(Key)
_value_decoders = {key: msgspec.json.Decoder(value) for key, value in VALUES.items()}


def encode(record: Record) -> tuple[bytes, bytes | None]:
    return msgspec.json.encode(record.key), encode_value(record.value) if record.value is not None else None


def encode_value(value: msgspec.Struct) -> bytes:
    """Fields that are not set are left out, as Confluent does."""
    fields = {name: field for name, field in msgspec.structs.asdict(value).items() if field is not None}
    return msgspec.json.encode(fields)


def decode(key: bytes | None, value: bytes | None) -> Record:
    """Raises UnknownRecord."""
    try:
        known = _key_decoder.decode(key or b"")
        decoder = _value_decoders.get(type(known))
        return Record(known, decoder.decode(value) if decoder is not None and value is not None else None)  # type: ignore[arg-type]
    except msgspec.DecodeError as error:
        raise UnknownRecord(str(error)) from None
