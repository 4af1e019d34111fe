"""Produce (API key 0), requests and responses of versions 3 to 13, written by hand: every record comes through here.

    request  = [transactional_id], acks i16, timeout_ms i32, topics: name (13: topic id), partitions: index i32, records
    response = topics: name (13: topic id), partitions: index i32, error_code i16, base_offset i64,
               log_append_time_ms i64, log_start_offset i64 (5+), record_errors, error_message (8+); throttle_time_ms i32

Flexible from version 9. The records are views into the frame: nothing is copied.
"""

import struct
from typing import NamedTuple

from headwater.broker.wire.errors import ErrorCode, MalformedMessage
from headwater.broker.wire.varint import read_unsigned, skip_tags, write_unsigned

FLEXIBLE = 9
TOPIC_IDS = 13

ACKS_TIMEOUT = struct.Struct(">hi")
INT16 = struct.Struct(">h")
INT32 = struct.Struct(">i")
PARTITION_ANSWER = struct.Struct(">ihqq")  # index, error code, base offset, log append time
INT64 = struct.Struct(">q")


class PartitionRecords(NamedTuple):
    partition: int
    records: memoryview | None


class TopicRecords(NamedTuple):
    topic: str | bytes
    """The name; from version 13 on the topic id, 16 bytes."""
    partitions: list[PartitionRecords]


class ProduceRequest(NamedTuple):
    transactional_id: str | None
    acks: int
    timeout_ms: int
    topics: list[TopicRecords]


class PartitionAnswer(NamedTuple):
    partition: int
    error_code: int = ErrorCode.NONE
    base_offset: int = -1
    log_append_time_ms: int = -1
    log_start_offset: int = -1
    error_message: str | None = None
    record_errors: tuple[tuple[int, str], ...] = ()
    """(index in the batch, what is wrong) of the records that a compacted topic refuses."""


class TopicAnswer(NamedTuple):
    topic: str | bytes
    partitions: list[PartitionAnswer]


def decode_request(frame: memoryview, version: int, position: int) -> ProduceRequest:
    """Raises MalformedMessage."""
    try:
        if version >= FLEXIBLE:
            return _decode_flexible(frame, version, position)
        return _decode_classic(frame, position)
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise MalformedMessage(f"Produce version {version}: {error}") from None


def _decode_classic(frame: memoryview, position: int) -> ProduceRequest:
    size = len(frame)
    transactional_id, position = _string(frame, position)
    acks, timeout_ms = ACKS_TIMEOUT.unpack_from(frame, position)
    (topic_count,) = INT32.unpack_from(frame, position + 6)
    position += 10
    if topic_count < 0:
        raise MalformedMessage("the list of topics is null")
    topics = []
    for _ in range(topic_count):
        name, position = _string(frame, position)
        (partition_count,) = INT32.unpack_from(frame, position)
        position += 4
        partitions = []
        for _ in range(partition_count):
            (index,) = INT32.unpack_from(frame, position)
            (length,) = INT32.unpack_from(frame, position + 4)
            position += 8
            records = None
            if length >= 0:
                end = position + length
                if end > size:
                    raise MalformedMessage("the records are longer than the request")
                records, position = frame[position:end], end
            partitions.append(PartitionRecords(index, records))
        topics.append(TopicRecords(name or "", partitions))
    return ProduceRequest(transactional_id, acks, timeout_ms, topics)


def _decode_flexible(frame: memoryview, version: int, position: int) -> ProduceRequest:
    size = len(frame)
    transactional_id, position = _compact_string(frame, position)
    acks, timeout_ms = ACKS_TIMEOUT.unpack_from(frame, position)
    topic_count, position = read_unsigned(frame, position + 6)
    if topic_count == 0:
        raise MalformedMessage("the list of topics is null")
    topics = []
    for _ in range(topic_count - 1):
        name: str | bytes | None
        if version >= TOPIC_IDS:
            name, position = bytes(frame[position : position + 16]), position + 16
        else:
            name, position = _compact_string(frame, position)
        partition_count, position = read_unsigned(frame, position)
        partitions = []
        for _ in range(partition_count - 1):
            (index,) = INT32.unpack_from(frame, position)
            length, position = read_unsigned(frame, position + 4)
            records = None
            if length:
                end = position + length - 1
                if end > size:
                    raise MalformedMessage("the records are longer than the request")
                records, position = frame[position:end], end
            position = skip_tags(frame, position)
            partitions.append(PartitionRecords(index, records))
        position = skip_tags(frame, position)
        topics.append(TopicRecords(name or "", partitions))
    skip_tags(frame, position)
    return ProduceRequest(transactional_id, acks, timeout_ms, topics)


def _string(frame: memoryview, position: int) -> tuple[str | None, int]:
    (length,) = INT16.unpack_from(frame, position)
    position += 2
    if length < 0:
        return None, position
    if position + length > len(frame):
        raise MalformedMessage("a string is longer than the request")
    return str(frame[position : position + length], "utf-8"), position + length


def _compact_string(frame: memoryview, position: int) -> tuple[str | None, int]:
    length, position = read_unsigned(frame, position)
    if length == 0:
        return None, position
    end = position + length - 1
    if end > len(frame):
        raise MalformedMessage("a string is longer than the request")
    return str(frame[position:end], "utf-8"), end


def encode_response(topics: list[TopicAnswer], version: int) -> bytearray:
    return _encode_flexible(topics, version) if version >= FLEXIBLE else _encode_classic(topics, version)


def _encode_classic(topics: list[TopicAnswer], version: int) -> bytearray:
    out = bytearray(INT32.pack(len(topics)))
    for topic, partitions in topics:
        name = topic.encode() if isinstance(topic, str) else topic
        out += INT16.pack(len(name))
        out += name
        out += INT32.pack(len(partitions))
        for answer in partitions:
            out += PARTITION_ANSWER.pack(
                answer.partition, answer.error_code, answer.base_offset, answer.log_append_time_ms
            )
            if version >= 5:
                out += INT64.pack(answer.log_start_offset)
            if version >= 8:
                out += INT32.pack(len(answer.record_errors))
                for index, message in answer.record_errors:
                    out += INT32.pack(index)
                    _write_string(out, message)
                _write_string(out, answer.error_message)
    out += INT32.pack(0)  # throttle_time_ms: nothing is throttled
    return out


def _write_string(out: bytearray, text: str | None) -> None:
    if text is None:
        out += INT16.pack(-1)
    else:
        data = text.encode()
        out += INT16.pack(len(data))
        out += data


def _encode_flexible(topics: list[TopicAnswer], version: int) -> bytearray:
    out = bytearray()
    write_unsigned(out, len(topics) + 1)
    for topic, partitions in topics:
        if version >= TOPIC_IDS:
            assert isinstance(topic, bytes)
            out += topic
        else:
            _write_compact_string(out, topic)
        write_unsigned(out, len(partitions) + 1)
        for answer in partitions:
            out += PARTITION_ANSWER.pack(
                answer.partition, answer.error_code, answer.base_offset, answer.log_append_time_ms
            )
            out += INT64.pack(answer.log_start_offset)
            write_unsigned(out, len(answer.record_errors) + 1)
            for index, message in answer.record_errors:
                out += INT32.pack(index)
                _write_compact_string(out, message)
                out.append(0)
            _write_compact_string(out, answer.error_message)
            out.append(0)
        out.append(0)
    out += INT32.pack(0)
    out.append(0)
    return out


def _write_compact_string(out: bytearray, text: str | bytes | None) -> None:
    if text is None:
        out.append(0)
    else:
        data = text.encode() if isinstance(text, str) else text
        write_unsigned(out, len(data) + 1)
        out += data
