"""The only door to the environment: every setting begins with HEADWATER_, and an unknown one is an error.

HEADWATER_BOOTSTRAP_SERVERS   HOST:PORT[,HOST:PORT...]         127.0.0.1:9092
HEADWATER_DATABASE_URL        SQLAlchemy's, sync or async       none
HEADWATER_CREATE_TOPICS       true | false                      true
HEADWATER_REGISTRY_URL        of the schema registry           http://127.0.0.1:8081
HEADWATER_REGISTER_SCHEMAS    true | false                      true
HEADWATER_ALERT_WEBHOOK       where alerts are posted          none
HEADWATER_HISTORY             a folder for histories           none
HEADWATER_KAFKA_<NAME>        a property of the Kafka client, with _ for .
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

PREFIX = "HEADWATER_"
KAFKA_PREFIX = "HEADWATER_KAFKA_"
KNOWN = (
    "BOOTSTRAP_SERVERS",
    "DATABASE_URL",
    "CREATE_TOPICS",
    "REGISTRY_URL",
    "REGISTER_SCHEMAS",
    "ALERT_WEBHOOK",
    "HISTORY",
)
# Settings of the tests and tools of the project itself, and of commands, not of an application.
ELSEWHERE = ("REQUIRE_ALL", "CACHE")
DEFAULT_BOOTSTRAP_SERVERS = "127.0.0.1:9092"
DEFAULT_REGISTRY_URL = "http://127.0.0.1:8081"


class InvalidSetting(ValueError):
    """A setting that can't be used; the message says which and what to do."""


@dataclass(frozen=True, slots=True)
class Settings:
    bootstrap_servers: str = DEFAULT_BOOTSTRAP_SERVERS
    database_url: str | None = None
    create_topics: bool = True
    registry_url: str = DEFAULT_REGISTRY_URL
    register_schemas: bool = True
    kafka: Mapping[str, str] = field(default_factory=dict)
    """Properties of the Kafka client, by their own names."""
    alert_webhook: str | None = None
    history: str | None = None
    """A folder: see headwater.runtime.history."""


def from_environment(environment: Mapping[str, str]) -> Settings:
    """Raises InvalidSetting."""
    kafka = {}
    values = {}
    for name, value in environment.items():
        if name.startswith(KAFKA_PREFIX):
            kafka[name.removeprefix(KAFKA_PREFIX).lower().replace("_", ".")] = value
        elif name.startswith(PREFIX) and name.removeprefix(PREFIX) not in ELSEWHERE:
            values[name.removeprefix(PREFIX)] = value
    for name in values:
        if name not in KNOWN:
            near = difflib.get_close_matches(name, KNOWN, n=1)
            advice = (
                f" Did you mean {PREFIX}{near[0]}?" if near else f" Known are {', '.join(PREFIX + k for k in KNOWN)}."
            )
            raise InvalidSetting(f"the setting {PREFIX}{name} is not known.{advice}")
    return Settings(
        bootstrap_servers=values.get("BOOTSTRAP_SERVERS", DEFAULT_BOOTSTRAP_SERVERS),
        database_url=values.get("DATABASE_URL"),
        create_topics=_flag("CREATE_TOPICS", values.get("CREATE_TOPICS", "true")),
        registry_url=_url("REGISTRY_URL", values.get("REGISTRY_URL")) or DEFAULT_REGISTRY_URL,
        register_schemas=_flag("REGISTER_SCHEMAS", values.get("REGISTER_SCHEMAS", "true")),
        kafka=kafka,
        alert_webhook=_url("ALERT_WEBHOOK", values.get("ALERT_WEBHOOK")),
        history=values.get("HISTORY"),
    )


def _flag(name: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise InvalidSetting(f"{PREFIX}{name} is true or false, not {value!r}.")
    return value.lower() == "true"


def _url(name: str, value: str | None) -> str | None:
    if value is not None and (urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).hostname):
        raise InvalidSetting(f"{PREFIX}{name} is an address that begins with http:// or https://, not {value!r}.")
    return value


DURATION_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "y": 365 * 86400.0}


def duration_seconds(text: str) -> float:
    """`500ms`, `30s`, `5m`, `24h`, `7d`, `1y` in seconds; a year has 365 days. Raises InvalidSetting."""
    for unit in ("ms", "s", "m", "h", "d", "y"):
        number = text.removesuffix(unit)
        if number != text and number.replace(".", "", 1).isdigit():
            return float(number) * DURATION_SECONDS[unit]
    raise InvalidSetting(f"{text!r} is no duration: write a number and ms, s, m, h, d or y, as in 30s or 7d.")
