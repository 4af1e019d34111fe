"""JSON with a JSON Schema (draft 2020-12): for events that other tools validate.

The schemas are closed (`additionalProperties: false`): with an open one, every property that is added later might have
been in old documents with another meaning, and registries refuse it. Reading is lenient all the same: what a class doesn't
know is passed over.
"""

import json
from typing import Any

import msgspec

from headwater.event.data_format import NoSchema, Read, Unencodable, Write, WriterSchema
from headwater.event.event import is_pydantic

KEPT: tuple[type, ...] = ()
DRAFT = "https://json-schema.org/draft/2020-12/schema"


def schema_of(cls: type) -> str:
    try:
        schema = cls.model_json_schema(by_alias=True) if is_pydantic(cls) else msgspec.json.schema(cls)  # type: ignore[attr-defined]
    except TypeError as error:
        raise NoSchema(f"{cls.__name__} has no JSON Schema: {error}") from None
    inner = schema.get("$defs", {})
    if "$ref" in schema:
        schema = {**inner.pop(cls.__name__), **({"$defs": inner} if inner else {})}
    for each in (schema, *inner.values()):
        if "properties" in each:
            each["additionalProperties"] = False
    return json.dumps({"$schema": DRAFT, **schema}, separators=(",", ":"), ensure_ascii=False)


def writer(cls: type) -> Write:
    if is_pydantic(cls):
        return lambda event: event.model_dump_json(by_alias=True).encode()

    def write(event: object) -> bytes:
        try:
            return msgspec.json.encode(event)
        except (TypeError, ValueError) as error:
            raise Unencodable(f"this {cls.__name__} is no JSON: {error}") from None

    return write


def reader(cls: type, schema: WriterSchema) -> Read:
    if is_pydantic(cls):
        validate: Read = cls.model_validate_json  # type: ignore[attr-defined]
        return validate
    return msgspec.json.Decoder(cls).decode


def plain_reader(schema: WriterSchema) -> Read:
    return msgspec.json.decode


def name_of(schema: WriterSchema, data: bytes) -> str:
    node: Any = json.loads(schema.text)
    return str(node.get("title", "")) if isinstance(node, dict) else ""
