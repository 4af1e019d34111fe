"""A schema as the registry keeps it, and what a format must be able to do with it.

The parsed forms are made when they are needed: a registry with ten thousand schemas starts without reading one.
"""

import hashlib
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

import msgspec

MAX_BYTES = 1 << 20
MAX_DEPTH = 100  # of nested types: deeper ones are refused before a parser recurses into them


class SchemaType(StrEnum):
    AVRO = "AVRO"
    JSON = "JSON"
    PROTOBUF = "PROTOBUF"


class Reference(msgspec.Struct, frozen=True):
    """A schema that another one imports by this name."""

    name: str
    subject: str
    version: int


class Schema(msgspec.Struct, frozen=True):
    text: str
    type: SchemaType = SchemaType.AVRO
    references: tuple[Reference, ...] = ()
    metadata: Mapping[str, Any] | None = None
    rule_set: Mapping[str, Any] | None = None

    def digest(self) -> bytes:
        """The same for equal schemas: they share an id."""
        content = (self.type, self.text, self.references, self.metadata, self.rule_set)
        return hashlib.md5(msgspec.json.encode(content, order="sorted"), usedforsecurity=False).digest()


class InvalidSchema(Exception):
    """What was given is no schema; the message says where and why."""


class Difference(NamedTuple):
    """Why a reader can't read what a writer wrote. The kinds are Confluent's."""

    kind: str
    path: str
    description: str
    info: str = ""

    def __str__(self) -> str:
        return f"{{errorType:'{self.kind}', description:'{self.description}', additionalInfo:'{self.info}'}}"


class Parsed(Protocol):
    """A schema that was understood."""

    @property
    def text(self) -> str:
        """In one form for all ways to write it."""

    def check_new(self) -> None:
        """What is read in schemas that are there already, and refused in new ones. Raises InvalidSchema."""

    def differences(self, writer: Any) -> list[Difference]:
        """Why a reader with this schema can't read what one with that schema wrote; empty when it can."""
