"""A partition as the broker serves it: the log, who may read up to where, and who waits for that to change.

When every batch is synced (`flush.messages=1`, the default) the high watermark is what is on the disk, for every
reader and whatever the producer's acks were: nobody reads what a power cut could take back. Otherwise it is the end of
the log, as on a Kafka cluster of one.
"""

import logging
from collections import deque
from collections.abc import Callable

from headwater.broker.log.flush import Flusher
from headwater.broker.log.partition_log import FlushWork, LogPosition, PartitionLog
from headwater.broker.purgatory import Delay
from headwater.broker.topic_config import TopicConfig
from headwater.broker.wire.errors import ErrorCode, MalformedMessage, ProtocolError
from headwater.broker.wire.record import compress, decode_records, decompress
from headwater.broker.wire.record_batch import (
    COMPRESSION,
    HEADER,
    HEADER_SIZE,
    LOG_APPEND_TIME,
    PREFIX_SIZE,
    BatchHeader,
    checksum,
    stamp_append_time,
    validate,
)

logger = logging.getLogger(__name__)


class RefusedRecords(ProtocolError):
    """Single records of a batch are at fault: the whole batch is refused and each of them named."""

    def __init__(self, code: ErrorCode, errors: tuple[tuple[int, str], ...]) -> None:
        if code is ErrorCode.INVALID_TIMESTAMP:
            message = "One or more records have been rejected due to invalid timestamp"
        else:
            message = (
                f"One or more records have been rejected due to {len(errors)} record errors in total, "
                f"and only showing the first three errors at most: {[text for _, text in errors[:3]]}"
            )
        super().__init__(code, message)
        self.errors = errors


class Appended:
    """Where a batch went."""

    __slots__ = ("append_time_ms", "base_offset", "end_offset")

    def __init__(self, base_offset: int, end_offset: int, append_time_ms: int) -> None:
        self.base_offset = base_offset
        self.end_offset = end_offset
        self.append_time_ms = append_time_ms


class Partition:
    def __init__(self, topic: str, index: int, log: PartitionLog, config: TopicConfig, flusher: Flusher) -> None:
        self.topic = topic
        self.index = index
        self.log = log
        self.config = config
        self.high_watermark: LogPosition = log.end
        self.delays: dict[Delay, None] = {}
        self._flusher = flusher
        self._unflushed_batches = 0
        self.last_flush_ms = 0
        self._durable_waiters: deque[tuple[int, Callable[[], None]]] = deque()

    @property
    def leader_epoch(self) -> int:
        return self.log.epochs.latest

    @property
    def last_stable_offset(self) -> int:
        """The high watermark: there are no transactions that could hold it back."""
        return self.high_watermark.offset

    # Appending

    def append(self, batch: memoryview, now_ms: int) -> Appended:
        """One batch of a producer. Raises ProtocolError, and OSError for the disk's troubles."""
        config = self.config
        header = validate(batch, config.max_message_bytes)
        if header.producer_id >= 0:
            earlier = self.log.producers.check(header)
            if earlier is not None:
                return Appended(earlier.first_offset, earlier.last_offset + 1, -1)
        if header.is_transactional:
            raise ProtocolError(ErrorCode.TRANSACTIONAL_ID_AUTHORIZATION_FAILED)
        self._check_timestamps(header, now_ms)
        if config.compacts:
            self._check_keys(batch, header)
        data: memoryview | bytearray = batch
        if config.compression is not None and config.compression != header.compression:
            data, header = _recompressed(batch, header, config.compression)
            if header.size_bytes > config.max_message_bytes:
                raise ProtocolError(
                    ErrorCode.MESSAGE_TOO_LARGE, "the batch is too large with the topic's compression.type"
                )
        if header.size_bytes > config.log.segment_bytes:
            raise ProtocolError(ErrorCode.RECORD_LIST_TOO_LARGE, "the batch is larger than segment.bytes")
        append_time_ms = -1
        if config.uses_append_time:
            header = stamp_append_time(memoryview(data), header, now_ms)
            append_time_ms = now_ms
        return self.append_stamped(header, data, now_ms, append_time_ms)

    def append_stamped(
        self, header: BatchHeader, data: memoryview | bytearray, now_ms: int, append_time_ms: int = -1
    ) -> Appended:
        """A batch that needs no more checks."""
        log = self.log
        segments = len(log.segments)
        header = log.append(header, data, now_ms)
        config = self.config
        if config.flush_messages == 1:
            self._flusher.mark_dirty(log)
        else:
            self._unflushed_batches += header.record_count
            if self._unflushed_batches >= config.flush_messages or len(log.segments) > segments:
                self._unflushed_batches = 0
                self._flusher.mark_dirty(log, waiters=2)  # nobody waits: in the flusher's thread
            self._raise_high_watermark(log.end)
        return Appended(header.base_offset, log.log_end_offset, append_time_ms)

    def _check_timestamps(self, header: BatchHeader, now_ms: int) -> None:
        """The batch's first and greatest timestamp; those between are not looked at."""
        config = self.config
        if config.uses_append_time:
            if header.attributes & LOG_APPEND_TIME:
                message = "Producer should not set timestamp type to LogAppendTime."
                raise RefusedRecords(ErrorCode.INVALID_TIMESTAMP, ((0, message),))
            return
        low, high = now_ms - config.timestamp_before_max_ms, now_ms + config.timestamp_after_max_ms
        for index, timestamp in ((0, header.base_timestamp), (header.last_offset_delta, header.max_timestamp)):
            if timestamp >= 0 and not low <= timestamp <= high:
                message = (
                    f"Timestamp {timestamp} of message with offset {index} is out of range. "
                    f"The timestamp should be within [{low}, {high}]"
                )
                raise RefusedRecords(ErrorCode.INVALID_TIMESTAMP, ((index, message),))

    def _check_keys(self, batch: memoryview, header: BatchHeader) -> None:
        """Without a key a record of a compacted topic could never be replaced."""
        message = f"Compacted topic cannot accept message without key in topic partition {self.topic}-{self.index}"
        try:
            errors = tuple((i, message) for i, record in enumerate(decode_records(batch)) if record.key is None)
        except MalformedMessage as error:
            raise ProtocolError(ErrorCode.INVALID_RECORD, str(error)) from None
        if errors:
            raise RefusedRecords(ErrorCode.INVALID_RECORD, errors)

    # Becoming durable

    def wait_durable(self, end_offset: int, then: Callable[[], None]) -> None:
        """`then` is called when everything before `end_offset` is on the disk; at once when that is not asked for."""
        if self.is_durable(end_offset):
            then()
        else:
            self._durable_waiters.append((end_offset, then))

    def is_durable(self, end_offset: int) -> bool:
        return not self.config.syncs_every_batch or self.log.recovery_point >= end_offset

    def on_durable(self, work: FlushWork) -> None:
        if self.config.syncs_every_batch:
            self._raise_high_watermark(work.end)
        waiters = self._durable_waiters
        while waiters and waiters[0][0] <= work.end.offset:
            then = waiters.popleft()[1]
            try:
                then()
            except Exception:  # one request that can't be answered must not keep the others waiting
                logger.exception("answer_failed topic=%s partition=%d", self.topic, self.index)

    def _raise_high_watermark(self, end: LogPosition) -> None:
        if end.offset > self.high_watermark.offset:
            self.high_watermark = end
            for delay in self.delays:
                delay.changed()

    def reconfigure(self, config: TopicConfig) -> None:
        """New topic configs count from now on."""
        self.config = config
        self.log.config = config.log
        if not config.syncs_every_batch:
            self._raise_high_watermark(self.log.end)
            while self._durable_waiters:
                self._durable_waiters.popleft()[1]()
        elif self.log.is_dirty:
            self._flusher.mark_dirty(self.log)

    def close_delays(self) -> None:
        """The partition goes away: who waits on it looks again and is told so."""
        for delay in self.delays:
            delay.changed()

    # Reading

    def check_epoch(self, current_leader_epoch: int) -> None:
        """What the client believes; -1 is not checked. Raises ProtocolError (KIP-320)."""
        if current_leader_epoch == -1:
            return
        if current_leader_epoch < self.leader_epoch:
            raise ProtocolError(ErrorCode.FENCED_LEADER_EPOCH)
        if current_leader_epoch > self.leader_epoch:
            raise ProtocolError(ErrorCode.UNKNOWN_LEADER_EPOCH)

    def read(self, offset: int, max_bytes: int, at_least_one: bool) -> bytes:
        """Batches below the high watermark. Raises ProtocolError OFFSET_OUT_OF_RANGE."""
        log = self.log
        if offset < log.log_start_offset or offset > log.log_end_offset:
            raise ProtocolError(ErrorCode.OFFSET_OUT_OF_RANGE)
        return log.read(offset, max_bytes, self.high_watermark, at_least_one)


def _recompressed(batch: memoryview, header: BatchHeader, codec: int) -> tuple[bytearray, BatchHeader]:
    """The same records with the topic's `compression.type`."""
    try:
        body = compress(codec, bytes(decompress(header.compression, batch[HEADER_SIZE:])))
    except MalformedMessage as error:
        raise ProtocolError(ErrorCode.INVALID_RECORD, str(error)) from None
    data = bytearray(HEADER_SIZE) + body
    attributes = header.attributes & ~COMPRESSION | codec
    header = header._replace(attributes=attributes, length=len(data) - PREFIX_SIZE)
    HEADER.pack_into(data, 0, *header)
    header = header._replace(crc=checksum(data, 0, len(data)))
    HEADER.pack_into(data, 0, *header)
    return data, header
