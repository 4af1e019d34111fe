"""Events: frozen typed classes, named in the past tense; commands are named in the imperative.

    class OrderCreated(Event):
        order_id: str
        total: Decimal

Fields travel in camelCase (`orderId`), as in the envelope around them. The class's name is the event's type; a class
attribute `event_version = "v2"` is its version. Pydantic models and dataclasses serve as events too, by their own
field names.
"""

import dataclasses
from functools import lru_cache
from typing import ClassVar, TypeAlias, dataclass_transform

import msgspec


@dataclass_transform(frozen_default=True)
class EventMeta(msgspec.StructMeta):
    """Tells type checkers that every event is frozen, as its base is, without each having to say so."""


class Event(msgspec.Struct, metaclass=EventMeta, frozen=True, rename="camel"):
    """The base of typed events."""

    event_version: ClassVar[str] = "v1"


@lru_cache(maxsize=10_000)
def is_pydantic(cls: type) -> bool:
    """Whether it is a pydantic model; pydantic itself is not imported."""
    return hasattr(cls, "model_validate_json")


AnyEvent: TypeAlias = object
"""An Event, a pydantic model or a dataclass instance."""


class NotAnEvent(TypeError):
    """A class that can't be an event."""


def check_event_class(cls: type) -> None:
    """Raises NotAnEvent."""
    if not (issubclass(cls, msgspec.Struct) or dataclasses.is_dataclass(cls) or hasattr(cls, "model_validate")):
        raise NotAnEvent(f"{cls.__name__} is no event: derive it from headwater.Event, or use pydantic or a dataclass.")


def event_type(cls: type) -> str:
    return cls.__name__


def event_version(cls: type) -> str:
    return getattr(cls, "event_version", "v1")
