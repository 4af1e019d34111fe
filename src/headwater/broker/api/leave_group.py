"""LeaveGroup (API key 13), versions 0-5: members go, or are removed by an operator.

Behaviour
- A static member can be named by its group instance id alone (KIP-345: removal by an operator).

Versions: 3 takes many members; 4 is flexible; 5 adds a reason.
Deviations: none known.
Upstream: GroupMetadataManager#classicGroupLeave.
"""

from typing import Annotated

from headwater.broker.api.request import Request
from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.message import Int16, Int32, Message, NullableString, String, Structure, since, until


class LeavingMember(Structure):
    member_id: String
    group_instance_id: NullableString = None
    reason: Annotated[NullableString, since(5)] = None


class LeaveGroupRequest(Message):
    FLEXIBLE = 4
    group_id: String
    member_id: Annotated[String, until(2)] = ""
    members: Annotated[list[LeavingMember], since(3)] = []


class LeftMember(Structure):
    member_id: String
    group_instance_id: NullableString
    error_code: Int16


class LeaveGroupResponse(Message):
    FLEXIBLE = 4
    throttle_time_ms: Annotated[Int32, since(1)] = 0
    error_code: Int16 = 0
    members: Annotated[list[LeftMember], since(3)] = []


def handle(message: LeaveGroupRequest, request: Request) -> LeaveGroupResponse | None:
    many = request.version >= 3
    members = message.members if many else [LeavingMember(message.member_id)]

    def done(codes: list[int]) -> None:
        left = [
            LeftMember(member.member_id, member.group_instance_id, code)
            for member, code in zip(members, codes, strict=True)
        ]
        request.respond(LeaveGroupResponse(error_code=ErrorCode.NONE if many else codes[0], members=left))

    leaving = [(member.member_id, member.group_instance_id) for member in members]
    try:
        request.node.groups.leave(message.group_id, leaving, done)
    except ProtocolError as error:
        return LeaveGroupResponse(error_code=error.code)
    return None
