"""Topic configs by Kafka's names, with Kafka's defaults and limits.

A topic's own value counts first, then the broker's (`log.retention.hours` for `retention.ms`), then the default. The
one default that differs from Kafka's is `flush.messages`: 1, so that acknowledged means on the disk.

Some values are refused, because the broker could not keep what they promise: tiered storage, preallocated files.
Upstream: org.apache.kafka.storage.internals.log.LogConfig, org.apache.kafka.common.config.TopicConfig.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import NamedTuple

from headwater.broker.log.partition_log import LogConfig
from headwater.broker.wire.record import GZIP, LZ4, NONE, SNAPPY, ZSTD

MAX_LONG = (1 << 63) - 1
MAX_INT = (1 << 31) - 1
MINUTE_MS = 60 * 1000
HOUR_MS = 60 * MINUTE_MS


class ConfigType(IntEnum):
    """As DescribeConfigs numbers them."""

    BOOLEAN = 1
    STRING = 2
    INT = 3
    LONG = 5
    DOUBLE = 6
    LIST = 7


INTEGER = re.compile(r"[+-]?[0-9]+")  # Java's, not Python's 1_000


class InvalidConfig(ValueError):
    """A config value that can't be used; the message names it and says what is allowed."""


class ConfigKey(NamedTuple):
    name: str
    type: ConfigType
    default: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    """Values that Kafka allows and this broker could not honour."""
    synonyms: tuple[tuple[str, int], ...] = ()
    """Broker configs that give the default, first one first, each with what to multiply it by."""

    def check(self, value: str) -> None:
        """Raises InvalidConfig."""
        try:
            values = self._parse(value)
        except ValueError:
            raise InvalidConfig(
                f"Invalid value {value} for configuration {self.name}: it is of type {self.type.name}"
            ) from None
        for item in values:
            if self.choices and item not in self.choices:
                raise InvalidConfig(
                    f"Invalid value {item} for configuration {self.name}: it must be one of {', '.join(self.choices)}"
                )
            if self.low is not None and self.low == self.high and item != self.low:
                raise InvalidConfig(
                    f"Invalid value {item} for configuration {self.name}: this broker has only {self.low:.0f}"
                )
            if self.low is not None and isinstance(item, int | float) and item < self.low:
                raise InvalidConfig(
                    f"Invalid value {item} for configuration {self.name}: it must be at least {self.low:.0f}"
                )
            if self.high is not None and isinstance(item, int | float) and item > self.high:
                raise InvalidConfig(
                    f"Invalid value {item} for configuration {self.name}: it must be at most {self.high:.0f}"
                )
        if value in self.refused:
            raise InvalidConfig(f"Invalid value {value} for configuration {self.name}: this broker doesn't have it")

    def _parse(self, value: str) -> list[str] | list[int] | list[float]:
        if self.type is ConfigType.LIST:
            items = [item.strip() for item in value.split(",")] if value else []
            if "" in items or len(set(items)) < len(items):
                raise ValueError(value)
            return items
        if self.type is ConfigType.BOOLEAN:
            if value.lower() not in ("true", "false"):
                raise ValueError(value)
            return []
        if self.type is ConfigType.DOUBLE:
            return [float(value)]
        if self.type is ConfigType.STRING:
            return [value]
        if not INTEGER.fullmatch(value.strip()):
            raise ValueError(value)
        number = int(value)
        limit = MAX_INT if self.type is ConfigType.INT else MAX_LONG
        if not -limit - 1 <= number <= limit:
            raise ValueError(value)
        return [number]


BOOLEAN, STRING, INT, LONG, DOUBLE, LIST = (
    ConfigType.BOOLEAN,
    ConfigType.STRING,
    ConfigType.INT,
    ConfigType.LONG,
    ConfigType.DOUBLE,
    ConfigType.LIST,
)
ONE = 1

TOPIC_KEYS: dict[str, ConfigKey] = {
    key.name: key
    for key in (
        ConfigKey("cleanup.policy", LIST, "delete", choices=("compact", "delete"), synonyms=(("log.cleanup.policy", ONE),)),
        ConfigKey("compression.gzip.level", INT, "-1", -1, 9, synonyms=(("compression.gzip.level", ONE),)),
        ConfigKey("compression.lz4.level", INT, "9", 1, 17, synonyms=(("compression.lz4.level", ONE),)),
        ConfigKey(
            "compression.type", STRING, "producer",
            choices=("uncompressed", "zstd", "lz4", "snappy", "gzip", "producer"),
            synonyms=(("compression.type", ONE),),
        ),
        ConfigKey("compression.zstd.level", INT, "3", -131072, 22, synonyms=(("compression.zstd.level", ONE),)),
        ConfigKey("delete.retention.ms", LONG, "86400000", 0, synonyms=(("log.cleaner.delete.retention.ms", ONE),)),
        ConfigKey("file.delete.delay.ms", LONG, "60000", 0, synonyms=(("log.segment.delete.delay.ms", ONE),)),
        ConfigKey("flush.messages", LONG, "1", 1, synonyms=(("log.flush.interval.messages", ONE),)),
        ConfigKey("flush.ms", LONG, str(MAX_LONG), 0, synonyms=(("log.flush.interval.ms", ONE),)),
        ConfigKey("follower.replication.throttled.replicas", LIST, ""),
        ConfigKey("index.interval.bytes", INT, "4096", 0, synonyms=(("log.index.interval.bytes", ONE),)),
        ConfigKey("leader.replication.throttled.replicas", LIST, ""),
        ConfigKey("local.retention.bytes", LONG, "-2", -2, synonyms=(("log.local.retention.bytes", ONE),)),
        ConfigKey("local.retention.ms", LONG, "-2", -2, synonyms=(("log.local.retention.ms", ONE),)),
        ConfigKey("max.compaction.lag.ms", LONG, str(MAX_LONG), 1, synonyms=(("log.cleaner.max.compaction.lag.ms", ONE),)),
        ConfigKey("max.message.bytes", INT, "1048588", 0, synonyms=(("message.max.bytes", ONE),)),
        ConfigKey("message.timestamp.after.max.ms", LONG, "3600000", 0, synonyms=(("log.message.timestamp.after.max.ms", ONE),)),
        ConfigKey(
            "message.timestamp.before.max.ms", LONG, str(MAX_LONG), 0, synonyms=(("log.message.timestamp.before.max.ms", ONE),)
        ),
        ConfigKey(
            "message.timestamp.type", STRING, "CreateTime",
            choices=("CreateTime", "LogAppendTime"),
            synonyms=(("log.message.timestamp.type", ONE),),
        ),
        ConfigKey("min.cleanable.dirty.ratio", DOUBLE, "0.5", 0, 1, synonyms=(("log.cleaner.min.cleanable.ratio", ONE),)),
        ConfigKey("min.compaction.lag.ms", LONG, "0", 0, synonyms=(("log.cleaner.min.compaction.lag.ms", ONE),)),
        ConfigKey("min.insync.replicas", INT, "1", 1, synonyms=(("min.insync.replicas", ONE),)),
        ConfigKey("preallocate", BOOLEAN, "false", refused=("true",), synonyms=(("log.preallocate", ONE),)),
        ConfigKey("remote.log.copy.disable", BOOLEAN, "false"),
        ConfigKey("remote.log.delete.on.disable", BOOLEAN, "false"),
        ConfigKey("remote.storage.enable", BOOLEAN, "false", refused=("true",)),
        ConfigKey("retention.bytes", LONG, "-1", -1, synonyms=(("log.retention.bytes", ONE),)),
        ConfigKey(
            "retention.ms", LONG, str(168 * HOUR_MS), -1,
            synonyms=(("log.retention.ms", ONE), ("log.retention.minutes", MINUTE_MS), ("log.retention.hours", HOUR_MS)),
        ),
        ConfigKey("segment.bytes", INT, "1073741824", 1048576, synonyms=(("log.segment.bytes", ONE),)),
        ConfigKey("segment.index.bytes", INT, "10485760", 4, synonyms=(("log.index.size.max.bytes", ONE),)),
        ConfigKey("segment.jitter.ms", LONG, "0", 0, 0),
        ConfigKey(
            "segment.ms", LONG, str(168 * HOUR_MS), 1, synonyms=(("log.roll.ms", ONE), ("log.roll.hours", HOUR_MS))
        ),
        ConfigKey("unclean.leader.election.enable", BOOLEAN, "false"),
    )
}  # fmt: skip

INTERNAL_SEGMENT_BYTES = "internal.segment.bytes"
"""Kafka's own way around the lower limit of `segment.bytes`, for tests; not shown."""
INTERNAL_SEGMENT_KEY = ConfigKey(INTERNAL_SEGMENT_BYTES, INT, "0", 1)

CODECS = {"uncompressed": NONE, "gzip": GZIP, "snappy": SNAPPY, "lz4": LZ4, "zstd": ZSTD}


@dataclasses.dataclass(frozen=True, slots=True)
class TopicConfig:
    """The configs of one topic as the broker uses them."""

    log: LogConfig
    compacts: bool
    compression: int | None
    """The codec that batches are stored with; None: the producer's."""
    flush_messages: int
    flush_ms: int
    max_message_bytes: int
    uses_append_time: bool
    timestamp_before_max_ms: int
    timestamp_after_max_ms: int

    @property
    def syncs_every_batch(self) -> bool:
        return self.flush_messages == 1


def check_topic_configs(configs: Mapping[str, str]) -> None:
    """Raises InvalidConfig for an unknown name or a value that can't be used."""
    for name, value in configs.items():
        key = INTERNAL_SEGMENT_KEY if name == INTERNAL_SEGMENT_BYTES else TOPIC_KEYS.get(name)
        if key is None:
            raise InvalidConfig(f"Unknown topic config name: {name}")
        if len(value) > 32767:
            raise InvalidConfig(f"The value of {name} is longer than 32767 characters")
        key.check(value)
    low = int(configs.get("min.compaction.lag.ms", "0"))
    high = int(configs.get("max.compaction.lag.ms", str(MAX_LONG)))
    if low > high:
        raise InvalidConfig(f"min.compaction.lag.ms ({low}) must not be above max.compaction.lag.ms ({high})")


def effective_value(key: ConfigKey, overrides: Mapping[str, str], broker: Mapping[str, str]) -> str:
    if key.name in overrides:
        return overrides[key.name]
    for synonym, factor in key.synonyms:
        if synonym in broker:
            return str(max(int(broker[synonym]), -1) * factor) if factor != ONE else broker[synonym]
    return key.default


def topic_config(overrides: Mapping[str, str], broker: Mapping[str, str]) -> TopicConfig:
    """The topic's own configs over those of the broker over the defaults."""

    def text(name: str) -> str:
        return effective_value(TOPIC_KEYS[name], overrides, broker)

    number: Callable[[str], int] = lambda name: int(text(name))  # noqa: E731
    policy = text("cleanup.policy")
    return TopicConfig(
        log=LogConfig(
            segment_bytes=int(overrides.get(INTERNAL_SEGMENT_BYTES, "0")) or number("segment.bytes"),
            segment_ms=number("segment.ms"),
            index_interval_bytes=number("index.interval.bytes"),
            index_bytes=number("segment.index.bytes"),
            retention_bytes=number("retention.bytes"),
            retention_ms=number("retention.ms"),
            deletes="delete" in policy,
            file_delete_delay_ms=number("file.delete.delay.ms"),
        ),
        compacts="compact" in policy,
        compression=CODECS.get(text("compression.type")),
        flush_messages=number("flush.messages"),
        flush_ms=number("flush.ms"),
        max_message_bytes=number("max.message.bytes"),
        uses_append_time=text("message.timestamp.type") == "LogAppendTime",
        timestamp_before_max_ms=number("message.timestamp.before.max.ms"),
        timestamp_after_max_ms=number("message.timestamp.after.max.ms"),
    )
