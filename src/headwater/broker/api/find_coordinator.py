"""FindCoordinator (API key 10), versions 0-6.

Behaviour
- This node coordinates every group. The offsets topic is made when the first group is looked for.
- For transactions (key type 1): TRANSACTIONAL_ID_AUTHORIZATION_FAILED, which clients take as final; share groups
  (2, KIP-932) and unknown types: INVALID_REQUEST.

Versions: 1 adds the key type; 3 is flexible; 4 asks for many keys at once (KIP-699).
Deviations: transactions and share groups.
Upstream: kafka.server.KafkaApis#getCoordinator.
"""

from typing import Annotated

from headwater.broker.api.request import Request
from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.message import Int8, Int16, Int32, Message, NullableString, String, Structure, since, until

GROUP, TRANSACTION = 0, 1


class FindCoordinatorRequest(Message):
    FLEXIBLE = 3
    key: Annotated[String, until(3)] = ""
    key_type: Annotated[Int8, since(1)] = GROUP
    coordinator_keys: Annotated[list[String], since(4)] = []


class Coordinator(Structure):
    key: String
    node_id: Int32
    host: String
    port: Int32
    error_code: Int16
    error_message: NullableString


class FindCoordinatorResponse(Message):
    FLEXIBLE = 3
    throttle_time_ms: Annotated[Int32, since(1)] = 0
    error_code: Annotated[Int16, until(3)] = 0
    error_message: Annotated[NullableString, since(1, 3)] = None
    node_id: Annotated[Int32, until(3)] = -1
    host: Annotated[String, until(3)] = ""
    port: Annotated[Int32, until(3)] = -1
    coordinators: Annotated[list[Coordinator], since(4)] = []


def handle(message: FindCoordinatorRequest, request: Request) -> FindCoordinatorResponse:
    if request.version >= 4:
        found = [_coordinator(key, message.key_type, request) for key in message.coordinator_keys]
        return FindCoordinatorResponse(coordinators=found)
    one = _coordinator(message.key, message.key_type, request)
    return FindCoordinatorResponse(
        error_code=one.error_code, error_message=one.error_message, node_id=one.node_id, host=one.host, port=one.port
    )


def _coordinator(key: str, key_type: int, request: Request) -> Coordinator:
    node = request.node
    try:
        if key_type == TRANSACTION:
            raise ProtocolError(
                ErrorCode.TRANSACTIONAL_ID_AUTHORIZATION_FAILED, "this broker does not have transactions yet"
            )
        if key_type != GROUP:
            raise ProtocolError(ErrorCode.INVALID_REQUEST, f"coordinators of type {key_type} are not known")
        node.ensure_offsets_topic()
    except ProtocolError as error:
        return Coordinator(key, -1, "", -1, error.code, error.message)
    return Coordinator(key, node.node_id, node.host, node.port, ErrorCode.NONE, None)
