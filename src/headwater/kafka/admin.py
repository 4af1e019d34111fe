"""Administration through Kafka's own requests: topics, groups, offsets. Works on any Kafka."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from confluent_kafka import (
    OFFSET_INVALID,
    ConsumerGroupTopicPartitions,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ClusterMetadata,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    OffsetSpec,
    ResourceType,
)

from headwater.kafka.client_config import for_admin
from headwater.settings import Settings

TIMEOUT_SECONDS = 15.0
ALREADY_EXISTS = 36
PASSING = (
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
)
"""Refusals that end by themselves, soon: after an election, of a topic that was made just now."""
PASSING_SECONDS = 5.0
PASSING_PAUSE_SECONDS = 0.1

K = TypeVar("K")
UNKNOWN_TOPIC = 3


LASTING = {"metadata.recovery.strategy": "none"}
"""After an outage the client would otherwise forget all nodes and learn them anew, but send what is for a group's coordinator to
the one it has forgotten: no answer, ever (librdkafka 2.16)."""


class AdminError(Exception):
    """The cluster refused, or could not be reached; the message says what and why."""


class NotReachable(AdminError):
    """No broker answered."""


class TopicDescription(NamedTuple):
    name: str
    topic_id: str
    partitions: list["PartitionDescription"]
    is_internal: bool


class PartitionDescription(NamedTuple):
    partition: int
    leader: int
    replicas: list[int]
    in_sync_replicas: list[int]


class ConfigValue(NamedTuple):
    value: str
    is_default: bool


class GroupMember(NamedTuple):
    member_id: str
    client_id: str
    host: str
    instance_id: str | None
    partitions: list[tuple[str, int]]


class GroupDescription(NamedTuple):
    group: str
    state: str
    assignor: str
    members: list[GroupMember]


class CommittedPosition(NamedTuple):
    offset: int
    metadata: str


class KafkaAdmin:
    def __init__(self, settings: Settings) -> None:
        self._servers = settings.bootstrap_servers
        self._client = AdminClient(
            {"bootstrap.servers": settings.bootstrap_servers, **LASTING, "log_level": 0, **for_admin(settings.kafka)}
        )

    def check_reachable(self, seconds: float = 5.0) -> None:
        """Raises NotReachable."""
        self._metadata(seconds)

    # Topics

    def topic_names(self) -> list[str]:
        return sorted(self._metadata().topics)

    def describe_topics(self, names: Sequence[str]) -> list[TopicDescription]:
        """Raises AdminError for an unknown one."""
        found = []
        answers = self._ask(lambda: self._client.describe_topics(TopicCollection(list(names))), "the topic {}")
        for topic in answers.values():
            partitions = [
                PartitionDescription(
                    each.id,
                    each.leader.id if each.leader is not None else -1,
                    [node.id for node in each.replicas],
                    [node.id for node in each.isr],
                )
                for each in topic.partitions
            ]
            found.append(TopicDescription(topic.name, str(topic.topic_id), partitions, topic.is_internal))
        return found

    def partition_counts(self) -> dict[str, int]:
        return {name: len(topic.partitions) for name, topic in self._metadata().topics.items()}

    def broker_count(self) -> int:
        return len(self._metadata().brokers)

    def create_topic(
        self, name: str, partitions: int = -1, replication_factor: int = -1, configs: Mapping[str, str] | None = None
    ) -> bool:
        """False when it was there already. Raises AdminError."""
        if partitions < -1 or replication_factor < -1 or not name:
            raise AdminError(
                f"a topic has a name, and at least 1 partition and replica, or -1 for the default: {name!r}."
            )
        topic = NewTopic(name, partitions, replication_factor, config=dict(configs or {}))
        try:
            self._client.create_topics([topic], operation_timeout=TIMEOUT_SECONDS)[name].result(TIMEOUT_SECONDS)
        except KafkaException as error:
            if error.args[0].code() == ALREADY_EXISTS:
                return False
            raise AdminError(f"the topic {name} can't be created: {error.args[0].str()}") from None
        except TimeoutError:
            raise NotReachable(f"no answer from {self._servers} within {TIMEOUT_SECONDS:.0f} s") from None
        return True

    def delete_topic(self, name: str) -> None:
        """Raises AdminError."""
        self._ask(lambda: self._client.delete_topics([name]), "the topic {} can't be deleted")

    def grow_topic(self, name: str, partitions: int) -> None:
        """Raises AdminError."""
        wanted = [NewPartitions(name, partitions)]
        self._ask(lambda: self._client.create_partitions(wanted), f"the topic {{}} can't have {partitions} partitions")

    def topic_configs(self, name: str) -> dict[str, ConfigValue]:
        """Raises AdminError."""
        resource = ConfigResource(ResourceType.TOPIC, name)
        answers = self._ask(lambda: self._client.describe_configs([resource]), f"the configs of {name} can't be read")
        entries = answers[resource]
        return {
            key: ConfigValue(entry.value, entry.is_default or entry.source != 1)
            for key, entry in sorted(entries.items())
        }

    def alter_topic_configs(self, name: str, changes: Mapping[str, str | None]) -> None:
        """A value of None goes back to the default. Raises AdminError."""
        entries = [
            ConfigEntry(
                key,
                value or "",
                incremental_operation=AlterConfigOpType.DELETE if value is None else AlterConfigOpType.SET,
            )
            for key, value in changes.items()
        ]
        resource = ConfigResource(ResourceType.TOPIC, name, incremental_configs=entries)
        self._ask(lambda: self._client.incremental_alter_configs([resource]), f"the configs of {name} can't be changed")

    # Offsets

    def offsets(
        self, partitions: Sequence[tuple[str, int]], spec: OffsetSpec, **options: Any
    ) -> dict[tuple[str, int], int]:
        """Those that are known, -1 where there is none at that time. Raises AdminError."""
        if not partitions:
            return {}
        wanted = {TopicPartition(topic, index): spec for topic, index in partitions}
        found = {}
        answers = self._ask(lambda: self._client.list_offsets(wanted, **options), "the offsets of {} can't be read")
        for place, answer in answers.items():
            if answer.offset == OFFSET_INVALID:  # the client's way to say that the leader's answer was lost
                raise NotReachable(
                    f"no answer about the offsets of {place.topic}-{place.partition}: its leader is away"
                )
            found[place.topic, place.partition] = answer.offset
        return found

    def end_offsets(self, partitions: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
        return self.offsets(partitions, OffsetSpec.latest())

    def last_stable_offsets(self, partitions: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
        """Where reading committed records ends now: before the first transaction that is open."""
        return self.offsets(partitions, OffsetSpec.latest(), isolation_level=IsolationLevel.READ_COMMITTED)

    def start_offsets(self, partitions: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
        return self.offsets(partitions, OffsetSpec.earliest())

    def offsets_at(self, partitions: Sequence[tuple[str, int]], timestamp_ms: int) -> dict[tuple[str, int], int]:
        """The first offset at or after the time; the end where there is none."""
        found = self.offsets(partitions, OffsetSpec.for_timestamp(timestamp_ms))
        late = [place for place, offset in found.items() if offset < 0]
        return {**found, **self.end_offsets(late)}

    # Groups

    def group_states(self) -> dict[str, str]:
        """Raises AdminError."""
        (listing,) = self._ask(lambda: {"": self._client.list_consumer_groups()}, "the groups can't be listed").values()
        return {group.group_id: group.state.name if group.state else "" for group in listing.valid}

    def describe_group(self, group: str) -> GroupDescription:
        """Raises AdminError."""
        found = self._ask(lambda: self._client.describe_consumer_groups([group]), "the group {} can't be described")[
            group
        ]
        members = [
            GroupMember(
                member.member_id,
                member.client_id,
                member.host,
                member.group_instance_id,
                [(each.topic, each.partition) for each in member.assignment.topic_partitions]
                if member.assignment
                else [],
            )
            for member in found.members
        ]
        return GroupDescription(group, found.state.name, found.partition_assignor, members)

    def committed(self, group: str) -> dict[tuple[str, int], CommittedPosition]:
        """Raises AdminError."""
        request = [ConsumerGroupTopicPartitions(group)]
        answers = self._ask(
            lambda: self._client.list_consumer_group_offsets(request), "the offsets of {} can't be read"
        )
        found = answers[group]
        return {
            (each.topic, each.partition): CommittedPosition(each.offset, each.metadata or "")
            for each in found.topic_partitions
            if each.offset >= 0
        }

    def alter_committed(self, group: str, positions: Mapping[tuple[str, int], tuple[int, str]]) -> None:
        """To offsets with their metadata. Raises AdminError while the group has members."""
        places = [
            TopicPartition(topic, index, offset, metadata) if metadata else TopicPartition(topic, index, offset)
            for (topic, index), (offset, metadata) in positions.items()
        ]
        request = [ConsumerGroupTopicPartitions(group, places)]
        answers = self._ask(
            lambda: self._client.alter_consumer_group_offsets(request), "the offsets of {} can't be changed"
        )
        found = answers[group]
        for each in found.topic_partitions:
            if each.error is not None:
                raise AdminError(f"the offset of {each.topic}-{each.partition} can't be changed: {each.error.str()}")

    def delete_group(self, group: str) -> None:
        """Raises AdminError."""
        self._ask(lambda: self._client.delete_consumer_groups([group]), "the group {} can't be deleted")

    def _metadata(self, seconds: float = TIMEOUT_SECONDS) -> ClusterMetadata:
        """Raises NotReachable."""
        try:
            return self._client.list_topics(timeout=seconds)
        except KafkaException as error:
            raise NotReachable(
                f"no broker answers at {self._servers} ({error.args[0].str()}).\n"
                "  Start one with `headwater up`, or name yours: HEADWATER_BOOTSTRAP_SERVERS=HOST:PORT (--bootstrap-servers "
                "of the commands that have it)."
            ) from None

    def _ask(self, ask: "Callable[[], Mapping[K, Future[Any]]]", what: str) -> dict[K, Any]:
        """The answers to a request, by what was asked for; once more, for a while, when a node hasn't taken up its work yet.

        what: what an error begins with, `{}` being what was asked for. Raises AdminError.
        """
        deadline = time.monotonic() + PASSING_SECONDS
        while True:
            found = {}
            for key, future in ask().items():
                name = f"{key.topic}-{key.partition}" if isinstance(key, TopicPartition) else str(key)
                about = what.replace("{}", name)
                try:
                    found[key] = future.result(TIMEOUT_SECONDS)
                except KafkaException as error:
                    if error.args[0].code() in PASSING and time.monotonic() < deadline:
                        break
                    raise AdminError(f"{about}: {error.args[0].str()}") from None
                except TimeoutError:
                    raise NotReachable(
                        f"{about}: no answer from {self._servers} within {TIMEOUT_SECONDS:.0f} s"
                    ) from None
            else:
                return found
            time.sleep(PASSING_PAUSE_SECONDS)
