"""DescribeTopicPartitions (API key 75), version 0: topics page by page (KIP-966).

Behaviour
- No topics asked: all, by name. At most 2,000 partitions an answer; the cursor says where to go on.
- An unknown name gets its error and costs nothing of the page.

Deviations: authorized operations are always "not asked".
Upstream: DescribeTopicPartitionsRequestHandler.
"""

from headwater.broker.api.request import Request
from headwater.broker.metadata import check_name
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
)

NOT_ASKED = -(1 << 31)
MAX_PARTITIONS = 2000


class TopicRequest(Structure):
    name: String


class Cursor(Structure):
    topic_name: String
    partition_index: Int32


class DescribeTopicPartitionsRequest(Message):
    FLEXIBLE = 0
    topics: list[TopicRequest] = []
    response_partition_limit: Int32 = MAX_PARTITIONS
    cursor: Cursor | None = None


class DescribedPartition(Structure):
    error_code: Int16
    partition_index: Int32
    leader_id: Int32
    leader_epoch: Int32
    replica_nodes: list[Int32]
    isr_nodes: list[Int32]
    eligible_leader_replicas: list[Int32] | None = []
    last_known_elr: list[Int32] | None = []
    offline_replicas: list[Int32] = []


class DescribedTopic(Structure):
    error_code: Int16
    name: NullableString
    topic_id: Uuid = NO_UUID
    is_internal: Bool = False
    partitions: list[DescribedPartition] = []
    topic_authorized_operations: Int32 = NOT_ASKED


class DescribeTopicPartitionsResponse(Message):
    FLEXIBLE = 0
    throttle_time_ms: Int32 = 0
    topics: list[DescribedTopic] = []
    next_cursor: Cursor | None = None


def handle(message: DescribeTopicPartitionsRequest, request: Request) -> DescribeTopicPartitionsResponse:
    node, cursor = request.node, message.cursor
    asked = {topic.name for topic in message.topics}
    if cursor is not None and (cursor.partition_index < 0 or (asked and cursor.topic_name not in asked)):
        return DescribeTopicPartitionsResponse(
            topics=[DescribedTopic(ErrorCode.INVALID_REQUEST, name) for name in sorted(asked)]
        )
    names = sorted(asked or node.metadata.topics)
    if cursor is not None:
        names = [name for name in names if name >= cursor.topic_name]
    left = max(1, min(message.response_partition_limit, MAX_PARTITIONS))
    topics = []
    for name in names:
        known = node.metadata.topics.get(name)
        if known is None:
            topics.append(DescribedTopic(_error(name), name))
            continue
        first = cursor.partition_index if cursor is not None and cursor.topic_name == name else 0
        if left == 0 and first < known.partition_count:
            return DescribeTopicPartitionsResponse(topics=topics, next_cursor=Cursor(name, first))
        end = min(known.partition_count, first + left)
        partitions = [_partition(name, index, request) for index in range(first, end)]
        topics.append(DescribedTopic(ErrorCode.NONE, name, known.topic_id, known.is_internal, partitions))
        left -= len(partitions)
        if end < known.partition_count:
            return DescribeTopicPartitionsResponse(topics=topics, next_cursor=Cursor(name, end))
    return DescribeTopicPartitionsResponse(topics=topics)


def _error(name: str) -> ErrorCode:
    try:
        check_name(name)
    except ProtocolError as error:
        return error.code
    return ErrorCode.UNKNOWN_TOPIC_OR_PARTITION


def _partition(topic: str, index: int, request: Request) -> DescribedPartition:
    node = request.node
    me = [node.node_id]
    epoch = node.partitions[topic, index].leader_epoch
    return DescribedPartition(ErrorCode.NONE, index, node.node_id, epoch, me, me)
