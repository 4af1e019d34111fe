"""Opening a partition: what a clean stop left is taken over, what a crash left is checked and cut.

After a clean stop the indexes and the producer snapshot at the log's end are believed. Otherwise:

1. Everything before the recovery point is on the disk; segments that end before it are left alone.
2. From there on each batch must be whole, carry its checksum and go on from the offset before. At the first that does
   not, the segment is cut and the later segments are removed: a torn tail.
3. The indexes of the segments that were read are made anew; the producers' state is the newest snapshot and what the
   batches behind it say.

Batches are headers here: no record is looked at. Upstream: LogLoader, UnifiedLog#rebuildProducerState.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from headwater.broker.log.checkpoint import CorruptCheckpoint, EpochStart, LeaderEpochs
from headwater.broker.log.partition_log import EPOCHS_FILE, LogConfig, PartitionLog
from headwater.broker.log.producer_state import CorruptSnapshot, ProducerState
from headwater.broker.log.segment import (
    DELETED,
    INDEX,
    LOG,
    RECOVERY_SCAN_BYTES,
    SNAPSHOT,
    TIME_INDEX,
    BatchPosition,
    OpenFiles,
    Segment,
    file_name,
)
from headwater.broker.wire.record_batch import HEADER_SIZE, is_intact, read_header

logger = logging.getLogger(__name__)


def open_partition_log(
    directory: Path,
    files: OpenFiles,
    config: LogConfig,
    *,
    recovery_point: int = 0,
    log_start_offset: int = 0,
    clean: bool = False,
) -> PartitionLog:
    """The log in `directory`, which is made when it is missing. Raises OSError."""
    file_system = files.file_system
    file_system.make_directory(directory)
    names = file_system.list_directory(directory)
    for name in names:
        if name.endswith((DELETED, ".tmp", ".cleaned")):
            file_system.remove(directory / name)
    bases = sorted(int(name.removesuffix(LOG)) for name in names if name.endswith(LOG))
    if not bases:
        segments = [Segment(directory, log_start_offset, files)]
        _ = segments[0].file
        epochs = _epochs(directory, files, [])  # a crash may have left them and taken the log
        return PartitionLog(
            directory, files, config, segments, ProducerState(), epochs, log_start_offset, log_start_offset
        )
    segments = [Segment(directory, base, files, _size(directory, base, files)) for base in bases]
    if clean and all(
        f"{base:020d}{suffix}" in names
        for base, segment in zip(bases, segments, strict=True)
        for suffix in (INDEX, TIME_INDEX)
        if segment.size_bytes
    ):
        for segment in segments[:-1]:
            segment.close()
        end = _end_after_clean_stop(segments[-1])
        unsynced: list[Segment] = []
    else:
        segments, end, unsynced = _recover(directory, segments, files, config, recovery_point)
    log_start = max(log_start_offset, segments[0].base_offset)
    end = max(end, segments[-1].base_offset)
    log = PartitionLog(
        directory,
        files,
        config,
        segments,
        ProducerState(),
        _epochs(directory, files, segments),
        min(log_start, end),
        end,
    )
    log.recovered(min(recovery_point, end) if unsynced else end, unsynced)
    log.producers = _producers(log, names)
    return log


def _size(directory: Path, base: int, files: OpenFiles) -> int:
    return files.get(directory / file_name(base, LOG)).size()


def _end_after_clean_stop(active: Segment) -> int:
    offsets = active.offset_index
    start = offsets.positions[-1] if offsets.positions else 0
    batches = list(active.scan(start))
    # The batch of the last entry started a new count; it is not counted again by the next one.
    active.resume(iter(batches))
    return batches[-1].header.last_offset + 1 if batches else active.base_offset


def _recover(
    directory: Path, segments: list[Segment], files: OpenFiles, config: LogConfig, recovery_point: int
) -> tuple[list[Segment], int, list[Segment]]:
    """The segments that are whole, the log end offset, and the segments that may not be on the disk yet."""
    kept: list[Segment] = []
    unsynced: list[Segment] = []
    end = segments[0].base_offset
    for i, segment in enumerate(segments):
        following = segments[i + 1].base_offset if i + 1 < len(segments) else None
        if following is not None and following <= recovery_point:
            segment.close()
            kept.append(segment)
            end = following
            continue
        if kept and segment.base_offset != end:  # the end of the segment before is missing: nothing may follow a hole
            for later in segments[i:]:
                logger.warning("segment_removed directory=%s base_offset=%d", directory.name, later.base_offset)
                _remove(directory, later, files)
            break
        size = segment.size_bytes
        end = segment.base_offset
        position = 0
        batches = _whole_batches(segment, recovery_point)
        for at, header in segment.rebuild_indexes(batches, config.index_interval_bytes):
            end = header.last_offset + 1
            position = at + header.size_bytes
        kept.append(segment)
        unsynced.append(segment)
        if position < size:
            logger.warning(
                "tail_cut directory=%s segment=%d position=%d bytes_cut=%d log_end_offset=%d",
                directory.name, segment.base_offset, position, size - position, end,
            )  # fmt: skip
            segment.file.truncate(position)
            segment.file.sync()
            segment.size_bytes = position
            for later in segments[i + 1 :]:
                logger.warning("segment_removed directory=%s base_offset=%d", directory.name, later.base_offset)
                _remove(directory, later, files)
            break
        if following is not None:
            segment.write_indexes()
            segment.close()
    return kept, end, unsynced


def _whole_batches(segment: Segment, recovery_point: int) -> Iterator[BatchPosition]:
    """The batches up to the first that is cut off, damaged or out of order."""
    expected = segment.base_offset
    chunk, start, position = b"", 0, 0
    while position + HEADER_SIZE <= segment.size_bytes:
        at = position - start
        if at + HEADER_SIZE > len(chunk):
            chunk, start, at = segment.file.read(position, RECOVERY_SCAN_BYTES), position, 0
        header = read_header(chunk, at)
        size = header.size_bytes
        if header.magic != 2 or size < HEADER_SIZE or header.base_offset != expected or header.last_offset_delta < 0:
            return
        if header.last_offset >= recovery_point:
            if at + size > len(chunk):
                if position + size > segment.size_bytes:
                    return
                chunk, start, at = segment.file.read(position, max(size, RECOVERY_SCAN_BYTES)), position, 0
            if not is_intact(chunk, at, header):
                return
        yield BatchPosition(position, header)
        expected = header.last_offset + 1
        position += size


def _remove(directory: Path, segment: Segment, files: OpenFiles) -> None:
    for suffix in (LOG, INDEX, TIME_INDEX, SNAPSHOT):
        files.file_system.remove(directory / file_name(segment.base_offset, suffix))
    files.forget(directory / file_name(segment.base_offset, LOG))


def _epochs(directory: Path, files: OpenFiles, segments: list[Segment]) -> LeaderEpochs:
    path = directory / EPOCHS_FILE
    try:
        if files.file_system.exists(path):
            return LeaderEpochs.decode(files.file_system.read_file(path))
    except CorruptCheckpoint as error:
        logger.warning("leader_epochs_rebuilt directory=%s reason=%s", directory.name, error)
    entries: list[EpochStart] = []
    for segment in segments:
        for _, header in segment.scan(0, RECOVERY_SCAN_BYTES):
            if header.leader_epoch > (entries[-1].epoch if entries else -1):
                entries.append(EpochStart(header.leader_epoch, header.base_offset))
    return LeaderEpochs(entries)


def _producers(log: PartitionLog, names: list[str]) -> ProducerState:
    """The newest snapshot that is not beyond the log's end, and what came behind it."""
    file_system = log.file_system
    state, start = ProducerState(), log.log_start_offset
    for name in sorted((name for name in names if name.endswith(SNAPSHOT)), reverse=True):
        offset = int(name.removesuffix(SNAPSHOT))
        if offset > log.log_end_offset:
            file_system.remove(log.directory / name)
            continue
        try:
            state, start = ProducerState.decode_snapshot(file_system.read_file(log.directory / name)), offset
            break
        except CorruptSnapshot as error:
            logger.warning("producer_snapshot_left_out file=%s reason=%s", name, error)
            file_system.remove(log.directory / name)
    for name in names:  # those of rolled segments are kept, for when the log is cut there
        offset = int(name.removesuffix(SNAPSHOT)) if name.endswith(SNAPSHOT) else start
        if offset < start and all(segment.base_offset != offset for segment in log.segments):
            file_system.remove(log.directory / name)
    if start < log.log_end_offset:
        for _, (_, header) in log.batches(max(start, log.log_start_offset), RECOVERY_SCAN_BYTES):
            if header.producer_id >= 0 and header.base_offset >= start:
                state.appended(header)
    return state
