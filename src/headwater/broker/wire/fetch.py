"""Fetch (API key 1), requests and responses of versions 4 to 18, written by hand: every record leaves through here.

    request  = replica_id i32 (to 14), max_wait_ms i32, min_bytes i32, max_bytes i32, isolation_level i8,
               session_id i32, session_epoch i32 (7+), topics: name (13: topic id), partitions, forgotten topics (7+),
               rack_id (11+)
    response = throttle_time_ms i32, error_code i16, session_id i32 (7+), topics: name (13: topic id), partitions

Flexible from version 12. Record bytes are not copied into the response: it is a list of buffers.
Sources: KIP-227 (sessions), KIP-320 (leader epochs), KIP-392 (racks), KIP-516 (topic ids), KIP-903, KIP-1166.
"""

import struct
from typing import NamedTuple

from headwater.broker.wire.errors import ErrorCode, MalformedMessage
from headwater.broker.wire.varint import read_unsigned, skip_tags, write_unsigned

FLEXIBLE = 12
TOPIC_IDS = 13

INT16 = struct.Struct(">h")
INT32 = struct.Struct(">i")
BODY_START = struct.Struct(">iiib")  # max wait, min bytes, max bytes, isolation level
SESSION = struct.Struct(">ii")
PARTITION_HEAD = struct.Struct(">ihqqq")  # index, error code, high watermark, last stable offset, log start offset
PARTITION_HEAD_4 = struct.Struct(">ihqq")
INT64 = struct.Struct(">q")


class PartitionFetch(NamedTuple):
    partition: int
    current_leader_epoch: int
    """-1: don't check."""
    fetch_offset: int
    max_bytes: int


class TopicFetch(NamedTuple):
    topic: str | bytes
    """The name; from version 13 on the topic id."""
    partitions: list[PartitionFetch]


class FetchRequest(NamedTuple):
    max_wait_ms: int
    min_bytes: int
    max_bytes: int
    isolation_level: int
    session_id: int
    session_epoch: int
    topics: list[TopicFetch]
    forgotten: list[tuple[str | bytes, list[int]]]


class PartitionAnswer(NamedTuple):
    partition: int
    error_code: int
    high_watermark: int
    last_stable_offset: int
    log_start_offset: int
    records: bytes | memoryview


class TopicAnswer(NamedTuple):
    topic: str | bytes
    partitions: list[PartitionAnswer]


def decode_request(frame: memoryview, version: int, position: int) -> FetchRequest:
    """Raises MalformedMessage."""
    try:
        return _decode(frame, version, position)
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise MalformedMessage(f"Fetch version {version}: {error}") from None


def _decode(frame: memoryview, version: int, position: int) -> FetchRequest:
    flexible = version >= FLEXIBLE
    if version <= 14:
        position += 4  # the replica id: only brokers have one
    max_wait_ms, min_bytes, max_bytes, isolation_level = BODY_START.unpack_from(frame, position)
    position += BODY_START.size
    session_id, session_epoch = 0, -1
    if version >= 7:
        session_id, session_epoch = SESSION.unpack_from(frame, position)
        position += SESSION.size
    layout = _partition_layout(version)
    topics = []
    count, position = _count(frame, position, flexible)
    for _ in range(count):
        topic, position = _topic(frame, position, version)
        partition_count, position = _count(frame, position, flexible)
        partitions = []
        for _ in range(partition_count):
            fields = layout.unpack_from(frame, position)
            position += layout.size
            if flexible:
                position = skip_tags(frame, position)
            epoch = fields[1] if version >= 9 else -1
            offset = fields[2] if version >= 9 else fields[1]
            partitions.append(PartitionFetch(fields[0], epoch, offset, fields[-1]))
        if flexible:
            position = skip_tags(frame, position)
        topics.append(TopicFetch(topic, partitions))
    forgotten = []
    if version >= 7:
        count, position = _count(frame, position, flexible)
        for _ in range(count):
            topic, position = _topic(frame, position, version)
            index_count, position = _count(frame, position, flexible)
            indexes = list(struct.unpack_from(f">{index_count}i", frame, position))
            position += 4 * index_count
            if flexible:
                position = skip_tags(frame, position)
            forgotten.append((topic, indexes))
    return FetchRequest(
        max_wait_ms, min_bytes, max_bytes, isolation_level, session_id, session_epoch, topics, forgotten
    )


def _partition_layout(version: int) -> struct.Struct:
    """index, [current leader epoch (9+)], fetch offset, [last fetched epoch (12+)], [log start offset (5+)], max bytes."""
    return PARTITION_LAYOUTS[12 if version >= 12 else 9 if version >= 9 else 5 if version >= 5 else 4]


PARTITION_LAYOUTS = {
    4: struct.Struct(">iqi"),
    5: struct.Struct(">iqqi"),
    9: struct.Struct(">iiqqi"),
    12: struct.Struct(">iiqiqi"),
}


def _count(frame: memoryview, position: int, flexible: bool) -> tuple[int, int]:
    if flexible:
        count, position = read_unsigned(frame, position)
        count -= 1
    else:
        (count,) = INT32.unpack_from(frame, position)
        position += 4
    if not 0 <= count <= len(frame) - position:
        raise MalformedMessage("a list is null or longer than the request")
    return count, position


def _topic(frame: memoryview, position: int, version: int) -> tuple[str | bytes, int]:
    if version >= TOPIC_IDS:
        topic_id = bytes(frame[position : position + 16])
        if len(topic_id) < 16:
            raise MalformedMessage("the request ends inside a topic id")
        return topic_id, position + 16
    if version >= FLEXIBLE:
        size, position = read_unsigned(frame, position)
        size -= 1
    else:
        (size,) = INT16.unpack_from(frame, position)
        position += 2
    if size < 0 or position + size > len(frame):
        raise MalformedMessage("a topic name is null or longer than the request")
    return str(frame[position : position + size], "utf-8"), position + size


def encode_response(
    topics: list[TopicAnswer], version: int, error_code: int = ErrorCode.NONE, session_id: int = 0
) -> list[bytes | bytearray | memoryview]:
    """The buffers of the response body, in order."""
    flexible = version >= FLEXIBLE
    buffers: list[bytes | bytearray | memoryview] = []
    out = bytearray(INT32.pack(0))  # throttle_time_ms
    if version >= 7:
        out += INT16.pack(error_code)
        out += INT32.pack(session_id)
    _write_count(out, len(topics), flexible)
    for topic, partitions in topics:
        if isinstance(topic, bytes):
            out += topic
        else:
            name = topic.encode()
            if flexible:
                write_unsigned(out, len(name) + 1)
            else:
                out += INT16.pack(len(name))
            out += name
        _write_count(out, len(partitions), flexible)
        for answer in partitions:
            _write_partition_head(out, answer, version)
            if answer.records:
                buffers.append(out)
                buffers.append(answer.records)
                out = bytearray()
            if flexible:
                out.append(0)
        if flexible:
            out.append(0)
    if flexible:
        out.append(0)
    buffers.append(out)
    return buffers


def _write_partition_head(out: bytearray, answer: PartitionAnswer, version: int) -> None:
    index, error_code, high_watermark, last_stable_offset, log_start_offset, records = answer
    if version >= 5:
        out += PARTITION_HEAD.pack(index, error_code, high_watermark, last_stable_offset, log_start_offset)
    else:
        out += PARTITION_HEAD_4.pack(index, error_code, high_watermark, last_stable_offset)
    if version >= FLEXIBLE:
        out.append(0)  # aborted transactions: null
        out += INT32.pack(-1)  # preferred read replica
        write_unsigned(out, len(records) + 1)
    else:
        out += INT32.pack(-1)
        if version >= 11:
            out += INT32.pack(-1)
        out += INT32.pack(len(records))


def _write_count(out: bytearray, count: int, flexible: bool) -> None:
    if flexible:
        write_unsigned(out, count + 1)
    else:
        out += INT32.pack(count)
