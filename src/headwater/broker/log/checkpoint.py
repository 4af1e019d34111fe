"""Kafka's small text files: per log directory and per partition.

    offsets      = "0\\n", count, "\\n", (topic, " ", partition, " ", offset, "\\n")*
    leader epochs = "0\\n", count, "\\n", (epoch, " ", start offset, "\\n")*

The offset files are `recovery-point-offset-checkpoint` (everything before is on the disk),
`log-start-offset-checkpoint`, `replication-offset-checkpoint` (high watermarks). Each is replaced as a whole.
`partition.metadata` carries the topic id, `meta.properties` the directory's identity.
Upstream: OffsetCheckpointFile, LeaderEpochCheckpointFile, PartitionMetadataFile.
"""

import base64
from bisect import bisect_right
from collections.abc import Mapping
from typing import NamedTuple

VERSION = "0"


class CorruptCheckpoint(ValueError):
    """A checkpoint that can't be read. It holds hints only: the caller goes on without it."""


TopicPartition = tuple[str, int]


def encode_offsets(offsets: Mapping[TopicPartition, int]) -> bytes:
    lines = [f"{topic} {partition} {offset}" for (topic, partition), offset in sorted(offsets.items())]
    return "\n".join([VERSION, str(len(lines)), *lines, ""]).encode()


def decode_offsets(data: bytes) -> dict[TopicPartition, int]:
    """Raises CorruptCheckpoint."""
    rows = _rows(data, 3)
    return {(topic, int(partition)): int(offset) for topic, partition, offset in rows}


class EpochStart(NamedTuple):
    epoch: int
    start_offset: int


class LeaderEpochs:
    """The leader epochs of a partition and the offsets that they began at (KIP-101)."""

    def __init__(self, entries: list[EpochStart]) -> None:
        self.entries = entries

    @property
    def latest(self) -> int:
        return self.entries[-1].epoch if self.entries else -1

    def begin(self, epoch: int, start_offset: int) -> None:
        """An epoch that holds no record is taken over by the next, as in Kafka."""
        while self.entries and self.entries[-1].start_offset >= start_offset:
            self.entries.pop()
        self.entries.append(EpochStart(epoch, start_offset))

    def truncate_before(self, offset: int) -> None:
        """The log starts at `offset` now: the epoch there begins there."""
        i = bisect_right([entry.start_offset for entry in self.entries], offset) - 1
        if i >= 0 and self.entries[i].start_offset < offset:
            self.entries = [EpochStart(self.entries[i].epoch, offset), *self.entries[i + 1 :]]

    def epoch_of(self, offset: int) -> int:
        i = bisect_right([entry.start_offset for entry in self.entries], offset) - 1
        return self.entries[i].epoch if i >= 0 else -1

    def end_offset(self, epoch: int, log_end_offset: int) -> tuple[int, int]:
        """(the greatest epoch at or below `epoch`, the offset at which the next one begins); (-1, -1) if there is none.

        (LeaderEpochFileCache#endOffsetFor)
        """
        if not self.entries or epoch < 0:
            return -1, -1
        if epoch == self.latest:
            return epoch, log_end_offset
        i = bisect_right([entry.epoch for entry in self.entries], epoch)
        if i == len(self.entries):
            return -1, -1
        if i == 0:
            return epoch, self.entries[0].start_offset
        return self.entries[i - 1].epoch, self.entries[i].start_offset

    def encode(self) -> bytes:
        lines = [f"{entry.epoch} {entry.start_offset}" for entry in self.entries]
        return "\n".join([VERSION, str(len(lines)), *lines, ""]).encode()

    @classmethod
    def decode(cls, data: bytes) -> "LeaderEpochs":
        """Raises CorruptCheckpoint."""
        return cls([EpochStart(int(epoch), int(offset)) for epoch, offset in _rows(data, 2)])


def _rows(data: bytes, columns: int) -> list[list[str]]:
    try:
        lines = data.decode().split("\n")
        if lines[0] != VERSION:
            raise CorruptCheckpoint(f"the checkpoint has version {lines[0]!r}, not {VERSION}")
        rows = [line.split(" ") for line in lines[2:] if line]
        if len(rows) != int(lines[1]) or any(len(row) != columns for row in rows):
            raise CorruptCheckpoint("the checkpoint's count is not that of its lines")
        for row in rows:
            for number in row[-2:]:
                int(number)
    except (UnicodeDecodeError, IndexError, ValueError) as error:
        raise CorruptCheckpoint(str(error)) from None
    return rows


def encode_uuid(value: bytes) -> str:
    """Kafka writes its UUIDs in base64url without padding."""
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def decode_uuid(text: str) -> bytes:
    value = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if len(value) != 16:
        raise CorruptCheckpoint(f"{text!r} is not a UUID")
    return value


def encode_partition_metadata(topic_id: bytes) -> bytes:
    return f"version: 0\ntopic_id: {encode_uuid(topic_id)}".encode()


def decode_topic_id(data: bytes) -> bytes | None:
    """The topic id of a `partition.metadata` file; None for one that a crash left empty or cut off."""
    for line in data.decode("utf-8", "replace").splitlines():
        name, _, value = line.partition(":")
        if name == "topic_id":
            try:
                return decode_uuid(value.strip())
            except ValueError:
                return None
    return None


def encode_properties(properties: Mapping[str, str]) -> bytes:
    return "".join(f"{name}={value}\n" for name, value in properties.items()).encode()


def decode_properties(data: bytes) -> dict[str, str]:
    """A Java properties file without continuation lines or escapes: name=value, comments with # or !."""
    properties = {}
    for line in data.decode().splitlines():
        text = line.strip()
        if text and text[0] not in "#!":
            name, _, value = text.partition("=")
            properties[name.strip()] = value.strip()
    return properties
