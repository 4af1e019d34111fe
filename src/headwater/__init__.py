"""Headwater: an event backbone for Python teams.

Names are imported when they are first used (PEP 562), so that the broker's process loads none of the application half.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from headwater.domain.projection import Projection
    from headwater.domain.saga import Saga
    from headwater.domain.saga_decision import Step
    from headwater.event.envelope import Envelope, IdempotencyKey, Metadata, Position
    from headwater.event.event import Event, Tombstone
    from headwater.event.topic import Topic
    from headwater.kafka.producer import NotPublished, Profile
    from headwater.runtime.app import App
    from headwater.runtime.handler import Tier
    from headwater.runtime.retry import Retry
    from headwater.runtime.tracing import CorrelationMiddleware
    from headwater.settings import Settings
    from headwater.store.database import Database
    from headwater.store.outbox import Outbox
    from headwater.store.rows import Rows
    from headwater.store.unit_of_work import UnitOfWork
    from headwater.trust.audit import Audit

PUBLIC = {
    "App": "headwater.runtime.app",
    "Audit": "headwater.trust.audit",
    "CorrelationMiddleware": "headwater.runtime.tracing",
    "Database": "headwater.store.database",
    "Envelope": "headwater.event.envelope",
    "Event": "headwater.event.event",
    "IdempotencyKey": "headwater.event.envelope",
    "Metadata": "headwater.event.envelope",
    "NotPublished": "headwater.kafka.producer",
    "Outbox": "headwater.store.outbox",
    "Position": "headwater.event.envelope",
    "Profile": "headwater.kafka.producer",
    "Projection": "headwater.domain.projection",
    "Retry": "headwater.runtime.retry",
    "Rows": "headwater.store.rows",
    "Saga": "headwater.domain.saga",
    "Settings": "headwater.settings",
    "Step": "headwater.domain.saga_decision",
    "Tier": "headwater.runtime.handler",
    "Tombstone": "headwater.event.event",
    "Topic": "headwater.event.topic",
    "UnitOfWork": "headwater.store.unit_of_work",
}

__all__ = [
    "App",
    "Audit",
    "CorrelationMiddleware",
    "Database",
    "Envelope",
    "Event",
    "IdempotencyKey",
    "Metadata",
    "NotPublished",
    "Outbox",
    "Position",
    "Profile",
    "Projection",
    "Retry",
    "Rows",
    "Saga",
    "Settings",
    "Step",
    "Tier",
    "Tombstone",
    "Topic",
    "UnitOfWork",
]


def __getattr__(name: str) -> object:
    if name not in PUBLIC:
        raise AttributeError(f"module 'headwater' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(PUBLIC[name]), name)
