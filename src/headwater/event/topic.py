"""Topics as an application declares them.

    orders = Topic("orders.events.order-lifecycle", key="order_id", events=[OrderCreated], partitions=20, retention="1y")

`key` names the field of the event that its order depends on: events with the same key are handled in order. It is
required, because a topic without a key promises no order to anybody.
"""

from collections.abc import Mapping, Sequence
from datetime import date
from enum import Enum
from typing import Any
from uuid import UUID

from headwater.declaration import WrongDeclaration
from headwater.event.event import Tombstone, check_event_class, event_namespace, event_type
from headwater.schema.schema import SchemaType
from headwater.settings import duration_seconds

FOREVER = "forever"
CLASS_RETENTION = {"events": "7d", "raw": "30d", "audit": "90d"}


class InvalidTopic(WrongDeclaration, ValueError):
    """A declaration that can't be kept."""


class Topic:
    def __init__(
        self,
        name: str,
        *,
        key: str,
        events: Sequence[type],
        partitions: int = 1,
        retention: str | None = None,
        compacted: bool = False,
        configs: Mapping[str, str] | None = None,
        schema: str | None = None,
        class_: str | None = None,
        replication: int | None = None,
    ) -> None:
        """Raises InvalidTopic, NotAnEvent, InvalidSetting.

        retention: a duration (`7d`, `1y`), "forever", or None for the broker's own.
        class_: events, raw or audit, which are kept for at least 7, 30 and 90 days; and for so long unless said.
        replication: how many replicas; None: as many as the broker says.
        configs: further topic configs by Kafka's names.
        schema: avro, json or protobuf: values are data behind the id of a schema in a registry, one subject for each event,
        `<topic>-<namespace.Name>`. None: values are envelopes, as JSON.
        """
        if partitions < 1:
            raise InvalidTopic(f"the topic {name} has {partitions} partitions: at least 1 is needed.")
        if not events:
            raise InvalidTopic(f"the topic {name} lists no events.")
        for cls in events:
            check_event_class(cls)
            fields = field_names(cls)
            if key not in fields:
                raise InvalidTopic(
                    f"the topic {name} has the key {key!r}, but {cls.__name__} has no such field: it has {', '.join(fields)}."
                )
        self.name = name
        self.key = key
        self.events = tuple(events)
        self.partitions = partitions
        self.configs = dict(configs or {})
        self.schema = _schema_type(name, schema)
        self.replication = replication
        milliseconds = retention_ms(name, retention, class_)
        if milliseconds is not None:
            self.configs["retention.ms"] = str(milliseconds)
        if compacted:
            self.configs["cleanup.policy"] = "compact"
        names = [cls.__name__ for cls in events]
        if len(set(names)) < len(names):
            raise InvalidTopic(f"the topic {name} lists two classes of one name: the name is the event's type.")

    def key_of(self, event: Any) -> bytes:
        """The key of one event, as it goes on the wire. Raises InvalidTopic for an event without one."""
        value = event.key if isinstance(event, Tombstone) else getattr(event, self.key)
        if value is None or value == "" or value == b"":
            raise InvalidTopic(f"this {type(event).__name__} has an empty {self.key}: {self.name} is ordered by it.")
        if isinstance(value, bytes):
            return value
        if isinstance(value, Enum) or not isinstance(value, str | int | UUID | date):
            raise InvalidTopic(
                f"the {self.key} of this {type(event).__name__} is a {type(value).__name__}: keys of {self.name} are "
                "text, bytes, whole numbers, UUIDs or dates."
            )
        return str(value).encode()

    @property
    def is_compacted(self) -> bool:
        return "compact" in self.configs.get("cleanup.policy", "")

    def subject_of(self, cls: type) -> str:
        """Where the registry has the schemas of this event: Confluent's TopicRecordNameStrategy."""
        return f"{self.name}-{'.'.join(part for part in (event_namespace(cls), event_type(cls)) if part)}"

    def __repr__(self) -> str:
        return f"Topic({self.name!r})"


def retention_ms(topic: str, retention: str | None, class_: str | None) -> int | None:
    """How long a topic's records are kept, in milliseconds; -1 for ever, None as the broker says. Raises InvalidTopic,
    InvalidSetting."""
    if class_ is not None and class_ not in CLASS_RETENTION:
        raise InvalidTopic(f"the topic {topic} has the class {class_!r}: {', '.join(CLASS_RETENTION)}.")
    if retention == FOREVER:
        return -1
    least = CLASS_RETENTION[class_] if class_ is not None else None
    if retention is None:
        return round(duration_seconds(least) * 1000) if least is not None else None
    if least is not None and duration_seconds(retention) < duration_seconds(least):
        raise InvalidTopic(f"the topic {topic} is kept for {retention}, and its class {class_} for at least {least}.")
    return round(duration_seconds(retention) * 1000)


def _schema_type(topic: str, name: str | None) -> SchemaType | None:
    """Raises InvalidTopic."""
    if name is None:
        return None
    if name.upper() not in SchemaType.__members__:
        raise InvalidTopic(f"the topic {topic} has schema={name!r}: avro, json or protobuf.")
    return SchemaType(name.upper())


def field_names(cls: type) -> tuple[str, ...]:
    for attribute in ("__struct_fields__", "__dataclass_fields__", "model_fields"):
        names = getattr(cls, attribute, None)
        if names is not None:
            return tuple(names)
    return ()
