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

from headwater.event.event import check_event_class
from headwater.settings import duration_seconds

FOREVER = "forever"


class InvalidTopic(ValueError):
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
    ) -> None:
        """Raises InvalidTopic, NotAnEvent, InvalidSetting.

        retention: a duration (`7d`, `1y`), "forever", or None for the broker's own.
        configs: further topic configs by Kafka's names.
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
        if retention is not None:
            seconds = -1 if retention == FOREVER else duration_seconds(retention)
            self.configs["retention.ms"] = str(round(seconds * 1000) if seconds >= 0 else -1)
        if compacted:
            self.configs["cleanup.policy"] = "compact"
        names = [cls.__name__ for cls in events]
        if len(set(names)) < len(names):
            raise InvalidTopic(f"the topic {name} lists two classes of one name: the name is the event's type.")

    def key_of(self, event: Any) -> bytes:
        """The key of one event, as it goes on the wire. Raises InvalidTopic for an event without one."""
        value = getattr(event, self.key)
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

    def __repr__(self) -> str:
        return f"Topic({self.name!r})"


def field_names(cls: type) -> tuple[str, ...]:
    for attribute in ("__struct_fields__", "__dataclass_fields__", "model_fields"):
        names = getattr(cls, attribute, None)
        if names is not None:
            return tuple(names)
    return ()
