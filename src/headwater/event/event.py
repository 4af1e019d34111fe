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
from typing import ClassVar, Protocol, TypeAlias, dataclass_transform

import msgspec

from headwater.declaration import WrongDeclaration
from headwater.event.upcast import Upcasts


@dataclass_transform(frozen_default=True)
class EventMeta(msgspec.StructMeta):
    """Tells type checkers that every event is frozen, as its base is, without each having to say so."""


class Event(msgspec.Struct, metaclass=EventMeta, frozen=True, rename="camel"):
    """The base of typed events."""

    event_version: ClassVar[str] = "v1"
    event_namespace: ClassVar[str] = ""
    """Before the type's name in a schema: Avro's namespace, Protobuf's package."""
    upcasts: ClassVar[Upcasts] = {}
    """See headwater.event.upcast."""


@lru_cache(maxsize=10_000)
def is_pydantic(cls: type) -> bool:
    """Whether it is a pydantic model; pydantic itself is not imported."""
    return hasattr(cls, "model_validate_json")


class Tombstone:
    """There is nothing any more under this key: a record without a value, in a compacted topic.

    It is published like an event, `uow.publish(Tombstone(order_states, "o-1"))`, and handled by a handler that says so,
    `event: OrderState | Tombstone`; others pass it over.
    """

    __slots__ = ("key", "topic")
    event_version: ClassVar[str] = "v1"

    def __init__(self, topic: "HasName", key: object) -> None:
        """topic: a Topic. key: as the field that is the topic's key has it, or its bytes."""
        self.topic = topic
        self.key = key if isinstance(key, bytes) else str(key).encode()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tombstone) and (self.topic.name, self.key) == (other.topic.name, other.key)

    def __hash__(self) -> int:
        return hash((self.topic.name, self.key))

    def __repr__(self) -> str:
        return f"Tombstone({self.topic.name!r}, {self.key!r})"


class HasName(Protocol):
    """A topic, as far as a tombstone knows it."""

    name: str


AnyEvent: TypeAlias = object
"""An Event, a pydantic model or a dataclass instance."""


class NotAnEvent(WrongDeclaration, TypeError):
    """A class that can't be an event."""


def check_event_class(cls: type) -> None:
    """Raises NotAnEvent."""
    if not (issubclass(cls, msgspec.Struct) or dataclasses.is_dataclass(cls) or hasattr(cls, "model_validate")):
        raise NotAnEvent(f"{cls.__name__} is no event: derive it from headwater.Event, or use pydantic or a dataclass.")


def event_type(cls: type) -> str:
    return cls.__name__


def event_version(cls: type) -> str:
    return getattr(cls, "event_version", "v1")


def event_upcasts(cls: type) -> Upcasts:
    return getattr(cls, "upcasts", {})


def event_namespace(cls: type) -> str:
    return getattr(cls, "event_namespace", "")
