"""Records inside a batch, and batches made of records: for the broker's own topics, tools and tests.

    record = length varint, attributes i8 = 0, timestamp delta varlong, offset delta varint,
             key bytes with varint length (-1: null), value likewise, header count varint, headers
    header = key string with varint length, value bytes with varint length (-1: null)

Compression covers all records of a batch. Snappy is read with and without the xerial framing that Java and Go clients
use. Source: KIP-98. Upstream: DefaultRecord, Compression.
"""

import struct
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import cramjam

from headwater.broker.wire.errors import MalformedMessage
from headwater.broker.wire.record_batch import (
    CRC_START,
    HEADER,
    HEADER_SIZE,
    LOG_APPEND_TIME,
    NO_PRODUCER,
    NO_TIMESTAMP,
    PREFIX_SIZE,
    BatchHeader,
    checksum,
    read_header,
)
from headwater.broker.wire.varint import Buffer, read_signed, write_signed

NONE, GZIP, SNAPPY, LZ4, ZSTD = range(5)
XERIAL_MAGIC = b"\x82SNAPPY\x00"
XERIAL_HEADER = 16
STREAMS = {GZIP: cramjam.gzip, LZ4: cramjam.lz4, ZSTD: cramjam.zstd}
MAX_RECORDS_BYTES = 100 << 20  # of one batch, decompressed: 1 MB of zstd can say that it is 30 GB
FIRST_ROOM_BYTES = 64 << 10


class Record(NamedTuple):
    offset: int
    timestamp: int
    """Milliseconds since 1970, -1 when there is none."""
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()


def decode_records(buffer: Buffer, position: int = 0) -> Iterator[Record]:
    """The records of the batch at `position`. Raises MalformedMessage for records that don't follow the format."""
    header = read_header(buffer, position)
    body = memoryview(buffer)[position + HEADER_SIZE : position + header.size_bytes]
    data = decompress(header.compression, body)
    at = 0
    append_time = header.attributes & LOG_APPEND_TIME
    for _ in range(header.record_count):
        size, at = read_signed(data, at)
        end = at + size
        if size < 0 or end > len(data):
            raise MalformedMessage("a record is longer than its batch")
        timestamp_delta, at = read_signed(data, at + 1)
        offset_delta, at = read_signed(data, at)
        key, at = _sized_bytes(data, at)
        value, at = _sized_bytes(data, at)
        count, at = read_signed(data, at)
        if count < 0 or count > len(data) - at:
            raise MalformedMessage("a record has a wrong count of headers")
        headers = []
        for _ in range(count):
            name, at = _sized_bytes(data, at)
            content, at = _sized_bytes(data, at)
            headers.append(((name or b"").decode("utf-8", "replace"), content))
        if at != end:
            raise MalformedMessage("a record's length is not that of its fields")
        timestamp = header.max_timestamp if append_time else header.base_timestamp + timestamp_delta
        yield Record(header.base_offset + offset_delta, timestamp, key, value, tuple(headers))


def _sized_bytes(data: Buffer, at: int) -> tuple[bytes | None, int]:
    size, at = read_signed(data, at)
    if size < 0:
        return None, at
    end = at + size
    if end > len(data):
        raise MalformedMessage("a key, value or header is longer than its batch")
    return bytes(data[at:end]), end


class NewRecord(NamedTuple):
    """A record before it has an offset."""

    key: bytes | None
    value: bytes | None
    timestamp: int = NO_TIMESTAMP
    headers: tuple[tuple[str, bytes | None], ...] = ()


def encode_batch(
    records: Sequence[NewRecord],
    *,
    base_offset: int = 0,
    compression: int = NONE,
    producer_id: int = NO_PRODUCER,
    producer_epoch: int = -1,
    base_sequence: int = -1,
    attributes: int = 0,
) -> bytearray:
    """A batch of at least one record."""
    base_timestamp = records[0].timestamp
    data = bytearray()
    for delta, record in enumerate(records):
        data += _encode_record(record, delta, record.timestamp - base_timestamp)
    body = compress(compression, data)
    batch = bytearray(HEADER_SIZE) + body
    header = BatchHeader(
        base_offset=base_offset,
        length=len(batch) - PREFIX_SIZE,
        leader_epoch=-1,
        magic=2,
        crc=0,
        attributes=attributes | compression,
        last_offset_delta=len(records) - 1,
        base_timestamp=base_timestamp,
        max_timestamp=max(record.timestamp for record in records),
        producer_id=producer_id,
        producer_epoch=producer_epoch,
        base_sequence=base_sequence,
        record_count=len(records),
    )
    HEADER.pack_into(batch, 0, *header)
    struct.pack_into(">I", batch, CRC_START, checksum(batch, 0, len(batch)))
    return batch


def _encode_record(record: NewRecord, offset_delta: int, timestamp_delta: int) -> bytearray:
    body = bytearray(1)
    write_signed(body, timestamp_delta)
    write_signed(body, offset_delta)
    _write_sized(body, record.key)
    _write_sized(body, record.value)
    write_signed(body, len(record.headers))
    for name, content in record.headers:
        _write_sized(body, name.encode())
        _write_sized(body, content)
    out = bytearray()
    write_signed(out, len(body))
    return out + body


def _write_sized(out: bytearray, data: bytes | None) -> None:
    if data is None:
        write_signed(out, -1)
    else:
        write_signed(out, len(data))
        out += data


def compress(codec: int, data: bytes | bytearray) -> bytes:
    if codec == NONE:
        return bytes(data)
    if codec == GZIP:
        return bytes(cramjam.gzip.compress(data))
    if codec == SNAPPY:
        return bytes(cramjam.snappy.compress_raw(data))
    if codec == LZ4:
        return bytes(cramjam.lz4.compress(data))
    if codec == ZSTD:
        return bytes(cramjam.zstd.compress(data))
    raise ValueError(f"compression codecs are 0 to 4, not {codec}")


def decompress(codec: int, data: Buffer) -> Buffer:
    """Raises MalformedMessage for bytes that the codec can't read, or that grow beyond MAX_RECORDS_BYTES."""
    if codec == NONE:
        return data
    try:
        if codec == SNAPPY:
            return _decompress_snappy(bytes(data))
        if codec in STREAMS:
            return _decompress_stream(STREAMS[codec], data)
    except cramjam.DecompressionError as error:
        raise MalformedMessage(
            f"the records can't be decompressed into at most {MAX_RECORDS_BYTES} bytes: {error}"
        ) from None
    raise MalformedMessage(f"compression {codec} is not known")


def _decompress_stream(stream: ModuleType, data: Buffer) -> Buffer:
    """These formats don't say how much comes out: the room grows until it is enough, or too much."""
    size = max(4 * len(data), FIRST_ROOM_BYTES)
    while True:
        room = bytearray(min(size, MAX_RECORDS_BYTES))
        try:
            return memoryview(room)[: stream.decompress_into(data, room)]
        except cramjam.DecompressionError:
            if size >= MAX_RECORDS_BYTES:
                raise
        size *= 8


def _decompress_snappy(data: bytes) -> bytes:
    if not data.startswith(XERIAL_MAGIC):
        return _decompress_snappy_block(data, MAX_RECORDS_BYTES)
    out, at = bytearray(), XERIAL_HEADER
    while at + 4 <= len(data):
        (size,) = struct.unpack_from(">i", data, at)
        if size < 0 or at + 4 + size > len(data):
            raise MalformedMessage("a snappy block is longer than its batch")
        out += _decompress_snappy_block(data[at + 4 : at + 4 + size], MAX_RECORDS_BYTES - len(out))
        at += 4 + size
    return bytes(out)


def _decompress_snappy_block(data: bytes, most: int) -> bytes:
    size = cramjam.snappy.decompress_raw_len(data)
    if size > most:
        raise MalformedMessage(
            f"the records can't be decompressed into at most {MAX_RECORDS_BYTES} bytes: they are {size}"
        )
    return bytes(cramjam.snappy.decompress_raw(data))
