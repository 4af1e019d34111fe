"""DescribeConfigs (API key 32), versions 1-4: what topics and this broker are configured with, and by whom.

Behaviour
- A topic's entry is its own (source 1), the broker's static one (4) or the default (5).
- The broker's entries are those of `headwater.broker.broker_config`; all are read-only.
- Groups, client metrics and loggers have no configs here: INVALID_REQUEST.

Versions: 3 adds types and documentation (KIP-569); 4 is flexible.
Deviations: documentation is null; the broker lists what it has, which is less than Kafka.
Upstream: kafka.server.ConfigHelper.
"""

from collections.abc import Iterable
from typing import Annotated

from headwater.broker.api.request import Request
from headwater.broker.broker_config import BROKER_KEYS
from headwater.broker.metadata import Topic, check_name
from headwater.broker.node import Node
from headwater.broker.topic_config import TOPIC_KEYS, ConfigKey, effective_value
from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.message import Bool, Int8, Int16, Int32, Message, NullableString, String, Structure, since

TOPIC, BROKER = 2, 4
DYNAMIC_TOPIC, STATIC_BROKER, DEFAULT = 1, 4, 5


class DescribeConfigsResource(Structure):
    resource_type: Int8
    resource_name: String
    configuration_keys: list[String] | None


class DescribeConfigsRequest(Message):
    FLEXIBLE = 4
    resources: list[DescribeConfigsResource] = []
    include_synonyms: Bool = False
    include_documentation: Annotated[Bool, since(3)] = False


class ConfigSynonym(Structure):
    name: String
    value: NullableString
    source: Int8


class ConfigEntry(Structure):
    name: String
    value: NullableString
    read_only: Bool
    config_source: Int8
    is_sensitive: Bool = False
    synonyms: list[ConfigSynonym] = []
    config_type: Annotated[Int8, since(3)] = 0
    documentation: Annotated[NullableString, since(3)] = None


class DescribeConfigsResult(Structure):
    error_code: Int16
    error_message: NullableString
    resource_type: Int8
    resource_name: String
    configs: list[ConfigEntry] = []


class DescribeConfigsResponse(Message):
    FLEXIBLE = 4
    throttle_time_ms: Int32 = 0
    results: list[DescribeConfigsResult] = []


def handle(message: DescribeConfigsRequest, request: Request) -> DescribeConfigsResponse:
    results = []
    for resource in message.resources:
        kind, name = resource.resource_type, resource.resource_name
        try:
            entries = _entries(kind, name, request.node)
        except ProtocolError as error:
            results.append(DescribeConfigsResult(error.code, error.message, kind, name))
            continue
        wanted = resource.configuration_keys
        configs = [entry for entry in entries if not wanted or entry.name in wanted]
        if not message.include_synonyms:
            for entry in configs:
                entry.synonyms = []
        results.append(DescribeConfigsResult(ErrorCode.NONE, None, kind, name, configs))
    return DescribeConfigsResponse(results=results)


def _entries(kind: int, name: str, node: Node) -> Iterable[ConfigEntry]:
    if kind == TOPIC:
        check_name(name)
        return topic_entries(node.metadata.topic(name), node)
    if kind == BROKER:
        check_broker(name, node.node_id)
        return [_broker_entry(key, node) for key in BROKER_KEYS.values()] if name else []
    raise ProtocolError(ErrorCode.INVALID_REQUEST, f"resources of type {kind} have no configs on this broker")


def check_broker(name: str, node_id: int) -> None:
    """Raises ProtocolError INVALID_REQUEST for another broker than this one; "" is the cluster's default."""
    if name and not name.isdigit():
        raise ProtocolError(ErrorCode.INVALID_REQUEST, f"Broker id must be an integer, but it is: {name}")
    if name and int(name) != node_id:
        raise ProtocolError(
            ErrorCode.INVALID_REQUEST,
            f"Unexpected broker id, expected {node_id} or empty string, but received {name}",
        )


def topic_entries(topic: Topic, node: Node) -> list[ConfigEntry]:
    return [_topic_entry(key, topic, node) for key in sorted(TOPIC_KEYS.values())]


def _topic_entry(key: ConfigKey, topic: Topic, node: Node) -> ConfigEntry:
    broker = node.config.values
    synonyms = [ConfigSynonym(name, broker[name], STATIC_BROKER) for name, _ in key.synonyms if name in broker]
    if key.synonyms:
        synonyms.append(ConfigSynonym(key.synonyms[-1][0], BROKER_KEYS[key.synonyms[-1][0]].default, DEFAULT))
    if key.name in topic.configs:
        synonyms.insert(0, ConfigSynonym(key.name, topic.configs[key.name], DYNAMIC_TOPIC))
    source = synonyms[0].source if synonyms else DEFAULT
    value = effective_value(key, topic.configs, broker)
    return ConfigEntry(key.name, value, False, source, False, synonyms, key.type)


def _broker_entry(key: ConfigKey, node: Node) -> ConfigEntry:
    source = STATIC_BROKER if key.name in node.config.values else DEFAULT
    value = node.config.text(key.name)
    return ConfigEntry(key.name, value, True, source, False, [ConfigSynonym(key.name, value, source)], key.type)
