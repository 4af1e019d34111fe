"""DeleteTopics (API key 20), versions 1-6.

Behaviour
- The topic is gone when the answer goes out; its files are removed `file.delete.delay.ms` later.
- The groups' offsets for it are forgotten, as in Kafka.

Versions: 4 is flexible; 5 adds an error message; 6 takes ids beside names (KIP-516).
Deviations: `__consumer_offsets` can't be deleted: POLICY_VIOLATION.
Upstream: ControllerApis#deleteTopics.
"""

from collections import Counter
from typing import Annotated

from headwater.broker.api.request import Request
from headwater.broker.metadata import Topic
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
    found: list[tuple[DeleteTopicState, Topic | ProtocolError]] = []
    for state in {(state.name, state.topic_id): state for state in states}.values():
        try:
            found.append((state, _resolve(state, states, request)))
        except ProtocolError as error:
            found.append((state, error))
    counts = Counter(topic.topic_id for _, topic in found if isinstance(topic, Topic))
    responses = []
    for state, topic in found:
        if isinstance(topic, Topic) and counts[topic.topic_id] > 1:
            if state.name is None:
                continue  # named by its id too: answered once, under its name
            topic = ProtocolError(
                ErrorCode.INVALID_REQUEST, "The provided topic name maps to an ID that was already supplied."
            )
        if isinstance(topic, Topic):
            try:
                request.node.delete_topic(topic)
                responses.append(DeletedTopic(topic.name, topic.topic_id))
                continue
            except ProtocolError as error:
                topic = error
        responses.append(DeletedTopic(state.name, state.topic_id, topic.code, topic.message))
    return DeleteTopicsResponse(responses=responses)


def _resolve(state: DeleteTopicState, states: list[DeleteTopicState], request: Request) -> Topic:
    name, topic_id = state.name, state.topic_id
    if not request.node.config.flag("delete.topic.enable"):
        code = ErrorCode.TOPIC_DELETION_DISABLED if request.version >= 3 else ErrorCode.INVALID_REQUEST
        raise ProtocolError(code, "delete.topic.enable is false")
    if name is None and topic_id == NO_UUID:
        raise ProtocolError(ErrorCode.INVALID_REQUEST, "Neither topic name nor id were specified.")
    if name is not None and topic_id != NO_UUID:
        raise ProtocolError(ErrorCode.INVALID_REQUEST, "You may not specify both topic name and topic id.")
    if states.count(state) > 1:
        raise ProtocolError(
            ErrorCode.INVALID_REQUEST, "Duplicate topic name." if name is not None else "Duplicate topic id."
        )
    try:
        return request.node.topic_of(topic_id if name is None else name)
    except ProtocolError as error:
        raise ProtocolError(
            error.code, f"This server does not host this {'topic ID' if name is None else 'topic-partition'}."
        ) from None
