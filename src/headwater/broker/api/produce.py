"""Produce (API key 0), versions 3-13; 0-2 are advertised and closed on, as Kafka does.

Behaviour
- acks=0 gets no answer; when it fails the connection is closed, because there is no other way to say so.
- acks=1 is answered when the batch is appended, acks=all when it is durable: synced where `flush.messages` is 1.
- A retry of an idempotent producer's batch is answered with the offset of the first one, and waits for it too.
- Topics are not created here: a client asks Metadata first.

Versions
- 5 adds the log start offset; 8 adds record errors (KIP-467); 9 is flexible; 13 names topics by id (KIP-516).

Deviations
- Records are read on compacted topics only; elsewhere the batch's header and checksum are what is checked.
- A transactional batch is refused with TRANSACTIONAL_ID_AUTHORIZATION_FAILED: there are no transactions yet.

Upstream: kafka.server.KafkaApis#handleProduceRequest, ReplicaManager#appendRecords, LogValidator.
"""

from headwater.broker.api.request import Request
from headwater.broker.node import OFFSETS_TOPIC, storage_error
from headwater.broker.partition import Partition, RefusedRecords
from headwater.broker.wire.errors import ErrorCode, MalformedMessage, ProtocolError
from headwater.broker.wire.produce import (
    FLEXIBLE,
    PartitionAnswer,
    PartitionRecords,
    ProduceRequest,
    TopicAnswer,
    decode_request,
    encode_response,
)

__all__ = ["FLEXIBLE", "serve"]

ALL = -1


def serve(request: Request, frame: memoryview) -> None:
    produce = decode_request(frame, request.version, request.body)
    answers: list[TopicAnswer] = []
    waits: list[tuple[Partition, int]] = []
    now_ms = request.node.clock.now_ms()
    for topic, partitions in produce.topics:
        answers.append(
            TopicAnswer(topic, [_append(topic, records, produce, request, now_ms, waits) for records in partitions])
        )
    if produce.acks == 0:
        request.connection.withdraw(request.reply)
        if any(answer.error_code for _, partitions in answers for answer in partitions):
            raise MalformedMessage("a batch with acks=0 could not be appended")
        return
    if produce.acks == ALL and waits:
        _wait(waits, request, answers)
    else:
        request.respond_buffers([encode_response(answers, request.version)])


def _wait(waits: list[tuple[Partition, int]], request: Request, answers: list[TopicAnswer]) -> None:
    """Answer when every partition is durable."""
    left = len(waits)

    def durable() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            request.respond_buffers([encode_response(answers, request.version)])

    for partition, end_offset in waits:
        partition.wait_durable(end_offset, durable)


def _append(
    topic_key: str | bytes,
    records: PartitionRecords,
    produce: ProduceRequest,
    request: Request,
    now_ms: int,
    waits: list[tuple[Partition, int]],
) -> PartitionAnswer:
    index, batch = records
    node = request.node
    log_start_offset = -1
    try:
        topic = node.topic_of(topic_key)
        partition = node.partition(topic.name, index)
        if not batch:
            raise ProtocolError(ErrorCode.INVALID_RECORD, "there is no record batch for the partition")
        if not -1 <= produce.acks <= 1:
            raise ProtocolError(ErrorCode.INVALID_REQUIRED_ACKS)
        if topic.name == OFFSETS_TOPIC:
            raise ProtocolError(ErrorCode.INVALID_TOPIC_EXCEPTION)
        log_start_offset = partition.log.log_start_offset
        appended = partition.append(batch, now_ms)
    except RefusedRecords as refusal:
        return PartitionAnswer(index, refusal.code, -1, -1, log_start_offset, refusal.message, refusal.errors)
    except ProtocolError as error:
        return PartitionAnswer(index, error.code, log_start_offset=log_start_offset, error_message=error.message)
    except OSError as error:
        return PartitionAnswer(index, storage_error(error).code)
    if produce.acks == ALL and not partition.is_durable(appended.end_offset):
        waits.append((partition, appended.end_offset))
    return PartitionAnswer(
        index, ErrorCode.NONE, appended.base_offset, appended.append_time_ms, partition.log.log_start_offset
    )
