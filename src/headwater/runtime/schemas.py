"""The schemas of an application's events, in a registry: registered at the start, looked up when data needs them.

A class's schema is registered under its topic's subject before anything is published with it; one that the registry
refuses, because what reads the topic could not read it, refuses the start. With HEADWATER_REGISTER_SCHEMAS=false nothing is
registered: what isn't there refuses the start and says what to do.

A schema is looked up once and kept. While the registry is away, events whose schemas are known go on, others wait as in any
outage.
"""

import logging
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from headwater.event.codec import Framed
from headwater.event.data_format import NoSchema, Write, WriterSchema, data_format
from headwater.event.topic import Topic
from headwater.kafka.registry_client import Refused, RegistryClient, RegistryUnreachable
from headwater.schema.schema import InvalidSchema, SchemaType
from headwater.settings import Settings

logger = logging.getLogger(__name__)

START_SECONDS = 30.0  # for a registry that starts beside us
PAUSE_SECONDS = 0.2
UNKNOWN_SECONDS = 2.0  # for an id to come to be known
MAX_REFERENCES = 100
UNKNOWN = (40401, 40402, 40403)


class UnusableSchema(Exception):
    """An event's schema can't be used; the message says whose, why, and what to do."""


class EventSchema(NamedTuple):
    cls: type
    subject: str
    type: SchemaType
    text: str
    write: Write


def schemas_of(topics: Iterable[Topic]) -> list[EventSchema]:
    """Of the events of topics that have schemas. Raises UnusableSchema."""
    return [
        _schema_of(topic, cls, topic.schema) for topic in topics if topic.schema is not None for cls in topic.events
    ]


def _schema_of(topic: Topic, cls: type, kind: SchemaType) -> EventSchema:
    try:
        form = data_format(kind)
        return EventSchema(cls, topic.subject_of(cls), kind, form.schema_of(cls), form.writer(cls))
    except ModuleNotFoundError as error:
        raise UnusableSchema(
            f"{topic.name} has schema={kind.lower()!r}, which needs {error.name}: install headwater[{kind.lower()}]."
        ) from None
    except NoSchema as error:
        raise UnusableSchema(f"{topic.name}: {error}") from None


class Schemas:
    def __init__(self, settings: Settings) -> None:
        self._registers = settings.register_schemas
        self._client = RegistryClient(settings.registry_url)
        self._known: dict[int, WriterSchema] = {}

    def prepare(self, topics: Iterable[Topic], published: Collection[str]) -> dict[type, Framed]:
        """How each class is written. The schemas of published topics are registered; of others, which the application reads and
        somebody else defines, nothing is. Blocks. Raises UnusableSchema, RegistryUnreachable."""
        deadline = time.monotonic() + START_SECONDS
        ours = schemas_of(topic for topic in topics if topic.name in published)
        return {each.cls: Framed(self._known_as(each, deadline), each.type, each.write) for each in ours}

    def _known_as(self, schema: EventSchema, deadline: float) -> int:
        """Raises UnusableSchema, RegistryUnreachable."""
        while True:
            try:
                return self._id_of(schema)
            except RegistryUnreachable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(PAUSE_SECONDS)
            except Refused as error:
                if error.status >= 500 and time.monotonic() < deadline:
                    time.sleep(PAUSE_SECONDS)
                    continue
                raise UnusableSchema(_advice(schema, error)) from None

    def _id_of(self, schema: EventSchema) -> int:
        """Raises RegistryUnreachable, Refused, UnusableSchema."""
        if not self._registers:
            return self._client.look_up(schema.subject, schema.text, schema.type)
        if schema.type is SchemaType.PROTOBUF:
            self._check_numbers(schema.subject, schema.text)
        return self._client.register(schema.subject, schema.text, schema.type)

    def _check_numbers(self, subject: str, schema: str) -> None:
        """A field's number is what it is known by: one that moves makes nonsense of what was written, and a registry that
        compares types alone lets it through. Raises UnusableSchema."""
        from headwater.event.protobuf_data import numbers_of

        try:
            before = numbers_of(str(self._client.version(subject, "latest")["schema"]))
        except (Refused, InvalidSchema):
            return
        for field, number in numbers_of(schema).items():
            if before.get(field, number) != number:
                raise UnusableSchema(
                    f"{subject}: {field} was number {before[field]} and would be {number}. New fields go to the end, or have "
                    'numbers of their own: Annotated[str, Meta(extra={"number": 7})].'
                )

    def look_up(self, id: int) -> WriterSchema | None:
        """None when there is no such schema. Blocks; from any thread. Raises RegistryUnreachable."""
        deadline = time.monotonic() + UNKNOWN_SECONDS
        while id not in self._known:
            try:
                self._known[id] = self._read(id)
            except Refused as error:
                if error.code not in UNKNOWN:
                    raise RegistryUnreachable(f"the registry can't say what schema {id} is: {error}") from None
                if time.monotonic() > deadline:
                    logger.warning("schema_unknown id=%d", id)
                    return None  # not kept: it may come to be known
                time.sleep(PAUSE_SECONDS)  # one of several registries may be a moment behind
            except (KeyError, TypeError, ValueError) as error:
                raise RegistryUnreachable(
                    f"the registry's answer about schema {id} makes no sense: {error!r}"
                ) from None
        return self._known[id]

    def _read(self, id: int) -> WriterSchema:
        """Raises Refused, RegistryUnreachable."""
        found = self._client.schema(id)
        references: dict[str, str] = {}
        self._add_references(found, references)
        return WriterSchema(str(found["schema"]), SchemaType(found.get("schemaType", "AVRO")), references)

    def _add_references(self, schema: Mapping[str, Any], found: dict[str, str]) -> None:
        for reference in schema.get("references", ()):
            if reference["name"] in found or len(found) >= MAX_REFERENCES:
                continue
            other = self._client.version(reference["subject"], str(reference["version"]), deleted=True)
            self._add_references(other, found)
            found[reference["name"]] = str(other["schema"])


def _advice(schema: EventSchema, error: Refused) -> str:
    name = schema.cls.__name__
    if error.code in UNKNOWN:
        return (
            f"the schema of {name} is not registered as {schema.subject}, and HEADWATER_REGISTER_SCHEMAS is false: "
            "`headwater schemas export MODULE:APP DIR` writes it, `headwater schemas register` registers it."
        )
    return f"the registry refuses the schema of {name} as {schema.subject}: {error}"
