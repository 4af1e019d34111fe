"""Topics as code: what is declared beside what a cluster has, and the steps from one to the other.

    (declared, found) -> Plan -> carry_out

Nothing is deleted that the declaration doesn't name for it. What can't be changed in place, fewer partitions or another
replication factor, is a warning that says so.
"""

import re
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from headwater.event.topic import InvalidTopic, retention_ms
from headwater.kafka.admin import KafkaAdmin
from headwater.runtime.app import App
from headwater.runtime.topics import declared
from headwater.settings import InvalidSetting

REPLICATION = "replication"
MIN_REPLICAS, MAX_REPLICAS = 2, 3
VISIBLE_SECONDS = 10.0
EXEMPT = re.compile(r"__|_schemas$|.*\.(retry|dead|deadlines)$")
"""Kafka's own topics and ours, which have names of their own."""


class InvalidDeclaration(Exception):
    """A file that declares no topics; the message says where and why."""


class DeclaredTopic(msgspec.Struct, frozen=True):
    """A topic, as far as it is declared: what is None is left to the cluster."""

    name: str
    partitions: int | None = None
    replication: int | None = None
    configs: Mapping[str, str] = {}
    source: str = ""
    """Who declares it."""
    follows: bool = False
    """It is made like this, and its configs are left alone afterwards: a retry topic goes by its source as that is."""


class Declaration(msgspec.Struct, frozen=True):
    topics: tuple[DeclaredTopic, ...] = ()
    delete: tuple[str, ...] = ()
    pattern: str | None = None
    exempt: frozenset[str] = frozenset()


class FoundTopic(NamedTuple):
    partitions: int
    replication: int
    configs: Mapping[str, str]
    """All of them, with the cluster's defaults."""


class Action(StrEnum):
    CREATE = "create"
    GROW = "grow"
    CONFIGURE = "configure"
    DELETE = "delete"


class Step(NamedTuple):
    action: Action
    topic: str
    detail: str
    partitions: int | None = None
    replication: int | None = None
    configs: Mapping[str, str] = {}


class Plan(NamedTuple):
    steps: list[Step]
    warnings: list[str]
    violations: list[str]
    """Of the pattern: names that shouldn't be."""


def declared_by(app: App, source: str) -> Declaration:
    """An application's topics, its handlers' retry and dead-letter topics among them."""
    return Declaration(
        tuple(
            DeclaredTopic(name, partitions, replication, configs, source, follows=bool(EXEMPT.match(name)))
            for name, (partitions, replication, configs) in declared(app.topics, app.handlers).items()
        )
    )


def read_declaration(path: Path) -> Declaration:
    """A TOML file:

        pattern = '[a-z]+\\.(events|commands)\\.[a-z-]+'
        exempt = ["inventory-events"]
        delete = ["an-old-topic"]

        [defaults]
        replication = 3
        [defaults.configs]
        "min.insync.replicas" = 2

        [topics."orders.events.order-lifecycle"]
        partitions = 20
        retention = "1y"
        class = "events"

    Raises InvalidDeclaration.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidDeclaration(f"{path} can't be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidDeclaration(f"{path} is no TOML: {error}.") from None
    try:
        file = msgspec.convert(content, _File)
        if file.pattern is not None:
            re.compile(file.pattern)
        topics = tuple(
            _merged(name, file.defaults, msgspec.convert(given, _Topic), str(path))
            for name, given in file.topics.items()
        )
    except (msgspec.ValidationError, re.error, InvalidTopic, InvalidSetting) as error:
        raise InvalidDeclaration(f"{path}: {error}") from None
    return Declaration(topics, tuple(file.delete), file.pattern, frozenset(file.exempt))


class _Topic(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"class_": "class"}):
    partitions: int | None = None
    replication: int | None = None
    retention: str | None = None
    class_: str | None = None
    compacted: bool | None = None
    configs: dict[str, str | int | float | bool] = {}


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    topics: dict[str, Any] = {}
    defaults: _Topic = _Topic()
    delete: list[str] = []
    pattern: str | None = None
    exempt: list[str] = []


def _merged(name: str, defaults: _Topic, given: _Topic, source: str) -> DeclaredTopic:
    """What a topic says itself counts more than the defaults, whichever way it says it. Raises InvalidDeclaration, InvalidTopic,
    InvalidSetting."""
    configs = {key: _text(value) for key, value in {**defaults.configs, **given.configs}.items()}
    says_retention = given.retention is not None or given.class_ is not None
    if "retention.ms" not in given.configs:
        class_ = given.class_ or defaults.class_
        retention = given.retention or (None if given.class_ is not None else defaults.retention)
        milliseconds = retention_ms(name, retention, class_)
        if milliseconds is not None:
            configs["retention.ms"] = str(milliseconds)
    elif says_retention:
        raise InvalidDeclaration(f"{source}: {name} says twice how long it keeps records: leave out retention.ms.")
    if "cleanup.policy" not in given.configs:
        if given.compacted if given.compacted is not None else defaults.compacted:
            configs["cleanup.policy"] = "compact"
        elif given.compacted is False:
            configs["cleanup.policy"] = "delete"
    elif given.compacted is not None:
        raise InvalidDeclaration(f"{source}: {name} says twice whether it is compacted: leave out cleanup.policy.")
    return DeclaredTopic(
        name, given.partitions or defaults.partitions, given.replication or defaults.replication, configs, source
    )


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def joined(declarations: Sequence[Declaration]) -> Declaration:
    """All of them as one. Raises InvalidDeclaration where two say different things."""
    topics: dict[str, DeclaredTopic] = {}
    for declaration in declarations:
        for topic in declaration.topics:
            known = topics.setdefault(topic.name, topic)
            if msgspec.structs.replace(known, source="") != msgspec.structs.replace(topic, source=""):
                raise InvalidDeclaration(
                    f"{topic.name} is declared differently by {known.source} and by {topic.source}."
                )
    delete = tuple(name for declaration in declarations for name in declaration.delete)
    both = [name for name in delete if name in topics]
    if both:
        raise InvalidDeclaration(f"{both[0]} is declared, and to be deleted.")
    patterns = sorted({each.pattern for each in declarations if each.pattern is not None})
    if len(patterns) > 1:
        raise InvalidDeclaration(f"names shall follow two patterns: {patterns[0]} and {patterns[1]}.")
    pattern = patterns[0] if patterns else None
    exempt = frozenset().union(*(each.exempt for each in declarations)) if declarations else frozenset()
    return Declaration(tuple(topics.values()), delete, pattern, exempt)


def plan(declared: Declaration, found: Mapping[str, FoundTopic]) -> Plan:
    """What is to be done, in order."""
    steps: list[Step] = []
    warnings: list[str] = []
    for topic in declared.topics:
        steps += _steps(topic, found.get(topic.name))
        warnings += _warnings(topic, found.get(topic.name))
    steps += [Step(Action.DELETE, name, "with all its records") for name in declared.delete if name in found]
    violations = []
    if declared.pattern is not None:
        for name in sorted({topic.name for topic in declared.topics} | set(found)):
            if not EXEMPT.match(name) and name not in declared.exempt and not re.fullmatch(declared.pattern, name):
                violations.append(f"{name} doesn't follow {declared.pattern}")
    return Plan(steps, warnings, violations)


def _steps(topic: DeclaredTopic, found: FoundTopic | None) -> Iterator[Step]:
    if found is None:
        parts = [f"{topic.partitions or 'default'} partitions"]
        if topic.replication is not None:
            parts.append(f"{topic.replication} replicas")
        parts += [f"{name}={value}" for name, value in topic.configs.items()]
        yield Step(Action.CREATE, topic.name, ", ".join(parts), topic.partitions, topic.replication, topic.configs)
        return
    if topic.partitions is not None and found.partitions < topic.partitions:
        detail = f"{found.partitions} to {topic.partitions} partitions: keys go to other partitions from then on"
        yield Step(Action.GROW, topic.name, detail, topic.partitions)
    if topic.follows:
        return
    changes = {name: value for name, value in topic.configs.items() if found.configs.get(name) != value}
    if changes:
        words = [f"{name} {found.configs.get(name, 'unset')} to {value}" for name, value in changes.items()]
        yield Step(Action.CONFIGURE, topic.name, ", ".join(words), configs=changes)


def _warnings(topic: DeclaredTopic, found: FoundTopic | None) -> Iterator[str]:
    if found is not None and topic.partitions is not None and found.partitions > topic.partitions:
        yield f"{topic.name} has {found.partitions} partitions, {topic.partitions} are declared: a topic can't have fewer."
    replication = (
        topic.replication if topic.replication is not None else found.replication if found is not None else None
    )
    if found is not None and topic.replication is not None and found.replication != topic.replication:
        yield (
            f"{topic.name} has {found.replication} replicas, {topic.replication} are declared: "
            "kafka-reassign-partitions changes that."
        )
    if EXEMPT.match(topic.name):
        return  # it has as many as what it belongs to
    if replication is not None and replication < MIN_REPLICAS:
        yield f"{topic.name} has one replica: it goes with its broker. {MIN_REPLICAS} is the least, {MAX_REPLICAS} the usual."
    if replication is not None and replication > MAX_REPLICAS:
        yield f"{topic.name} has {replication} replicas: above {MAX_REPLICAS} each write costs more and little is gained."


def find(client: KafkaAdmin) -> dict[str, FoundTopic]:
    """All topics but Kafka's own. Raises AdminError."""
    names = [name for name in client.topic_names() if not name.startswith("__")]
    described = client.describe_topics(names) if names else []
    return {
        topic.name: FoundTopic(
            len(topic.partitions),
            min((len(each.replicas) for each in topic.partitions), default=0),
            {key: each.value for key, each in client.topic_configs(topic.name).items()},
        )
        for topic in described
    }


def carry_out(client: KafkaAdmin, step: Step) -> None:
    """Raises AdminError."""
    if step.action is Action.CREATE:
        client.create_topic(step.topic, step.partitions or -1, step.replication or -1, step.configs)
    elif step.action is Action.GROW:
        assert step.partitions is not None
        client.grow_topic(step.topic, step.partitions)
    elif step.action is Action.CONFIGURE:
        client.alter_topic_configs(step.topic, dict(step.configs))
        _await_configs(client, step)
    else:
        client.delete_topic(step.topic)


def _await_configs(client: KafkaAdmin, step: Step) -> None:
    """A KRaft controller answers before the brokers have read its log: a plan made now would still want the change."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while time.monotonic() < deadline:
        shown = client.topic_configs(step.topic)
        if all(name in shown and shown[name].value == value for name, value in step.configs.items()):
            return
        time.sleep(0.05)
