"""The topics that an application needs: declared by it, made at its start, grown while it runs.

What is there is left as it is; `headwater apply` is for changing it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from headwater.event.topic import Topic
from headwater.kafka.admin import AdminError, KafkaAdmin
from headwater.runtime.handler import Handler
from headwater.runtime.retry import Delivery
from headwater.runtime.retry_topic import DEAD_CONFIGS, HEADER_ROOM, RETRY_CONFIGS
from headwater.runtime.subscription import CannotStart
from headwater.settings import Settings

T = TypeVar("T")

DEFAULT_MAX_MESSAGE_BYTES = "1048588"
KNOWN_SECONDS = 15.0
"""For a topic that was made to be known everywhere."""


class Shape(NamedTuple):
    """What a topic is made with."""

    partitions: int
    replication: int | None
    """None: what the cluster says."""
    configs: Mapping[str, str]


def declared(topics: Sequence[Topic], handlers: Sequence[Handler]) -> dict[str, Shape]:
    """By name; the handlers' retry and dead-letter topics among them, with the replicas of their source."""
    found = {topic.name: Shape(topic.partitions, topic.replication, topic.configs) for topic in topics}
    for handler in handlers:
        topic = handler.topic
        found.update(_of_failures(handler, Shape(topic.partitions, topic.replication, topic.configs)))
    return found


def make(name: str, topics: Sequence[Topic], handlers: Sequence[Handler], settings: Settings) -> None:
    """What is missing of an application of that name. A handler's retry and dead-letter topics come before its source, so that
    nothing is taken that can't be parked. Raises CannotStart, AdminError."""
    admin = KafkaAdmin(settings)
    admin.check_reachable()
    present = admin.partition_counts()
    wanted: dict[str, Shape] = {}
    small: dict[str, int] = {}
    for handler in handlers:
        for topic, shape in _of_failures(handler, _source_shape(handler, admin, present)).items():
            wanted[topic] = shape
            if present.get(topic, shape.partitions) < shape.partitions:
                small[topic] = shape.partitions
    wanted.update({topic.name: Shape(topic.partitions, topic.replication, topic.configs) for topic in topics})
    missing = {topic: shape for topic, shape in wanted.items() if topic not in present}
    if (missing or small) and not settings.create_topics:
        commands = [
            f"  headwater topics create {topic} --partitions {shape.partitions}"
            + "".join(f" --config {key}={value}" for key, value in shape.configs.items())
            for topic, shape in missing.items()
        ]
        commands += [f"  headwater topics alter {topic} --partitions {count}" for topic, count in small.items()]
        raise CannotStart(
            f"{name} needs topics that are missing or too small, and may not create them. Run:\n" + "\n".join(commands)
        )
    brokers = admin.broker_count() if any(shape.replication is not None for shape in missing.values()) else 0
    for topic, shape in missing.items():
        # what is declared for a cluster runs on a laptop too; `headwater apply` says what is missing
        replicas = min(shape.replication, brokers) if shape.replication is not None else -1
        admin.create_topic(topic, shape.partitions, replicas, shape.configs)
    for topic, count in small.items():
        admin.grow_topic(topic, count)


def ids(names: Sequence[str], settings: Settings) -> dict[str, str]:
    """By topic. Raises AdminError."""
    admin = KafkaAdmin(settings)
    described = _when_known(lambda: admin.describe_topics(names)) if names else []
    return {each.name: each.topic_id for each in described}


def retentions_ms(handlers: Sequence[Handler], settings: Settings) -> dict[str, int]:
    """By topic, of those whose handlers have an inbox: it keeps as much. Raises AdminError."""
    admin = KafkaAdmin(settings)
    return {
        name: int(_when_known(lambda name=name: admin.topic_configs(name))["retention.ms"].value)  # type: ignore[misc]
        for name in {each.topic.name for each in handlers if each.delivery is Delivery.EFFECTIVELY_ONCE}
    }


def grow(handler: Handler, partitions: int, settings: Settings) -> None:
    """Its source has grown while the application runs. Raises AdminError."""
    if not settings.create_topics:
        raise AdminError(
            f"{handler.topic.name} has grown: run `headwater topics alter {handler.retry_topic} --partitions {partitions}` "
            f"and the same for {handler.dead_topic}."
        )
    admin = KafkaAdmin(settings)
    counts = admin.partition_counts()
    for name in (handler.retry_topic, handler.dead_topic):
        if counts.get(name, partitions) < partitions:
            admin.grow_topic(name, partitions)


def _source_shape(handler: Handler, admin: KafkaAdmin, present: Mapping[str, int]) -> Shape:
    """As it is, or else as it is declared. Raises AdminError."""
    topic = handler.topic
    if topic.name not in present:
        return Shape(topic.partitions, topic.replication, topic.configs)
    configs: Mapping[str, str] = topic.configs
    if handler.dead_topic not in present or handler.retry_topic not in present:
        found = _when_known(lambda: admin.topic_configs(topic.name))
        configs = {name: each.value for name, each in found.items()}
    return Shape(present[topic.name], topic.replication, configs)


def _of_failures(handler: Handler, source: Shape) -> dict[str, Shape]:
    """The retry topic and the dead-letter topic; none without a retry policy."""
    if handler.options.retry is None:
        return {}
    largest = int(source.configs.get("max.message.bytes", DEFAULT_MAX_MESSAGE_BYTES)) + HEADER_ROOM
    return {
        name: source._replace(configs={**configs, "max.message.bytes": str(largest)})
        for name, configs in ((handler.retry_topic, RETRY_CONFIGS), (handler.dead_topic, DEAD_CONFIGS))
    }


def _when_known(ask: Callable[[], T]) -> T:
    """What was made just now is not known to every node at once. Raises AdminError."""
    deadline = time.monotonic() + KNOWN_SECONDS
    while True:
        try:
            return ask()
        except AdminError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
