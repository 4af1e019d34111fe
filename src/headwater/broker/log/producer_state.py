"""What a partition knows of its idempotent producers: their epoch and their last five batches (KIP-98, KIP-360).

Promise   A batch that was appended is not appended again: the retry is answered with the first one's offset. A gap in a
          producer's sequence is refused.
Not       Transactions.

The snapshot `00000000000000000042.snapshot` holds the state before offset 42, in Kafka's format:

    file  = version i16 = 1, crc u32 over what follows, count i32, entry*
    entry = producer_id i64, epoch i16, last_sequence i32, last_offset i64, offset_delta i32, timestamp i64,
            coordinator_epoch i32, current_transaction_first_offset i64

It is written when a segment is rolled and at a clean stop, so that a start needn't read the whole log. Like Kafka's
it keeps only the last batch of each producer. Upstream: ProducerStateManager, ProducerAppendInfo.
"""

import struct
from collections import deque
from typing import NamedTuple

from crc32c import crc32c

from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.record_batch import BatchHeader

VERSION = 1
PREFIX = struct.Struct(">hI")
COUNT = struct.Struct(">i")
ENTRY = struct.Struct(">qhiqiqiq")
BATCHES_KEPT = 5  # a producer has at most five requests under way (max.in.flight.requests.per.connection)


class CorruptSnapshot(ValueError):
    """A snapshot that can't be read: it is left out, and the log is read from an older one."""


class AppendedBatch(NamedTuple):
    first_sequence: int
    last_sequence: int
    last_offset: int
    offset_delta: int
    timestamp: int

    @property
    def first_offset(self) -> int:
        return self.last_offset - self.offset_delta


class Producer:
    __slots__ = ("batches", "epoch", "last_timestamp")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.last_timestamp = -1
        self.batches: deque[AppendedBatch] = deque(maxlen=BATCHES_KEPT)


class ProducerState:
    """The producers of one partition."""

    def __init__(self) -> None:
        self.producers: dict[int, Producer] = {}

    def check(self, header: BatchHeader) -> AppendedBatch | None:
        """The earlier batch when this one is a retry of it, else None.

        Raises ProtocolError: INVALID_PRODUCER_EPOCH for an older epoch, OUT_OF_ORDER_SEQUENCE_NUMBER for a gap and for a
        retry of a batch from before the five that are remembered.
        """
        producer = self.producers.get(header.producer_id)
        if producer is None:
            return None  # its state has expired or was cut off: any sequence is accepted (KAFKA-7190)
        if header.producer_epoch < producer.epoch:
            raise ProtocolError(
                ErrorCode.INVALID_PRODUCER_EPOCH,
                f"producer {header.producer_id} goes on with epoch {producer.epoch}, not {header.producer_epoch}",
            )
        if header.producer_epoch > producer.epoch:
            if header.base_sequence != 0:
                raise ProtocolError(
                    ErrorCode.OUT_OF_ORDER_SEQUENCE_NUMBER,
                    f"a new epoch of producer {header.producer_id} begins with sequence 0, not {header.base_sequence}",
                )
            return None
        for batch in producer.batches:
            if batch.first_sequence == header.base_sequence and batch.last_sequence == header.last_sequence:
                return batch
        if not producer.batches:
            return None
        expected = (producer.batches[-1].last_sequence + 1) & 0x7FFFFFFF
        if header.base_sequence != expected:
            raise ProtocolError(
                ErrorCode.OUT_OF_ORDER_SEQUENCE_NUMBER,
                f"producer {header.producer_id} goes on with sequence {expected}, not {header.base_sequence}",
            )
        return None

    def appended(self, header: BatchHeader) -> None:
        """The batch of an idempotent producer is in the log."""
        producer = self.producers.get(header.producer_id)
        if producer is None or producer.epoch != header.producer_epoch:
            producer = self.producers[header.producer_id] = Producer(header.producer_epoch)
        producer.last_timestamp = header.max_timestamp
        producer.batches.append(
            AppendedBatch(
                header.base_sequence,
                header.last_sequence,
                header.last_offset,
                header.last_offset_delta,
                header.max_timestamp,
            )
        )

    def expire(self, before_ms: int) -> None:
        """Forget producers that wrote nothing since (`producer.id.expiration.ms`)."""
        for producer_id in [pid for pid, producer in self.producers.items() if producer.last_timestamp < before_ms]:
            del self.producers[producer_id]

    def encode_snapshot(self) -> bytes:
        body = bytearray(COUNT.pack(len(self.producers)))
        for producer_id, producer in self.producers.items():
            last = producer.batches[-1] if producer.batches else AppendedBatch(-1, -1, -1, 0, producer.last_timestamp)
            body += ENTRY.pack(
                producer_id,
                producer.epoch,
                last.last_sequence,
                last.last_offset,
                last.offset_delta,
                last.timestamp,
                -1,
                -1,
            )
        return PREFIX.pack(VERSION, crc32c(body)) + body

    @classmethod
    def decode_snapshot(cls, data: bytes) -> "ProducerState":
        """Raises CorruptSnapshot."""
        try:
            version, crc = PREFIX.unpack_from(data)
            body = data[PREFIX.size :]
            if version != VERSION or crc32c(body) != crc:
                raise CorruptSnapshot("the version or the checksum of the producer snapshot is wrong")
            (count,) = COUNT.unpack_from(body)
            entries = [ENTRY.unpack_from(body, COUNT.size + i * ENTRY.size) for i in range(count)]
        except struct.error as error:
            raise CorruptSnapshot(f"the producer snapshot is cut off: {error}") from None
        state = cls()
        for producer_id, epoch, last_sequence, last_offset, offset_delta, timestamp, _, _ in entries:
            producer = state.producers[producer_id] = Producer(epoch)
            producer.last_timestamp = timestamp
            if last_offset >= 0:
                first_sequence = (last_sequence - offset_delta) & 0x7FFFFFFF
                producer.batches.append(
                    AppendedBatch(first_sequence, last_sequence, last_offset, offset_delta, timestamp)
                )
        return state
