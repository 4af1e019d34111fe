"""THE table: every API that this broker has, its versions and who answers it.

What is not in the table isn't advertised and isn't there. A request for an unknown API or version closes its
connection, as in Kafka; ApiVersions alone is answered in any version, because a client asks it to find out (KIP-511).
"""

import logging
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from headwater.broker.api import (
    alter_configs,
    api_versions,
    create_partitions,
    create_topics,
    delete_groups,
    delete_records,
    delete_topics,
    describe_cluster,
    describe_configs,
    describe_groups,
    describe_log_dirs,
    describe_topic_partitions,
    fetch,
    find_coordinator,
    heartbeat,
    incremental_alter_configs,
    init_producer_id,
    join_group,
    leave_group,
    list_groups,
    list_offsets,
    metadata,
    offset_commit,
    offset_delete,
    offset_fetch,
    offset_for_leader_epoch,
    produce,
    sync_group,
)
from headwater.broker.api.request import Request
from headwater.broker.connection import Connection
from headwater.broker.node import Node
from headwater.broker.wire.errors import MalformedMessage
from headwater.broker.wire.header import CORRELATION_ID, decode_request_header
from headwater.broker.wire.message import NEVER, Message
from headwater.broker.wire.varint import skip_tags

logger = logging.getLogger(__name__)

Serve = Callable[[Request, memoryview], None]
M = TypeVar("M", bound=Message)


class Api(NamedTuple):
    key: int
    name: str
    first_version: int
    last_version: int
    flexible: int
    """The first version with flexible headers and messages."""
    serve: Serve
    advertised_from: int | None = None
    """Lower than `first_version` where clients want to see a version that nobody serves any more."""


def answering(message: type[M], handle: Callable[[M, Request], Message | None]) -> Serve:
    """Decode, handle, answer. A handler that returns None answers later."""

    def serve(request: Request, frame: memoryview) -> None:
        response = handle(message.decode(frame, request.version, request.body), request)
        if response is not None:
            request.respond(response)

    return serve


def _api(
    key: int,
    name: str,
    first: int,
    last: int,
    message: type[M],
    handle: Callable[[M, Request], Message | None],
) -> Api:
    return Api(key, name, first, last, message.FLEXIBLE, answering(message, handle))


APIS: dict[int, Api] = {
    api.key: api
    for api in (
        # Produce 0-2 are advertised, because old librdkafka compresses nothing otherwise (KAFKA-18659), and not served.
        Api(0, "Produce", 3, 13, produce.FLEXIBLE, produce.serve, advertised_from=0),
        Api(1, "Fetch", 4, 18, fetch.FLEXIBLE, fetch.serve),
        _api(2, "ListOffsets", 1, 11, list_offsets.ListOffsetsRequest, list_offsets.handle),
        _api(3, "Metadata", 0, 13, metadata.MetadataRequest, metadata.handle),
        _api(8, "OffsetCommit", 2, 10, offset_commit.OffsetCommitRequest, offset_commit.handle),
        _api(9, "OffsetFetch", 1, 10, offset_fetch.OffsetFetchRequest, offset_fetch.handle),
        _api(10, "FindCoordinator", 0, 6, find_coordinator.FindCoordinatorRequest, find_coordinator.handle),
        _api(11, "JoinGroup", 0, 9, join_group.JoinGroupRequest, join_group.handle),
        _api(12, "Heartbeat", 0, 4, heartbeat.HeartbeatRequest, heartbeat.handle),
        _api(13, "LeaveGroup", 0, 5, leave_group.LeaveGroupRequest, leave_group.handle),
        _api(14, "SyncGroup", 0, 5, sync_group.SyncGroupRequest, sync_group.handle),
        _api(15, "DescribeGroups", 0, 6, describe_groups.DescribeGroupsRequest, describe_groups.handle),
        _api(16, "ListGroups", 0, 5, list_groups.ListGroupsRequest, list_groups.handle),
        _api(18, "ApiVersions", 0, 4, api_versions.ApiVersionsRequest, api_versions.handle),
        _api(19, "CreateTopics", 2, 7, create_topics.CreateTopicsRequest, create_topics.handle),
        _api(20, "DeleteTopics", 1, 6, delete_topics.DeleteTopicsRequest, delete_topics.handle),
        _api(21, "DeleteRecords", 0, 2, delete_records.DeleteRecordsRequest, delete_records.handle),
        _api(22, "InitProducerId", 0, 5, init_producer_id.InitProducerIdRequest, init_producer_id.handle),
        _api(
            23, "OffsetForLeaderEpoch", 2, 4,
            offset_for_leader_epoch.OffsetForLeaderEpochRequest, offset_for_leader_epoch.handle,
        ),
        _api(32, "DescribeConfigs", 1, 4, describe_configs.DescribeConfigsRequest, describe_configs.handle),
        _api(33, "AlterConfigs", 0, 2, alter_configs.AlterConfigsRequest, alter_configs.handle),
        _api(35, "DescribeLogDirs", 1, 4, describe_log_dirs.DescribeLogDirsRequest, describe_log_dirs.handle),
        _api(37, "CreatePartitions", 0, 3, create_partitions.CreatePartitionsRequest, create_partitions.handle),
        _api(42, "DeleteGroups", 0, 2, delete_groups.DeleteGroupsRequest, delete_groups.handle),
        _api(
            44, "IncrementalAlterConfigs", 0, 1,
            incremental_alter_configs.IncrementalAlterConfigsRequest, incremental_alter_configs.handle,
        ),
        _api(47, "OffsetDelete", 0, 0, offset_delete.OffsetDeleteRequest, offset_delete.handle),
        _api(60, "DescribeCluster", 0, 2, describe_cluster.DescribeClusterRequest, describe_cluster.handle),
        _api(
            75, "DescribeTopicPartitions", 0, 0,
            describe_topic_partitions.DescribeTopicPartitionsRequest, describe_topic_partitions.handle,
        ),
    )
}  # fmt: skip

API_VERSIONS = 18
PRODUCE = 0

api_versions.advertise(
    (api.key, api.first_version if api.advertised_from is None else api.advertised_from, api.last_version)
    for api in APIS.values()
)


class Dispatcher:
    """From frames to the API that answers them."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.connections: set[Connection] = set()
        self.stalled_bytes = 0
        """Of answers that wait for clients to read."""

    def connected(self, connection: Connection) -> None:
        if len(self.connections) >= self.node.config.number("max.connections"):
            logger.warning("connection_refused peer=%s reason=max.connections", connection.peer_host)
            connection.close()
            return
        self.connections.add(connection)

    def disconnected(self, connection: Connection) -> None:
        self.connections.discard(connection)

    def handle(self, frame: memoryview, connection: Connection) -> None:
        """Raises MalformedMessage: the connection is to be closed."""
        key, version, correlation_id, client_id, body = decode_request_header(frame)
        api = APIS.get(key)
        if api is None:
            raise MalformedMessage(f"API key {key} is not known")
        head = CORRELATION_ID.pack(correlation_id)
        if not api.first_version <= version <= api.last_version:
            if key != API_VERSIONS:
                raise MalformedMessage(
                    f"{api.name} version {version}: this broker has {api.first_version} to {api.last_version}"
                )
            reply = connection.expect(head)
            reply.send([api_versions.unsupported_version()])
            return
        flexible = version >= api.flexible and api.flexible != NEVER
        if flexible:
            body = skip_tags(frame, body)
            if key != API_VERSIONS:  # its response header is version 0 for ever
                head += b"\x00"
        reply = connection.expect(head)
        request = Request(self, self.node, connection, reply, version, client_id, body)
        try:
            api.serve(request, frame)
        except MalformedMessage:
            raise
        except Exception:
            logger.exception("request_failed api=%s version=%d client=%s", api.name, version, client_id)
            raise MalformedMessage(f"{api.name} version {version} failed in the broker") from None
        if reply.buffers is None and key != PRODUCE:
            connection.mute_until(reply)
