"""The broker's configs by the names of Kafka's `server.properties`.

What Kafka has and this broker doesn't is unknown here, and an unknown name is an error that names the nearest known
one: an option that is read and ignored would be a lie. Listener, directory and identity come from the command line.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path

from headwater.broker.log.checkpoint import decode_properties
from headwater.broker.topic_config import (
    BOOLEAN,
    INT,
    LONG,
    STRING,
    TOPIC_KEYS,
    ConfigKey,
    InvalidConfig,
)

OWN_KEYS = (
    ConfigKey("advertised.listeners", STRING, ""),
    ConfigKey("auto.create.topics.enable", BOOLEAN, "true"),
    ConfigKey("broker.rack", STRING, ""),
    ConfigKey("connections.max.idle.ms", LONG, "600000", 1000),
    ConfigKey("default.replication.factor", INT, "1", 1, 1),
    ConfigKey("delete.topic.enable", BOOLEAN, "true"),
    ConfigKey("fetch.max.bytes", INT, "57671680", 1024),
    ConfigKey("group.initial.rebalance.delay.ms", INT, "0", 0),
    ConfigKey("group.max.session.timeout.ms", INT, "1800000", 0),
    ConfigKey("group.max.size", INT, "2147483647", 1),
    ConfigKey("group.min.session.timeout.ms", INT, "6000", 0),
    ConfigKey("log.flush.offset.checkpoint.interval.ms", INT, "60000", 100),
    ConfigKey("log.retention.check.interval.ms", LONG, "300000", 1),
    ConfigKey("max.connections", INT, "10000", 1),
    ConfigKey("max.incremental.fetch.session.cache.slots", INT, "1000", 0),
    ConfigKey("node.id", INT, "1", 0),
    ConfigKey("num.partitions", INT, "1", 1),
    ConfigKey("offset.metadata.max.bytes", INT, "4096", 0),
    ConfigKey("offsets.retention.check.interval.ms", LONG, "600000", 1),
    ConfigKey("offsets.retention.minutes", INT, "10080", 1),
    ConfigKey("producer.id.expiration.ms", INT, "86400000", 1),
    ConfigKey("socket.request.max.bytes", INT, "104857600", 1024),
)


def _topic_defaults() -> list[ConfigKey]:
    """Broker configs that give topics their defaults: checked as the topic's are."""
    keys = []
    for key in TOPIC_KEYS.values():
        for synonym, factor in key.synonyms:
            default = key.default if factor == 1 else str(int(key.default) // factor)
            keys.append(key._replace(name=synonym, default=default, synonyms=()))
    return keys


BROKER_KEYS: dict[str, ConfigKey] = {key.name: key for key in (*OWN_KEYS, *_topic_defaults())}

ELSEWHERE = {
    "broker.id": "use node.id",
    "listeners": "use --listen HOST:PORT",
    "log.dir": "use --data DIR",
    "log.dirs": "use --data DIR",
}


class BrokerConfig:
    """The configs that were set, over the defaults."""

    def __init__(self, values: Mapping[str, str]) -> None:
        """Raises InvalidConfig."""
        for name, value in values.items():
            if name not in BROKER_KEYS:
                raise InvalidConfig(f"unknown broker config {name!r}{_advice(name)}")
            BROKER_KEYS[name].check(value)
        self.values = dict(values)
        self._numbers = {key.name: int(self.text(key.name)) for key in BROKER_KEYS.values() if key.type in (INT, LONG)}

    def text(self, name: str) -> str:
        return self.values.get(name, BROKER_KEYS[name].default)

    def number(self, name: str) -> int:
        return self._numbers[name]

    def flag(self, name: str) -> bool:
        return self.text(name).lower() == "true"


def _advice(name: str) -> str:
    if name in ELSEWHERE:
        return f": {ELSEWHERE[name]}."
    near = difflib.get_close_matches(name, BROKER_KEYS, n=1, cutoff=0.6)
    return f". Did you mean {near[0]!r}?" if near else ". docs/reference/broker.md lists the known ones."


def read_config_file(path: Path) -> dict[str, str]:
    """A `server.properties` file. Raises InvalidConfig."""
    try:
        return decode_properties(path.read_bytes())
    except OSError as error:
        raise InvalidConfig(f"the config file {path} can't be read: {error.strerror}.") from None


def parse_setting(text: str) -> tuple[str, str]:
    """`NAME=VALUE` of the command line. Raises InvalidConfig."""
    name, separator, value = text.partition("=")
    if not separator:
        raise InvalidConfig(f"--set takes NAME=VALUE, not {text!r}.")
    return name.strip(), value.strip()
