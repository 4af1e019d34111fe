"""Where an event goes: the one topic that lists its class, with the key that the topic names.

An event that no topic lists, and one that two topics list, are errors at the start or where it is published: never a
guess.
"""

from collections.abc import Iterable

from headwater.event.codec import Encoded, Framed, encode
from headwater.event.envelope import Metadata, current_cause
from headwater.event.event import Tombstone
from headwater.event.topic import Topic
from headwater.store.outbox import OutboxRow

# Kafka's default max.message.bytes, less what a batch adds. It is checked before the commit, because a row of the outbox
# that no broker takes would hold up all that come behind it.
MAX_EVENT_BYTES = 1_000_000


class TooLarge(ValueError):
    """The event is larger than its topic takes."""


class NoTopic(Exception):
    """The event's class is listed by no topic of the application, or by two."""


class NoSchemaId(Exception):
    """The event's schema has no id yet: the application has not been started."""


class Router:
    """The topics of an application, by the events that they list."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.topics: dict[str, Topic] = {}
        self._by_class: dict[type, Topic] = {}
        self.framed: dict[type, Framed] = {}
        """Of the classes whose topics have schemas; known when the application has started."""

    def add(self, topics: Iterable[Topic]) -> None:
        """Raises NoTopic when two topics list the same class."""
        for topic in topics:
            known = self.topics.setdefault(topic.name, topic)
            if known is not topic:
                raise NoTopic(f"the topic {topic.name} is declared twice: use one Topic object for both.")
            for cls in topic.events:
                other = self._by_class.setdefault(cls, topic)
                if other is not topic:
                    raise NoTopic(
                        f"{cls.__name__} is listed by {other.name} and by {topic.name}: it can have one topic only."
                    )

    def lists(self, cls: type) -> bool:
        return cls in self._by_class

    def topic_of(self, event: object) -> Topic:
        """Raises NoTopic."""
        if isinstance(event, Tombstone):
            return self._topic_of_tombstone(event)
        topic = self._by_class.get(type(event))
        if topic is None:
            raise NoTopic(
                f"no topic of this application lists {type(event).__name__}: give the App its topic, "
                f"App({self.source!r}, topics=[...])."
            )
        return topic

    def _topic_of_tombstone(self, tombstone: Tombstone) -> Topic:
        topic = self.topics.get(tombstone.topic.name)
        if topic is None or topic is not tombstone.topic:
            raise NoTopic(
                f"{tombstone.topic.name} is no topic of this application: App({self.source!r}, topics=[...])."
            )
        if not topic.is_compacted:
            raise NoTopic(
                f"{topic.name} is not compacted: a tombstone would mean nothing there. Topic(..., compacted=True)"
            )
        return topic

    def encode(self, event: object, metadata: Metadata | None = None) -> tuple[Topic, bytes, Encoded]:
        """The event's topic, its key and its bytes. Raises NoTopic, InvalidTopic, NoSchemaId, TooLarge, Unencodable."""
        topic = self.topic_of(event)
        framed = None
        if topic.schema is not None and not isinstance(event, Tombstone):
            framed = self.framed.get(type(event))
            if framed is None:
                raise NoSchemaId(
                    f"{type(event).__name__} has no schema id yet: publish inside `app.lifespan` or a handler."
                )
        encoded = encode(event, self.source, current_cause(), metadata, framed)
        if encoded.value is not None and len(encoded.value) > MAX_EVENT_BYTES:
            raise TooLarge(
                f"this {encoded.event_type} has {len(encoded.value)} bytes: {topic.name} takes {MAX_EVENT_BYTES} at most. "
                "Store what is large elsewhere, and put its place into the event."
            )
        return topic, topic.key_of(event), encoded

    def outbox_row(self, event: object) -> OutboxRow:
        topic, key, encoded = self.encode(event)
        return OutboxRow(encoded.event_id, topic.name, key, encoded.event_type, encoded.value, encoded.headers)
