"""IncrementalAlterConfigs (API key 44), versions 0-1: set, delete, append to and subtract from single configs (KIP-339).

Behaviour: topics only, all or nothing per resource; `validate_only` checks the same.
Versions: 1 is flexible.
Deviations: broker configs can't be changed while it runs: INVALID_REQUEST.
Upstream: ConfigurationControlManager#incrementalAlterConfigs.
"""

from collections import Counter

from headwater.broker.api.alter_configs import change_topic, check_resource
from headwater.broker.api.request import Request
from headwater.broker.topic_config import TOPIC_KEYS, ConfigType
from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.message import Bool, Int8, Int16, Int32, Message, NullableString, String, Structure

SET, DELETE, APPEND, SUBTRACT = range(4)


class AlterableConfig(Structure):
    name: String
    config_operation: Int8
    value: NullableString


class AlterConfigsResource(Structure):
    resource_type: Int8
    resource_name: String
    configs: list[AlterableConfig]


class IncrementalAlterConfigsRequest(Message):
    FLEXIBLE = 1
    resources: list[AlterConfigsResource] = []
    validate_only: Bool = False


class AlterConfigsResult(Structure):
    error_code: Int16
    error_message: NullableString
    resource_type: Int8
    resource_name: String


class IncrementalAlterConfigsResponse(Message):
    FLEXIBLE = 1
    throttle_time_ms: Int32 = 0
    responses: list[AlterConfigsResult] = []


def handle(message: IncrementalAlterConfigsRequest, request: Request) -> IncrementalAlterConfigsResponse:
    counts = Counter((resource.resource_type, resource.resource_name) for resource in message.resources)
    responses = []
    for resource in message.resources:
        kind, name = resource.resource_type, resource.resource_name
        code, text = ErrorCode.NONE, None
        try:
            check_resource(kind, name, counts[kind, name], [config.name for config in resource.configs])
            topic = request.node.metadata.topics.get(name)
            configs = dict(topic.configs) if topic is not None else {}
            for config in resource.configs:
                _change(configs, config)
            change_topic(name, configs, message.validate_only, request)
        except ProtocolError as error:
            code, text = error.code, error.message
        responses.append(AlterConfigsResult(code, text, kind, name))
    return IncrementalAlterConfigsResponse(responses=responses)


def _change(configs: dict[str, str], change: AlterableConfig) -> None:
    name, operation, value = change.name, change.config_operation, change.value
    if operation == DELETE:
        configs.pop(name, None)
        return
    if value is None:
        raise ProtocolError(ErrorCode.INVALID_REQUEST, f"Null value not supported for : {name}")
    if operation == SET:
        configs[name] = value
    elif operation in (APPEND, SUBTRACT):
        key = TOPIC_KEYS.get(name)
        if key is None:
            raise ProtocolError(ErrorCode.INVALID_CONFIG, f"Unknown topic config name: {name}")
        if key.type is not ConfigType.LIST:
            word = "APPEND to" if operation == APPEND else "SUBTRACT from"
            raise ProtocolError(ErrorCode.INVALID_CONFIG, f"Can't {word} key {name} because its type is not LIST.")
        items = [item for item in configs.get(name, key.default).split(",") if item]
        given = [item for item in value.split(",") if item]
        if operation == APPEND:
            items += [item for item in given if item not in items]
        else:
            items = [item for item in items if item not in given]
        configs[name] = ",".join(items)
    else:
        raise ProtocolError(ErrorCode.INVALID_REQUEST, f"Unknown operations type {operation}")
