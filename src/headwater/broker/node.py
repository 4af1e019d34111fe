"""One broker: its topics, partitions, groups and the log directory that keeps them.

Everything here runs on one event loop, which owns all state. The node changes the metadata by deciding, appending to
the metadata log, syncing it and applying; partitions follow from the metadata.
"""

import asyncio
import errno
import logging
import os
import random
import uuid
from collections.abc import Callable, Iterable, Mapping

from headwater.broker.broker_config import BrokerConfig
from headwater.broker.fetch_session import FetchSessions
from headwater.broker.group.coordinator import GroupCoordinator
from headwater.broker.log.flush import Flusher, OnDurable, die
from headwater.broker.log.log_directory import LogDirectory
from headwater.broker.log.partition_log import FlushWork, LogConfig, PartitionLog
from headwater.broker.metadata import (
    INTERNAL_TOPICS,
    METADATA_TOPIC,
    ClusterMetadata,
    MetadataRecord,
    Topic,
    TopicRecord,
    decode_record,
    encode_record,
)
from headwater.broker.partition import Partition
from headwater.broker.topic_config import topic_config
from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.record import NewRecord, encode_batch
from headwater.broker.wire.record_batch import read_header
from headwater.clock import Clock

logger = logging.getLogger(__name__)

OFFSETS_TOPIC = "__consumer_offsets"
OFFSETS_CONFIGS = {"cleanup.policy": "compact", "compression.type": "producer", "segment.bytes": "104857600"}
METADATA_LOG = LogConfig(deletes=False)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)  # it may pass: disk space, open files

PartitionKey = tuple[str, int]


class Node:
    def __init__(
        self,
        config: BrokerConfig,
        directory: LogDirectory,
        clock: Clock,
        loop: asyncio.AbstractEventLoop,
        random_source: random.Random,
        new_flusher: Callable[[OnDurable], Flusher],
    ) -> None:
        self.config = config
        self.directory = directory
        self.clock = clock
        self.loop = loop
        self.node_id = config.number("node.id")
        self.rack = config.text("broker.rack") or None
        self.host = ""
        self.port = 0
        self.metadata = ClusterMetadata(self.node_id)
        self.partitions: dict[PartitionKey, Partition] = {}
        self.sessions = FetchSessions(config.number("max.incremental.fetch.session.cache.slots"), random_source)
        self.flusher = new_flusher(self._on_durable)
        self.groups = GroupCoordinator(config, clock, loop, self.append_offsets_records)
        self._by_log: dict[PartitionLog, Partition] = {}
        self._producer_ids: Iterable[int] = iter(())
        self._metadata_log: PartitionLog

    @property
    def cluster_id(self) -> str:
        return self.directory.cluster_id

    # Start and stop

    def load(self) -> None:
        """Open everything that the directory holds; a crash's traces are cleared away. Raises OSError."""
        self._metadata_log = self.directory.open_partition(METADATA_TOPIC, 0, bytes(16), METADATA_LOG)
        for record in self._metadata_log.records(
            self._metadata_log.log_start_offset, self._metadata_log.log_end_offset
        ):
            if record.value is not None:
                self.metadata.apply(decode_record(record.value))
        if self._metadata_log.is_dirty:
            self.flusher.flush_now(self._metadata_log)
        topic_ids = {topic.name: topic.topic_id for topic in self.metadata.topics.values()}
        self.directory.set_aside_strays({METADATA_TOPIC: bytes(16), **topic_ids})
        for topic in self.metadata.topics.values():
            self._open_partitions(topic)
            if "compact" in topic.configs.get("cleanup.policy", ""):
                logger.info("compaction_absent topic=%s effect=every_record_is_kept", topic.name)
        if OFFSETS_TOPIC in self.metadata.topics:
            log = self.partitions[OFFSETS_TOPIC, 0].log
            self.groups.load(log.records(log.log_start_offset, log.log_end_offset))
            self.groups.check_offsets(self._log_end, topic_ids)
        self.directory.file_system.sync_directory(self.directory.path)

    def _log_end(self, topic: str, index: int) -> int | None:
        partition = self.partitions.get((topic, index))
        return None if partition is None else partition.log.log_end_offset

    def close(self) -> None:
        """A clean stop: everything synced, indexes and snapshots written, the directory marked as in order."""
        self.flusher.close()
        for log in [*self._by_log, self._metadata_log]:
            if log.is_dirty:
                self.flusher.flush_now(log)
            log.close()
        self.write_checkpoints()
        self.directory.close_clean()

    def write_checkpoints(self) -> None:
        logs = {key: partition.log for key, partition in self.partitions.items()}
        logs[METADATA_TOPIC, 0] = self._metadata_log
        marks = {key: partition.high_watermark.offset for key, partition in self.partitions.items()}
        self.directory.write_checkpoints(logs, marks)

    def _on_durable(self, log: PartitionLog, work: FlushWork) -> None:
        partition = self._by_log.get(log)
        if partition is not None:
            partition.on_durable(work)

    # Topics

    def create_topic(self, name: str, partition_count: int, configs: Mapping[str, str]) -> Topic:
        """Raises ProtocolError."""
        records = self.metadata.decide_create(name, partition_count, configs, uuid.uuid4().bytes)
        first = records[0]
        assert isinstance(first, TopicRecord)
        topic = Topic(name, first.topic_id, partition_count, dict(configs))
        opened = self._make_partitions(topic, range(partition_count))
        self._commit_with(records, opened)
        logger.info("topic_created topic=%s partitions=%d", name, partition_count)
        return self.metadata.topics[name]

    def _make_partitions(self, topic: Topic, indexes: range) -> list[Partition]:
        """Their files, before the metadata speaks of them. Raises ProtocolError, and then there are none."""
        opened: list[Partition] = []
        config = topic_config(topic.configs, self.config.values)
        try:
            for index in indexes:
                log = self.directory.open_partition(topic.name, index, topic.topic_id, config.log)
                opened.append(Partition(topic.name, index, log, config, self.flusher))
        except OSError as error:
            self._discard(topic.name, indexes)
            raise storage_error(error) from error
        return opened

    def _commit_with(self, records: list[MetadataRecord], opened: list[Partition]) -> None:
        try:
            self._commit(records)
        except ProtocolError:
            for partition in opened:
                partition.log.forget_files()
                self._discard(partition.topic, range(partition.index, partition.index + 1))
            raise
        for partition in opened:
            self._register(partition)

    def _discard(self, topic: str, indexes: range, delay_seconds: float = 0.0) -> None:
        file_system = self.directory.file_system
        for index in indexes:
            if file_system.exists(self.directory.partition_path(topic, index)):
                gone = self.directory.discard_partition(topic, index)
                self._later(delay_seconds, lambda gone=gone: file_system.remove_directory(gone))  # type: ignore[misc]

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        """In a thread: unlinking gigabytes takes its time."""
        self.loop.call_later(seconds, lambda: self.loop.run_in_executor(None, work))

    def _register(self, partition: Partition) -> None:
        self.partitions[partition.topic, partition.index] = partition
        self._by_log[partition.log] = partition

    def grow_topic(self, name: str, partition_count: int) -> None:
        """Raises ProtocolError."""
        records = self.metadata.decide_grow(name, partition_count)
        topic = self.metadata.topics[name]
        self._commit_with(records, self._make_partitions(topic, range(topic.partition_count, partition_count)))

    def configure_topic(self, name: str, configs: Mapping[str, str]) -> None:
        """The topic's own configs shall be these. Raises ProtocolError."""
        self._commit(self.metadata.decide_configs(name, configs))
        topic = self.metadata.topics[name]
        config = topic_config(topic.configs, self.config.values)
        for index in range(topic.partition_count):
            self.partitions[name, index].reconfigure(config)

    def delete_topic(self, topic: Topic) -> None:
        """What was written so far is synced and acknowledged first. Raises ProtocolError."""
        if topic.name == OFFSETS_TOPIC:
            raise ProtocolError(ErrorCode.POLICY_VIOLATION, f"{OFFSETS_TOPIC} holds the offsets of all groups.")
        partitions = [self.partitions[topic.name, index] for index in range(topic.partition_count)]
        for partition in partitions:
            self.flusher.flush_now(partition.log)
        self._commit(self.metadata.decide_delete(topic))
        delay = topic_config(topic.configs, self.config.values).log.file_delete_delay_ms / 1000
        for partition in partitions:
            del self.partitions[topic.name, partition.index]
            del self._by_log[partition.log]
            partition.close_delays()
            partition.log.forget_files()
        try:
            self._discard(topic.name, range(topic.partition_count), delay)
            self.write_checkpoints()
        except OSError as error:
            storage_error(error)  # the next start sets the folders aside: their topic is gone
        self.groups.topic_deleted(topic.name)
        logger.info("topic_deleted topic=%s", topic.name)

    def delete_before(self, partition: Partition, offset: int) -> None:
        """Move the log start; the files of whole segments before it go `file.delete.delay.ms` later."""
        log = partition.log
        delay = partition.config.log.file_delete_delay_ms / 1000
        for segment in log.delete_before(offset):
            self._later(delay, lambda segment=segment: log.remove_deleted(segment))  # type: ignore[misc]
        for delayed in partition.delays:
            delayed.changed()

    def _open_partitions(self, topic: Topic) -> None:
        """At the start. Raises OSError."""
        config = topic_config(topic.configs, self.config.values)
        for index in range(topic.partition_count):
            log = self.directory.open_partition(topic.name, index, topic.topic_id, config.log)
            if config.syncs_every_batch and log.is_dirty:
                self.flusher.flush_now(log)  # what a crash left in the page cache counts when it is on the disk
            self._register(Partition(topic.name, index, log, config, self.flusher))

    def _commit(self, records: list[MetadataRecord]) -> None:
        """Append to the metadata log, sync, apply."""
        if not records:
            return
        now = self.clock.now_ms()
        batch = encode_batch([NewRecord(None, encode_record(record), now) for record in records])
        try:
            self._metadata_log.append(read_header(batch), batch, now)
        except OSError as error:
            raise storage_error(error) from error
        self.flusher.flush_now(self._metadata_log)
        for record in records:
            self.metadata.apply(record)

    # Look-ups

    def topic_of(self, name_or_id: str | bytes) -> Topic:
        """Raises ProtocolError UNKNOWN_TOPIC_ID or UNKNOWN_TOPIC_OR_PARTITION."""
        if isinstance(name_or_id, bytes):
            topic = self.metadata.topics_by_id.get(name_or_id)
            if topic is None:
                raise ProtocolError(ErrorCode.UNKNOWN_TOPIC_ID)
            return topic
        return self.metadata.topic(name_or_id)

    def partition(self, topic: str, index: int) -> Partition:
        """Raises ProtocolError UNKNOWN_TOPIC_OR_PARTITION."""
        partition = self.partitions.get((topic, index))
        if partition is None:
            raise ProtocolError(ErrorCode.UNKNOWN_TOPIC_OR_PARTITION)
        return partition

    def new_producer_id(self) -> int:
        """One that no producer had before, also across restarts. Raises ProtocolError."""
        for producer_id in self._producer_ids:
            return producer_id
        first = self.metadata.next_producer_id
        self._commit(self.metadata.decide_producer_ids())
        self._producer_ids = iter(range(first, self.metadata.next_producer_id))
        return self.new_producer_id()

    # The groups' log

    def auto_create(self, name: str) -> None:
        """A topic that a client has asked for. Raises ProtocolError."""
        if name == OFFSETS_TOPIC:
            self.ensure_offsets_topic()
        elif name not in INTERNAL_TOPICS:
            self.create_topic(name, self.config.number("num.partitions"), {})

    def ensure_offsets_topic(self) -> None:
        """Made when the first group is looked for. Raises ProtocolError."""
        if OFFSETS_TOPIC not in self.metadata.topics:
            self.create_topic(OFFSETS_TOPIC, 1, OFFSETS_CONFIGS)

    def append_offsets_records(self, records: list[NewRecord]) -> tuple[Partition, int]:
        """Append the coordinator's records; the partition and the offset up to which it must be durable.

        Raises ProtocolError COORDINATOR_NOT_AVAILABLE while the disk is full.
        """
        self.ensure_offsets_topic()
        partition = self.partitions[OFFSETS_TOPIC, 0]
        if not records:
            return partition, partition.log.log_end_offset
        batch = encode_batch(records)
        try:
            appended = partition.append_stamped(read_header(batch), batch, self.clock.now_ms())
        except OSError as error:
            raise ProtocolError(ErrorCode.COORDINATOR_NOT_AVAILABLE) from storage_error(error)
        return partition, appended.end_offset


def storage_error(error: OSError) -> ProtocolError:
    """What may pass is told to the client; after any other trouble with the disk nobody knows what is on it."""
    if error.errno not in FULL:
        die(error)
    logger.error("storage_refused error=%s", error)
    return ProtocolError(ErrorCode.KAFKA_STORAGE_ERROR, os.strerror(error.errno or 0))
