"""Heartbeat (API key 12), versions 0-4: a member says that it lives, and hears whether a rebalance has begun.

Behaviour: that of `headwater.broker.group.classic`.
Versions: 3 adds static members; 4 is flexible.
Deviations: none known.
Upstream: GroupMetadataManager#classicGroupHeartbeat.
"""

from typing import Annotated

from headwater.broker.api.request import Request
from headwater.broker.wire.message import Int16, Int32, Message, NullableString, String, since


class HeartbeatRequest(Message):
    FLEXIBLE = 4
    group_id: String
    generation_id: Int32
    member_id: String
    group_instance_id: Annotated[NullableString, since(3)] = None


class HeartbeatResponse(Message):
    FLEXIBLE = 4
    throttle_time_ms: Annotated[Int32, since(1)] = 0
    error_code: Int16 = 0


def handle(message: HeartbeatRequest, request: Request) -> HeartbeatResponse:
    code = request.node.groups.heartbeat(
        message.group_id, message.member_id, message.group_instance_id, message.generation_id
    )
    return HeartbeatResponse(error_code=code)
