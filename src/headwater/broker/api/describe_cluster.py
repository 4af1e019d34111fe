"""DescribeCluster (API key 60), versions 0-2: this broker, which is all of the cluster (KIP-700).

Versions: 1 adds the endpoint type (KIP-919); 2 fenced brokers.
Deviations: authorized operations are always "not asked".
Upstream: kafka.server.KafkaApis#handleDescribeCluster.
"""

from typing import Annotated

from headwater.broker.api.request import Request
from headwater.broker.wire.errors import ErrorCode
from headwater.broker.wire.message import Bool, Int8, Int16, Int32, Message, NullableString, String, Structure, since

NOT_ASKED = -(1 << 31)
BROKERS, CONTROLLERS = 1, 2


class DescribeClusterRequest(Message):
    FLEXIBLE = 0
    include_cluster_authorized_operations: Bool = False
    endpoint_type: Annotated[Int8, since(1)] = BROKERS
    include_fenced_brokers: Annotated[Bool, since(2)] = False


class ClusterBroker(Structure):
    broker_id: Int32
    host: String
    port: Int32
    rack: NullableString
    is_fenced: Annotated[Bool, since(2)] = False


class DescribeClusterResponse(Message):
    FLEXIBLE = 0
    throttle_time_ms: Int32 = 0
    error_code: Int16 = 0
    error_message: NullableString = None
    endpoint_type: Annotated[Int8, since(1)] = BROKERS
    cluster_id: String = ""
    controller_id: Int32 = -1
    brokers: list[ClusterBroker] = []
    cluster_authorized_operations: Int32 = NOT_ASKED


def handle(message: DescribeClusterRequest, request: Request) -> DescribeClusterResponse:
    if message.endpoint_type == CONTROLLERS:
        return DescribeClusterResponse(
            error_code=ErrorCode.MISMATCHED_ENDPOINT_TYPE,
            error_message="The request was sent to an endpoint of type BROKER, but we wanted an endpoint of type CONTROLLER",
        )
    if message.endpoint_type != BROKERS:
        return DescribeClusterResponse(
            error_code=ErrorCode.UNSUPPORTED_ENDPOINT_TYPE,
            error_message=f"Unsupported endpoint type {message.endpoint_type}",
        )
    node = request.node
    return DescribeClusterResponse(
        cluster_id=node.cluster_id,
        controller_id=node.node_id,
        brokers=[ClusterBroker(node.node_id, node.host, node.port, node.rack)],
    )
