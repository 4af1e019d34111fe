"""DeleteTopics (API key 20), versions 1-6.

Behaviour
- The topic is gone when the answer goes out; its files are removed `file.delete.delay.ms` later.
- The groups' offsets for it are forgotten, as in Kafka.

Versions: 4 is flexible; 5 adds an error message; 6 takes ids beside names (KIP-516).
Deviations: none known.
Upstream: ControllerApis#deleteTopics.
"""

from typing import Annotated

from headwater.broker.api.request import Request
from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.message import (
    NO_UUID,
    Int16,
    Int32,
    Message,
    NullableString,
    String,
    Structure,
    Uuid,
    since,
    until,
)


class DeleteTopicState(Structure):
    name: NullableString = None
    topic_id: Uuid = NO_UUID


class DeleteTopicsRequest(Message):
    FLEXIBLE = 4
    topics: Annotated[list[DeleteTopicState], since(6)] = []
    topic_names: Annotated[list[String], until(5)] = []
    timeout_ms: Int32 = 60000


class DeletedTopic(Structure):
    name: NullableString
    topic_id: Annotated[Uuid, since(6)] = NO_UUID
    error_code: Int16 = 0
    error_message: Annotated[NullableString, since(5)] = None


class DeleteTopicsResponse(Message):
    FLEXIBLE = 4
    throttle_time_ms: Annotated[Int32, since(1)] = 0
    responses: list[DeletedTopic] = []


def handle(message: DeleteTopicsRequest, request: Request) -> DeleteTopicsResponse:
    states = message.topics if request.version >= 6 else [DeleteTopicState(name) for name in message.topic_names]
    seen: dict[tuple[str | None, bytes], int] = {}
    for state in states:
        seen[state.name, state.topic_id] = seen.get((state.name, state.topic_id), 0) + 1
    responses = []
    for (name, topic_id), count in seen.items():
        try:
            responses.append(_delete(name, topic_id, count, request))
        except ProtocolError as error:
            responses.append(DeletedTopic(name, topic_id, error.code, error.message))
    return DeleteTopicsResponse(responses=responses)


def _delete(name: str | None, topic_id: bytes, count: int, request: Request) -> DeletedTopic:
    node = request.node
    if not node.config.flag("delete.topic.enable"):
        code = ErrorCode.TOPIC_DELETION_DISABLED if request.version >= 3 else ErrorCode.INVALID_REQUEST
        raise ProtocolError(code, "delete.topic.enable is false")
    if name is None and topic_id == NO_UUID:
        raise ProtocolError(ErrorCode.INVALID_REQUEST, "Neither topic name nor id were specified.")
    if name is not None and topic_id != NO_UUID:
        raise ProtocolError(ErrorCode.INVALID_REQUEST, "You may not specify both topic name and topic id.")
    if count > 1:
        raise ProtocolError(
            ErrorCode.INVALID_REQUEST, "Duplicate topic name." if name is not None else "Duplicate topic id."
        )
    topic = node.topic_of(topic_id if name is None else name)
    node.delete_topic(topic)
    return DeletedTopic(topic.name, topic.topic_id)
