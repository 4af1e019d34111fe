"""What the cluster consists of: topics, their partitions and configs, and the producer ids that were given out.

Decide, then apply. `decide_*` look at the state and return records; `apply` is the only thing that changes it. The
records are Kafka's own metadata records, kept in the log `__cluster_metadata-0` as KRaft keeps them, so that
`kafka-dump-log --cluster-metadata-decoder` shows them; a start is `apply` over that log.

    value = frame version varint = 1, record type varint, record version varint, record (flexible)

Errors are ProtocolError with Kafka's codes and messages. Upstream: ReplicationControlManager, ConfigurationControlManager,
MetadataRecordSerde.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from headwater.broker.topic_config import InvalidConfig, check_topic_configs
from headwater.broker.wire.errors import ErrorCode, MalformedMessage, ProtocolError
from headwater.broker.wire.message import Int8, Int32, Int64, Message, NullableString, String, Uuid
from headwater.broker.wire.varint import read_unsigned, write_unsigned

METADATA_TOPIC = "__cluster_metadata"
INTERNAL_TOPICS = ("__consumer_offsets", "__transaction_state", "__share_group_state")
MAX_NAME_LENGTH = 249
MAX_PARTITIONS_PER_REQUEST = 10_000
PRODUCER_ID_BLOCK = 1000
TOPIC_RESOURCE = 2

LEGAL_NAME = re.compile(r"[a-zA-Z0-9._-]+")


class TopicRecord(Message):
    FLEXIBLE = 0
    name: String
    topic_id: Uuid


class PartitionRecord(Message):
    FLEXIBLE = 0
    partition_id: Int32
    topic_id: Uuid
    replicas: list[Int32]
    isr: list[Int32]
    removing_replicas: list[Int32]
    adding_replicas: list[Int32]
    leader: Int32
    leader_epoch: Int32
    partition_epoch: Int32


class ConfigRecord(Message):
    FLEXIBLE = 0
    resource_type: Int8
    resource_name: String
    name: String
    value: NullableString


class RemoveTopicRecord(Message):
    FLEXIBLE = 0
    topic_id: Uuid


class ProducerIdsRecord(Message):
    FLEXIBLE = 0
    broker_id: Int32
    broker_epoch: Int64
    next_producer_id: Int64


MetadataRecord = TopicRecord | PartitionRecord | ConfigRecord | RemoveTopicRecord | ProducerIdsRecord

RECORD_TYPES: dict[int, type[MetadataRecord]] = {
    2: TopicRecord,
    3: PartitionRecord,
    4: ConfigRecord,
    9: RemoveTopicRecord,
    15: ProducerIdsRecord,
}
TYPE_OF = {cls: number for number, cls in RECORD_TYPES.items()}


def encode_record(record: MetadataRecord) -> bytes:
    out = bytearray()
    write_unsigned(out, 1)
    write_unsigned(out, TYPE_OF[type(record)])
    write_unsigned(out, 0)
    return bytes(out + record.encode(0))


def decode_record(value: bytes) -> MetadataRecord:
    """Raises MalformedMessage."""
    _, position = read_unsigned(value, 0)
    number, position = read_unsigned(value, position)
    version, position = read_unsigned(value, position)
    if number not in RECORD_TYPES:
        raise MalformedMessage(f"metadata record type {number} is not known")
    return RECORD_TYPES[number].decode(value, version, position)


@dataclass(slots=True)
class Topic:
    name: str
    topic_id: bytes
    partition_count: int = 0
    configs: dict[str, str] = field(default_factory=dict)

    @property
    def is_internal(self) -> bool:
        return self.name in INTERNAL_TOPICS


class ClusterMetadata:
    def __init__(self, node_id: int) -> None:
        self.node_id = node_id
        self.topics: dict[str, Topic] = {}
        self.topics_by_id: dict[bytes, Topic] = {}
        self.next_producer_id = 0

    def apply(self, record: MetadataRecord) -> None:
        if isinstance(record, TopicRecord):
            topic = Topic(record.name, record.topic_id)
            self.topics[topic.name] = topic
            self.topics_by_id[topic.topic_id] = topic
        elif isinstance(record, PartitionRecord):
            topic = self.topics_by_id[record.topic_id]
            topic.partition_count = max(topic.partition_count, record.partition_id + 1)
        elif isinstance(record, ConfigRecord):
            configs = self.topics[record.resource_name].configs
            if record.value is None:
                configs.pop(record.name, None)
            else:
                configs[record.name] = record.value
        elif isinstance(record, RemoveTopicRecord):
            topic = self.topics_by_id.pop(record.topic_id)
            del self.topics[topic.name]
        else:
            self.next_producer_id = record.next_producer_id

    def topic(self, name: str) -> Topic:
        """Raises ProtocolError UNKNOWN_TOPIC_OR_PARTITION."""
        topic = self.topics.get(name)
        if topic is None:
            raise ProtocolError(ErrorCode.UNKNOWN_TOPIC_OR_PARTITION)
        return topic

    def decide_create(
        self, name: str, partition_count: int, configs: Mapping[str, str], topic_id: bytes
    ) -> list[MetadataRecord]:
        check_name(name)
        if name == METADATA_TOPIC:
            raise ProtocolError(ErrorCode.INVALID_REQUEST, f"Creation of internal topic {name} is prohibited.")
        if name in self.topics:
            raise ProtocolError(ErrorCode.TOPIC_ALREADY_EXISTS, f"Topic '{name}' already exists.")
        same = next((other for other in self.topics if _collides(other, name)), None)
        if same is not None:
            raise ProtocolError(
                ErrorCode.INVALID_TOPIC_EXCEPTION, f"Topic '{name}' collides with existing topic: {same}"
            )
        _check_configs(configs)
        return [
            TopicRecord(name, topic_id),
            *(ConfigRecord(TOPIC_RESOURCE, name, key, value) for key, value in configs.items()),
            *self._partitions(topic_id, 0, partition_count),
        ]

    def decide_grow(self, name: str, partition_count: int) -> list[MetadataRecord]:
        """More partitions. Raises ProtocolError INVALID_PARTITIONS when it is not an increase."""
        topic = self.topic(name)
        if partition_count == topic.partition_count:
            raise ProtocolError(ErrorCode.INVALID_PARTITIONS, f"Topic already has {partition_count} partition(s).")
        if partition_count < topic.partition_count:
            raise ProtocolError(
                ErrorCode.INVALID_PARTITIONS,
                f"The topic {name} currently has {topic.partition_count} partition(s); "
                f"{partition_count} would not be an increase.",
            )
        if partition_count - topic.partition_count > MAX_PARTITIONS_PER_REQUEST:
            raise ProtocolError(ErrorCode.POLICY_VIOLATION, "Unable to perform excessively large batch operation.")
        return self._partitions(topic.topic_id, topic.partition_count, partition_count)

    def decide_configs(self, name: str, configs: Mapping[str, str]) -> list[MetadataRecord]:
        """The topic's own configs shall be exactly these."""
        _check_configs(configs)
        topic = self.topics.get(name)
        if topic is None:
            raise ProtocolError(ErrorCode.UNKNOWN_TOPIC_OR_PARTITION, f"The topic '{name}' does not exist.")
        return [
            *(ConfigRecord(TOPIC_RESOURCE, name, key, None) for key in topic.configs if key not in configs),
            *(
                ConfigRecord(TOPIC_RESOURCE, name, key, value)
                for key, value in configs.items()
                if topic.configs.get(key) != value
            ),
        ]

    def decide_delete(self, topic: Topic) -> list[MetadataRecord]:
        return [
            *(ConfigRecord(TOPIC_RESOURCE, topic.name, key, None) for key in topic.configs),
            RemoveTopicRecord(topic.topic_id),
        ]

    def decide_producer_ids(self) -> list[MetadataRecord]:
        """The next block of producer ids is this broker's."""
        return [ProducerIdsRecord(self.node_id, 0, self.next_producer_id + PRODUCER_ID_BLOCK)]

    def _partitions(self, topic_id: bytes, first: int, end: int) -> list[MetadataRecord]:
        me = [self.node_id]
        return [PartitionRecord(index, topic_id, me, me, [], [], self.node_id, 0, 0) for index in range(first, end)]


def check_name(name: str) -> None:
    """Raises ProtocolError INVALID_TOPIC_EXCEPTION: names become folders, and Kafka's rules keep them harmless."""
    problem = None
    if not name:
        problem = "the empty string is not allowed"
    elif name in (".", ".."):
        problem = f"'{name}' is not allowed"
    elif len(name) > MAX_NAME_LENGTH:
        problem = f"the length of '{name}' is longer than the max allowed length {MAX_NAME_LENGTH}"
    elif not LEGAL_NAME.fullmatch(name):
        problem = f"'{name}' contains one or more characters other than ASCII alphanumerics, '.', '_' and '-'"
    if problem:
        raise ProtocolError(ErrorCode.INVALID_TOPIC_EXCEPTION, f"Topic name is invalid: {problem}")


def _collides(one: str, other: str) -> bool:
    return one.replace(".", "_") == other.replace(".", "_")


def _check_configs(configs: Mapping[str, str]) -> None:
    try:
        check_topic_configs(configs)
    except InvalidConfig as error:
        raise ProtocolError(ErrorCode.INVALID_CONFIG, str(error)) from None
