"""The sparse offset index of a segment: `00000000000000000000.index`, Kafka's format.

    file  = entry*
    entry = relative_offset i32, position i32      both big-endian; 8 bytes

An entry says: the batch at `position` ends at base offset + `relative_offset`. There is one about every
`index.interval.bytes` of batches, never more than one a batch. It has no checksum, because after a crash it is rebuilt
from the segment and never believed.

    0000002a 00001038      the batch at byte 4152 ends at base + 42

Kafka preallocates the file and cuts it when the segment is rolled; ours is as long as its entries from the start.
Upstream: org.apache.kafka.storage.internals.log.OffsetIndex.
"""

import struct
from array import array
from bisect import bisect_right

ENTRY = struct.Struct(">ii")
MAX_RELATIVE_OFFSET = (1 << 31) - 1


class OffsetIndex:
    """The entries, in two columns."""

    __slots__ = ("offsets", "positions")

    def __init__(self, data: bytes = b"") -> None:
        self.offsets = array("i")
        self.positions = array("i")
        for relative_offset, position in ENTRY.iter_unpack(data[: len(data) // ENTRY.size * ENTRY.size]):
            if self.offsets and relative_offset <= self.offsets[-1]:
                break  # the zeros behind the last entry of a preallocated file
            self.offsets.append(relative_offset)
            self.positions.append(position)

    def add(self, relative_offset: int, position: int) -> None:
        self.offsets.append(relative_offset)
        self.positions.append(position)

    def lookup(self, relative_offset: int) -> int:
        """The position of a batch at or before the one with the offset."""
        i = bisect_right(self.offsets, relative_offset)
        return self.positions[i - 1] if i else 0

    def encode(self) -> bytes:
        return b"".join(map(ENTRY.pack, self.offsets, self.positions))
