"""Metadata (API key 3), versions 0-13.

Behaviour
- No topics asked: all (null from version 1 on, an empty list in version 0); an empty list from version 1 on: none.
- An unknown name is created when `auto.create.topics.enable` and the client both allow it, and answered at once: one
  node needs no election that the client would have to wait for.
- Unknown ids get UNKNOWN_TOPIC_ID; when any id is given, names are ignored (KIP-516).

Versions
- 1 adds racks and the controller; 4 auto-creation on request; 7 leader epochs; 9 is flexible; 10 topic ids; 12 look-up
  by id; 13 a top-level error.

Deviations: Kafka answers UNKNOWN_TOPIC_OR_PARTITION for a topic that it is just creating; here it is there at once.
Authorized operations are always "not asked".
Upstream: kafka.server.KafkaApis#handleTopicMetadataRequest.
"""

from typing import Annotated

from headwater.broker.api.request import Request
from headwater.broker.metadata import INTERNAL_TOPICS, Topic, check_name
from headwater.broker.node import Node
from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.message import (
    NO_UUID,
    Bool,
    Int16,
    Int32,
    Message,
    NullableString,
    String,
    Structure,
    Uuid,
    nullable_since,
    since,
)

NOT_ASKED = -(1 << 31)


class MetadataRequestTopic(Structure):
    topic_id: Annotated[Uuid, since(10)] = NO_UUID
    name: NullableString = None


class MetadataRequest(Message):
    FLEXIBLE = 9
    topics: Annotated[list[MetadataRequestTopic] | None, nullable_since(1)] = None
    allow_auto_topic_creation: Annotated[Bool, since(4)] = True
    include_cluster_authorized_operations: Annotated[Bool, since(8, 10)] = False
    include_topic_authorized_operations: Annotated[Bool, since(8)] = False


class MetadataBroker(Structure):
    node_id: Int32
    host: String
    port: Int32
    rack: Annotated[NullableString, since(1)] = None


class MetadataPartition(Structure):
    error_code: Int16
    partition_index: Int32
    leader_id: Int32
    leader_epoch: Annotated[Int32, since(7)] = -1
    replica_nodes: list[Int32] = []
    isr_nodes: list[Int32] = []
    offline_replicas: Annotated[list[Int32], since(5)] = []


class MetadataTopic(Structure):
    error_code: Int16
    name: NullableString
    topic_id: Annotated[Uuid, since(10)] = NO_UUID
    is_internal: Annotated[Bool, since(1)] = False
    partitions: list[MetadataPartition] = []
    topic_authorized_operations: Annotated[Int32, since(8)] = NOT_ASKED


class MetadataResponse(Message):
    FLEXIBLE = 9
    throttle_time_ms: Annotated[Int32, since(3)] = 0
    brokers: list[MetadataBroker] = []
    cluster_id: Annotated[NullableString, since(2)] = None
    controller_id: Annotated[Int32, since(1)] = -1
    topics: list[MetadataTopic] = []
    cluster_authorized_operations: Annotated[Int32, since(8, 10)] = NOT_ASKED
    error_code: Annotated[Int16, since(13)] = 0


def handle(message: MetadataRequest, request: Request) -> MetadataResponse:
    node = request.node
    return MetadataResponse(
        brokers=[MetadataBroker(node.node_id, node.host, node.port, node.rack)],
        cluster_id=node.cluster_id,
        controller_id=node.node_id,
        topics=_topics(message, request),
    )


def _topics(message: MetadataRequest, request: Request) -> list[MetadataTopic]:
    node, wanted = request.node, message.topics
    if wanted is None or (request.version == 0 and not wanted):
        return [_known(topic, node) for topic in node.metadata.topics.values()]
    if any(topic.topic_id != NO_UUID for topic in wanted):
        if request.version < 12:
            return [MetadataTopic(ErrorCode.INVALID_REQUEST, topic.name or "", topic.topic_id) for topic in wanted]
        ids = dict.fromkeys(topic.topic_id for topic in wanted if topic.topic_id != NO_UUID)
        return [_by_id(topic_id, node) for topic_id in ids]
    names = dict.fromkeys(topic.name or "" for topic in wanted)
    return [_by_name(name, message.allow_auto_topic_creation, node) for name in names]


def _by_id(topic_id: bytes, node: Node) -> MetadataTopic:
    try:
        return _known(node.topic_of(topic_id), node)
    except ProtocolError as error:
        return MetadataTopic(error.code, None, topic_id)


def _by_name(name: str, create: bool, node: Node) -> MetadataTopic:
    try:
        if name not in node.metadata.topics:
            check_name(name)
            if create and node.config.flag("auto.create.topics.enable"):
                node.auto_create(name)
        return _known(node.metadata.topic(name), node)
    except ProtocolError as error:
        return MetadataTopic(error.code, name, is_internal=name in INTERNAL_TOPICS)


def _known(topic: Topic, node: Node) -> MetadataTopic:
    me = [node.node_id]
    return MetadataTopic(
        ErrorCode.NONE,
        topic.name,
        topic.topic_id,
        topic.is_internal,
        [
            MetadataPartition(
                ErrorCode.NONE, index, node.node_id, node.partitions[topic.name, index].leader_epoch, me, me
            )
            for index in range(topic.partition_count)
        ],
    )
