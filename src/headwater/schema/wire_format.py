"""How a value names its schema: Confluent's wire format.

    00  id (4 bytes, big endian)  data                      Avro, JSON Schema
    00  id  indexes  data                                   Protobuf: which message of the file

The indexes lead from the file to the message: the count and each index as zigzag varints; the first message of the file,
[0], is a single zero byte.
"""

import struct
from collections.abc import Sequence

MAGIC = 0
HEADER_BYTES = 5
MAX_INDEXES = 100
_header = struct.Struct(">bI")


class NotFramed(ValueError):
    """The value doesn't begin with a schema's id."""


def frame(id: int, data: bytes) -> bytes:
    return _header.pack(MAGIC, id) + data


def unframe(value: bytes) -> tuple[int, bytes]:
    """The schema's id, and what is behind it. Raises NotFramed."""
    if len(value) < HEADER_BYTES or value[0] != MAGIC:
        raise NotFramed(f"the value begins with {value[:HEADER_BYTES]!r}, not with 0 and the id of a schema")
    return _header.unpack_from(value)[1], value[HEADER_BYTES:]


def encode_indexes(indexes: Sequence[int]) -> bytes:
    if list(indexes) == [0]:
        return b"\0"
    return b"".join(_varint(number) for number in (len(indexes), *indexes))


def decode_indexes(data: bytes) -> tuple[list[int], bytes]:
    """The indexes, and what is behind them. Raises NotFramed."""
    count, at = _read_varint(data, 0)
    if count == 0:
        return [0], data[at:]
    if not 0 < count <= MAX_INDEXES:
        raise NotFramed(f"{count} message indexes")
    indexes = []
    for _ in range(count):
        index, at = _read_varint(data, at)
        indexes.append(index)
    return indexes, data[at:]


def _varint(number: int) -> bytes:
    number = number << 1 if number >= 0 else (-number << 1) - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise NotFramed("the message indexes are cut off")
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return (number >> 1) ^ -(number & 1), at
