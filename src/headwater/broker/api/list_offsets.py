"""ListOffsets (API key 2), versions 1-11.

Behaviour
- Timestamp -1 is the log's end as readers see it, the high watermark; -2 and -4 the log start; -3 the record with the
  greatest timestamp (KIP-734); -5 and -6 the tiers' borders, which are not there.
- Any other is a time: the first record at or after it is answered; none: offset -1, timestamp -1.
- The leader epoch of the answered record goes out with it, so that clients notice truncation.

Versions
- 2 adds the isolation level; 4 the leader epoch (KIP-320); 6 is flexible; 7 -3; 8 -4 (KIP-405); 9 -5; 10 adds a
  time-out, which nothing here needs; 11 -6.

Deviations: none known.
Upstream: kafka.server.ReplicaManager#fetchOffset, UnifiedLog#fetchOffsetByTimestamp.
"""

from collections import Counter
from typing import Annotated

from headwater.broker.api.request import Request
from headwater.broker.partition import Partition
from headwater.broker.wire.errors import ErrorCode, MalformedMessage, ProtocolError
from headwater.broker.wire.message import Int8, Int16, Int32, Int64, Message, String, Structure, since

LATEST, EARLIEST, MAX_TIMESTAMP, EARLIEST_LOCAL, LATEST_TIERED, EARLIEST_PENDING_UPLOAD = range(-1, -7, -1)
FIRST_VERSION = {
    LATEST: 1,
    EARLIEST: 1,
    MAX_TIMESTAMP: 7,
    EARLIEST_LOCAL: 8,
    LATEST_TIERED: 9,
    EARLIEST_PENDING_UPLOAD: 11,
}


class ListOffsetsRequestPartition(Structure):
    partition_index: Int32
    current_leader_epoch: Annotated[Int32, since(4)] = -1
    timestamp: Int64 = LATEST


class ListOffsetsRequestTopic(Structure):
    name: String
    partitions: list[ListOffsetsRequestPartition]


class ListOffsetsRequest(Message):
    FLEXIBLE = 6
    replica_id: Int32 = -1
    isolation_level: Annotated[Int8, since(2)] = 0
    topics: list[ListOffsetsRequestTopic] = []
    timeout_ms: Annotated[Int32, since(10)] = 0


class ListOffsetsPartition(Structure):
    partition_index: Int32
    error_code: Int16 = 0
    timestamp: Int64 = -1
    offset: Int64 = -1
    leader_epoch: Annotated[Int32, since(4)] = -1


class ListOffsetsTopic(Structure):
    name: String
    partitions: list[ListOffsetsPartition]


class ListOffsetsResponse(Message):
    FLEXIBLE = 6
    throttle_time_ms: Annotated[Int32, since(2)] = 0
    topics: list[ListOffsetsTopic] = []


def handle(message: ListOffsetsRequest, request: Request) -> ListOffsetsResponse:
    return ListOffsetsResponse(
        topics=[ListOffsetsTopic(topic.name, _partitions(topic, request)) for topic in message.topics]
    )


def _partitions(topic: ListOffsetsRequestTopic, request: Request) -> list[ListOffsetsPartition]:
    counts = Counter(wanted.partition_index for wanted in topic.partitions)
    return [_partition(topic.name, wanted, counts[wanted.partition_index], request) for wanted in topic.partitions]


def _partition(topic: str, wanted: ListOffsetsRequestPartition, count: int, request: Request) -> ListOffsetsPartition:
    index = wanted.partition_index
    try:
        if count > 1:
            raise ProtocolError(ErrorCode.INVALID_REQUEST)
        if wanted.timestamp < 0 and request.version < FIRST_VERSION.get(wanted.timestamp, request.version + 1):
            raise ProtocolError(ErrorCode.UNSUPPORTED_VERSION)
        partition = request.node.partition(topic, index)
        partition.check_epoch(wanted.current_leader_epoch)
        timestamp, offset = _look_up(partition, wanted.timestamp)
    except ProtocolError as error:
        return ListOffsetsPartition(index, error.code)
    except MalformedMessage:
        return ListOffsetsPartition(index, ErrorCode.CORRUPT_MESSAGE)
    epochs = partition.log.epochs
    epoch = epochs.latest if wanted.timestamp == LATEST else epochs.epoch_of(offset) if offset >= 0 else -1
    return ListOffsetsPartition(index, ErrorCode.NONE, timestamp, offset, epoch)


def _look_up(partition: Partition, timestamp: int) -> tuple[int, int]:
    """(timestamp, offset)"""
    log = partition.log
    if timestamp == LATEST:
        return -1, partition.high_watermark.offset
    if timestamp in (EARLIEST, EARLIEST_LOCAL):
        return -1, log.log_start_offset
    if timestamp in (LATEST_TIERED, EARLIEST_PENDING_UPLOAD):
        return -1, -1
    if timestamp == MAX_TIMESTAMP:
        found = log.offset_of_max_timestamp()
    else:
        found = log.offset_for_time(timestamp, partition.high_watermark.offset)
    if found is None or found.offset >= partition.high_watermark.offset:
        return -1, -1
    return found.timestamp, found.offset
