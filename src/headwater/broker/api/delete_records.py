"""DeleteRecords (API key 21), versions 0-2: move the log start, at most to the high watermark (-1).

Behaviour
- Internal topics are refused with INVALID_TOPIC_EXCEPTION, topics that are only compacted with POLICY_VIOLATION.
- Whole segments before the new log start are removed.

Versions: 2 is flexible.
Deviations: none known.
Upstream: ReplicaManager#deleteRecordsOnLocalLog.
"""

from headwater.broker.api.request import Request
from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.message import Int16, Int32, Int64, Message, String, Structure

HIGH_WATERMARK = -1


class DeleteRecordsRequestPartition(Structure):
    partition_index: Int32
    offset: Int64


class DeleteRecordsRequestTopic(Structure):
    name: String
    partitions: list[DeleteRecordsRequestPartition]


class DeleteRecordsRequest(Message):
    FLEXIBLE = 2
    topics: list[DeleteRecordsRequestTopic] = []
    timeout_ms: Int32 = 60000


class DeleteRecordsPartition(Structure):
    partition_index: Int32
    low_watermark: Int64 = -1
    error_code: Int16 = 0


class DeleteRecordsTopic(Structure):
    name: String
    partitions: list[DeleteRecordsPartition]


class DeleteRecordsResponse(Message):
    FLEXIBLE = 2
    throttle_time_ms: Int32 = 0
    topics: list[DeleteRecordsTopic] = []


def handle(message: DeleteRecordsRequest, request: Request) -> DeleteRecordsResponse:
    return DeleteRecordsResponse(
        topics=[
            DeleteRecordsTopic(topic.name, [_delete(topic.name, wanted, request) for wanted in topic.partitions])
            for topic in message.topics
        ]
    )


def _delete(name: str, wanted: DeleteRecordsRequestPartition, request: Request) -> DeleteRecordsPartition:
    node = request.node
    try:
        partition = node.partition(name, wanted.partition_index)
        if node.metadata.topics[name].is_internal:
            raise ProtocolError(ErrorCode.INVALID_TOPIC_EXCEPTION)
        if partition.config.compacts and not partition.config.log.deletes:
            raise ProtocolError(ErrorCode.POLICY_VIOLATION)
        end = partition.high_watermark.offset
        offset = end if wanted.offset == HIGH_WATERMARK else wanted.offset
        if not 0 <= offset <= end:
            raise ProtocolError(ErrorCode.OFFSET_OUT_OF_RANGE)
    except ProtocolError as error:
        return DeleteRecordsPartition(wanted.partition_index, error_code=error.code)
    node.delete_before(partition, offset)
    return DeleteRecordsPartition(wanted.partition_index, partition.log.log_start_offset)
