"""Every declared message in every version, held against kio, which is generated from Kafka's own declarations."""

import contextlib
import importlib
import io
import re
import typing
from dataclasses import fields, is_dataclass

import kio.serial
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headwater.broker import api
from headwater.broker.dispatch import APIS
from headwater.broker.wire.errors import MalformedMessage
from headwater.broker.wire.message import Kind, Message, NullableSince, Since, Structure, Tagged

HAND_WRITTEN = {"produce", "fetch"}


def declared() -> list[tuple[str, str, int, type[Message]]]:
    """(API, "request" or "response", version, message)"""
    found = []
    for entry in APIS.values():
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", entry.name).lower()
        if name in HAND_WRITTEN:
            continue
        module = importlib.import_module(f"{api.__name__}.{name}")
        for kind in ("Request", "Response"):
            message = getattr(module, entry.name + kind)
            found += [(name, kind.lower(), v, message) for v in range(entry.first_version, entry.last_version + 1)]
    return found


def strategy(hint: object, version: int) -> st.SearchStrategy:
    """Values of a field, as Kafka's own generator would allow them."""
    marks: tuple[object, ...] = ()
    if typing.get_origin(hint) is typing.Annotated:
        marks = hint.__metadata__
        hint = hint.__origin__
    kind = next((mark for mark in marks if isinstance(mark, Kind)), None)
    if kind is not None:
        return {
            "bool": st.booleans(),
            "int8": st.integers(-(1 << 7), (1 << 7) - 1),
            "int16": st.integers(-1, 100).filter(lambda n: n not in (-1,)),
            "int32": st.integers(0, (1 << 31) - 1),
            "int64": st.integers(0, 1 << 45),
            "uuid": st.binary(min_size=16, max_size=16),
            "string": st.text(max_size=20),
            "nullable_string": st.text(max_size=20),
            "bytes": st.binary(max_size=30),
            "nullable_bytes": st.binary(max_size=30),
        }[kind.name]
    arguments = [each for each in typing.get_args(hint) if each is not type(None)]
    nullable = type(None) in typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return st.lists(strategy(arguments[0], version), max_size=3)
    if nullable:
        inner = strategy(arguments[0], version)
        first = next((mark.first for mark in marks if isinstance(mark, NullableSince)), 0)
        return inner | st.none() if version >= first else inner
    return structures(hint, version)


def structures(cls: type[Structure], version: int) -> st.SearchStrategy:
    values = {}
    flexible = getattr(cls, "FLEXIBLE", 0)
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if name == "FLEXIBLE":
            continue
        marks = hint.__metadata__ if typing.get_origin(hint) is typing.Annotated else ()
        if any(isinstance(m, Since) and not m.first <= version <= m.last for m in marks):
            continue
        if any(isinstance(m, Tagged) and version < max(m.first, flexible) for m in marks):
            continue
        values[name] = strategy(hint, version)
    return st.builds(cls, **values)


CASES = [pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[2]}") for case in declared()]


@pytest.mark.parametrize(("name", "kind", "version", "message"), CASES)
@settings(max_examples=6, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_message_and_version_round_trips(
    name: str, kind: str, version: int, message: type[Message], data: st.DataObject
) -> None:
    """What is encoded is decoded to the same value, and to nothing else when a byte is missing."""
    value = data.draw(structures(message, version))
    encoded = bytes(value.encode(version))

    assert message.decode(encoded, version) == value
    for end in range(len(encoded)):
        with pytest.raises(MalformedMessage):
            message.decode(encoded[:end], version)


@pytest.mark.parametrize(("name", "kind", "version", "message"), CASES)
@settings(max_examples=5, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_kio_reads_what_we_write_and_writes_the_same(
    name: str, kind: str, version: int, message: type[Message], data: st.DataObject
) -> None:
    """A second implementation, generated from Kafka's declarations, agrees on every byte."""
    module = importlib.import_module(f"kio.schema.{name}.v{version}.{kind}")
    theirs = next(
        cls
        for cls in vars(module).values()
        if is_dataclass(cls) and cls.__module__ == module.__name__ and cls.__type__.name == kind
    )
    value = _with_known_error_codes(data.draw(structures(message, version)))
    encoded = bytes(value.encode(version))

    decoded, size = kio.serial.entity_reader(theirs)(encoded, 0)
    written = io.BytesIO()
    kio.serial.entity_writer(theirs)(written, decoded)

    assert size == len(encoded)
    assert written.getvalue() == encoded
    assert sum("tag" not in field.metadata for field in fields(decoded)) == sum(1 for _ in _fields_of(message, version))


def _fields_of(cls: type[Message], version: int) -> typing.Iterator[str]:
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        marks = hint.__metadata__ if typing.get_origin(hint) is typing.Annotated else ()
        outside = any(isinstance(m, Since) and not m.first <= version <= m.last for m in marks)
        if name != "FLEXIBLE" and not outside and not any(isinstance(m, Tagged) for m in marks):
            yield name


def _with_known_error_codes(value: Structure) -> Structure:
    """kio refuses error codes that don't exist."""
    for field in msgspec.structs.fields(value):
        content = getattr(value, field.name)
        if field.name in ("error_code", "topic_config_error_code"):
            setattr(value, field.name, 0)
        elif isinstance(content, Structure):
            _with_known_error_codes(content)
        elif isinstance(content, list):
            for item in content:
                if isinstance(item, Structure):
                    _with_known_error_codes(item)
    return value


@given(st.binary(max_size=200))
def test_garbage_is_refused_and_nothing_else_happens(garbage: bytes) -> None:
    """A decoder given any bytes answers a message or MalformedMessage."""
    for _, _, version, message in declared():
        with contextlib.suppress(MalformedMessage):
            message.decode(garbage, version)
