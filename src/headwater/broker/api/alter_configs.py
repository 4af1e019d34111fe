"""AlterConfigs (API key 33), versions 0-2: a resource's configs shall be exactly these.

Behaviour
- Topics only: the broker's configs are given at its start. What is not named goes back to its default.
- All or nothing per resource; `validate_only` checks the same.

Versions: 2 is flexible.
Deviations: broker configs can't be changed while it runs: INVALID_REQUEST.
Upstream: ConfigurationControlManager#legacyAlterConfigs.
"""

from collections import Counter

from headwater.broker.api.describe_configs import TOPIC
from headwater.broker.api.request import Request
from headwater.broker.metadata import check_name
from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.message import Bool, Int8, Int16, Int32, Message, NullableString, String, Structure


class AlterableConfig(Structure):
    name: String
    value: NullableString


class AlterConfigsResource(Structure):
    resource_type: Int8
    resource_name: String
    configs: list[AlterableConfig]


class AlterConfigsRequest(Message):
    FLEXIBLE = 2
    resources: list[AlterConfigsResource] = []
    validate_only: Bool = False


class AlterConfigsResult(Structure):
    error_code: Int16
    error_message: NullableString
    resource_type: Int8
    resource_name: String


class AlterConfigsResponse(Message):
    FLEXIBLE = 2
    throttle_time_ms: Int32 = 0
    responses: list[AlterConfigsResult] = []


def handle(message: AlterConfigsRequest, request: Request) -> AlterConfigsResponse:
    counts = Counter((resource.resource_type, resource.resource_name) for resource in message.resources)
    responses = []
    for resource in message.resources:
        kind, name = resource.resource_type, resource.resource_name
        code, text = ErrorCode.NONE, None
        try:
            check_resource(kind, name, counts[kind, name], [config.name for config in resource.configs])
            missing = [config.name for config in resource.configs if config.value is None]
            if missing:
                raise ProtocolError(ErrorCode.INVALID_REQUEST, f"Null value not supported for : {', '.join(missing)}")
            configs = {config.name: config.value or "" for config in resource.configs}
            change_topic(name, configs, message.validate_only, request)
        except ProtocolError as error:
            code, text = error.code, error.message
        responses.append(AlterConfigsResult(code, text, kind, name))
    return AlterConfigsResponse(responses=responses)


def check_resource(kind: int, name: str, count: int, names: list[str]) -> None:
    """Raises ProtocolError."""
    if count > 1:
        raise ProtocolError(ErrorCode.INVALID_REQUEST, "Each resource must appear at most once.")
    if len(set(names)) < len(names):
        raise ProtocolError(ErrorCode.INVALID_REQUEST, "Error due to duplicate config keys")
    if kind != TOPIC:
        raise ProtocolError(
            ErrorCode.INVALID_REQUEST, f"configs of resources of type {kind} can't be changed while the broker runs"
        )
    if not name:
        raise ProtocolError(ErrorCode.INVALID_REQUEST, "Default topic resources are not allowed.")
    check_name(name)


def change_topic(name: str, configs: dict[str, str], validate_only: bool, request: Request) -> None:
    """The topic's own configs shall be these. Raises ProtocolError."""
    request.node.metadata.decide_configs(name, configs)
    if not validate_only:
        request.node.configure_topic(name, configs)
