"""DescribeLogDirs (API key 35), versions 1-4: how much of the disk each partition takes.

Behaviour
- No topics asked (null): all. Unknown ones are left out.

Versions: 2 is flexible; 3 adds a top-level error; 4 the size of the disk (KIP-827).
Deviations: none known.
Upstream: ReplicaManager#describeLogDirs.
"""

import shutil
from typing import Annotated

from headwater.broker.api.request import Request
from headwater.broker.wire.message import Bool, Int16, Int32, Int64, Message, String, Structure, since


class DescribableTopic(Structure):
    topic: String
    partitions: list[Int32]


class DescribeLogDirsRequest(Message):
    FLEXIBLE = 2
    topics: list[DescribableTopic] | None = None


class LogDirPartition(Structure):
    partition_index: Int32
    partition_size: Int64
    offset_lag: Int64 = 0
    is_future_key: Bool = False


class LogDirTopic(Structure):
    name: String
    partitions: list[LogDirPartition]


class LogDir(Structure):
    error_code: Int16
    log_dir: String
    topics: list[LogDirTopic]
    total_bytes: Annotated[Int64, since(4)] = -1
    usable_bytes: Annotated[Int64, since(4)] = -1


class DescribeLogDirsResponse(Message):
    FLEXIBLE = 2
    throttle_time_ms: Int32 = 0
    error_code: Annotated[Int16, since(3)] = 0
    results: list[LogDir] = []


def handle(message: DescribeLogDirsRequest, request: Request) -> DescribeLogDirsResponse:
    node = request.node
    if message.topics is None:
        wanted = list(node.partitions)
    else:
        wanted = [(topic.topic, index) for topic in message.topics for index in topic.partitions]
    topics: dict[str, LogDirTopic] = {}
    for name, index in wanted:
        partition = node.partitions.get((name, index))
        if partition is not None:
            topics.setdefault(name, LogDirTopic(name, [])).partitions.append(
                LogDirPartition(index, partition.log.size_bytes)
            )
    path = node.directory.path
    disk = shutil.disk_usage(path)
    return DescribeLogDirsResponse(
        results=[LogDir(0, str(path.absolute()), list(topics.values()), disk.total, disk.free)]
    )
