"""CreateTopics (API key 19), versions 2-7.

Behaviour
- A topic that can't be created gets its own error and message; the others are created.
- `validate_only` checks the same and creates nothing.
- Partitions and replication factor of -1 are the broker's defaults; a manual assignment names this broker only.

Versions: 5 is flexible and answers partitions and configs (KIP-525); 7 the topic id.
Deviations: replication factors above 1 can't be had on one node: INVALID_REPLICATION_FACTOR.
Upstream: ReplicationControlManager#createTopics, ControllerApis#createTopics.
"""

from collections import Counter
from typing import Annotated

from headwater.broker.api.describe_configs import topic_entries
from headwater.broker.api.request import Request
from headwater.broker.metadata import MAX_PARTITIONS_PER_REQUEST, Topic
from headwater.broker.node import OFFSETS_CONFIGS, OFFSETS_TOPIC
from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.message import (
    NO_UUID,
    Bool,
    Int8,
    Int16,
    Int32,
    Message,
    NullableString,
    String,
    Structure,
    Uuid,
    since,
    tagged,
)


class CreatableReplicaAssignment(Structure):
    partition_index: Int32
    broker_ids: list[Int32]


class CreatableTopicConfig(Structure):
    name: String
    value: NullableString


class CreatableTopic(Structure):
    name: String
    num_partitions: Int32
    replication_factor: Int16
    assignments: list[CreatableReplicaAssignment] = []
    configs: list[CreatableTopicConfig] = []


class CreateTopicsRequest(Message):
    FLEXIBLE = 5
    topics: list[CreatableTopic] = []
    timeout_ms: Int32 = 60000
    validate_only: Bool = False


class CreatedTopicConfig(Structure):
    name: String
    value: NullableString
    read_only: Bool
    config_source: Int8
    is_sensitive: Bool


class CreatedTopic(Structure):
    name: String
    topic_id: Annotated[Uuid, since(7)] = NO_UUID
    error_code: Int16 = 0
    error_message: NullableString = None
    topic_config_error_code: Annotated[Int16, tagged(0, 5)] = 0
    num_partitions: Annotated[Int32, since(5)] = -1
    replication_factor: Annotated[Int16, since(5)] = -1
    configs: Annotated[list[CreatedTopicConfig] | None, since(5)] = []


class CreateTopicsResponse(Message):
    FLEXIBLE = 5
    throttle_time_ms: Int32 = 0
    topics: list[CreatedTopic] = []


def handle(message: CreateTopicsRequest, request: Request) -> CreateTopicsResponse:
    default = request.node.config.number("num.partitions")
    total = sum(_partition_count(topic, default) for topic in message.topics)
    repeated = {name for name, count in Counter(topic.name for topic in message.topics).items() if count > 1}
    results: dict[str, CreatedTopic] = {}
    for topic in message.topics:
        try:
            if total > MAX_PARTITIONS_PER_REQUEST:
                raise ProtocolError(ErrorCode.POLICY_VIOLATION, "Excessively large number of partitions per request.")
            if topic.name in repeated:
                raise ProtocolError(ErrorCode.INVALID_REQUEST, "Duplicate topic name.")
            results[topic.name] = _create(topic, message.validate_only, request)
        except ProtocolError as error:
            results[topic.name] = CreatedTopic(topic.name, error_code=error.code, error_message=error.message)
    return CreateTopicsResponse(topics=list(results.values()))


def _partition_count(topic: CreatableTopic, default: int) -> int:
    return len(topic.assignments) or (topic.num_partitions if topic.num_partitions != -1 else default)


def _create(topic: CreatableTopic, validate_only: bool, request: Request) -> CreatedTopic:
    node = request.node
    null_values = [config.name for config in topic.configs if config.value is None]
    if null_values:
        raise ProtocolError(
            ErrorCode.INVALID_CONFIG, f"Null value not supported for topic configs: {','.join(null_values)}"
        )
    configs = {config.name: config.value for config in topic.configs if config.value is not None}
    if topic.name == OFFSETS_TOPIC:
        configs |= OFFSETS_CONFIGS  # it would forget its offsets after a week otherwise
    count = _partition_count(topic, node.config.number("num.partitions"))
    records = node.metadata.decide_create(topic.name, max(count, 0), configs, NO_UUID)
    if topic.assignments:
        check_assignments(topic, node.node_id)
    else:
        _check_numbers(topic)
    assert records
    if validate_only:
        created = Topic(topic.name, NO_UUID, count, configs)
    else:
        created = node.create_topic(topic.name, count, configs)
    return CreatedTopic(
        topic.name,
        created.topic_id,
        num_partitions=count,
        replication_factor=1,
        configs=[
            CreatedTopicConfig(entry.name, entry.value, entry.read_only, entry.config_source, entry.is_sensitive)
            for entry in topic_entries(created, node)
        ],
    )


def _check_numbers(topic: CreatableTopic) -> None:
    factor, count = topic.replication_factor, topic.num_partitions
    if factor < -1 or factor == 0:
        raise ProtocolError(
            ErrorCode.INVALID_REPLICATION_FACTOR,
            "Replication factor must be larger than 0, or -1 to use the default value.",
        )
    if count < -1 or count == 0:
        raise ProtocolError(
            ErrorCode.INVALID_PARTITIONS, "Number of partitions was set to an invalid non-positive value."
        )
    if factor > 1:
        raise ProtocolError(
            ErrorCode.INVALID_REPLICATION_FACTOR,
            f"Unable to replicate the partition {factor} time(s): The target replication factor of {factor} cannot be "
            "reached because only 1 broker(s) are registered.",
        )


def check_assignments(topic: CreatableTopic, node_id: int) -> None:
    """Raises ProtocolError INVALID_REQUEST or INVALID_REPLICA_ASSIGNMENT."""
    for value, name in ((topic.replication_factor, "replication factor"), (topic.num_partitions, "numPartitions")):
        if value != -1:
            raise ProtocolError(
                ErrorCode.INVALID_REQUEST, f"A manual partition assignment was specified, but {name} was not set to -1."
            )
    indexes = [assignment.partition_index for assignment in topic.assignments]
    if sorted(indexes) != list(range(len(indexes))):
        raise ProtocolError(
            ErrorCode.INVALID_REPLICA_ASSIGNMENT, "partitions should be a consecutive 0-based integer sequence"
        )
    for assignment in topic.assignments:
        check_replicas(assignment.broker_ids, node_id)


def check_replicas(broker_ids: list[int], node_id: int) -> None:
    """Raises ProtocolError INVALID_REPLICA_ASSIGNMENT: this broker is the only one."""
    if not broker_ids:
        problem = "The manual partition assignment includes an empty replica list."
    elif len(set(broker_ids)) < len(broker_ids):
        problem = f"The manual partition assignment includes the broker {broker_ids[0]} more than once."
    elif broker_ids != [node_id]:
        other = next(broker_id for broker_id in broker_ids if broker_id != node_id)
        problem = f"The manual partition assignment includes broker {other}, but no such broker is registered."
    else:
        return
    raise ProtocolError(ErrorCode.INVALID_REPLICA_ASSIGNMENT, problem)
