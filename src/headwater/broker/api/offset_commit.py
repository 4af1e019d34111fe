"""OffsetCommit (API key 8), versions 2-10: how far a group is.

Behaviour
- The answer goes out when the commit is durable.
- A topic or partition that isn't there gets its own error; the others are committed.
- Without a generation (-1) anyone may commit for a group that has no members.

Versions
- 2-4 may ask for an expiry; 6 adds the leader epoch; 7 static members; 8 is flexible; 9 answers GROUP_ID_NOT_FOUND for
  an unknown group; 10 names topics by id.

Deviations: none known.
Upstream: OffsetMetadataManager#commitOffset.
"""

from typing import Annotated

from headwater.broker.api.request import Request
from headwater.broker.group.coordinator import Commit
from headwater.broker.group.offsets import CommittedOffset, OffsetKey
from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.message import (
    NO_UUID,
    Int16,
    Int32,
    Int64,
    Message,
    NullableString,
    String,
    Structure,
    Uuid,
    since,
    until,
)


class OffsetCommitRequestPartition(Structure):
    partition_index: Int32
    committed_offset: Int64
    committed_leader_epoch: Annotated[Int32, since(6)] = -1
    committed_metadata: NullableString = None


class OffsetCommitRequestTopic(Structure):
    name: Annotated[String, until(9)] = ""
    topic_id: Annotated[Uuid, since(10)] = NO_UUID
    partitions: list[OffsetCommitRequestPartition] = []


class OffsetCommitRequest(Message):
    FLEXIBLE = 8
    group_id: String
    generation_id_or_member_epoch: Int32 = -1
    member_id: String = ""
    group_instance_id: Annotated[NullableString, since(7)] = None
    retention_time_ms: Annotated[Int64, since(2, 4)] = -1
    topics: list[OffsetCommitRequestTopic] = []


class OffsetCommitPartition(Structure):
    partition_index: Int32
    error_code: Int16


class OffsetCommitTopic(Structure):
    name: Annotated[String, until(9)] = ""
    topic_id: Annotated[Uuid, since(10)] = NO_UUID
    partitions: list[OffsetCommitPartition] = []


class OffsetCommitResponse(Message):
    FLEXIBLE = 8
    throttle_time_ms: Annotated[Int32, since(3)] = 0
    topics: list[OffsetCommitTopic] = []


def handle(message: OffsetCommitRequest, request: Request) -> OffsetCommitResponse | None:
    node = request.node
    expires = node.clock.now_ms() + message.retention_time_ms if message.retention_time_ms >= 0 else -1
    commits: list[Commit] = []
    refused: dict[tuple[int, int], int] = {}  # by the topic's place in the request and the partition
    names: list[str] = []
    for place, topic in enumerate(message.topics):
        name = topic.name
        try:
            known = node.topic_of(topic.topic_id if request.version >= 10 else topic.name)
            name = known.name
        except ProtocolError as error:
            refused.update({(place, partition.partition_index): error.code for partition in topic.partitions})
            names.append(name)
            continue
        names.append(name)
        for partition in topic.partitions:
            if not 0 <= partition.partition_index < known.partition_count:
                refused[place, partition.partition_index] = ErrorCode.UNKNOWN_TOPIC_OR_PARTITION
                continue
            committed = CommittedOffset(
                partition.committed_offset,
                partition.committed_leader_epoch,
                partition.committed_metadata or "",
                expire_timestamp=expires,
                topic_id=known.topic_id,
            )
            commits.append(Commit(name, partition.partition_index, committed))

    def answer(codes: dict[OffsetKey, int], for_all: int = ErrorCode.NONE) -> OffsetCommitResponse:
        return OffsetCommitResponse(
            topics=[
                OffsetCommitTopic(
                    topic.name,
                    topic.topic_id,
                    [
                        OffsetCommitPartition(
                            partition.partition_index,
                            refused.get(
                                (place, partition.partition_index),
                                codes.get((names[place], partition.partition_index), for_all),
                            ),
                        )
                        for partition in topic.partitions
                    ],
                )
                for place, topic in enumerate(message.topics)
            ]
        )

    if not commits:
        return answer({})
    unknown_group = ErrorCode.GROUP_ID_NOT_FOUND if request.version >= 9 else ErrorCode.ILLEGAL_GENERATION
    try:
        node.groups.commit(
            message.group_id,
            message.member_id,
            message.group_instance_id,
            message.generation_id_or_member_epoch,
            commits,
            unknown_group,
            lambda codes: request.respond(answer(codes)),
        )
    except ProtocolError as error:
        return answer({}, error.code)
    return None
