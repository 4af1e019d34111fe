"""Topics with schemas: what is published is what confluent-kafka's deserializers read, and the other way round; a registry
that is away, that refuses, that doesn't know."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONDeserializer
from confluent_kafka.schema_registry.protobuf import ProtobufDeserializer
from confluent_kafka.serialization import MessageField, SerializationContext
from google.protobuf import message_factory
from typer.testing import CliRunner

from headwater import App, Envelope, Event, Retry, Settings, Tombstone, Topic
from headwater.event import protobuf_data
from headwater.event.topic import InvalidTopic
from headwater.kafka.admin import KafkaAdmin
from headwater.kafka.registry_client import RegistryClient, RegistryUnreachable
from headwater.operations.lag import partition_rows
from headwater.runtime import schemas
from headwater.runtime.handler import InvalidHandler
from headwater.runtime.publish import NoSchemaId, NoTopic
from headwater.runtime.schemas import UnusableSchema
from tests.conftest import Engine
from tests.kit.clients import wait_until
from tests.kit.commands import commands
from tests.kit.registry import RegistryProcess
from tests.kit.running import CLIENT, Running

FORMATS = ["avro", "json", "protobuf"]


class Placed(Event):
    order_id: str
    cents: int
    note: str | None = None


class State(Event):
    order_id: str
    status: str


@pytest.fixture(scope="module", params=["embedded", "kafka"])
def engine(request: pytest.FixtureRequest) -> Engine:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Engine)
    return found


@pytest.fixture(scope="module")
def registry(engine: Engine) -> Iterator[RegistryProcess]:
    with RegistryProcess.start(engine.bootstrap_servers) as process:
        yield process


def settings_for(engine: Engine, url: str, **more: Any) -> Settings:
    return Settings(engine.bootstrap_servers, kafka=CLIENT, registry_url=url, **more)


def publish(app: App, *events: object) -> None:
    async def main() -> None:
        async with app.lifespan():
            for event in events:
                await app.publish(event)

    asyncio.run(main())


def take(engine: Engine, topic: str, count: int) -> list[Any]:
    consumer = Consumer(
        {"bootstrap.servers": engine.bootstrap_servers, "group.id": f"{topic}-taker", "auto.offset.reset": "earliest"}
    )
    consumer.subscribe([topic])
    found: list[Any] = []
    try:
        deadline = time.monotonic() + 30
        while len(found) < count and time.monotonic() < deadline:
            found += [message for message in consumer.consume(count, 0.5) if message.error() is None]
    finally:
        consumer.close()
    return found


@pytest.mark.parametrize("form", FORMATS)
def test_confluent_deserializers_read_what_is_published(
    engine: Engine, registry: RegistryProcess, unique: str, form: str
) -> None:
    """The value is data behind the id of a schema under `<topic>-<Name>`, the envelope is in the headers. (both engines)"""
    topic = Topic(unique, key="order_id", events=[Placed, State], schema=form)
    app = App("shop", topics=[topic], settings=settings_for(engine, registry.url))
    publish(app, Placed("o-1", 1250))
    (message,) = take(engine, unique, 1)
    client = SchemaRegistryClient({"url": registry.url})
    context = SerializationContext(unique, MessageField.VALUE)
    if form == "avro":
        data = AvroDeserializer(client)(message.value(), context)
    elif form == "json":
        text = client.get_latest_version(f"{unique}-Placed").schema
        data = JSONDeserializer(text, schema_registry_client=client)(message.value(), context)
    else:
        derived = protobuf_data._Derivation(Placed)
        kind = message_factory.GetMessageClass(protobuf_data._pool([derived.file]).FindMessageTypeByName("Placed"))
        read = ProtobufDeserializer(kind, {"use.deprecated.format": False})(message.value(), context)
        data = {"orderId": read.order_id, "cents": read.cents}
    assert data is not None
    assert (data["orderId"], data["cents"]) == ("o-1", 1250)
    headers = dict(message.headers())
    assert (headers["headwater-event-type"], headers["headwater-source"]) == (b"Placed", b"shop")
    assert sorted(each for each in RegistryClient(registry.url).subjects() if each.startswith(unique)) == [
        f"{unique}-Placed",
        f"{unique}-State",
    ]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["async", "sync", "batch"])
def test_events_with_schemas_are_handled(
    engine: Engine, registry: RegistryProcess, unique: str, form: str, kind: str
) -> None:
    """By each kind of handler; what fails is parked, tried again and handled, as it was. (both engines)"""
    topic = Topic(unique, key="order_id", events=[Placed], schema=form)
    app = App("shop", settings=settings_for(engine, registry.url))
    seen: list[Placed] = []
    failed: set[str] = set()

    def work(event: Placed) -> None:
        if event.order_id == "o-1" and event.order_id not in failed:
            failed.add(event.order_id)
            raise RuntimeError("not yet")
        seen.append(event)

    retry = Retry(5, "200ms")
    if kind == "async":

        @app.handler(topic, group=unique, retry=retry)
        async def handle(event: Placed) -> None:
            work(event)
    elif kind == "sync":

        @app.handler(topic, group=unique, retry=retry)
        def handle_sync(event: Placed) -> None:
            work(event)
    else:

        @app.handler(topic, group=unique, retry=retry)
        async def handle_batch(events: list[Placed]) -> list[Exception | None]:
            outcomes: list[Exception | None] = []
            for event in events:
                try:
                    work(event)
                    outcomes.append(None)
                except RuntimeError as error:
                    outcomes.append(error)
            return outcomes

    events = [Placed(f"o-{i}", i, "n" if i % 2 else None) for i in range(20)]
    publish(App("publisher", topics=[topic], settings=settings_for(engine, registry.url)), *events)
    with Running(app):
        wait_until(lambda: len(seen) >= 20, "20 events")
    assert sorted(seen, key=lambda event: event.cents) == events


def test_a_confluent_producers_records_are_handled(engine: Engine, registry: RegistryProcess, unique: str) -> None:
    """Another team's schema and no headers of ours: the type is the schema's name, the id is the record's place. (both
    engines)"""
    theirs = {
        "type": "record",
        "name": "Placed",
        "namespace": "com.example",
        "fields": [
            {"name": "orderId", "type": "string"},
            {"name": "cents", "type": "int"},
            {"name": "more", "type": {"type": "array", "items": "string"}},
        ],
    }
    client = SchemaRegistryClient({"url": registry.url})
    serialize = AvroSerializer(client, json.dumps(theirs))
    producer = Producer({"bootstrap.servers": engine.bootstrap_servers})
    topic = Topic(unique, key="order_id", events=[Placed], schema="avro")
    app = App("shop", settings=settings_for(engine, registry.url))
    seen: list[tuple[Placed, str, str]] = []

    @app.handler(topic, group=unique)
    async def handle(event: Placed, envelope: Envelope) -> None:
        seen.append((event, envelope.event_id, envelope.event_type))

    with Running(app):
        value = serialize(
            {"orderId": "o-9", "cents": 7, "more": ["x"]}, SerializationContext(unique, MessageField.VALUE)
        )
        producer.produce(unique, value, b"o-9")
        producer.flush(10)
        wait_until(lambda: len(seen) == 1, "their event")
    (event, event_id, kind) = seen[0]
    assert (event, kind) == (Placed("o-9", 7), "Placed")
    assert event_id.endswith(":0:0")


def test_a_registry_that_is_away_holds_up_only_what_it_must(engine: Engine, unique: str) -> None:
    """Events of known schemas go on; others wait, as in an outage, and are handled when it is back: none is dead. (both
    engines)"""
    topic = Topic(unique, key="order_id", events=[Placed, State], schema="avro")
    admin = KafkaAdmin(Settings(engine.bootstrap_servers))
    seen: list[object] = []
    with RegistryProcess.start(engine.bootstrap_servers) as registry:
        url = registry.url
        publisher = App("publisher", topics=[topic], settings=settings_for(engine, url))
        app = App("shop", settings=settings_for(engine, url))

        @app.handler(topic, group=unique)
        async def handle(event: Placed | State) -> None:
            seen.append(event)

        async def publish_without_registry() -> None:
            async with publisher.lifespan():
                registry.kill()
                await publisher.publish(Placed("o-2", 2))
                await asyncio.to_thread(wait_until, lambda: len(seen) == 2, "an event of a known schema")
                await publisher.publish(State("o-3", "paid"))

        with Running(app):
            publish(publisher, Placed("o-1", 1))
            wait_until(lambda: len(seen) == 1, "the first event")
            asyncio.run(publish_without_registry())
            wait_until(
                lambda: any("registry" in (row.waiting or "") for row in partition_rows(admin, unique)),
                "the reason",
                30,
            )
            assert len(seen) == 2
            with RegistryProcess.start(engine.bootstrap_servers, "--listen", url.removeprefix("http://")):
                wait_until(lambda: len(seen) == 3, "the event whose schema was missing", 60)
    assert seen == [Placed("o-1", 1), Placed("o-2", 2), State("o-3", "paid")]


def test_an_unknown_schema_is_a_dead_letter(engine: Engine, registry: RegistryProcess, unique: str) -> None:
    """And what is behind it goes on. (both engines)"""
    topic = Topic(unique, key="order_id", events=[Placed], schema="avro")
    app = App("shop", settings=settings_for(engine, registry.url))
    seen: list[Placed] = []

    @app.handler(topic, group=unique)
    async def handle(event: Placed) -> None:
        seen.append(event)

    with Running(app):
        publish(App("p", topics=[topic], settings=settings_for(engine, registry.url)), Placed("o-1", 1))
        producer = Producer({"bootstrap.servers": engine.bootstrap_servers})
        producer.produce(unique, b"\0" + (999_999).to_bytes(4, "big") + b"x", b"o-1")
        producer.produce(unique, b"{}", b"o-1")
        producer.flush(10)
        publish(App("p", topics=[topic], settings=settings_for(engine, registry.url)), Placed("o-1", 2))
        wait_until(lambda: len(seen) == 2, "the event behind")
    letters = take(engine, f"{unique}.{unique}.dead", 2)
    errors = [dict(letter.headers())["headwater-error"].decode() for letter in letters]
    assert ["999999" in errors[0], "id of a schema" in errors[1]] == [True, True]


# At the start


def test_an_incompatible_class_is_refused_at_the_start(engine: Engine, registry: RegistryProcess, unique: str) -> None:
    """S001.18: with the field, before anything is published with it. (both engines)"""
    publish(
        App(
            "a",
            topics=[Topic(unique, key="order_id", events=[State], schema="avro")],
            settings=settings_for(engine, registry.url),
        )
    )

    class Newer(Event):
        order_id: str
        status: str
        customer: str

    Newer.__name__ = "State"
    newer = App(
        "a",
        topics=[Topic(unique, key="order_id", events=[Newer], schema="avro")],
        settings=settings_for(engine, registry.url),
    )
    with pytest.raises(UnusableSchema, match="customer"):
        publish(newer)


def test_a_protobuf_field_that_moves_is_refused_at_the_start(
    engine: Engine, registry: RegistryProcess, unique: str
) -> None:
    """Types alone would fit: a registry lets it through. (both engines)"""
    settings = settings_for(engine, registry.url)
    publish(App("a", topics=[Topic(unique, key="order_id", events=[State], schema="protobuf")], settings=settings))

    class Moved(Event):
        new: str
        order_id: str
        status: str

    Moved.__name__ = "State"
    moved = App("a", topics=[Topic(unique, key="order_id", events=[Moved], schema="protobuf")], settings=settings)
    with pytest.raises(UnusableSchema, match=r"State\.order_id was number 1 and would be 2"):
        publish(moved)


def test_without_the_right_to_register_only_what_is_there_is_used(
    engine: Engine, registry: RegistryProcess, unique: str
) -> None:
    """The start says what to run; when that was done, it starts. (both engines)"""
    topic = Topic(unique, key="order_id", events=[State], schema="avro")
    careful = App("a", topics=[topic], settings=settings_for(engine, registry.url, register_schemas=False))
    with pytest.raises(UnusableSchema, match="headwater schemas export"):
        publish(careful)
    (schema,) = schemas.schemas_of([topic])
    RegistryClient(registry.url).register(schema.subject, schema.text, schema.type)
    publish(careful, State("o-1", "new"))


def test_a_registry_that_is_not_there_is_waited_for_and_then_said(
    engine: Engine, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(both engines)"""
    monkeypatch.setattr(schemas, "START_SECONDS", 0.5)
    topic = Topic(unique, key="order_id", events=[State], schema="avro")
    app = App("a", topics=[topic], settings=settings_for(engine, "http://127.0.0.1:1"))
    with pytest.raises(RegistryUnreachable, match="headwater registry"):
        publish(app)


def test_an_application_that_has_not_started_knows_no_ids(unique: str) -> None:
    topic = Topic(unique, key="order_id", events=[State], schema="avro")
    with pytest.raises(NoSchemaId, match="lifespan"):
        App("a", topics=[topic])._router.encode(State("o", "s"))
    with pytest.raises(InvalidTopic, match="avro, json or protobuf"):
        Topic(unique, key="order_id", events=[State], schema="xml")


def test_the_schemas_of_an_application_are_written_to_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: RegistryProcess
) -> None:
    """S001.18: `schemas export`, then `schemas check` in a CI job."""
    (tmp_path / "exported_app.py").write_text(
        "from headwater import App, Event, Topic\n"
        "class Paid(Event):\n    order_id: str\n    cents: int\n"
        "app = App('pay', topics=[Topic('pay.events', key='order_id', events=[Paid], schema='avro')])\n"
    )
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(commands, ["schemas", "export", "exported_app:app", "out"])
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "out").iterdir()
    assert (path.name, json.loads(path.read_text())["name"]) == ("pay.events-Paid.avsc", "Paid")
    checked = CliRunner().invoke(
        commands, ["schemas", "check", "pay.events-Paid", str(path), "--registry", registry.url]
    )
    assert (checked.exit_code, "new" in checked.output) == (0, True)


# Tombstones


@pytest.mark.parametrize("form", [None, "avro"])
def test_tombstones_are_published_and_handled(
    engine: Engine, registry: RegistryProcess, unique: str, form: str | None
) -> None:
    """In order with the events of their key; a handler that doesn't ask for them passes them over. (both engines)"""
    topic = Topic(unique, key="order_id", events=[State], compacted=True, schema=form)
    app = App("shop", settings=settings_for(engine, registry.url))
    seen: list[object] = []
    others: list[object] = []

    @app.handler(topic, group=unique)
    async def handle(event: State | Tombstone, envelope: Envelope) -> None:
        seen.append(event)
        assert envelope.source == "publisher"

    @app.handler(topic, group=f"{unique}-others")
    async def handle_others(event: State) -> None:
        others.append(event)

    with Running(app):
        publish(
            App("publisher", topics=[topic], settings=settings_for(engine, registry.url)),
            State("o-1", "new"),
            Tombstone(topic, "o-1"),
            State("o-1", "again"),
        )
        wait_until(lambda: (len(seen), len(others)) == (3, 2), "all of them")
    assert seen == [State("o-1", "new"), Tombstone(topic, "o-1"), State("o-1", "again")]
    assert take(engine, unique, 3)[1].value() is None


def test_a_tombstone_goes_through_the_outbox(engine: Engine, unique: str, tmp_path: Path) -> None:
    """In the transaction that removes the row. (both engines)"""
    topic = Topic(unique, key="order_id", events=[State], compacted=True)
    app = App("shop", topics=[topic], settings=Settings(engine.bootstrap_servers, f"sqlite:///{tmp_path}/a.db"))

    async def main() -> None:
        async with app.lifespan():
            session = app.database.async_sessions()
            async with app.unit_of_work(session) as uow:
                uow.publish(State("o-1", "new"))
                uow.publish(Tombstone(topic, "o-1"))
            await session.close()
            await asyncio.to_thread(take_and_check)

    def take_and_check() -> None:
        assert [message.value() is None for message in take(engine, unique, 2)] == [False, True]

    asyncio.run(main())


def test_tombstones_are_refused_where_they_mean_nothing(unique: str) -> None:
    plain = Topic(unique, key="order_id", events=[State])
    compacted = Topic(unique, key="order_id", events=[State], compacted=True)
    with pytest.raises(NoTopic, match="compacted"):
        App("a", topics=[plain])._router.encode(Tombstone(plain, "o"))
    with pytest.raises(NoTopic, match="no topic"):
        App("a", topics=[plain])._router.encode(Tombstone(compacted, "o"))

    async def takes_both(event: State | Tombstone) -> None: ...

    async def takes_one(event: Tombstone) -> None: ...

    with pytest.raises(InvalidHandler, match="compacted"):
        App("a").handler(plain, group="g")(takes_both)
    with pytest.raises(InvalidHandler, match="alone"):
        App("a").handler(compacted, group="g")(takes_one)
