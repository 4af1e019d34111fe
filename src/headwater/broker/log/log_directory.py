"""The data directory: who it belongs to, whether it was left in order, and its partitions.

    .lock                              held by the broker that uses it
    meta.properties                    version=1, cluster.id, node.id, directory.id
    .kafka_cleanshutdown               {"version":0,"brokerEpoch":-1}: written last at a clean stop, removed at the start
    recovery-point-offset-checkpoint   replication-offset-checkpoint   log-start-offset-checkpoint
    <topic>-<partition>/               one folder a partition
    <topic>-<partition>.<id>-delete/   on its way out

Upstream: LogManager, MetaPropertiesEnsemble, CleanShutdownFileHandler.
"""

import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from headwater.broker.log.checkpoint import (
    CorruptCheckpoint,
    TopicPartition,
    decode_offsets,
    decode_properties,
    decode_topic_id,
    encode_offsets,
    encode_partition_metadata,
    encode_properties,
    encode_uuid,
)
from headwater.broker.log.file_system import FileSystem
from headwater.broker.log.partition_log import LogConfig, PartitionLog
from headwater.broker.log.recovery import open_partition_log
from headwater.broker.log.segment import OpenFiles

logger = logging.getLogger(__name__)

LOCK = ".lock"
CLEAN_SHUTDOWN = ".kafka_cleanshutdown"
META = "meta.properties"
RECOVERY_POINTS = "recovery-point-offset-checkpoint"
HIGH_WATERMARKS = "replication-offset-checkpoint"
LOG_STARTS = "log-start-offset-checkpoint"
PARTITION_METADATA = "partition.metadata"
DELETE_SUFFIX = "-delete"
STRAY_SUFFIX = "-stray"


class DirectoryError(Exception):
    """The data directory can't be used; the message says why and what to do."""


class LogDirectory:
    def __init__(self, path: Path, file_system: FileSystem, node_id: int) -> None:
        """Take the directory. Raises DirectoryError."""
        self.path = path
        self.file_system = file_system
        self.files = OpenFiles(file_system)
        try:
            file_system.make_directory(path)
            self._lock()
            self.cluster_id = self._identity(node_id)
            self.was_clean = file_system.exists(path / CLEAN_SHUTDOWN)
            self._recovery_points = self._read_offsets(RECOVERY_POINTS)
            self._log_starts = self._read_offsets(LOG_STARTS)
            file_system.remove(path / CLEAN_SHUTDOWN)
            file_system.sync_directory(path)
            self._remove_deleted()
        except OSError as error:
            raise DirectoryError(
                f"the directory {path} can't be used: {error.strerror or error}.\n"
                "  Give the broker a directory that it may write to, with --data."
            ) from error

    def _lock(self) -> None:
        owner = self.path / LOCK
        try:
            self.file_system.lock(owner)
        except BlockingIOError:
            try:
                who = self.file_system.read_file(owner).decode() or "another process"
            except OSError:
                who = "another process"
            raise DirectoryError(
                f"the directory {self.path} is in use by {who}.\n"
                "  Stop that broker, or give this one its own directory with --data."
            ) from None

    def say_owner(self, text: str) -> None:
        """What a second broker on the directory is told."""
        (self.path / LOCK).write_text(text)

    def _identity(self, node_id: int) -> str:
        path = self.path / META
        if self.file_system.exists(path):
            properties = decode_properties(self.file_system.read_file(path))
            if properties.get("node.id", str(node_id)) != str(node_id):
                raise DirectoryError(
                    f"the directory {self.path} belongs to node {properties['node.id']}, this broker is node {node_id}.\n"
                    "  Start it with --set node.id=" + properties["node.id"] + ", or on another directory."
                )
            if "cluster.id" in properties:
                return properties["cluster.id"]
        cluster_id = encode_uuid(uuid.uuid4().bytes)
        content = {
            "version": "1",
            "cluster.id": cluster_id,
            "directory.id": encode_uuid(uuid.uuid4().bytes),
            "node.id": str(node_id),
        }
        self.file_system.replace_file(path, encode_properties(content))
        return cluster_id

    def _read_offsets(self, name: str) -> dict[TopicPartition, int]:
        try:
            if self.file_system.exists(self.path / name):
                return decode_offsets(self.file_system.read_file(self.path / name))
        except CorruptCheckpoint as error:
            logger.warning("checkpoint_left_out file=%s reason=%s", name, error)
        return {}

    def _remove_deleted(self) -> None:
        for name in self.file_system.list_directory(self.path):
            if name.endswith(DELETE_SUFFIX):
                self.file_system.remove_directory(self.path / name)

    def set_aside_strays(self, topic_ids: Mapping[str, bytes]) -> None:
        """Partitions of topics that are not there, or that are others of the same name, are renamed and kept.

        A crash between the decision to delete a topic and the removal of its folders leaves such; so may a directory
        that was put together by hand. `topic_ids` are those that the metadata knows. Upstream: LogManager's `-stray`.
        """
        for name in self.file_system.list_directory(self.path):
            topic, separator, partition = name.rpartition("-")
            metadata = self.path / name / PARTITION_METADATA
            if not separator or not partition.isdigit() or not self.file_system.exists(metadata):
                continue
            topic_id = decode_topic_id(self.file_system.read_file(metadata))
            if topic_id is None or topic_ids.get(topic) == topic_id:
                continue
            stray = f"{topic[:180]}-{partition}.{uuid.uuid4().hex}{STRAY_SUFFIX}"
            logger.warning("partition_set_aside folder=%s renamed=%s reason=its topic id is not known", name, stray)
            self.file_system.rename(self.path / name, self.path / stray)
            self._recovery_points.pop((topic, int(partition)), None)
            self._log_starts.pop((topic, int(partition)), None)
        for checkpoint in (self._recovery_points, self._log_starts):
            for key in [key for key in checkpoint if key[0] not in topic_ids]:
                del checkpoint[key]
        self.file_system.sync_directory(self.path)

    def partition_path(self, topic: str, partition: int) -> Path:
        return self.path / f"{topic}-{partition}"

    def open_partition(self, topic: str, partition: int, topic_id: bytes, config: LogConfig) -> PartitionLog:
        """The partition's log; made when it is missing. Raises OSError."""
        path = self.partition_path(topic, partition)
        log = open_partition_log(
            path,
            self.files,
            config,
            recovery_point=self._recovery_points.get((topic, partition), 0),
            log_start_offset=self._log_starts.get((topic, partition), 0),
            clean=self.was_clean,
        )
        if log.epochs.latest < 0:
            log.begin_epoch(0)
        elif not self.was_clean:
            log.begin_epoch(log.epochs.latest + 1)
        metadata = path / PARTITION_METADATA
        if not self.file_system.exists(metadata):
            self.file_system.write_file(metadata, encode_partition_metadata(topic_id))
        return log

    def discard_partition(self, topic: str, partition: int) -> Path:
        """Rename the folder out of the way; `file_system.remove_directory` takes what is returned."""
        old = self.partition_path(topic, partition)
        new = self.path / f"{topic[:180]}-{partition}.{uuid.uuid4().hex}{DELETE_SUFFIX}"
        self.file_system.rename(old, new)
        self.file_system.sync_directory(self.path)
        self._recovery_points.pop((topic, partition), None)
        self._log_starts.pop((topic, partition), None)
        return new

    def write_checkpoints(
        self, logs: Mapping[TopicPartition, PartitionLog], high_watermarks: Mapping[TopicPartition, int]
    ) -> None:
        """Recovery points, log starts and high watermarks of all partitions."""
        points = {key: log.recovery_point for key, log in logs.items()}
        starts = {
            key: log.log_start_offset for key, log in logs.items() if log.log_start_offset > log.segments[0].base_offset
        }
        self.file_system.replace_file(self.path / RECOVERY_POINTS, encode_offsets(points))
        self.file_system.replace_file(self.path / LOG_STARTS, encode_offsets(starts))
        self.file_system.replace_file(self.path / HIGH_WATERMARKS, encode_offsets(high_watermarks))

    def close_clean(self) -> None:
        """Everything was flushed and closed: say so."""
        self.file_system.replace_file(self.path / CLEAN_SHUTDOWN, b'{"version":0,"brokerEpoch":-1}')

    def owner_text(self) -> str:
        return f"process {os.getpid()}"
