"""Avro: the schema of a class, and its data by fastavro.

    str string · int long · float double · bool boolean · bytes bytes · None null · X | None a union with null
    datetime timestamp-micros (UTC) · date date · time time-micros · UUID uuid · Enum of names enum
    Decimal string; with Meta(extra={"precision": 12, "scale": 2}) decimal (all of an event, or none)
    list, set, tuple[X, ...] array · dict[str, X] map · Event, Struct, dataclass record

Data of another version is resolved as the specification says: promotions, the defaults of the class's own schema.
"""

import io
import json
import re
from collections.abc import Mapping
from datetime import date, datetime, time
from decimal import Decimal
from functools import lru_cache
from typing import Any
from uuid import UUID

import fastavro
import msgspec
from msgspec import inspect as types

from headwater.event.data_format import NoSchema, Read, Unencodable, Write, WriterSchema, type_of
from headwater.event.event import event_namespace
from headwater.schema.schema import InvalidSchema, SchemaType

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
KEPT: tuple[type, ...] = (bytes, datetime, date, time, Decimal, UUID)
"""What fastavro takes as it is."""
SIMPLE: dict[type, object] = {
    types.StrType: "string",
    types.IntType: "long",
    types.FloatType: "double",
    types.BoolType: "boolean",
    types.BytesType: "bytes",
    types.NoneType: "null",
    types.DateTimeType: {"type": "long", "logicalType": "timestamp-micros"},
    types.DateType: {"type": "int", "logicalType": "date"},
    types.TimeType: {"type": "long", "logicalType": "time-micros"},
    types.UUIDType: {"type": "string", "logicalType": "uuid"},
    types.DecimalType: "string",
}


def schema_of(cls: type) -> str:
    return json.dumps(_Derivation(event_namespace(cls)).of_class(cls), separators=(",", ":"), ensure_ascii=False)


def writer(cls: type) -> Write:
    schema = fastavro.parse_schema(json.loads(schema_of(cls)))
    derivation = _Derivation("")
    derivation.of_class(cls)
    kept = tuple(kind for kind in KEPT if kind is not Decimal or derivation.has_decimals)
    checks_times = derivation.has_times

    def write(event: object) -> bytes:
        data = msgspec.to_builtins(event, builtin_types=kept)
        if checks_times:
            _check_times(data)
        out = io.BytesIO()
        try:
            fastavro.schemaless_writer(out, schema, data)
        except (ValueError, TypeError, OverflowError) as error:
            raise Unencodable(f"this {cls.__name__} doesn't fit its schema: {error}") from None
        return out.getvalue()

    return write


def reader(cls: type, schema: WriterSchema) -> Read:
    written = _parsed(schema)
    own = fastavro.parse_schema(json.loads(schema_of(cls)))
    resolved = None if _same(written, own) else own

    def read(data: bytes) -> Any:
        values = fastavro.schemaless_reader(io.BytesIO(data), written, resolved)
        return msgspec.convert(values, cls, builtin_types=KEPT)

    return read


def plain_reader(schema: WriterSchema) -> Read:
    written = _parsed(schema)

    def read(data: bytes) -> Any:
        return fastavro.schemaless_reader(io.BytesIO(data), written, None)

    return read


def name_of(schema: WriterSchema, data: bytes) -> str:
    node = json.loads(schema.text)
    return str(node["name"]).rpartition(".")[2] if isinstance(node, Mapping) and "name" in node else ""


@lru_cache(maxsize=1000)
def _parse(text: str, references: tuple[str, ...]) -> Any:
    try:
        named: dict[str, Any] = {}
        for each in references:
            fastavro.parse_schema(json.loads(each), named)
        return fastavro.parse_schema(json.loads(text), named)
    except (ValueError, KeyError, TypeError, RecursionError, fastavro.schema.SchemaParseException) as error:
        raise InvalidSchema(f"{type(error).__name__}: {error}") from None


def _parsed(schema: WriterSchema) -> Any:
    """Raises InvalidSchema."""
    return _parse(schema.text, tuple(schema.references.values()))


def _same(one: Any, other: Any) -> bool:
    return bool(fastavro.schema.to_parsing_canonical_form(one) == fastavro.schema.to_parsing_canonical_form(other))


def _check_times(data: Any) -> None:
    """A time without a zone would be taken for this machine's own. Raises Unencodable."""
    if isinstance(data, datetime):
        if data.tzinfo is None:
            raise Unencodable(f"{data.isoformat()} has no zone: give datetimes one, as in datetime.now(UTC).")
    elif isinstance(data, dict):
        for value in data.values():
            _check_times(value)
    elif isinstance(data, list | tuple):
        for value in data:
            _check_times(value)


class _Derivation:
    """A class, and those inside it: each is written out where it comes first, and named from then on."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._known: dict[str, type] = {}
        self.has_decimals = False
        self.has_times = False
        self._has_plain_decimals = False

    def of_class(self, cls: type) -> dict[str, Any]:
        found = self._type(type_of(cls, SchemaType.AVRO), cls.__name__)
        assert isinstance(found, dict)
        if self.has_decimals and self._has_plain_decimals:
            raise NoSchema(
                f"{cls.__name__} has a Decimal with a precision and one without: give all of them one, or none."
            )
        return {"type": "record", "name": found["name"], **({"namespace": self._namespace} if self._namespace else {}),
                "fields": found["fields"]}  # fmt: skip

    def _type(self, info: types.Type, place: str) -> Any:
        if isinstance(info, types.Metadata):
            extra = info.extra or {}
            if isinstance(info.type, types.DecimalType) and "precision" in extra:
                self.has_decimals = True
                return {"type": "bytes", "logicalType": "decimal", "precision": extra["precision"],
                        "scale": extra.get("scale", 0)}  # fmt: skip
            return self._type(info.type, place)
        if type(info) in SIMPLE:
            self.has_times = self.has_times or isinstance(info, types.DateTimeType)
            self._has_plain_decimals = self._has_plain_decimals or isinstance(info, types.DecimalType)
            return SIMPLE[type(info)]
        if isinstance(info, types.StructType | types.DataclassType):
            return self._record(info, place)
        if isinstance(info, types.EnumType):
            return self._enum(info, place)
        if isinstance(info, types.LiteralType) and all(isinstance(value, str) for value in info.values):
            return "string"
        if isinstance(info, types.UnionType):
            return self._union(info, place)
        if isinstance(info, types.ListType | types.SetType | types.FrozenSetType | types.VarTupleType):
            return {"type": "array", "items": self._type(info.item_type, f"{place}[]")}
        if isinstance(info, types.DictType) and isinstance(info.key_type, types.StrType):
            return {"type": "map", "values": self._type(info.value_type, f"{place}{{}}")}
        raise NoSchema(f"{place} is a {type(info).__name__.removesuffix('Type')}, which Avro has no type for.")

    def _named(self, cls: type, place: str) -> bool:
        """Whether it was written out before."""
        if not NAME.fullmatch(cls.__name__):
            raise NoSchema(f"{place}: {cls.__name__} is no name in Avro: letters, digits and _.")
        known = self._known.setdefault(cls.__name__, cls)
        if known is not cls:
            raise NoSchema(f"{place}: two classes are called {cls.__name__}; a schema's names are its own.")
        return known is cls

    def _record(self, info: types.StructType | types.DataclassType, place: str) -> Any:
        cls = info.cls
        if cls.__name__ in self._known and self._known[cls.__name__] is cls:
            return cls.__name__
        self._named(cls, place)
        fields = [self._field(field, f"{place}.{field.encode_name}") for field in info.fields]
        if isinstance(info, types.StructType) and info.tag_field is not None:
            fields.insert(0, {"name": info.tag_field, "type": "string"})
        return {"type": "record", "name": cls.__name__, "fields": fields}

    def _field(self, field: types.Field, place: str) -> dict[str, Any]:
        if not NAME.fullmatch(field.encode_name):
            raise NoSchema(f"{place} is no name in Avro: letters, digits and _.")
        kind = self._type(field.type, place)
        if field.required:
            return {"name": field.encode_name, "type": kind}
        value = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
        default = msgspec.to_builtins(value, builtin_types=(bytes,))
        if isinstance(kind, list):  # a default is of the union's first branch
            kind = sorted(kind, key=lambda branch: (branch == "null") is not (default is None))
        if isinstance(kind, dict) and "logicalType" in kind:
            raise NoSchema(f"{place} has a default, which Avro can't say of a {kind['logicalType']}: make it optional.")
        return {"name": field.encode_name, "type": kind,
                "default": default.decode("latin-1") if isinstance(default, bytes) else default}  # fmt: skip

    def _enum(self, info: types.EnumType, place: str) -> Any:
        values = [member.value for member in info.cls]
        if all(isinstance(value, int) for value in values):
            return "long"
        if not all(isinstance(value, str) and NAME.fullmatch(value) for value in values):
            return "string"
        if info.cls.__name__ in self._known and self._known[info.cls.__name__] is info.cls:
            return info.cls.__name__
        self._named(info.cls, place)
        return {"type": "enum", "name": info.cls.__name__, "symbols": values}

    def _union(self, info: types.UnionType, place: str) -> list[Any]:
        branches = [self._type(each, place) for each in info.types]
        kinds = [branch["type"] if isinstance(branch, dict) else branch for branch in branches]
        if len({str(kind) for kind in kinds if kind != "record"}) < len([kind for kind in kinds if kind != "record"]):
            raise NoSchema(f"{place} is a union of types that are one in Avro.")
        return sorted(branches, key=lambda branch: branch != "null")
