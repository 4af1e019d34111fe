"""OffsetDelete (API key 47), version 0: forget a group's offsets of some partitions (KIP-496).

Behaviour
- Offsets of topics that a member subscribes to are kept: GROUP_SUBSCRIBED_TO_TOPIC.
- A group of another kind than consumers must be empty: NON_EMPTY_GROUP.

Deviations: none known.
Upstream: OffsetMetadataManager#deleteOffsets.
"""

from headwater.broker.api.request import Request
from headwater.broker.group.offsets import OffsetKey
from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.message import Int16, Int32, Message, String, Structure


class OffsetDeleteRequestPartition(Structure):
    partition_index: Int32


class OffsetDeleteRequestTopic(Structure):
    name: String
    partitions: list[OffsetDeleteRequestPartition]


class OffsetDeleteRequest(Message):
    group_id: String
    topics: list[OffsetDeleteRequestTopic]


class OffsetDeletePartition(Structure):
    partition_index: Int32
    error_code: Int16


class OffsetDeleteTopic(Structure):
    name: String
    partitions: list[OffsetDeletePartition]


class OffsetDeleteResponse(Message):
    error_code: Int16 = 0
    throttle_time_ms: Int32 = 0
    topics: list[OffsetDeleteTopic] = []


def handle(message: OffsetDeleteRequest, request: Request) -> OffsetDeleteResponse | None:
    keys = [
        (topic.name, partition.partition_index)
        for topic in message.topics
        for partition in topic.partitions
        if (topic.name, partition.partition_index) in request.node.partitions
    ]

    def done(codes: dict[OffsetKey, int]) -> None:
        topics = [
            OffsetDeleteTopic(
                topic.name,
                [
                    OffsetDeletePartition(
                        partition.partition_index,
                        codes.get((topic.name, partition.partition_index), ErrorCode.UNKNOWN_TOPIC_OR_PARTITION),
                    )
                    for partition in topic.partitions
                ],
            )
            for topic in message.topics
        ]
        request.respond(OffsetDeleteResponse(topics=topics))

    try:
        request.node.groups.delete_offsets(message.group_id, keys, done)
    except ProtocolError as error:
        return OffsetDeleteResponse(error_code=error.code)
    return None
