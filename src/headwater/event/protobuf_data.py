"""Protocol Buffers: the schema of a class (proto3), and its data by the protobuf package.

    str string · int int64 · float double · bool bool · bytes bytes · X | None optional X
    datetime google.protobuf.Timestamp · date, time, UUID, Decimal, Enum string (an Enum of numbers int64)
    list, set, tuple[X, ...] repeated · dict[str, X] map · Event, Struct, dataclass message

Fields have their Python names, and numbers in the order of their declaration: new ones go to the end. A number of one's own
is `Annotated[str, Meta(extra={"number": 7})]`; the numbers of fields that are gone are not to be given again.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from msgspec import inspect as types

from headwater.event.data_format import NoSchema, Read, Unencodable, Write, WriterSchema, type_of
from headwater.event.event import event_namespace
from headwater.schema import wire_format
from headwater.schema.proto_text import print_file
from headwater.schema.protobuf import ProtobufSchema
from headwater.schema.schema import InvalidSchema, SchemaType

F = descriptor_pb2.FieldDescriptorProto
FILE = "event.proto"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TIMESTAMP = "google.protobuf.Timestamp"
KEPT: tuple[type, ...] = (bytes, datetime)
SIMPLE = {
    types.StrType: F.TYPE_STRING,
    types.IntType: F.TYPE_INT64,
    types.FloatType: F.TYPE_DOUBLE,
    types.BoolType: F.TYPE_BOOL,
    types.BytesType: F.TYPE_BYTES,
    types.DateType: F.TYPE_STRING,
    types.TimeType: F.TYPE_STRING,
    types.UUIDType: F.TYPE_STRING,
    types.DecimalType: F.TYPE_STRING,
}


class Name(NamedTuple):
    """A field on its two sides."""

    wire: str
    """In the data of an event: orderId."""
    field: str
    """In the message: order_id."""
    number: int
    inner: "Names | None" = None
    is_map: bool = False
    is_optional: bool = False
    """None is another value than the one that a new message has."""
    zero: object = None
    """What a field that the writer's schema doesn't have is, where the class has no default; None: it has."""


Names = list[Name]


def schema_of(cls: type) -> str:
    return print_file(_Derivation(cls).file)


def writer(cls: type) -> Write:
    derivation = _Derivation(cls)
    names = derivation.names[cls.__name__]
    make = message_factory.GetMessageClass(_pool([derivation.file]).FindMessageTypeByName(_full_name(cls)))

    def write(event: object) -> bytes:
        data = msgspec.to_builtins(event, builtin_types=KEPT)
        try:
            return wire_format.encode_indexes([0]) + bytes(make(**_to_fields(data, names)).SerializeToString())
        except (ValueError, TypeError, OverflowError) as error:
            raise Unencodable(f"this {cls.__name__} doesn't fit its schema: {error}") from None

    return write


def reader(cls: type, schema: WriterSchema) -> Read:
    names = _Derivation(cls).names[cls.__name__]
    files = _parsed(schema)
    pool = _pool(files)

    def read(data: bytes) -> Any:
        return msgspec.convert(_from_message(_message(pool, files[-1], data), names), cls, builtin_types=KEPT)

    return read


def plain_reader(schema: WriterSchema) -> Read:
    """Names are the fields' JSON names, which are those of an event's data: orderId for order_id."""
    files = _parsed(schema)
    pool = _pool(files)

    def read(data: bytes) -> Any:
        message = _message(pool, files[-1], data)
        return _from_message(message, _names_of(message.DESCRIPTOR))

    return read


def name_of(schema: WriterSchema, data: bytes) -> str:
    indexes, _ = wire_format.decode_indexes(data)
    return str(_at(_parsed(schema)[-1], indexes).name)


def numbers_of(schema: str) -> dict[str, int]:
    """Of the fields of all messages, by `Message.field`. Raises InvalidSchema."""
    (*_, file) = _parsed(WriterSchema(schema, SchemaType.PROTOBUF))
    return {f"{message.name}.{field.name}": field.number for message in file.message_type for field in message.field}


# Messages


@lru_cache(maxsize=1000)
def _parse(text: str, references: tuple[tuple[str, str], ...]) -> list[descriptor_pb2.FileDescriptorProto]:
    return ProtobufSchema(text, dict(references)).files


def _parsed(schema: WriterSchema) -> list[descriptor_pb2.FileDescriptorProto]:
    """The file of the schema last, behind what it imports. Raises InvalidSchema."""
    return _parse(schema.text, tuple(schema.references.items()))


def _pool(files: list[descriptor_pb2.FileDescriptorProto]) -> descriptor_pool.DescriptorPool:
    """One of its own: two versions of a schema share their names."""
    pool = descriptor_pool.DescriptorPool()
    known = {file.name for file in files}
    if timestamp_pb2.DESCRIPTOR.name not in known:
        pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)
    for file in files:
        pool.Add(file)
    return pool


def _at(file: descriptor_pb2.FileDescriptorProto, indexes: list[int]) -> descriptor_pb2.DescriptorProto:
    try:
        message = file.message_type[indexes[0]]
        for index in indexes[1:]:
            message = message.nested_type[index]
    except IndexError:
        raise wire_format.NotFramed(f"the schema has no message at {indexes}") from None
    return message


def _message(pool: descriptor_pool.DescriptorPool, file: descriptor_pb2.FileDescriptorProto, data: bytes) -> Message:
    indexes, content = wire_format.decode_indexes(data)
    path = []
    for depth in range(len(indexes)):
        path.append(_at(file, indexes[: depth + 1]).name)
    name = ".".join([*([file.package] if file.package else []), *path])
    message = message_factory.GetMessageClass(pool.FindMessageTypeByName(name))()
    try:
        message.ParseFromString(content)
    except DecodeError as error:
        raise ValueError(f"it is no {name}: {error}") from None
    return message


def _to_fields(data: Mapping[str, Any], names: Names) -> dict[str, Any]:
    fields = {}
    for wire, field, _, inner, is_map, _, _ in names:
        value = data.get(wire)
        if value is None:
            continue
        if inner is not None:
            if isinstance(value, list | tuple):
                value = [_to_fields(each, inner) for each in value]
            elif is_map:
                value = {key: _to_fields(each, inner) for key, each in value.items()}
            else:
                value = _to_fields(value, inner)
        elif isinstance(value, datetime):
            value = _timestamp(value)
        elif isinstance(value, list | tuple):
            value = [_timestamp(each) if isinstance(each, datetime) else each for each in value]
        elif is_map:
            value = {key: _timestamp(each) if isinstance(each, datetime) else each for key, each in value.items()}
        fields[field] = value
    return fields


def _timestamp(value: datetime) -> dict[str, int]:
    """A Timestamp's fields."""
    if value.tzinfo is None:
        raise Unencodable(f"{value.isoformat()} has no zone: give datetimes one, as in datetime.now(UTC).")
    since = value - EPOCH
    return {"seconds": since.days * 86400 + since.seconds, "nanos": since.microseconds * 1000}


def _from_message(message: Any, names: Names) -> dict[str, Any]:
    """Fields by their numbers. What the schema that wrote the message doesn't have is left to the class's defaults, or is what
    proto3 says of a field that isn't there: zero."""
    by_number = message.DESCRIPTOR.fields_by_number
    data: dict[str, Any] = {}
    for wire, _, number, inner, is_map, is_optional, zero in names:
        field = by_number.get(number)
        if field is None:
            if zero is not None:
                data[wire] = zero
            continue
        name = field.name
        if field.has_presence and not message.HasField(name):
            if is_optional:
                data[wire] = None
            continue
        value = getattr(message, name)
        kind = field.message_type
        if is_map:
            if not _is_map(field):
                raise ValueError(f"{name} is no map in the schema that wrote it")
            held = kind.fields_by_name["value"].message_type
            value = {key: _value_of(each, held, inner) for key, each in value.items()}
        elif field.is_repeated:
            value = [_value_of(each, kind, inner) for each in value]
        else:
            value = _value_of(value, kind, inner)
        data[wire] = value
    return data


def _value_of(value: Any, kind: Descriptor | None, inner: Names | None) -> Any:
    if kind is None:
        return value
    if kind.full_name == TIMESTAMP:
        return value.ToDatetime(UTC)
    return _from_message(value, inner if inner is not None else _names_of(kind))


def _is_map(field: FieldDescriptor) -> bool:
    kind = field.message_type
    return kind is not None and kind.GetOptions().map_entry


def _names_of(kind: Descriptor, depth: int = 0) -> Names:
    """As a message has them itself."""
    found = []
    for field in kind.fields:
        inner = field.message_type
        if inner is not None and _is_map(field):
            inner = inner.fields_by_name["value"].message_type
        found.append(Name(field.json_name, field.name, field.number, None, _is_map(field)))
    return found


# Schemas


def _full_name(cls: type) -> str:
    return ".".join(part for part in (event_namespace(cls), cls.__name__) if part)


class _Derivation:
    """The event's message first, then those inside it."""

    def __init__(self, cls: type) -> None:
        """Raises NoSchema."""
        info = type_of(cls, SchemaType.PROTOBUF)
        self.file = descriptor_pb2.FileDescriptorProto(name=FILE, syntax="proto3", package=event_namespace(cls))
        self.names: dict[str, Names] = {}
        self._classes: dict[str, type] = {}
        self._message(info, cls.__name__)

    def _message(self, info: types.StructType | types.DataclassType, place: str) -> str:
        """Its full name."""
        name = info.cls.__name__
        full = "." + ".".join(part for part in (self.file.package, name) if part)
        known = self._classes.setdefault(name, info.cls)
        if known is not info.cls:
            raise NoSchema(f"{place}: two classes are called {name}; a schema's names are its own.")
        if name in self.names:
            return full
        names = self.names[name] = []
        message = self.file.message_type.add(name=name)
        fields = list(info.fields)
        number = 0
        if isinstance(info, types.StructType) and info.tag_field is not None:
            number = 1
            message.field.add(name=info.tag_field, number=1, type=F.TYPE_STRING, label=F.LABEL_OPTIONAL,
                              json_name=info.tag_field)  # fmt: skip
            names.append(Name(info.tag_field, info.tag_field, 1))
        for field in fields:
            number = self._field(message, field, number + 1, names, f"{place}.{field.name}")
        numbers = [field.number for field in message.field]
        twice = next((each for each in numbers if numbers.count(each) > 1), None)
        if twice is not None:
            raise NoSchema(f"{place} has two fields with the number {twice}.")
        return full

    def _field(
        self, message: descriptor_pb2.DescriptorProto, field: types.Field, number: int, names: Names, place: str
    ) -> int:
        info, extra = _without_meta(field.type)
        is_optional = isinstance(info, types.UnionType) and info.includes_none
        if isinstance(info, types.UnionType):
            others = [each for each in info.types if not isinstance(each, types.NoneType)]
            if len(others) != 1:
                raise NoSchema(f"{place} is a union, which Protobuf has no type for: X | None alone is.")
            info, more = _without_meta(others[0])
            extra = {**extra, **more}
        number = int(extra.get("number", number))
        made = message.field.add(name=field.name, number=number, label=F.LABEL_OPTIONAL, json_name=field.encode_name)
        is_map = isinstance(info, types.DictType)
        held = info
        if isinstance(info, types.ListType | types.SetType | types.FrozenSetType | types.VarTupleType):
            made.label = F.LABEL_REPEATED
            held, _ = _without_meta(info.item_type)
        elif isinstance(info, types.DictType):
            held, _ = _without_meta(info.value_type)
            self._map(message, made, info, held, place)
        if not is_map:
            self._set_type(made, held, place)
        if is_optional and made.label == F.LABEL_REPEATED:
            raise NoSchema(f"{place} may be None or empty, which are one in Protobuf: leave None out.")
        if is_optional and made.type != F.TYPE_MESSAGE:
            made.proto3_optional = True
            made.oneof_index = len(message.oneof_decl)
            message.oneof_decl.add(name=f"_{field.name}")
        inner = self.names[held.cls.__name__] if isinstance(held, types.StructType | types.DataclassType) else None
        zero = None if is_optional or not field.required else _zero(made, is_map)
        names.append(Name(field.encode_name, field.name, number, inner, is_map, is_optional, zero))
        return number

    def _map(
        self,
        message: descriptor_pb2.DescriptorProto,
        made: descriptor_pb2.FieldDescriptorProto,
        info: types.DictType,
        held: types.Type,
        place: str,
    ) -> None:
        if not isinstance(_without_meta(info.key_type)[0], types.StrType):
            raise NoSchema(f"{place} has keys that are not str.")
        entry = message.nested_type.add(name="".join(part.title() for part in made.name.split("_")) + "Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, type=F.TYPE_STRING, label=F.LABEL_OPTIONAL, json_name="key")
        value = entry.field.add(name="value", number=2, label=F.LABEL_OPTIONAL, json_name="value")
        self._set_type(value, held, place)
        made.label, made.type = F.LABEL_REPEATED, F.TYPE_MESSAGE
        made.type_name = "." + ".".join(part for part in (self.file.package, message.name, entry.name) if part)

    def _set_type(self, made: descriptor_pb2.FieldDescriptorProto, info: types.Type, place: str) -> None:
        if type(info) in SIMPLE:
            made.type = SIMPLE[type(info)]
        elif isinstance(info, types.DateTimeType):
            made.type, made.type_name = F.TYPE_MESSAGE, f".{TIMESTAMP}"
            if timestamp_pb2.DESCRIPTOR.name not in self.file.dependency:
                self.file.dependency.append(timestamp_pb2.DESCRIPTOR.name)
        elif isinstance(info, types.StructType | types.DataclassType):
            made.type, made.type_name = F.TYPE_MESSAGE, self._message(info, place)
        elif isinstance(info, types.EnumType):
            is_number = all(isinstance(member.value, int) for member in info.cls)
            made.type = F.TYPE_INT64 if is_number else F.TYPE_STRING
        elif isinstance(info, types.LiteralType) and all(isinstance(value, str) for value in info.values):
            made.type = F.TYPE_STRING
        else:
            kind = type(info).__name__.removesuffix("Type")
            raise NoSchema(f"{place} is a {kind}, which Protobuf has no type for.")


def _zero(field: descriptor_pb2.FieldDescriptorProto, is_map: bool) -> object:
    """None for a message, which has none."""
    if is_map:
        return {}
    if field.label == F.LABEL_REPEATED:
        return []
    return {F.TYPE_INT64: 0, F.TYPE_DOUBLE: 0.0, F.TYPE_BOOL: False, F.TYPE_BYTES: b"", F.TYPE_STRING: ""}.get(
        field.type
    )


def _without_meta(info: types.Type) -> tuple[types.Type, dict[str, Any]]:
    extra: dict[str, Any] = {}
    while isinstance(info, types.Metadata):
        extra = {**(info.extra or {}), **extra}
        info = info.type
    return info, extra


__all__ = ["InvalidSchema", "name_of", "numbers_of", "plain_reader", "reader", "schema_of", "writer"]
