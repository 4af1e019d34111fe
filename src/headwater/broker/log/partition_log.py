"""The log of one partition: its segments in a row, appended to at the end, read anywhere, cut at the front.

Promise   Batches get dense offsets in the order of `append`. What was appended is read back byte for byte, but for
          base offset and leader epoch. After `flushed` the bytes survive a power cut.
Not       Who may read up to where: that is the partition's high watermark (`headwater.broker.partition`).
Errors    OSError from `append` leaves the log as it was; ENOSPC is answered to the producer, anything else ends the
          process. An OSError from syncing ends the process: nobody knows what is on the disk then.
"""

import dataclasses
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from headwater.broker.log.checkpoint import LeaderEpochs
from headwater.broker.log.file_system import File, FileSystem
from headwater.broker.log.producer_state import ProducerState
from headwater.broker.log.segment import (
    DELETED,
    INDEX,
    LOG,
    SCAN_BYTES,
    SNAPSHOT,
    TIME_INDEX,
    BatchPosition,
    OpenFiles,
    Segment,
    file_name,
)
from headwater.broker.wire.record import Record, decode_records
from headwater.broker.wire.record_batch import BASE_OFFSET_LENGTH_EPOCH, PREFIX, PREFIX_SIZE, BatchHeader

EPOCHS_FILE = "leader-epoch-checkpoint"


@dataclasses.dataclass(frozen=True, slots=True)
class LogConfig:
    """The topic configs that the log obeys, by Kafka's meanings."""

    segment_bytes: int = 1 << 30
    segment_ms: int = 7 * 24 * 3600 * 1000
    index_interval_bytes: int = 4096
    index_bytes: int = 10 * 1024 * 1024
    retention_bytes: int = -1
    retention_ms: int = 7 * 24 * 3600 * 1000
    deletes: bool = True
    """`cleanup.policy` has `delete`: retention applies."""
    file_delete_delay_ms: int = 60_000


class LogPosition(NamedTuple):
    """An offset and where its batch begins."""

    offset: int
    segment_base: int
    position: int


class FlushWork(NamedTuple):
    """What must be synced so that everything before `end` is on the disk."""

    files: list[File]
    directories: list[Path]
    end: LogPosition


class TimestampOffset(NamedTuple):
    timestamp: int
    offset: int


class PartitionLog:
    def __init__(
        self,
        directory: Path,
        files: OpenFiles,
        config: LogConfig,
        segments: list[Segment],
        producers: ProducerState,
        epochs: LeaderEpochs,
        log_start_offset: int,
        log_end_offset: int,
    ) -> None:
        self.directory = directory
        self.config = config
        self.producers = producers
        self.epochs = epochs
        self.log_start_offset = log_start_offset
        self.log_end_offset = log_end_offset
        self.segments = segments
        self.recovery_point = log_end_offset
        """Everything before it is on the disk."""
        self._files = files
        self._bases = [segment.base_offset for segment in segments]
        self._unsynced: dict[int, File] = {}  # by the base offset of their segment
        self._unsynced_names = True  # the directory may be new

    @property
    def active(self) -> Segment:
        return self.segments[-1]

    @property
    def end(self) -> LogPosition:
        active = self.segments[-1]
        return LogPosition(self.log_end_offset, active.base_offset, active.size_bytes)

    @property
    def size_bytes(self) -> int:
        return sum(segment.size_bytes for segment in self.segments)

    @property
    def file_system(self) -> FileSystem:
        return self._files.file_system

    # Appending

    def append(self, header: BatchHeader, batch: bytearray | memoryview, now_ms: int) -> BatchHeader:
        """Write one validated batch behind the last one; its header with the offset that it got.

        The base offset and the leader epoch are written into `batch`. Raises OSError.
        """
        base_offset = self.log_end_offset
        header = header._replace(base_offset=base_offset, leader_epoch=self.epochs.latest)
        if self._must_roll(header, now_ms):
            self.roll()
        BASE_OFFSET_LENGTH_EPOCH.pack_into(batch, 0, base_offset, header.length, header.leader_epoch)
        active = self.segments[-1]
        active.append(header, batch, self.config.index_interval_bytes)
        self.log_end_offset = base_offset + header.last_offset_delta + 1
        self._unsynced[active.base_offset] = active.file
        if header.producer_id >= 0:
            self.producers.appended(header)
        return header

    def _must_roll(self, header: BatchHeader, now_ms: int) -> bool:
        """(LogSegment#shouldRoll)"""
        active, config = self.segments[-1], self.config
        if active.size_bytes == 0:
            return False
        if active.size_bytes + header.length + PREFIX_SIZE > config.segment_bytes:
            return True
        if active.first_timestamp is not None:
            now = header.max_timestamp if header.max_timestamp >= 0 else now_ms
            if now - active.first_timestamp > config.segment_ms:
                return True
        return not active.has_room(header.last_offset) or len(active.offset_index.offsets) * 8 >= config.index_bytes

    def roll(self) -> None:
        """Close the active segment and begin the next one at the log's end."""
        active = self.segments[-1]
        active.write_indexes()
        self.write_snapshot()
        segment = Segment(self.directory, self.log_end_offset, self._files)
        _ = segment.file
        active.close()
        self.segments.append(segment)
        self._bases.append(segment.base_offset)
        self._unsynced_names = True

    def write_snapshot(self) -> None:
        """An empty one says that there is nothing to remember, and spares the next start the reading."""
        path = self.directory / file_name(self.log_end_offset, SNAPSHOT)
        self.file_system.replace_file(path, self.producers.encode_snapshot())

    # Syncing

    @property
    def is_dirty(self) -> bool:
        return bool(self._unsynced)

    def begin_flush(self) -> FlushWork:
        """What is dirty now; `flushed` says that it was synced."""
        files = list(self._unsynced.values())
        self._unsynced.clear()
        directories = [self.directory, self.directory.parent] if self._unsynced_names else []
        self._unsynced_names = False
        return FlushWork(files, directories, self.end)

    def recovered(self, recovery_point: int, unsynced: list[Segment]) -> None:
        """After a crash: what was read back is in the page cache, and on the disk only when it has been synced again."""
        self.recovery_point = recovery_point
        self._unsynced = {segment.base_offset: segment.file for segment in unsynced if segment.size_bytes}

    def flushed(self, work: FlushWork) -> None:
        self.recovery_point = max(self.recovery_point, work.end.offset)

    # Reading

    def segment_of(self, offset: int) -> Segment:
        return self.segments[max(bisect_right(self._bases, offset) - 1, 0)]

    def read(self, offset: int, max_bytes: int, limit: LogPosition, at_least_one: bool) -> bytes:
        """Batches from the one that holds `offset` on, of one segment, none at or behind `limit`.

        At most `max_bytes`: the last batch may be cut off, as Kafka does, the first one never. With `at_least_one` the
        first batch comes however large it is; without, nothing comes when it doesn't fit.
        """
        if offset >= limit.offset:
            return b""
        i = max(bisect_right(self._bases, offset) - 1, 0)
        while True:
            segment = self.segments[i]
            end = limit.position if segment.base_offset == limit.segment_base else segment.size_bytes
            position = segment.position_of(offset)
            if position < end:
                break
            if segment.base_offset >= limit.segment_base:
                return b""
            i += 1  # the offset lies behind the segment's last batch: the next one has it
        data = segment.file.read(position, min(max_bytes, end - position)) if max_bytes > 0 else b""
        head = data if len(data) >= PREFIX_SIZE else segment.file.read(position, PREFIX_SIZE)
        size = PREFIX.unpack_from(head)[1] + PREFIX_SIZE
        if len(data) < size:
            return segment.file.read(position, size) if at_least_one else b""
        return data

    def batches(self, offset: int, chunk_bytes: int = SCAN_BYTES) -> Iterator[tuple[Segment, BatchPosition]]:
        """The headers of all batches from the one that holds `offset` on."""
        i = max(bisect_right(self._bases, offset) - 1, 0)
        for segment in self.segments[i:]:
            for batch in segment.scan(segment.position_of(offset), chunk_bytes):
                yield segment, batch

    def records(self, offset: int, limit: int) -> Iterator[Record]:
        """The records from `offset` on, below `limit`: for the broker's own topics."""
        for segment, (position, header) in self.batches(offset):
            if header.base_offset >= limit:
                return
            if not header.is_control:
                yield from decode_records(segment.file.read(position, header.size_bytes))

    def offset_for_time(self, timestamp: int, limit: int) -> TimestampOffset | None:
        """The first record at or after `timestamp` and below offset `limit`. (UnifiedLog#fetchOffsetByTimestamp)"""
        for segment in self.segments:
            if segment.max_timestamp < timestamp:
                continue
            start = segment.base_offset + segment.time_index.lookup(timestamp)
            for position, header in segment.scan(segment.position_of(max(start, self.log_start_offset))):
                if header.max_timestamp < timestamp:
                    continue
                for record in decode_records(segment.file.read(position, header.size_bytes)):
                    if record.offset >= limit:
                        return None
                    if record.timestamp >= timestamp and record.offset >= self.log_start_offset:
                        return TimestampOffset(record.timestamp, record.offset)
        return None

    def offset_of_max_timestamp(self) -> TimestampOffset | None:
        """The first record with the greatest timestamp of the log (KIP-734)."""
        segment = max(self.segments, key=lambda s: s.max_timestamp)
        if segment.max_timestamp < 0:
            return None
        position = segment.position_of(segment.offset_of_max_timestamp)
        header = next(segment.scan(position)).header
        for record in decode_records(segment.file.read(position, header.size_bytes)):
            if record.timestamp == segment.max_timestamp:
                return TimestampOffset(record.timestamp, record.offset)
        return None

    # Cutting off the front

    def delete_before(self, offset: int) -> list[Segment]:
        """Move the log start; segments that lie before it are renamed to `.deleted` and returned."""
        if offset <= self.log_start_offset:
            return []
        self.log_start_offset = offset
        self.epochs.truncate_before(offset)
        self.write_epochs()
        gone = []
        while len(self.segments) > 1 and self.segments[1].base_offset <= offset:
            gone.append(self.segments.pop(0))
            self._bases.pop(0)
        for segment in gone:
            self._rename_deleted(segment)
        return gone

    def _rename_deleted(self, segment: Segment) -> None:
        path = self.directory / file_name(segment.base_offset, LOG)
        self._files.forget(path)
        self._unsynced.pop(segment.base_offset, None)
        for suffix in (LOG, INDEX, TIME_INDEX):
            name = self.directory / file_name(segment.base_offset, suffix)
            if self.file_system.exists(name):
                self.file_system.rename(name, self.directory / (name.name + DELETED))
        self.file_system.remove(self.directory / file_name(segment.base_offset, SNAPSHOT))

    def remove_deleted(self, segment: Segment) -> None:
        """`file.delete.delay.ms` is over."""
        for suffix in (LOG, INDEX, TIME_INDEX):
            self.file_system.remove(self.directory / (file_name(segment.base_offset, suffix) + DELETED))

    # Epochs and the end

    def begin_epoch(self, epoch: int) -> None:
        self.epochs.begin(epoch, self.log_end_offset)
        if epoch == 0:  # a crash that takes it takes nothing: a log without epochs begins with 0
            self.file_system.write_file(self.directory / EPOCHS_FILE, self.epochs.encode())
        else:
            self.write_epochs()

    def write_epochs(self) -> None:
        self.file_system.replace_file(self.directory / EPOCHS_FILE, self.epochs.encode())

    def close(self) -> None:
        """A clean stop: indexes and producer snapshot are written. The caller has flushed before."""
        if self.active.size_bytes:
            self.active.write_indexes()
        self.write_snapshot()

    def forget_files(self) -> None:
        for segment in self.segments:
            self._files.forget(self.directory / file_name(segment.base_offset, LOG))
