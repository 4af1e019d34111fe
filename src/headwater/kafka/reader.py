"""Reading without a group: given partitions from given offsets, for ever or up to an end."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import confluent_kafka
from confluent_kafka import KafkaError, Message, TopicPartition

from headwater.kafka.admin import AdminError, KafkaAdmin
from headwater.kafka.client_config import logger as client_logger
from headwater.kafka.consumer import ConsumerFailed, Gone, consumer_config
from headwater.settings import Settings

Place = tuple[str, int]
"""A topic, and the number of a partition."""

Told = Callable[[int, int], None]
"""Called now and then while something long is done: how much of it is done, and how much it is."""

TAKE = 5000
TAKE_SECONDS = 0.5
SILENCE_SECONDS = 60.0


class KafkaReader:
    """Reads given partitions from given offsets, without a group. For one thread."""

    def __init__(self, settings: Settings, starts: Mapping[Place, int], *, isolation: str = "read_committed") -> None:
        config = consumer_config(settings, "headwater-reader", "classic")
        config.pop("group.instance.id", None)
        config["isolation.level"] = isolation
        self._consumer = confluent_kafka.Consumer({**config, "enable.partition.eof": True}, logger=client_logger)
        self._troubles: list[ConsumerFailed] = []
        if starts:
            self._consumer.assign([TopicPartition(*place, offset) for place, offset in starts.items()])

    def add(self, topic: str, partition: int, offset: int) -> None:
        self._consumer.incremental_assign([TopicPartition(topic, partition, offset)])

    def remove(self, topic: str, partition: int) -> None:
        self._consumer.incremental_unassign([TopicPartition(topic, partition)])

    def only(self, topic: str, partition: int, offset: int) -> None:
        """From now on this, and nothing else."""
        self._troubles.clear()
        self._consumer.assign([TopicPartition(topic, partition, offset)])

    def nothing(self) -> None:
        self._consumer.unassign()

    def offsets(self, topic: str, partition: int, seconds: float) -> tuple[int, int]:
        """The first offset and the end, read anew. Raises KafkaException."""
        first, end = self._consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=seconds)
        return int(first), int(end)

    def take(self, count: int, seconds: float) -> tuple[list[Message], dict[Place, int]]:
        """Records, and the partitions whose end was reached, with that end. Raises ConsumerFailed."""
        if self._troubles:
            raise self._troubles.pop(0)
        messages: list[Message] = []
        ended: dict[Place, int] = {}
        for message in self._consumer.consume(count, seconds):
            error = message.error()
            if error is None:
                messages.append(message)
            elif error.code() == KafkaError._PARTITION_EOF:
                ended[place_of(message)] = offset_of(message)
            else:
                is_gone = error.code() == KafkaError._AUTO_OFFSET_RESET
                trouble = Gone(error.str(), message.partition() or 0) if is_gone else ConsumerFailed(error.str())
                self._troubles.append(trouble)  # after the records that came with it
        if self._troubles and not messages:
            raise self._troubles.pop(0)
        return messages, ended

    def up_to(
        self, ends: Mapping[Place, int], positions: dict[Place, int], silence_seconds: float = SILENCE_SECONDS
    ) -> Iterator[list[Message]]:
        """What lies from `positions` up to `ends` and nothing beyond, in batches, whatever was read before; some are empty.

        `positions` are moved on before a batch is handed out: to the end itself where no record is left before it, as behind a
        transaction's marker or what was compacted away. Raises ConsumerFailed, after `silence_seconds` without a word too.
        """
        left = {place for place, end in ends.items() if positions[place] < end}
        self._troubles.clear()
        self._consumer.assign([TopicPartition(*place, positions[place]) for place in left])
        heard = time.monotonic()
        try:
            while left:
                messages, ended = self.take(TAKE, TAKE_SECONDS)
                if messages or ended:
                    heard = time.monotonic()
                elif time.monotonic() - heard > silence_seconds:
                    topic, partition = min(left)
                    raise ConsumerFailed(
                        f"{topic}-{partition} could not be read to its end: nothing came for {silence_seconds:g} s."
                    )
                batch = []
                for message in messages:
                    place, offset = place_of(message), offset_of(message)
                    if place in left:
                        end = ends[place]
                        if offset < end:
                            batch.append(message)
                        positions[place] = min(offset + 1, end)
                for place in left & ended.keys():
                    positions[place] = max(positions[place], min(ended[place], ends[place]))
                done = [place for place in left if positions[place] >= ends[place]]
                if done:
                    left.difference_update(done)
                    self._consumer.incremental_unassign([TopicPartition(*place) for place in done])
                handed_out = time.monotonic()
                yield batch
                heard += time.monotonic() - handed_out  # no silence of the broker's
        finally:
            with contextlib.suppress(RuntimeError):  # it was closed, and this was left in the middle
                self._consumer.unassign()

    def close(self) -> None:
        self._consumer.close()


def read_all(
    settings: Settings, admin: KafkaAdmin, topics: Sequence[str], told: Told | None = None
) -> Iterator[Message]:
    """Every committed record of topics up to where they end now. Raises AdminError, ConsumerFailed."""
    counts = admin.partition_counts()
    unknown = [topic for topic in topics if topic not in counts]
    if unknown:
        raise AdminError(f"there is no topic {unknown[0]}.")
    places = [(topic, index) for topic in topics for index in range(counts[topic])]
    positions, ends = admin.start_offsets(places), admin.last_stable_offsets(places)
    if positions == ends:
        return
    start, end = sum(positions.values()), sum(ends.values())
    reader = KafkaReader(settings, {})
    try:
        for batch in reader.up_to(ends, positions):
            yield from batch
            if told is not None:
                told(sum(positions.values()) - start, end - start)
    finally:
        reader.close()


def place_of(message: Message) -> Place:
    return message.topic() or "", message.partition() or 0


def offset_of(message: Message) -> int:
    return message.offset() or 0
