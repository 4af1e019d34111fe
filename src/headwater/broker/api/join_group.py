"""JoinGroup (API key 11), versions 0-9: a member joins, and waits until its group has gathered.

Behaviour: that of `headwater.broker.group.classic`. The connection is muted while the request waits, as in Kafka.

Versions
- 0 has no rebalance time-out: the session time-out counts; 4 tells a new member its id first (KIP-394); 5 adds static
  members (KIP-345); 6 is flexible; 7 the protocol type (KIP-559); 9 lets a returning leader skip the assignment (KIP-814).

Deviations: none known.
Upstream: GroupMetadataManager#classicGroupJoin.
"""

from typing import Annotated

from headwater.broker.api.request import Request
from headwater.broker.group.classic import Join, JoinAnswer, SyncAnswer
from headwater.broker.wire.errors import ProtocolError
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


class JoinGroupProtocol(Structure):
    name: String
    metadata: Bytes


class JoinGroupRequest(Message):
    FLEXIBLE = 6
    group_id: String
    session_timeout_ms: Int32
    rebalance_timeout_ms: Annotated[Int32, since(1)] = -1
    member_id: String = ""
    group_instance_id: Annotated[NullableString, since(5)] = None
    protocol_type: String = ""
    protocols: list[JoinGroupProtocol] = []
    reason: Annotated[NullableString, since(8)] = None


class JoinGroupMember(Structure):
    member_id: String
    group_instance_id: Annotated[NullableString, since(5)] = None
    metadata: Bytes = b""


class JoinGroupResponse(Message):
    FLEXIBLE = 6
    throttle_time_ms: Annotated[Int32, since(2)] = 0
    error_code: Int16 = 0
    generation_id: Int32 = -1
    protocol_type: Annotated[NullableString, since(7)] = None
    protocol_name: NullableString = None
    leader: String = ""
    skip_assignment: Annotated[Bool, since(9)] = False
    member_id: String = ""
    members: list[JoinGroupMember] = []


def handle(message: JoinGroupRequest, request: Request) -> JoinGroupResponse | None:
    groups = request.node.groups
    session_ms, rebalance_ms = message.session_timeout_ms, message.rebalance_timeout_ms

    def ticket(answer: JoinAnswer | SyncAnswer) -> None:
        assert isinstance(answer, JoinAnswer)
        request.respond(_response(answer, request.version))

    join = Join(
        ticket,
        message.member_id,
        groups.new_member_id(message.group_instance_id or request.client_id),
        message.group_instance_id,
        request.client_id,
        request.connection.peer_host,
        rebalance_ms if rebalance_ms >= 0 else session_ms,
        session_ms,
        message.protocol_type,
        [(protocol.name, protocol.metadata) for protocol in message.protocols],
        must_know_its_id=request.version >= 4,
        may_skip_assignment=request.version >= 9,
    )
    try:
        request.node.ensure_offsets_topic()
    except ProtocolError as error:
        return JoinGroupResponse(error_code=error.code, member_id=message.member_id)
    groups.join(message.group_id, join)
    return None


def _response(answer: JoinAnswer, version: int) -> JoinGroupResponse:
    return JoinGroupResponse(
        error_code=answer.error_code,
        generation_id=answer.generation,
        protocol_type=answer.protocol_type,
        protocol_name=answer.protocol_name if version >= 7 else answer.protocol_name or "",
        leader=answer.leader,
        skip_assignment=answer.skip_assignment,
        member_id=answer.member_id,
        members=[JoinGroupMember(*member) for member in answer.members],
    )
