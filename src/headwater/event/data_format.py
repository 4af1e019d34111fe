"""The formats that an event's data can have with a schema: what each must be able to do.

A class of events gives its schema, and what writes its data. What reads data is made for the schema that wrote it, which
may be older, newer, or another language's.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Protocol

import msgspec
from msgspec import inspect

from headwater.schema.schema import SchemaType

Write = Callable[[Any], bytes]
Read = Callable[[bytes], Any]
"""Raises anything: the caller says that it can't be decoded."""

MODULES = {
    SchemaType.AVRO: "headwater.event.avro_data",
    SchemaType.JSON: "headwater.event.json_data",
    SchemaType.PROTOBUF: "headwater.event.protobuf_data",
}


class NoSchema(TypeError):
    """A class that has no schema in this format; the message says which field, and what to do."""


class Unencodable(ValueError):
    """An event whose data its own schema can't hold."""


class WriterSchema(msgspec.Struct, frozen=True):
    """The schema that data was written with, and those that it references: texts by the name that it has for each, those
    first that others need."""

    text: str
    type: SchemaType
    references: Mapping[str, str] = {}


class DataFormat(Protocol):
    KEPT: tuple[type, ...]
    """Types that plain data has as they are."""

    def schema_of(self, cls: type) -> str:
        """Raises NoSchema."""

    def writer(self, cls: type) -> Write:
        """Raises NoSchema; what it returns raises Unencodable."""

    def reader(self, cls: type, schema: WriterSchema) -> Read:
        """Gives events of the class. Raises InvalidSchema."""

    def plain_reader(self, schema: WriterSchema) -> Read:
        """Gives the data as the schema has it: dicts, lists and values, by their names on the wire. Raises InvalidSchema."""

    def name_of(self, schema: WriterSchema, data: bytes) -> str:
        """What the schema calls the data."""


def type_of(cls: type, kind: SchemaType) -> inspect.StructType | inspect.DataclassType:
    """What the class is made of. Raises NoSchema."""
    try:
        found = inspect.type_info(cls)
    except TypeError as error:
        raise NoSchema(f"{cls.__name__} has no {kind} schema: {error}") from None
    if not isinstance(found, inspect.StructType | inspect.DataclassType):
        raise NoSchema(f"{cls.__name__} has no {kind} schema: derive it from headwater.Event, or use a dataclass.")
    return found


def data_format(kind: SchemaType) -> DataFormat:
    """Raises ModuleNotFoundError when its library is not installed."""
    module: DataFormat = import_module(MODULES[kind])  # a module is its implementation
    return module
