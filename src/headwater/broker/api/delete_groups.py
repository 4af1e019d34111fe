"""DeleteGroups (API key 42), versions 0-2: forget groups that have no members.

Behaviour: NON_EMPTY_GROUP while there are members, GROUP_ID_NOT_FOUND for an unknown one.
Versions: 2 is flexible.
Deviations: none known.
Upstream: GroupCoordinatorShard#deleteGroups.
"""

from headwater.broker.api.request import Request
from headwater.broker.wire.message import Int16, Int32, Message, String, Structure


class DeleteGroupsRequest(Message):
    FLEXIBLE = 2
    groups_names: list[String] = []


class DeletedGroup(Structure):
    group_id: String
    error_code: Int16


class DeleteGroupsResponse(Message):
    FLEXIBLE = 2
    throttle_time_ms: Int32 = 0
    results: list[DeletedGroup] = []


def handle(message: DeleteGroupsRequest, request: Request) -> DeleteGroupsResponse | None:
    names = list(dict.fromkeys(message.groups_names))
    if not names:
        return DeleteGroupsResponse()
    results: dict[str, int] = {}

    def done(name: str, code: int) -> None:
        results[name] = code
        if len(results) == len(names):
            request.respond(DeleteGroupsResponse(results=[DeletedGroup(each, results[each]) for each in names]))

    for name in names:
        request.node.groups.delete_group(name, lambda code, name=name: done(name, code))  # type: ignore[misc]
    return None
