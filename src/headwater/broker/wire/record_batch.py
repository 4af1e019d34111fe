"""Record batches: what producers send, what segments hold, what consumers get; the same bytes in all three places.

    batch = base_offset i64, length i32, partition_leader_epoch i32, magic i8 = 2, crc u32, attributes i16,
            last_offset_delta i32, base_timestamp i64, max_timestamp i64, producer_id i64, producer_epoch i16,
            base_sequence i32, record_count i32, records

`length` counts what follows it. The CRC-32C covers everything from `attributes` on, so the broker writes base offset
and leader epoch in place and leaves the producer's checksum as it is. Attributes: bits 0-2 compression, 3 timestamp
type, 4 transactional, 5 control, 6 delete horizon.

`validate` checks the header and the checksum of each batch. The records inside are not looked at, except on topics
that are compacted: reading them is what a broker in Python can't afford, and the client that wrote them checks them.
Source: KIP-98. Upstream: DefaultRecordBatch, LogValidator.
"""

import struct
from typing import NamedTuple

from crc32c import crc32c

from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.varint import Buffer

HEADER = struct.Struct(">qiibIhiqqqhii")
PREFIX = struct.Struct(">qi")  # base offset and length: enough to step over a batch
BASE_OFFSET_LENGTH_EPOCH = struct.Struct(">qii")
PREFIX_SIZE = PREFIX.size  # 12
HEADER_SIZE = HEADER.size  # 61
CRC_START = 17
ATTRIBUTES_START = 21
MAX_TIMESTAMP_START = 35

COMPRESSION = 0x07
LOG_APPEND_TIME = 0x08
TRANSACTIONAL = 0x10
CONTROL = 0x20

NO_PRODUCER = -1
NO_TIMESTAMP = -1


class BatchHeader(NamedTuple):
    """The 61 bytes before the records."""

    base_offset: int
    length: int
    leader_epoch: int
    magic: int
    crc: int
    attributes: int
    last_offset_delta: int
    base_timestamp: int
    max_timestamp: int
    producer_id: int
    producer_epoch: int
    base_sequence: int
    record_count: int

    @property
    def size_bytes(self) -> int:
        return PREFIX_SIZE + self.length

    @property
    def last_offset(self) -> int:
        return self.base_offset + self.last_offset_delta

    @property
    def last_sequence(self) -> int:
        """Sequences wrap from 2^31-1 to 0. (DefaultRecordBatch#incrementSequence)"""
        return (self.base_sequence + self.last_offset_delta) & 0x7FFFFFFF

    @property
    def compression(self) -> int:
        return self.attributes & COMPRESSION

    @property
    def is_transactional(self) -> bool:
        return bool(self.attributes & TRANSACTIONAL)

    @property
    def is_control(self) -> bool:
        return bool(self.attributes & CONTROL)


def read_header(buffer: Buffer, position: int = 0) -> BatchHeader:
    """The header at `position`; the caller has seen to it that it is there."""
    return BatchHeader._make(HEADER.unpack_from(buffer, position))


def checksum(buffer: Buffer, start: int, end: int) -> int:
    """The CRC-32C of the batch that lies at `start` to `end`."""
    return crc32c(memoryview(buffer)[start + ATTRIBUTES_START : end])


def is_intact(buffer: Buffer, position: int, header: BatchHeader) -> bool:
    end = position + header.size_bytes
    return end <= len(buffer) and header.magic == 2 and checksum(buffer, position, end) == header.crc


def validate(buffer: memoryview, max_batch_bytes: int) -> BatchHeader:
    """The header of the one batch that a produce request may have per partition.

    Raises ProtocolError with Kafka's codes, in Kafka's order: INVALID_RECORD for another magic, for more or less than
    one batch and for bad counts; MESSAGE_TOO_LARGE above `max.message.bytes`; CORRUPT_MESSAGE for a wrong checksum.
    """
    size = len(buffer)
    if size < HEADER_SIZE:
        raise ProtocolError(ErrorCode.INVALID_RECORD, f"a record batch has {HEADER_SIZE} bytes at least, not {size}")
    header = BatchHeader._make(HEADER.unpack_from(buffer))
    if not 0 <= header.magic <= 2:
        raise ProtocolError(ErrorCode.CORRUPT_MESSAGE, f"record batches have magic 2, not {header.magic}")
    if header.magic != 2:
        raise ProtocolError(
            ErrorCode.INVALID_RECORD, f"record batches have magic 2 since Kafka 0.11, not {header.magic}"
        )
    if header.length != size - PREFIX_SIZE:
        if header.length < HEADER_SIZE - PREFIX_SIZE:
            raise ProtocolError(ErrorCode.CORRUPT_MESSAGE, f"the record batch has a length of {header.length}")
        raise ProtocolError(ErrorCode.INVALID_RECORD, "a partition gets exactly one whole record batch per request")
    if header.base_offset != 0:
        raise ProtocolError(ErrorCode.INVALID_RECORD, f"the base offset of a new batch is 0, not {header.base_offset}")
    if size > max_batch_bytes:
        raise ProtocolError(
            ErrorCode.MESSAGE_TOO_LARGE, f"the record batch has {size} bytes, max.message.bytes is {max_batch_bytes}"
        )
    if crc32c(buffer[ATTRIBUTES_START:]) != header.crc:
        raise ProtocolError(ErrorCode.CORRUPT_MESSAGE, "the checksum of the record batch is wrong")
    if header.record_count < 1 or header.last_offset_delta != header.record_count - 1:
        raise ProtocolError(
            ErrorCode.INVALID_RECORD,
            f"the record batch says {header.record_count} records and a last offset delta of {header.last_offset_delta}",
        )
    if header.attributes & CONTROL:
        raise ProtocolError(ErrorCode.INVALID_RECORD, "clients don't write control batches")
    if header.producer_id >= 0 and header.base_sequence < 0:
        raise ProtocolError(ErrorCode.INVALID_RECORD, "a batch of an idempotent producer has a sequence")
    if header.attributes & COMPRESSION > 4:
        raise ProtocolError(
            ErrorCode.UNKNOWN_SERVER_ERROR, f"compression {header.compression} is not known: 0 to 4 are"
        )
    return header


def stamp_append_time(buffer: memoryview, header: BatchHeader, now_ms: int) -> BatchHeader:
    """`message.timestamp.type=LogAppendTime`: the broker's time counts for every record, and the checksum is made anew."""
    attributes = header.attributes | LOG_APPEND_TIME
    struct.pack_into(">h", buffer, ATTRIBUTES_START, attributes)
    struct.pack_into(">q", buffer, MAX_TIMESTAMP_START, now_ms)
    crc = crc32c(buffer[ATTRIBUTES_START:])
    struct.pack_into(">I", buffer, CRC_START, crc)
    return header._replace(attributes=attributes, max_timestamp=now_ms, crc=crc)
