"""OffsetForLeaderEpoch (API key 23), versions 2-4: where a leader epoch ended, so that a reader can notice truncation.

Behaviour
- The answer is the greatest epoch at or below the one asked for, and the offset at which the next began.

Versions: 3 adds the replica id, which only followers have; 4 is flexible.
Deviations: none known.
Upstream: LeaderEpochFileCache#endOffsetFor. Sources: KIP-101, KIP-279, KIP-320.
"""

from typing import Annotated

from headwater.broker.api.request import Request
from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.message import Int16, Int32, Int64, Message, String, Structure, since


class OffsetForLeaderPartition(Structure):
    partition: Int32
    current_leader_epoch: Int32
    leader_epoch: Int32


class OffsetForLeaderTopic(Structure):
    topic: String
    partitions: list[OffsetForLeaderPartition]


class OffsetForLeaderEpochRequest(Message):
    FLEXIBLE = 4
    replica_id: Annotated[Int32, since(3)] = -2
    topics: list[OffsetForLeaderTopic] = []


class EpochEndOffset(Structure):
    error_code: Int16
    partition: Int32
    leader_epoch: Int32 = -1
    end_offset: Int64 = -1


class OffsetForLeaderTopicResult(Structure):
    topic: String
    partitions: list[EpochEndOffset]


class OffsetForLeaderEpochResponse(Message):
    FLEXIBLE = 4
    throttle_time_ms: Int32 = 0
    topics: list[OffsetForLeaderTopicResult] = []


def handle(message: OffsetForLeaderEpochRequest, request: Request) -> OffsetForLeaderEpochResponse:
    return OffsetForLeaderEpochResponse(
        topics=[
            OffsetForLeaderTopicResult(topic.topic, [_end(topic.topic, wanted, request) for wanted in topic.partitions])
            for topic in message.topics
        ]
    )


def _end(topic: str, wanted: OffsetForLeaderPartition, request: Request) -> EpochEndOffset:
    try:
        partition = request.node.partition(topic, wanted.partition)
        partition.check_epoch(wanted.current_leader_epoch)
    except ProtocolError as error:
        return EpochEndOffset(error.code, wanted.partition)
    epoch, end = partition.log.epochs.end_offset(wanted.leader_epoch, partition.log.log_end_offset)
    return EpochEndOffset(ErrorCode.NONE, wanted.partition, epoch, end)
