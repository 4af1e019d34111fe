"""CreatePartitions (API key 37), versions 0-3: more partitions for a topic, never fewer.

Behaviour: keys of existing records don't move; which partition new ones go to changes, as everywhere in Kafka.
Versions: 2 is flexible.
Deviations: a manual assignment can name this broker only.
Upstream: ReplicationControlManager#createPartitions.
"""

from collections import Counter

from headwater.broker.api.create_topics import check_replicas
from headwater.broker.api.request import Request
from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.message import Bool, Int16, Int32, Message, NullableString, String, Structure


class CreatePartitionsAssignment(Structure):
    broker_ids: list[Int32]


class CreatePartitionsTopic(Structure):
    name: String
    count: Int32
    assignments: list[CreatePartitionsAssignment] | None


class CreatePartitionsRequest(Message):
    FLEXIBLE = 2
    topics: list[CreatePartitionsTopic] = []
    timeout_ms: Int32 = 60000
    validate_only: Bool = False


class CreatePartitionsResult(Structure):
    name: String
    error_code: Int16 = 0
    error_message: NullableString = None


class CreatePartitionsResponse(Message):
    FLEXIBLE = 2
    throttle_time_ms: Int32 = 0
    results: list[CreatePartitionsResult] = []


def handle(message: CreatePartitionsRequest, request: Request) -> CreatePartitionsResponse:
    counts = Counter(topic.name for topic in message.topics)
    results: dict[str, CreatePartitionsResult] = {}
    for topic in message.topics:
        try:
            if counts[topic.name] > 1:
                raise ProtocolError(ErrorCode.INVALID_REQUEST, "Duplicate topic name.")
            _grow(topic, message.validate_only, request)
            results[topic.name] = CreatePartitionsResult(topic.name)
        except ProtocolError as error:
            results[topic.name] = CreatePartitionsResult(topic.name, error.code, error.message)
    return CreatePartitionsResponse(results=list(results.values()))


def _grow(wanted: CreatePartitionsTopic, validate_only: bool, request: Request) -> None:
    node = request.node
    added = len(node.metadata.decide_grow(wanted.name, wanted.count))
    if wanted.assignments is not None:
        if len(wanted.assignments) != added:
            raise ProtocolError(
                ErrorCode.INVALID_REPLICA_ASSIGNMENT,
                f"Attempted to add {added} additional partition(s), "
                f"but only {len(wanted.assignments)} assignment(s) were specified.",
            )
        for assignment in wanted.assignments:
            check_replicas(assignment.broker_ids, node.node_id)
    if not validate_only:
        node.grow_topic(wanted.name, wanted.count)
