"""DescribeGroups (API key 15), versions 0-6: state, members and assignments of classic groups.

Behaviour
- An unknown group is "Dead"; from version 6 on with GROUP_ID_NOT_FOUND (KIP-1043).
- Members' metadata is shown while the group is stable.

Versions: 3 adds authorized operations, always "not asked"; 4 static members; 5 is flexible; 6 an error message.
Deviations: authorized operations.
Upstream: GroupMetadataManager#describeGroups.
"""

from typing import Annotated

from headwater.broker.api.request import Request
from headwater.broker.group.classic import STABLE, ClassicGroup
from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.message import (
    Bool,
    Bytes,
    Int16,
    Int32,
    Message,
    NullableString,
    String,
    Structure,
    since,
)

NOT_ASKED = -(1 << 31)


class DescribeGroupsRequest(Message):
    FLEXIBLE = 5
    groups: list[String] = []
    include_authorized_operations: Annotated[Bool, since(3)] = False


class DescribedMember(Structure):
    member_id: String
    group_instance_id: Annotated[NullableString, since(4)] = None
    client_id: String = ""
    client_host: String = ""
    member_metadata: Bytes = b""
    member_assignment: Bytes = b""


class DescribedGroup(Structure):
    error_code: Int16
    error_message: Annotated[NullableString, since(6)] = None
    group_id: String = ""
    group_state: String = ""
    protocol_type: String = ""
    protocol_data: String = ""
    members: list[DescribedMember] = []
    authorized_operations: Annotated[Int32, since(3)] = NOT_ASKED


class DescribeGroupsResponse(Message):
    FLEXIBLE = 5
    throttle_time_ms: Annotated[Int32, since(1)] = 0
    groups: list[DescribedGroup] = []


def handle(message: DescribeGroupsRequest, request: Request) -> DescribeGroupsResponse | None:
    groups = request.node.groups
    described = [_describe(group_id, groups.groups.get(group_id), request.version) for group_id in message.groups]
    response = DescribeGroupsResponse(groups=described)
    try:
        groups.wait_durable(lambda: request.respond(response))
    except ProtocolError as error:
        return DescribeGroupsResponse(
            groups=[DescribedGroup(error.code, None, group_id, "Dead") for group_id in message.groups]
        )
    return None


def _describe(group_id: str, group: ClassicGroup | None, version: int) -> DescribedGroup:
    if group is None:
        if version >= 6:
            return DescribedGroup(ErrorCode.GROUP_ID_NOT_FOUND, f"Group {group_id} not found.", group_id, "Dead")
        return DescribedGroup(ErrorCode.NONE, None, group_id, "Dead")
    stable = group.state is STABLE
    return DescribedGroup(
        ErrorCode.NONE,
        None,
        group_id,
        group.state.value,
        group.protocol_type or "",
        (group.protocol or "") if stable else "",
        [
            DescribedMember(
                member.member_id,
                member.group_instance_id,
                member.client_id,
                member.client_host,
                member.metadata(group.protocol) if stable else b"",
                member.assignment,
            )
            for member in group.members.values()
        ],
    )
