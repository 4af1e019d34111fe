"""Kafka's messages, declared once for all their versions.

A message is a typed class. Each field names its wire type, and the versions that have it:

    class HeartbeatRequest(Message):
        FLEXIBLE = 4
        group_id: String
        generation_id: Int32
        member_id: String
        group_instance_id: Annotated[NullableString, since(3)] = None

One object serves every version: a version that lacks a field reads its default and leaves it out when writing.
From version FLEXIBLE on lengths are compact and every structure ends with tagged fields (KIP-482); a field that is
`tagged` travels there, and only when it differs from its default. Lists follow from the type: `list[Int32]`,
`list[Partition]`; `list[...] | None` is a nullable array, `Structure | None` a nullable structure.

Codecs are put together on first use, one per class and version. They are pure, never read past the buffer, and raise
MalformedMessage for bytes that do not follow the declaration. The tests hold every message and version against `kio`.
Format: https://kafka.apache.org/protocol, KIP-482. Upstream: org.apache.kafka.message.MessageDataGenerator.
"""

import struct
import types
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, ClassVar, NamedTuple, Self, TypeAlias, Union, get_args, get_origin, get_type_hints

import msgspec

from headwater.broker.wire.errors import MalformedMessage
from headwater.broker.wire.varint import Buffer, read_unsigned, skip_tags, write_unsigned

NEVER = 1 << 15  # a version that no message reaches


class Since(NamedTuple):
    first: int
    last: int


class Tagged(NamedTuple):
    tag: int
    first: int


class NullableSince(NamedTuple):
    first: int


def since(first: int, last: int = NEVER) -> Since:
    """The versions that have the field."""
    return Since(first, last)


def until(last: int) -> Since:
    return Since(0, last)


def tagged(tag: int, first: int = 0) -> Tagged:
    """The field travels as tag `tag` from version `first` on."""
    return Tagged(tag, first)


def nullable_since(first: int) -> NullableSince:
    """Before version `first` null is written as empty (a list) and never read."""
    return NullableSince(first)


class Kind(NamedTuple):
    """A primitive of the protocol."""

    name: str
    format: str = ""


Bool = Annotated[bool, Kind("bool", ">?")]
Int8 = Annotated[int, Kind("int8", ">b")]
Int16 = Annotated[int, Kind("int16", ">h")]
Int32 = Annotated[int, Kind("int32", ">i")]
Int64 = Annotated[int, Kind("int64", ">q")]
Uuid = Annotated[bytes, Kind("uuid")]
String = Annotated[str, Kind("string")]
NullableString = Annotated[str | None, Kind("nullable_string")]
Bytes = Annotated[bytes, Kind("bytes")]
NullableBytes = Annotated[bytes | None, Kind("nullable_bytes")]

NO_UUID = bytes(16)
MAX_STRING = 0x7FFF

# `Any` is confined to this file: a codec is put together from a declaration, and its value's type is the declaration's.
Decode: TypeAlias = Callable[[Buffer, int], tuple[Any, int]]
Encode: TypeAlias = Callable[[bytearray, Any], None]


class Codec(NamedTuple):
    decode: Decode
    encode: Encode


class Structure(msgspec.Struct):
    """A part of a message."""


class Message(Structure):
    """A request, a response or a stored value: a structure that knows from which version on it is flexible."""

    FLEXIBLE: ClassVar[int] = NEVER

    @classmethod
    def decode(cls, buffer: Buffer, version: int, position: int = 0) -> Self:
        """The message that starts at `position`. Raises MalformedMessage."""
        try:
            value, _ = structure_codec(cls, version, version >= cls.FLEXIBLE).decode(buffer, position)
        except (struct.error, UnicodeDecodeError) as error:
            raise MalformedMessage(f"{cls.__name__} version {version}: {error}") from None
        assert isinstance(value, cls)
        return value

    def encode(self, version: int) -> bytearray:
        out = bytearray()
        structure_codec(type(self), version, version >= self.FLEXIBLE).encode(out, self)
        return out


class Field(NamedTuple):
    name: str
    codec: Codec
    default: object


@cache
def structure_codec(cls: type[Structure], version: int, flexible: bool) -> Codec:
    """The codec of one structure in one version."""
    fields: list[Field] = []
    tags: dict[int, Field] = {}
    defaults = {f.name: f.default for f in msgspec.structs.fields(cls)}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if get_origin(hint) is ClassVar or name == "FLEXIBLE":
            continue
        marks = hint.__metadata__ if get_origin(hint) is Annotated else ()
        tag = next((mark for mark in marks if isinstance(mark, Tagged)), None)
        if any(isinstance(mark, Since) and not mark.first <= version <= mark.last for mark in marks):
            continue
        field = Field(name, _codec(hint, version, flexible), defaults[name])
        if tag is None:
            fields.append(field)
        elif version >= tag.first and flexible:
            tags[tag.tag] = field
    return Codec(_structure_decode(cls, fields, tags, flexible), _structure_encode(fields, tags, flexible))


def _structure_decode(cls: type[Structure], fields: list[Field], tags: dict[int, Field], flexible: bool) -> Decode:
    steps = [(field.name, field.codec.decode) for field in fields]

    def decode(buffer: Buffer, position: int) -> tuple[Structure, int]:
        values = {}
        for name, step in steps:
            values[name], position = step(buffer, position)
        if flexible:
            if tags:
                position = _decode_tags(buffer, position, tags, values)
            else:
                position = skip_tags(buffer, position)
        return cls(**values), position

    return decode


def _decode_tags(buffer: Buffer, position: int, tags: dict[int, Field], values: dict[str, Any]) -> int:
    count, position = read_unsigned(buffer, position)
    for _ in range(count):
        tag, position = read_unsigned(buffer, position)
        size, position = read_unsigned(buffer, position)
        if tag in tags:
            values[tags[tag].name], _ = tags[tag].codec.decode(buffer, position)
        position += size
        if position > len(buffer):
            raise MalformedMessage("a tagged field is longer than the message")
    return position


def _structure_encode(fields: list[Field], tags: dict[int, Field], flexible: bool) -> Encode:
    steps = [(field.name, field.codec.encode) for field in fields]

    def encode(out: bytearray, value: Structure) -> None:
        for name, step in steps:
            step(out, getattr(value, name))
        if flexible:
            present = [
                (tag, field) for tag, field in sorted(tags.items()) if getattr(value, field.name) != field.default
            ]
            write_unsigned(out, len(present))
            for tag, field in present:
                body = bytearray()
                field.codec.encode(body, getattr(value, field.name))
                write_unsigned(out, tag)
                write_unsigned(out, len(body))
                out += body

    return encode


def _codec(hint: Any, version: int, flexible: bool) -> Codec:
    """The codec for a type hint."""
    marks: tuple[object, ...] = ()
    if get_origin(hint) is Annotated:
        marks = hint.__metadata__
        hint = hint.__origin__
    for mark in marks:
        if isinstance(mark, Kind):
            return _primitive(mark, flexible)
    nullable = False
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(choice for choice in get_args(hint) if choice is not type(None))
        nullable = True
        # `Int32 | None` does not occur: only lists and structures may be null beside strings and bytes
    if get_origin(hint) is list:
        first = next((mark.first for mark in marks if isinstance(mark, NullableSince)), 0)
        return _array(_codec(get_args(hint)[0], version, flexible), nullable and version >= first, flexible)
    codec = structure_codec(hint, version, flexible)
    return _nullable_structure(codec) if nullable else codec


def _primitive(kind: Kind, flexible: bool) -> Codec:
    if kind.format:
        return _number(struct.Struct(kind.format))
    if kind.name == "uuid":
        return Codec(_decode_uuid, _encode_uuid)
    text = kind.name.endswith("string")
    nullable = kind.name.startswith("nullable")
    return _sized(text, nullable, flexible)


def _number(layout: struct.Struct) -> Codec:
    unpack, pack, size = layout.unpack_from, layout.pack, layout.size

    def decode(buffer: Buffer, position: int) -> tuple[Any, int]:
        return unpack(buffer, position)[0], position + size

    def encode(out: bytearray, value: Any) -> None:
        out += pack(value)

    return Codec(decode, encode)


def _decode_uuid(buffer: Buffer, position: int) -> tuple[bytes, int]:
    if position + 16 > len(buffer):
        raise MalformedMessage("the message ends inside a UUID")
    return bytes(buffer[position : position + 16]), position + 16


def _encode_uuid(out: bytearray, value: bytes) -> None:
    out += value


def _length(flexible: bool, layout: struct.Struct) -> Codec:
    """A length or count: -1 is null. Compact ones are unsigned and one higher, so that 0 is null."""
    if not flexible:
        return _number(layout)

    def decode(buffer: Buffer, position: int) -> tuple[int, int]:
        size, position = read_unsigned(buffer, position)
        return size - 1, position

    def encode(out: bytearray, value: int) -> None:
        write_unsigned(out, value + 1)

    return Codec(decode, encode)


INT16 = struct.Struct(">h")
INT32 = struct.Struct(">i")


def _sized(text: bool, nullable: bool, flexible: bool) -> Codec:
    """Strings and bytes."""
    decode_length, encode_length = _length(flexible, INT16 if text else INT32)

    def decode(buffer: Buffer, position: int) -> tuple[str | bytes | None, int]:
        size, position = decode_length(buffer, position)
        if size < 0:
            if nullable and size == -1:
                return None, position
            raise MalformedMessage("a field that may not be null is null, or its length is negative")
        if text and size > MAX_STRING:
            raise MalformedMessage(f"a string has {size} bytes: {MAX_STRING} are the most that every version can write")
        end = position + size
        if end > len(buffer):
            raise MalformedMessage("a string or byte field is longer than the message")
        value = bytes(buffer[position:end])
        return (value.decode() if text else value), end

    def encode(out: bytearray, value: str | bytes | None) -> None:
        if value is None:
            encode_length(out, -1 if nullable else 0)
            return
        data = value.encode() if isinstance(value, str) else value
        encode_length(out, len(data))
        out += data

    return Codec(decode, encode)


def _array(item: Codec, nullable: bool, flexible: bool) -> Codec:
    decode_length, encode_length = _length(flexible, INT32)
    decode_item, encode_item = item

    def decode(buffer: Buffer, position: int) -> tuple[list[Any] | None, int]:
        count, position = decode_length(buffer, position)
        if count < 0:
            if nullable and count == -1:
                return None, position
            raise MalformedMessage("a list that may not be null is null, or its count is negative")
        if count > len(buffer) - position:  # every item takes a byte at least: memory stays bounded by the frame
            raise MalformedMessage("a list is longer than the message")
        values = []
        for _ in range(count):
            value, position = decode_item(buffer, position)
            values.append(value)
        return values, position

    def encode(out: bytearray, values: list[Any] | None) -> None:
        if values is None:
            encode_length(out, -1 if nullable else 0)
            return
        encode_length(out, len(values))
        for value in values:
            encode_item(out, value)

    return Codec(decode, encode)


def _nullable_structure(codec: Codec) -> Codec:
    def decode(buffer: Buffer, position: int) -> tuple[Any, int]:
        if position >= len(buffer):
            raise MalformedMessage("the message ends before a structure")
        if buffer[position] >= 0x80:  # -1, read as an unsigned byte
            return None, position + 1
        return codec.decode(buffer, position + 1)

    def encode(out: bytearray, value: Any) -> None:
        if value is None:
            out.append(0xFF)
        else:
            out.append(1)
            codec.encode(out, value)

    return Codec(decode, encode)
