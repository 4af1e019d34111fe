"""SyncGroup (API key 14), versions 0-5: the leader hands in who reads what, the others wait for their part.

Behaviour: that of `headwater.broker.group.classic`. The answer goes out when the assignment is durable.
Versions: 3 adds static members; 4 is flexible; 5 names the protocol, and refuses a member that means another (KIP-559).
Deviations: none known.
Upstream: GroupMetadataManager#classicGroupSync.
"""

from typing import Annotated

from headwater.broker.api.request import Request
from headwater.broker.group.classic import JoinAnswer, Sync, SyncAnswer
from headwater.broker.wire.errors import ErrorCode
from headwater.broker.wire.message import Bytes, Int16, Int32, Message, NullableString, String, Structure, since


class SyncGroupAssignment(Structure):
    member_id: String
    assignment: Bytes


class SyncGroupRequest(Message):
    FLEXIBLE = 4
    group_id: String
    generation_id: Int32
    member_id: String
    group_instance_id: Annotated[NullableString, since(3)] = None
    protocol_type: Annotated[NullableString, since(5)] = None
    protocol_name: Annotated[NullableString, since(5)] = None
    assignments: list[SyncGroupAssignment] = []


class SyncGroupResponse(Message):
    FLEXIBLE = 4
    throttle_time_ms: Annotated[Int32, since(1)] = 0
    error_code: Int16 = 0
    protocol_type: Annotated[NullableString, since(5)] = None
    protocol_name: Annotated[NullableString, since(5)] = None
    assignment: Bytes = b""


def handle(message: SyncGroupRequest, request: Request) -> SyncGroupResponse | None:
    if request.version >= 5 and (message.protocol_type is None or message.protocol_name is None):
        return SyncGroupResponse(error_code=ErrorCode.INCONSISTENT_GROUP_PROTOCOL)

    def ticket(answer: JoinAnswer | SyncAnswer) -> None:
        assert isinstance(answer, SyncAnswer)
        request.respond(
            SyncGroupResponse(
                error_code=answer.error_code,
                protocol_type=answer.protocol_type,
                protocol_name=answer.protocol_name,
                assignment=answer.assignment,
            )
        )

    sync = Sync(
        ticket,
        message.member_id,
        message.group_instance_id,
        message.generation_id,
        message.protocol_type,
        message.protocol_name,
        {assignment.member_id: assignment.assignment for assignment in message.assignments},
    )
    request.node.groups.sync(message.group_id, sync)
    return None
