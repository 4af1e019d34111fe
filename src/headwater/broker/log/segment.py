"""A segment: one `.log` file with its offset and time index.

    00000000000000000042.log         record batches, one behind the other, from offset 42
    00000000000000000042.index       see offset_index
    00000000000000000042.timeindex   see time_index

The indexes of the segment that is being written live in memory. Their files are written when the segment is closed:
after a crash nobody would believe them. Files are opened when they are needed and dropped least recently used first,
so a broker with many segments stays below its limit of open files.
"""

import resource
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from headwater.broker.log.file_system import Bytes, File, FileSystem
from headwater.broker.log.offset_index import MAX_RELATIVE_OFFSET, OffsetIndex
from headwater.broker.log.time_index import TimeIndex
from headwater.broker.wire.record_batch import (
    HEADER_SIZE,
    PREFIX_SIZE,
    BatchHeader,
    read_header,
)

LOG, INDEX, TIME_INDEX, SNAPSHOT, DELETED = ".log", ".index", ".timeindex", ".snapshot", ".deleted"
SCAN_BYTES = 8 * 1024  # read at a time when looking for a batch: a little more than index.interval.bytes
RECOVERY_SCAN_BYTES = 1024 * 1024
MAX_OPEN_FILES = 8000  # and never more than half of what the process may open: clients need sockets
MAX_INDEXES = 32  # of closed segments, in memory: 5 MB each for a full gigabyte


def file_name(offset: int, suffix: str) -> str:
    """Twenty digits, so that names sort as offsets do."""
    return f"{offset:020d}{suffix}"


class OpenFiles:
    """The log files that are open, least recently used first. What is dirty is referred to by its log as well."""

    def __init__(self, file_system: FileSystem) -> None:
        self.file_system = file_system
        self._limit = min(MAX_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._files: OrderedDict[Path, File] = OrderedDict()
        self._indexed: OrderedDict[Segment, None] = OrderedDict()

    def get(self, path: Path) -> File:
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = self.file_system.open(path)
            if len(self._files) > self._limit:
                self._files.popitem(last=False)
        else:
            self._files.move_to_end(path)
        return file

    def forget(self, path: Path) -> None:
        self._files.pop(path, None)

    def used_index(self, segment: "Segment") -> None:
        """A closed segment has read its indexes: at most MAX_INDEXES have them in memory."""
        self._indexed[segment] = None
        self._indexed.move_to_end(segment)
        if len(self._indexed) > MAX_INDEXES:
            self._indexed.popitem(last=False)[0].forget_indexes()


class BatchPosition(NamedTuple):
    position: int
    header: BatchHeader


class Segment:
    def __init__(self, directory: Path, base_offset: int, files: OpenFiles, size_bytes: int = 0) -> None:
        self.base_offset = base_offset
        self.size_bytes = size_bytes
        self.first_timestamp: int | None = None
        """Of the first batch that was appended: `segment.ms` counts from it."""
        self._directory = directory
        self._path = directory / file_name(base_offset, LOG)
        self._files = files
        self._offset_index: OffsetIndex | None = OffsetIndex() if size_bytes == 0 else None
        self._time_index: TimeIndex | None = TimeIndex() if size_bytes == 0 else None
        self._bytes_since_index_entry = 0
        self._max_timestamp = -1
        self._offset_of_max_timestamp = base_offset
        self._knows_max_timestamp = size_bytes == 0
        self._is_closed = False
        self._last_append = (-1, 0)  # base offset and position of the last batch: what a waiting consumer asks for

    @property
    def file(self) -> File:
        return self._files.get(self._path)

    @property
    def offset_index(self) -> OffsetIndex:
        if self._offset_index is None:
            self._offset_index = OffsetIndex(self._read_index(INDEX))
            self._used_index()
        return self._offset_index

    @property
    def time_index(self) -> TimeIndex:
        if self._time_index is None:
            index = self._time_index = TimeIndex(self._read_index(TIME_INDEX))
            if index.timestamps and not self._knows_max_timestamp:
                self._max_timestamp = index.timestamps[-1]
                self._offset_of_max_timestamp = self.base_offset + index.offsets[-1]
            self._knows_max_timestamp = True
            self._used_index()
            return index
        return self._time_index

    def _used_index(self) -> None:
        if self._is_closed:
            self._files.used_index(self)

    def forget_indexes(self) -> None:
        """They are read from their files again when they are needed."""
        if self._is_closed:
            self._offset_index = self._time_index = None

    @property
    def max_timestamp(self) -> int:
        """The greatest timestamp of its batches, -1 when it has none."""
        if not self._knows_max_timestamp:
            _ = self.time_index
        return self._max_timestamp

    @property
    def offset_of_max_timestamp(self) -> int:
        """The last offset of the batch with the greatest timestamp."""
        if not self._knows_max_timestamp:
            _ = self.time_index
        return self._offset_of_max_timestamp

    def _read_index(self, suffix: str) -> bytes:
        path = self._directory / file_name(self.base_offset, suffix)
        return self._files.file_system.read_file(path) if self._files.file_system.exists(path) else b""

    def has_room(self, last_offset: int) -> bool:
        """Whether the offset can be written relative to the base offset."""
        return last_offset - self.base_offset <= MAX_RELATIVE_OFFSET

    def append(self, header: BatchHeader, data: Bytes, index_interval_bytes: int) -> None:
        """One stamped batch. Raises OSError, and then nothing has changed."""
        position = self.size_bytes
        self.file.append(data)
        self.size_bytes = position + len(data)
        if self.first_timestamp is None:
            self.first_timestamp = header.max_timestamp
        self._last_append = (header.base_offset, position)
        self._index(header, position, index_interval_bytes)

    def _index(self, header: BatchHeader, position: int, index_interval_bytes: int) -> None:
        last_offset = header.base_offset + header.last_offset_delta
        if header.max_timestamp > self._max_timestamp:
            self._max_timestamp = header.max_timestamp
            self._offset_of_max_timestamp = last_offset
        if self._bytes_since_index_entry > index_interval_bytes:
            self.offset_index.add(last_offset - self.base_offset, position)
            self.time_index.add(self._max_timestamp, self._offset_of_max_timestamp - self.base_offset)
            self._bytes_since_index_entry = 0
        self._bytes_since_index_entry += header.length + PREFIX_SIZE

    def rebuild_indexes(self, batches: Iterator[BatchPosition], index_interval_bytes: int) -> Iterator[BatchPosition]:
        """Index the batches as they pass by, from the start of the segment."""
        self._offset_index, self._time_index = OffsetIndex(), TimeIndex()
        self._bytes_since_index_entry = 0
        self._max_timestamp, self._offset_of_max_timestamp = -1, self.base_offset
        self._knows_max_timestamp = True
        for batch in batches:
            if self.first_timestamp is None:
                self.first_timestamp = batch.header.max_timestamp
            self._index(batch.header, batch.position, index_interval_bytes)
            yield batch

    def resume(self, tail: Iterator[BatchPosition]) -> None:
        """Go on with the indexes of a clean stop: the batches behind the last entry count towards the next one."""
        _ = self.time_index
        first = next(self.scan(0), None)
        self.first_timestamp = first.header.max_timestamp if first else None
        for _, header in tail:
            if header.max_timestamp > self._max_timestamp:
                self._max_timestamp = header.max_timestamp
                self._offset_of_max_timestamp = header.last_offset
            self._bytes_since_index_entry += header.size_bytes

    def write_indexes(self) -> None:
        """The segment is closed: its indexes go to their files, with a last entry in the time index."""
        if self._max_timestamp >= 0:
            self.time_index.add(self._max_timestamp, self._offset_of_max_timestamp - self.base_offset)
        file_system = self._files.file_system
        file_system.replace_file(self._directory / file_name(self.base_offset, INDEX), self.offset_index.encode())
        file_system.replace_file(self._directory / file_name(self.base_offset, TIME_INDEX), self.time_index.encode())

    def close(self) -> None:
        """Nothing is appended any more; its indexes are in their files."""
        self._is_closed = True
        self.forget_indexes()

    def scan(self, position: int, chunk_bytes: int = SCAN_BYTES) -> Iterator[BatchPosition]:
        """The headers from the batch at `position` on, until the file ends or a batch is cut off. Nothing is checked."""
        chunk, start = b"", position
        while position + HEADER_SIZE <= self.size_bytes:
            at = position - start
            if at + HEADER_SIZE > len(chunk):
                start, at = position, 0
                chunk = self.file.read(start, chunk_bytes)
                if len(chunk) < HEADER_SIZE:
                    return
            header = read_header(chunk, at)
            if header.length < HEADER_SIZE - PREFIX_SIZE or position + header.size_bytes > self.size_bytes:
                return
            yield BatchPosition(position, header)
            position += header.size_bytes

    def position_of(self, offset: int) -> int:
        """The position of the batch that holds `offset`, or of the next one; the end when there is none."""
        if offset <= self.base_offset:
            return 0
        if offset == self._last_append[0]:
            return self._last_append[1]
        position = self.offset_index.lookup(offset - self.base_offset)
        for batch in self.scan(position):
            if batch.header.last_offset >= offset:
                return batch.position
            position = batch.position + batch.header.size_bytes
        return position
