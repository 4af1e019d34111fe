"""The envelope of every event, and what is carried from cause to effect.

    {"eventId": ..., "eventType": "OrderCreated", "eventVersion": "v1", "timestamp": ISO-8601, "source": ...,
     "correlationId": ..., "causationId": ..., "data": {...}, "metadata": {"userId": ..., "sessionId": ...}}

The correlation id is one for a whole story: a web request and everything that follows from it. The causation id is the
id of the event, or of the request, that led to this one. Both are set by the runtime, from the current `Cause`.
"""

import os
import random
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec


class Metadata(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """Who acts."""

    user_id: str | None = None
    session_id: str | None = None


class Envelope(msgspec.Struct, frozen=True, rename="camel"):
    event_id: str
    event_type: str
    event_version: str
    timestamp: datetime
    source: str
    correlation_id: str
    causation_id: str | None
    data: Any
    """The event; `Any`, because its class is the application's."""
    metadata: Metadata = Metadata()


class IdempotencyKey(str):
    """What a service outside is to know a handler's call by: the same at each attempt, redrive and replay of an event, and
    another for each group."""

    __slots__ = ()


class Position(NamedTuple):
    """Where an event stands: in its partition the offset grows, so it can be a version in a store outside."""

    topic: str
    partition: int
    offset: int


class Cause(NamedTuple):
    """What is being handled now: an event or a web request."""

    correlation_id: str
    causation_id: str | None
    metadata: Metadata = Metadata()


_cause: ContextVar[Cause | None] = ContextVar("headwater_cause", default=None)


def current_cause() -> Cause:
    """The cause of what is published now; without one a new story begins."""
    return _cause.get() or Cause(new_id(), None)


set_cause = _cause.set


# Seeded by the operating system: asking it for each id would be most of what an event costs.
_chance = random.Random(os.urandom(32))
os.register_at_fork(after_in_child=lambda: _chance.seed(os.urandom(32)))


def new_id() -> str:
    """A random UUID (RFC 9562, version 4)."""
    bits = _chance.getrandbits(128) & ~(0xF000 << 64 | 0xC000 << 48) | 0x4000 << 64 | 0x8000 << 48
    digits = f"{bits:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def now() -> datetime:
    return datetime.now(UTC)
