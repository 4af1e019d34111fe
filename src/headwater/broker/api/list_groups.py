"""ListGroups (API key 16), versions 0-5.

Behaviour: filters are compared without regard to case; an unknown state or type matches nothing.
Versions: 3 is flexible; 4 adds states (KIP-518); 5 types (KIP-848).
Deviations: none known.
Upstream: GroupMetadataManager#listGroups.
"""

from typing import Annotated

from headwater.broker.api.request import Request
from headwater.broker.wire.message import Int16, Int32, Message, String, Structure, since

CLASSIC = "classic"


class ListGroupsRequest(Message):
    FLEXIBLE = 3
    states_filter: Annotated[list[String], since(4)] = []
    types_filter: Annotated[list[String], since(5)] = []


class ListedGroup(Structure):
    group_id: String
    protocol_type: String
    group_state: Annotated[String, since(4)] = ""
    group_type: Annotated[String, since(5)] = CLASSIC


class ListGroupsResponse(Message):
    FLEXIBLE = 3
    throttle_time_ms: Annotated[Int32, since(1)] = 0
    error_code: Int16 = 0
    groups: list[ListedGroup] = []


def handle(message: ListGroupsRequest, request: Request) -> ListGroupsResponse:
    states = {state.strip().lower() for state in message.states_filter}
    types = {kind.strip().lower() for kind in message.types_filter}
    if types and CLASSIC not in types:
        return ListGroupsResponse()
    return ListGroupsResponse(
        groups=[
            ListedGroup(group.group_id, group.protocol_type or "", group.state.value)
            for group in request.node.groups.groups.values()
            if not states or group.state.value.lower() in states
        ]
    )
