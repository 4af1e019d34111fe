"""The sparse time index of a segment: `00000000000000000000.timeindex`, Kafka's format.

    file  = entry*
    entry = timestamp i64, relative_offset i32      both big-endian; 12 bytes

An entry says: no record up to base offset + `relative_offset` is later than `timestamp`, and the batch that ends there
has it as its greatest timestamp. Timestamps and offsets both ascend strictly. Entries are added with those of the
offset index, and a last one when the segment is closed. Like the offset index it is rebuilt after a crash.

    00000190a1b2c3d4 0000002a      up to base + 42 nothing is later than that millisecond

Upstream: org.apache.kafka.storage.internals.log.TimeIndex.
"""

import struct
from array import array
from bisect import bisect_left

ENTRY = struct.Struct(">qi")


class TimeIndex:
    """The entries, in two columns."""

    __slots__ = ("offsets", "timestamps")

    def __init__(self, data: bytes = b"") -> None:
        self.timestamps = array("q")
        self.offsets = array("i")
        for timestamp, relative_offset in ENTRY.iter_unpack(data[: len(data) // ENTRY.size * ENTRY.size]):
            if self.timestamps and timestamp <= self.timestamps[-1]:
                break
            self.timestamps.append(timestamp)
            self.offsets.append(relative_offset)

    def add(self, timestamp: int, relative_offset: int) -> None:
        """An entry that would not ascend is left out."""
        if not self.timestamps or (timestamp > self.timestamps[-1] and relative_offset > self.offsets[-1]):
            self.timestamps.append(timestamp)
            self.offsets.append(relative_offset)

    def lookup(self, timestamp: int) -> int:
        """A relative offset before which every record is earlier than `timestamp`."""
        i = bisect_left(self.timestamps, timestamp)
        return self.offsets[i - 1] + 1 if i else 0

    def encode(self) -> bytes:
        return b"".join(map(ENTRY.pack, self.timestamps, self.offsets))
