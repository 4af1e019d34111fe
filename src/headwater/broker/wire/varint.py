"""Variable-length integers: unsigned (flexible messages, KIP-482) and zig-zag (records, KIP-98)."""

from headwater.broker.wire.errors import MalformedMessage

Buffer = bytes | bytearray | memoryview

MAX_BYTES = 10  # a 64-bit integer in groups of seven bits


def read_unsigned(buffer: Buffer, position: int) -> tuple[int, int]:
    """The integer at `position` and the position behind it."""
    value = shift = 0
    for _ in range(MAX_BYTES):
        try:
            byte = buffer[position]
        except IndexError:
            raise MalformedMessage("the message ends inside an integer") from None
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise MalformedMessage("an integer is longer than 10 bytes")


def read_signed(buffer: Buffer, position: int) -> tuple[int, int]:
    """The zig-zag integer at `position` and the position behind it."""
    value, position = read_unsigned(buffer, position)
    return (value >> 1) ^ -(value & 1), position


def write_unsigned(out: bytearray, value: int) -> None:
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def write_signed(out: bytearray, value: int) -> None:
    write_unsigned(out, value << 1 if value >= 0 else (-value << 1) - 1)


def skip_tags(buffer: Buffer, position: int) -> int:
    """The position behind tagged fields that nobody here knows (KIP-482)."""
    count, position = read_unsigned(buffer, position)
    for _ in range(count):
        _, position = read_unsigned(buffer, position)
        size, position = read_unsigned(buffer, position)
        position += size
    if position > len(buffer):
        raise MalformedMessage("a tagged field is longer than the message")
    return position
