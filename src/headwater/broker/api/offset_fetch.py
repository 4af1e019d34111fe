"""OffsetFetch (API key 9), versions 1-10: how far a group said it was.

Behaviour
- No commit is no error: offset -1. So is an unknown group.
- The answer waits until what it says is durable.
- A commit for a topic that was deleted and made again doesn't count from version 10 on, where topics have ids.

Versions
- 2 may ask for all topics (null) and has a top-level error; 5 the leader epoch; 6 is flexible; 7 `require_stable`,
  which changes nothing without transactions; 8 asks for many groups (KIP-709); 9 names the member (KIP-848); 10 topic ids.

Deviations: none known.
Upstream: OffsetMetadataManager#fetchOffsets.
"""

from typing import Annotated

from headwater.broker.api.request import Request
from headwater.broker.group.offsets import CommittedOffset, OffsetKey
from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.message import (
    NO_UUID,
    Bool,
    Int16,
    Int32,
    Int64,
    Message,
    NullableString,
    String,
    Structure,
    Uuid,
    nullable_since,
    since,
    until,
)


class OffsetFetchRequestTopic(Structure):
    name: String
    partition_indexes: list[Int32]


class OffsetFetchRequestGroupTopic(Structure):
    name: Annotated[String, until(9)] = ""
    topic_id: Annotated[Uuid, since(10)] = NO_UUID
    partition_indexes: list[Int32] = []


class OffsetFetchRequestGroup(Structure):
    group_id: String
    member_id: Annotated[NullableString, since(9)] = None
    member_epoch: Annotated[Int32, since(9)] = -1
    topics: list[OffsetFetchRequestGroupTopic] | None = None


class OffsetFetchRequest(Message):
    FLEXIBLE = 6
    group_id: Annotated[String, until(7)] = ""
    topics: Annotated[list[OffsetFetchRequestTopic] | None, until(7), nullable_since(2)] = None
    groups: Annotated[list[OffsetFetchRequestGroup], since(8)] = []
    require_stable: Annotated[Bool, since(7)] = False


class OffsetFetchPartition(Structure):
    partition_index: Int32
    committed_offset: Int64 = -1
    committed_leader_epoch: Annotated[Int32, since(5)] = -1
    metadata: NullableString = ""
    error_code: Int16 = 0


class OffsetFetchTopic(Structure):
    name: String
    partitions: list[OffsetFetchPartition]


class OffsetFetchGroupTopic(Structure):
    name: Annotated[String, until(9)] = ""
    topic_id: Annotated[Uuid, since(10)] = NO_UUID
    partitions: list[OffsetFetchPartition] = []


class OffsetFetchGroup(Structure):
    group_id: String
    topics: list[OffsetFetchGroupTopic] = []
    error_code: Int16 = 0


class OffsetFetchResponse(Message):
    FLEXIBLE = 6
    throttle_time_ms: Annotated[Int32, since(3)] = 0
    topics: Annotated[list[OffsetFetchTopic], until(7)] = []
    error_code: Annotated[Int16, since(2, 7)] = 0
    groups: Annotated[list[OffsetFetchGroup], since(8)] = []


def handle(message: OffsetFetchRequest, request: Request) -> OffsetFetchResponse | None:
    groups = message.groups
    if request.version < 8:
        topics = message.topics
        wanted = None
        if topics is not None:
            wanted = [OffsetFetchRequestGroupTopic(topic.name, NO_UUID, topic.partition_indexes) for topic in topics]
        groups = [OffsetFetchRequestGroup(message.group_id, topics=wanted)]
    found = [_group(group, request) for group in groups]
    if request.version < 8:
        response = OffsetFetchResponse(
            topics=[OffsetFetchTopic(topic.name, topic.partitions) for topic in found[0].topics]
        )
    else:
        response = OffsetFetchResponse(groups=found)
    try:
        request.node.groups.wait_durable(lambda: request.respond(response))
    except ProtocolError as error:
        if request.version < 8:
            return OffsetFetchResponse(error_code=error.code)
        return OffsetFetchResponse(groups=[OffsetFetchGroup(group.group_id, [], error.code) for group in groups])
    return None


def _group(wanted: OffsetFetchRequestGroup, request: Request) -> OffsetFetchGroup:
    group = request.node.groups.groups.get(wanted.group_id)
    offsets: dict[OffsetKey, CommittedOffset] = group.offsets if group is not None else {}
    if wanted.topics is None:
        return OffsetFetchGroup(wanted.group_id, _all_topics(offsets, request))
    return OffsetFetchGroup(wanted.group_id, [_topic(topic, offsets, request) for topic in wanted.topics])


def _all_topics(offsets: dict[OffsetKey, CommittedOffset], request: Request) -> list[OffsetFetchGroupTopic]:
    topics: dict[str, OffsetFetchGroupTopic] = {}
    for (name, index), committed in offsets.items():
        if name not in topics:
            known = request.node.metadata.topics.get(name)
            if known is None and request.version >= 10:
                continue
            topics[name] = OffsetFetchGroupTopic(name, known.topic_id if known is not None else NO_UUID, [])
        topics[name].partitions.append(_partition(index, committed))
    return list(topics.values())


def _topic(
    wanted: OffsetFetchRequestGroupTopic, offsets: dict[OffsetKey, CommittedOffset], request: Request
) -> OffsetFetchGroupTopic:
    name = wanted.name
    if request.version >= 10:
        known = request.node.metadata.topics_by_id.get(wanted.topic_id)
        if known is None:
            unknown = [
                OffsetFetchPartition(index, error_code=ErrorCode.UNKNOWN_TOPIC_ID) for index in wanted.partition_indexes
            ]
            return OffsetFetchGroupTopic("", wanted.topic_id, unknown)
        name = known.name
    partitions = []
    for index in wanted.partition_indexes:
        committed = offsets.get((name, index))
        if committed is not None and request.version >= 10 and committed.topic_id not in (NO_UUID, wanted.topic_id):
            committed = None
        partitions.append(_partition(index, committed) if committed is not None else OffsetFetchPartition(index))
    return OffsetFetchGroupTopic(name, wanted.topic_id, partitions)


def _partition(index: int, committed: CommittedOffset) -> OffsetFetchPartition:
    return OffsetFetchPartition(index, committed.offset, committed.leader_epoch, committed.metadata)
