"""Outbox tables of one's own: mapped columns, shards, and PostgreSQL's logical replication as the source."""

import asyncio
import json
import subprocess
import sys
import textwrap
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text
from typer.testing import CliRunner

from headwater import App, Envelope, Event, Outbox, Topic
from headwater.kafka.admin import KafkaAdmin
from headwater.runtime.relay import Relay
from headwater.settings import Settings
from headwater.store import tables
from headwater.store.outbox import InvalidOutbox, OutboxRow
from headwater.store.pgoutput import Change, Malformed, decode
from headwater.store.replication import WHOLE, Replication, parse_snapshot, slot_name
from tests.conftest import Engine
from tests.kit.clients import Confluent, wait_until
from tests.kit.commands import commands
from tests.kit.connect import DebeziumWorker
from tests.kit.postgres import Postgres
from tests.kit.running import Running, settings_for


class Changed(Event):
    account_id: str
    number: int


SEEDS_TABLE = """
    CREATE TABLE outbox_events (
        id uuid PRIMARY KEY, aggregate_type varchar(100) NOT NULL, aggregate_id varchar(100) NOT NULL,
        event_type varchar(100) NOT NULL, payload jsonb NOT NULL, created_at timestamptz NOT NULL DEFAULT now(),
        published_at timestamptz)
"""
DEBEZIUMS_TABLE = """
    CREATE TABLE outbox (
        id uuid PRIMARY KEY, aggregatetype varchar(255) NOT NULL, aggregateid varchar(255) NOT NULL,
        type varchar(255) NOT NULL, payload jsonb, version text)
"""


def seeds_outbox(route: str, **more: Any) -> Outbox:
    return Outbox(
        "outbox_events", id="id", topic="aggregate_type", route=route, key="aggregate_id", event_type="event_type",
        payload="payload", created_at="created_at", published_at="published_at", **more,
    )  # fmt: skip


@pytest.fixture
def url(postgres: Postgres) -> Iterator[str]:
    """A database of PostgreSQL, empty; its slots go with it."""
    name = f"t{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield f"postgresql://postgres@127.0.0.1:{postgres.port}/{name}"
        slots = connection.execute("SELECT slot_name FROM pg_replication_slots WHERE database = %s", [name]).fetchall()
        for (slot,) in slots:
            wait_until(lambda slot=slot: _dropped(connection, slot), "the slot to go")  # type: ignore[misc]


def _dropped(connection: psycopg.Connection[Any], slot: str) -> bool:
    try:
        connection.execute("SELECT pg_drop_replication_slot(%s)", [slot])
    except psycopg.errors.ObjectInUse:
        return False
    return True


def run(url: str, *statements: str) -> list[Any]:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            cursor = connection.execute(statement)  # type: ignore[call-overload]
        return cursor.fetchall() if cursor.description else []


def migrate(url: str, outbox: Outbox) -> None:
    """As the message at the start says."""
    app = App("m", settings=Settings(database_url=url), outbox=outbox)
    with pytest.raises(InvalidOutbox, match="ALTER TABLE"):
        outbox.prepare(app.database.engine)
    run(url, *outbox.migration())
    outbox.prepare(app.database.engine)


def records(engine: Engine, topic: str, count: int) -> list[Any]:
    found = Confluent().consume(engine.bootstrap_servers, topic, count)
    return sorted(found, key=lambda record: (record.partition, record.offset))


def relaying(engine: Engine, url: str, topic: Topic, outbox: Outbox) -> App:
    return App(topic.name, topics=[topic], settings=settings_for(engine, url), outbox=outbox)


async def drained(app: App) -> None:
    def waiting() -> int:
        with app.database.engine.connect() as connection:
            return app.outbox.status(connection).waiting

    deadline = time.monotonic() + 60
    while await asyncio.to_thread(waiting):
        assert time.monotonic() < deadline, "the outbox was not drained"
        await asyncio.sleep(0.02)


# Columns


def test_the_seeds_table_works_by_mapping(engine: Engine, url: str, unique: str) -> None:
    """S003-10.3: rows of our own and rows that another program inserts: published in order, marked, and kept for a while.
    (both engines)"""
    topic = Topic(unique, key="account_id", events=[Changed], partitions=3)
    run(url, SEEDS_TABLE)
    outbox = seeds_outbox(unique[:3] + "{}")
    migrate(url, outbox)
    app = relaying(engine, url, topic, outbox)
    seen: list[tuple[Changed, str]] = []

    @app.handler(topic, group=unique)
    async def handle(event: Changed, envelope: Envelope) -> None:
        seen.append((event, envelope.event_id))

    theirs = uuid.uuid4()
    with Running(app):
        wait_until(lambda: app._relay is not None, "the application")
        with app.database.sessions() as session, app.unit_of_work(session) as uow:
            ours = uow.publish(Changed("a", 1))
        run(url, "INSERT INTO outbox_events (id, aggregate_type, aggregate_id, event_type, payload) VALUES "
                 f"('{theirs}', '{unique[3:]}', 'a', 'Changed', '{json.dumps({'accountId': 'a', 'number': 2})}')")  # fmt: skip
        wait_until(lambda: len(seen) == 2, "both events")
        wait_until(
            lambda: run(url, "SELECT count(*) FROM outbox_events WHERE published_at IS NOT NULL") == [(2,)], "the marks"
        )
    assert seen == [(Changed("a", 1), ours), (Changed("a", 2), str(theirs))]
    first, second = records(engine, unique, 2)
    assert (first.key, second.key) == (b"a", b"a")
    assert list(second.headers) == [("headwater-event-id", str(theirs).encode()), ("headwater-event-type", b"Changed")]


def test_rows_that_were_kept_for_long_enough_are_cleaned(embedded: Engine, url: str, unique: str) -> None:
    """And no others."""
    run(url, SEEDS_TABLE)
    outbox = seeds_outbox("{}", kept="1h")
    migrate(url, outbox)
    for state in ("now() - interval '2 hours'", "now() - interval '5 minutes'", "NULL"):
        run(url, "INSERT INTO outbox_events (id, aggregate_type, aggregate_id, event_type, payload, published_at) VALUES "
                 f"('{uuid.uuid4()}', 'x', 'a', 'Changed', '{{}}', {state})")  # fmt: skip
    with App("m", settings=Settings(database_url=url), outbox=outbox).database.engine.begin() as connection:
        assert outbox.clean(connection) == 1
        assert outbox.clean(connection) == 0
    assert run(url, "SELECT count(*) FROM outbox_events") == [(2,)]


def test_debeziums_table_gives_debeziums_records(engine: Engine, url: str, unique: str) -> None:
    """S003-10.3: route, key, value as the database has it, the id in the header `id`, further columns as headers. (both
    engines)"""
    run(url, DEBEZIUMS_TABLE)
    outbox = Outbox.debezium(route=unique + ".{}", headers={"type": "headwater-event-type", "version": "v"})
    migrate(url, outbox)
    topic = Topic(f"{unique}.orders", key="account_id", events=[Changed])
    app = relaying(engine, url, topic, outbox)
    id = uuid.uuid4()
    run(
        url,
        f"INSERT INTO outbox VALUES ('{id}', 'orders', 'o-1', 'Changed', '{{\"accountId\": \"o-1\", \"number\": 5}}', 'v7')",
    )

    async def main() -> None:
        async with app.lifespan():
            await drained(app)

    asyncio.run(main())
    (record,) = records(engine, topic.name, 1)
    assert (record.key, record.value) == (b"o-1", b'{"number": 5, "accountId": "o-1"}')
    assert list(record.headers) == [("id", str(id).encode()), ("headwater-event-type", b"Changed"), ("v", b"v7")]
    assert run(url, "SELECT count(*) FROM outbox") == [(0,)]


ROWS = [
    ("orders", "o-1", "OrderPlaced", '{"b": 1, "a": "xé", "n": 1.50}', "v1"),
    ("orders", "ké y", "OrderPlaced", '"just a string"', None),
    ("orders", "o-3", "OrderCancelled", '{"n": 12345678901234567890.123, "e": null}', ""),
    ("stock", "o-1", "StockReserved", "null", "true"),
    ("orders", "o-5", "OrderDeleted", None, "v2"),
]


@pytest.mark.parametrize("source", ["polling", "replication"])
def test_the_same_table_through_debezium_gives_the_same_records(
    engine: Engine, url: str, unique: str, source: str
) -> None:
    """S003-10.3: a Connect worker and the relay, side by side on one table, with writers at once: keys, values, headers,
    partitions, and the order of each key. (both engines)"""
    run(url, DEBEZIUMS_TABLE, "CREATE PUBLICATION debezium FOR TABLE outbox WITH (publish = 'insert')",
        "CREATE TABLE aggregate (id text PRIMARY KEY, version int NOT NULL)",
        "SELECT pg_create_logical_replication_slot('debezium', 'pgoutput')")  # fmt: skip
    outbox = Outbox.debezium(route=f"{unique}.relay.{{}}", headers={"type": "kind", "version": "v"}, source=source)
    migrate(url, outbox)
    admin = KafkaAdmin(settings_for(engine))
    for way in ("relay", "connect"):
        for topic in ("orders", "stock"):
            admin.create_topic(f"{unique}.{way}.{topic}", 3)
    for row in ROWS:
        insert_outbox(url, row)
    accounts, each = 4, 15

    def write(account: int) -> None:
        with psycopg.connect(url) as connection:
            for number in range(each):
                connection.execute(
                    "INSERT INTO aggregate VALUES (%s, 1) ON CONFLICT (id) DO UPDATE SET version = aggregate.version + 1",
                    [f"a{account % 2}"],
                )
                (version,) = connection.execute(
                    "SELECT version FROM aggregate WHERE id = %s", [f"a{account % 2}"]
                ).fetchone() or (0,)
                row = ("orders", f"a{account % 2}", "Changed", json.dumps({"version": version, "by": number}), "v1")
                connection.execute(INSERT_OUTBOX, [uuid.uuid4(), *row])
                connection.commit()

    app = App(unique, settings=settings_for(engine, url), outbox=outbox)
    router = {
        "route.topic.replacement": f"{unique}.connect.${{routedByValue}}",
        "table.fields.additional.placement": "type:header:kind,version:header:v",
    }

    async def main() -> None:
        async with app.lifespan():
            await asyncio.gather(*(asyncio.to_thread(write, account) for account in range(accounts)))
            await drained(app)

    database = url.rpartition("/")[2]
    with DebeziumWorker(engine.bootstrap_servers, int(url.rpartition(":")[2].partition("/")[0]), database, router):
        asyncio.run(main())
        for topic in ("orders", "stock"):
            count = sum(row[0] == topic for row in ROWS) + (accounts * each if topic == "orders" else 0)
            relayed, theirs = (by_key(engine, f"{unique}.{way}.{topic}", count) for way in ("relay", "connect"))
            assert relayed == theirs
            assert sum(map(len, relayed.values())) == count
    run(
        url,
        "SELECT pg_drop_replication_slot('debezium') FROM pg_replication_slots WHERE slot_name = 'debezium' AND NOT active",
    )


INSERT_OUTBOX = (
    "INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload, version) VALUES (%s, %s, %s, %s, %s, %s)"
)


def insert_outbox(url: str, row: tuple[str | None, ...]) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(INSERT_OUTBOX, [uuid.uuid4(), *row])


def by_key(engine: Engine, topic: str, count: int) -> dict[Any, list[Any]]:
    """What a consumer sees of each key, in order."""
    found: dict[Any, list[Any]] = defaultdict(list)
    for record in records(engine, topic, count):
        found[record.partition, record.key].append((record.value, list(record.headers)))
    return found


def test_a_mapped_table_works_on_sqlite(embedded: Engine, unique: str, tmp_path: Path) -> None:
    """S003-10.3: without any migration."""
    topic = Topic(unique, key="account_id", events=[Changed])
    app = relaying(embedded, f"sqlite:///{tmp_path / 'x.db'}", topic, seeds_outbox("{}"))
    with app.database.engine.begin() as connection:
        connection.execute(text(SEEDS_TABLE.replace("uuid", "text").replace("jsonb", "text").replace("timestamptz", "text")
                                .replace("now()", "CURRENT_TIMESTAMP")))  # fmt: skip

    async def main() -> None:
        async with app.lifespan():
            for number in range(20):
                with app.database.sessions() as session, app.unit_of_work(session) as uow:
                    uow.publish(Changed("a", number))
            await drained(app)

    asyncio.run(main())
    numbers = [json.loads(record.value)["data"]["number"] for record in records(embedded, unique, 20)]
    assert numbers == list(range(20))
    with app.database.engine.connect() as connection:
        query = text("SELECT count(*) FROM outbox_events WHERE published_at IS NOT NULL")
        assert connection.execute(query).scalar_one() == 20


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Outbox("nowhere"), "no table nowhere"),
        (lambda: Outbox("outbox_events"), "no column event_id, topic, key"),
        (lambda: seeds_outbox("{}"), "ALTER TABLE outbox_events ADD COLUMN headwater_position"),
    ],
)
def test_a_table_that_can_not_be_the_outbox_refuses_the_start(
    embedded: Engine, url: str, unique: str, make: Callable[[], Outbox], said: str
) -> None:
    """With what it lacks."""
    run(url, SEEDS_TABLE)
    app = relaying(embedded, url, Topic(unique, key="account_id", events=[Changed]), make())

    async def main() -> None:
        async with app.lifespan():
            pass

    with pytest.raises(InvalidOutbox, match=said):
        asyncio.run(main())


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InvalidOutbox, match=r"one \{\}"):
        Outbox(route="x")
    for name in ("Outbox", "app.outbox", "out box", "x; DROP TABLE y", ""):
        with pytest.raises(InvalidOutbox, match="can't be the outbox: its name must be"):
            Outbox(name)
    with pytest.raises(InvalidOutbox, match="shards"):
        Outbox(shards=0)
    with pytest.raises(InvalidOutbox, match="polling or replication"):
        Outbox(source="magic")
    with pytest.raises(InvalidOutbox, match="one stream"):
        Outbox(source="replication", shards=2)


def test_a_topic_that_the_route_does_not_lead_to_is_refused(url: str) -> None:
    """Before the transaction commits."""
    run(url, DEBEZIUMS_TABLE)
    outbox = Outbox.debezium()
    migrate(url, outbox)
    topic = Topic("elsewhere", key="account_id", events=[Changed])
    app = App("a", topics=[topic], settings=Settings(database_url=url), outbox=outbox)
    with (
        pytest.raises(InvalidOutbox, match="not to elsewhere"),
        app.database.sessions() as session,
        app.unit_of_work(session) as uow,
    ):
        uow.publish(Changed("a", 1))


def test_the_command_line_says_what_waits_and_what_is_missing(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and seconds; exit code 1 while nobody relays."""
    (tmp_path / "outbox_app.py").write_text(
        "from headwater import App, Outbox\n"
        "app = App('a', outbox=Outbox('outbox_events', id='id', topic='aggregate_type', key='aggregate_id',\n"
        "          event_type='event_type', payload='payload', published_at='published_at'))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADWATER_DATABASE_URL", url)
    run(url, SEEDS_TABLE)
    missing = CliRunner().invoke(commands, ["outbox", "migration", "outbox_app:app", "--json"])
    assert missing.exit_code == 0, missing.output
    run(url, *json.loads(missing.output))
    run(url, "INSERT INTO outbox_events (id, aggregate_type, aggregate_id, event_type, payload, created_at) VALUES "
             f"('{uuid.uuid4()}', 'x', 'a', 'Changed', '{{}}', now() - interval '90 seconds')")  # fmt: skip
    result = CliRunner().invoke(commands, ["outbox", "status", "outbox_app:app", "--json"])
    found = json.loads(result.output)
    assert (result.exit_code, found["waiting"], found["relays"]) == (1, 1, 0)
    assert 90 <= found["oldest_seconds"] < 150


# Shards


def test_shards_keep_the_order_of_each_key_and_are_shared(embedded: Engine, url: str, unique: str) -> None:
    """Two processes lead two of four shards each; when one goes, while rows are written, the other leads all. Every key in
    order."""
    topic = Topic(unique, key="account_id", events=[Changed], partitions=3)
    one, two = (relaying(embedded, url, topic, Outbox(shards=4)) for _ in range(2))
    accounts, each, written = 16, 200, 0

    def write() -> None:
        nonlocal written
        for number in range(each):
            with one.database.sessions() as session, one.unit_of_work(session) as uow:
                for account in range(accounts):
                    uow.publish(Changed(f"a{account}", number))
            written = number + 1

    async def main() -> None:
        async with one.lifespan():
            async with two.lifespan():
                first, second = one._relay, two._relay
                assert isinstance(first, Relay)
                assert isinstance(second, Relay)
                await asyncio.to_thread(
                    wait_until, lambda: (len(first.leads), len(second.leads)) == (2, 2), "an equal share", 30
                )
                writing = asyncio.create_task(asyncio.to_thread(write))
                await asyncio.to_thread(wait_until, lambda: written > each // 3, "some rows")
            assert written < each
            await writing
            await drained(one)
            await asyncio.to_thread(wait_until, lambda: len(first.leads) == 4, "all shards to be led", 30)

    asyncio.run(main())
    seen: dict[str, list[int]] = defaultdict(list)
    for record in records(embedded, unique, accounts * each):
        data = json.loads(record.value)["data"]
        seen[data["accountId"]].append(data["number"])
    assert seen == {f"a{account}": list(range(each)) for account in range(accounts)}


def test_relays_that_count_shards_differently_do_not_work_at_once(embedded: Engine, url: str, unique: str) -> None:
    """A key would be in two hands: the later one waits until the earlier one is gone."""
    topic = Topic(unique, key="account_id", events=[Changed])
    one, two = (relaying(embedded, url, topic, Outbox(shards=shards)) for shards in (1, 4))

    async def main() -> None:
        async with one.lifespan():
            relay = one._relay
            assert isinstance(relay, Relay)
            await asyncio.to_thread(wait_until, lambda: relay.leads == {0}, "the first to lead")
            async with two.lifespan():
                other = two._relay
                assert isinstance(other, Relay)
                with one.database.sessions() as session, one.unit_of_work(session) as uow:
                    uow.publish(Changed("a", 1))
                await drained(one)
                assert other.leads == set()
                await asyncio.to_thread(relay.stop)
                await asyncio.to_thread(wait_until, lambda: len(other.leads) == 4, "the other to lead", 30)

    asyncio.run(main())


# Replication


@pytest.fixture(params=["own", "mapped"])
def replicated(request: pytest.FixtureRequest, url: str) -> Outbox:
    if request.param == "own":
        return Outbox(source="replication")
    run(url, SEEDS_TABLE)
    outbox = seeds_outbox("{}", source="replication")
    migrate(url, outbox)
    return outbox


def numbers_of(engine: Engine, topic: str) -> list[int]:
    ends = KafkaAdmin(settings_for(engine)).end_offsets([(topic, index) for index in range(1)])
    return [json.loads(record.value)["data"]["number"] for record in records(engine, topic, sum(ends.values()))]


def test_by_replication_a_key_has_the_order_of_its_commits(
    engine: Engine, url: str, unique: str, replicated: Outbox
) -> None:
    """Also where its transactions share no row: what commits first is published first. (both engines)"""
    topic = Topic(unique, key="account_id", events=[Changed])
    app = relaying(engine, url, topic, replicated)

    async def main() -> None:
        async with app.lifespan():
            name = slot_name(replicated, url.rpartition("/")[2], "public")
            whole = f"SELECT obj_description(oid, 'pg_publication') FROM pg_publication WHERE pubname = '{name}'"
            await asyncio.to_thread(wait_until, lambda: run(url, whole) == [(WHOLE,)], "the stream")
            for number in range(0, 40, 2):
                slow, fast = app.database.sessions(), app.database.sessions()
                with slow, fast:
                    later = app.unit_of_work(slow)
                    with later:
                        later.publish(Changed("a", number + 1))
                        rows, later._rows = later._rows, []
                        slow.execute(app.outbox.insert_rows(), app.outbox.values(rows))
                        with app.unit_of_work(fast) as uow:
                            uow.publish(Changed("a", number))
            await drained(app)

    asyncio.run(main())
    assert numbers_of(engine, unique) == list(range(40))


def test_by_replication_nothing_is_lost_or_sent_twice_over_restarts(
    embedded: Engine, url: str, unique: str, replicated: Outbox
) -> None:
    """Rows before the first start, while nobody relays, and while somebody does."""
    topic = Topic(unique, key="account_id", events=[Changed])

    def publish(app: App, numbers: range) -> None:
        for number in numbers:
            with app.database.sessions() as session, app.unit_of_work(session) as uow:
                uow.publish(Changed("a", number))

    async def round_(first: int) -> None:
        app = relaying(embedded, url, topic, replicated)
        async with app.lifespan():
            await asyncio.to_thread(publish, app, range(first, first + 10))
            await drained(app)
        publish(app, range(first + 10, first + 20))

    for first in range(0, 100, 20):
        asyncio.run(round_(first))
    asyncio.run(round_(100))
    assert numbers_of(embedded, unique) == list(range(110))


def test_a_slot_that_was_lost_loses_nothing(embedded: Engine, unique: str) -> None:
    """The server throws a slot's log away beyond its bound; the table still has the rows."""
    server = Postgres(max_slot_wal_keep_size="16MB", max_wal_size="48MB", min_wal_size="32MB").start()
    try:
        topic = Topic(unique, key="account_id", events=[Changed])
        outbox = Outbox(source="replication")

        async def go(numbers: range) -> None:
            app = relaying(embedded, server.url, topic, outbox)
            async with app.lifespan():
                for number in numbers:
                    with app.database.sessions() as session, app.unit_of_work(session) as uow:
                        uow.publish(Changed("a", number))
                await drained(app)

        asyncio.run(go(range(10)))
        app = relaying(embedded, server.url, topic, outbox)
        for number in range(10, 20):
            with app.database.sessions() as session, app.unit_of_work(session) as uow:
                uow.publish(Changed("a", number))
        run(server.url, "CREATE TABLE noise (x text)")
        state = (
            f"SELECT wal_status FROM pg_replication_slots WHERE slot_name = '{slot_name(outbox, 'postgres', 'public')}'"
        )

        def lost() -> bool:
            run(server.url, "INSERT INTO noise SELECT repeat('x', 1000) FROM generate_series(1, 20000)", "CHECKPOINT")
            return run(server.url, state) == [("lost",)]

        wait_until(lost, "the slot to be lost", 60)
        asyncio.run(go(range(20, 30)))
    finally:
        server.stop()
    assert numbers_of(embedded, unique) == list(range(30))


def test_what_a_new_slot_and_the_table_both_have_is_published_once(url: str) -> None:
    """A transaction that commits between the slot and the snapshot is in both."""
    outbox = Outbox(source="replication")
    app = App(
        "a", topics=[Topic("t", key="account_id", events=[Changed])], settings=Settings(database_url=url), outbox=outbox
    )
    tables.create_tables(app.database.engine)

    def publish(number: int) -> None:
        with app.database.sessions() as session, app.unit_of_work(session) as uow:
            uow.publish(Changed("a", number))

    with app.database.engine.connect() as connection:
        source = Replication(outbox, app.database.url, connection)
        prepare = source._prepare

        def prepare_and_write() -> bool:
            is_new = prepare()
            publish(1)
            return is_new

        source._prepare = prepare_and_write  # type: ignore[method-assign]
        source.open()
        found = source.next(10, 0.1)
        assert source.next(10, 0.1) == [], "not before that is published"
        assert run(
            url, f"SELECT obj_description(oid, 'pg_publication') FROM pg_publication WHERE pubname = '{source._slot}'"
        ) == [("new",)], "if it ended here, the table would be read again"
        source.settle(found)
        publish(2)
        wait_until(lambda: bool(found.extend(source.next(10, 0.1)) or len(found) >= 2), "the second row")
        found += source.next(10, 0.3)
        source.close()
    assert [json.loads(row.payload or b"")["data"]["number"] for row in found] == [1, 2]


def test_the_log_is_confirmed_as_far_as_all_is_settled(url: str) -> None:
    """Although there is always something under way."""
    outbox = Outbox(source="replication")
    app = App(
        "a", topics=[Topic("t", key="account_id", events=[Changed])], settings=Settings(database_url=url), outbox=outbox
    )
    tables.create_tables(app.database.engine)
    with app.database.engine.connect() as connection:
        source = Replication(outbox, app.database.url, connection)
        source.open()
        source.next(10, 0.1)
        given: list[list[OutboxRow]] = []
        confirmed = [source._confirmed_lsn]
        for number in range(5):
            with app.database.sessions() as session, app.unit_of_work(session) as uow:
                uow.publish(Changed("a", number))
            wait_until(lambda: bool((rows := source.next(10, 0.1)) and given.append(rows) is None), "the row")
            source.next(10, 0.1)  # the end of its transaction
            if number:
                source.settle(given[number - 1])
                confirmed.append(source._confirmed_lsn)
        assert confirmed == sorted(set(confirmed)), "further with each that was settled"
        assert confirmed[-1] < source._read_lsn
        source.settle(given[-1])
        assert source._confirmed_lsn == source._read_lsn
        source.close()


def go(engine: Engine, url: str, topic: Topic, outbox: Outbox, numbers: range) -> None:
    """An application publishes these, and ends when they are in their topic."""

    async def main() -> None:
        app = relaying(engine, url, topic, outbox)
        async with app.lifespan():
            for number in numbers:
                with app.database.sessions() as session, app.unit_of_work(session) as uow:
                    uow.publish(Changed("a", number))
            await drained(app)

    asyncio.run(main())


def test_replication_goes_on_where_transactions_have_large_numbers(embedded: Engine, unique: str) -> None:
    """Their ids have 32 bits on the wire, and go round."""
    server = Postgres().start()
    try:
        topic = Topic(unique, key="account_id", events=[Changed])
        for database in ("postgres", "template1"):
            run(server.url.rpartition("/")[0] + f"/{database}", "VACUUM FREEZE")
        server.end()
        server.set_next_xid(3_000_000_000)
        server.begin()
        for first in range(0, 30, 10):
            go(embedded, server.url, topic, Outbox(source="replication"), range(first, first + 10))
    finally:
        server.stop()
    assert numbers_of(embedded, unique) == list(range(30))


def test_databases_of_one_server_have_slots_of_their_own(
    embedded: Engine, url: str, postgres: Postgres, unique: str
) -> None:
    """Slots are the server's: two services with a database each."""
    topics = [Topic(f"{unique}{i}", key="account_id", events=[Changed]) for i in range(2)]
    other = f"t{uuid.uuid4().hex[:12]}"
    run(postgres.url, f"CREATE DATABASE {other}")
    urls = [url, f"postgresql://postgres@127.0.0.1:{postgres.port}/{other}"]
    for first in (0, 5):
        for each, topic in zip(urls, topics, strict=True):
            go(embedded, each, topic, Outbox(source="replication"), range(first, first + 5))
    run(postgres.url, f"SELECT pg_drop_replication_slot('{slot_name(Outbox(), other, 'public')}')")
    assert [numbers_of(embedded, topic.name) for topic in topics] == [list(range(10))] * 2


def test_the_urls_search_path_counts_for_the_stream_too(embedded: Engine, url: str, unique: str) -> None:
    """Two services with a schema each in one database: each has a slot and a publication of its own."""
    topics = [Topic(f"{unique}{i}", key="account_id", events=[Changed]) for i in range(2)]
    schemas = ("shop", "bank")
    run(url, *(f"CREATE SCHEMA {schema}" for schema in schemas))
    for first in (0, 5):
        for schema, topic in zip(schemas, topics, strict=True):
            own = f"{url}?options=-csearch_path%3D{schema}"
            go(embedded, own, topic, Outbox(source="replication"), range(first, first + 5))
    assert [numbers_of(embedded, topic.name) for topic in topics] == [list(range(10))] * 2
    assert run(url, "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()") == [(2,)]


def test_a_table_that_was_made_anew_is_published(embedded: Engine, url: str, unique: str) -> None:
    """By a migration that swaps it: the publication goes by the table, not by its name."""
    topic = Topic(unique, key="account_id", events=[Changed])
    go(embedded, url, topic, Outbox(source="replication"), range(5))
    run(url, "DROP TABLE headwater_outbox")
    go(embedded, url, topic, Outbox(source="replication"), range(5, 10))
    assert numbers_of(embedded, unique) == list(range(10))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"wal_level": "replica"}, "wal_level"), ({"max_slot_wal_keep_size": "-1"}, "max_slot_wal_keep_size")],
)
def test_a_server_that_can_not_replicate_in_bounds_refuses_the_start(settings: dict[str, str], said: str) -> None:
    """With the statement that helps."""
    server = Postgres(**settings).start()
    try:
        app = App("a", settings=Settings(database_url=server.url), outbox=Outbox(source="replication"))
        with pytest.raises(InvalidOutbox, match=f"ALTER SYSTEM SET {said}"):
            app.outbox.prepare(app.database.engine)
    finally:
        server.stop()


WRITER = """
    import asyncio, sys
    from headwater import App, Event, Outbox, Settings, Topic

    class Changed(Event):
        account_id: str
        number: int

    servers, url, name, first = sys.argv[1:5]
    topic = Topic(name, key="account_id", events=[Changed])
    app = App(name, topics=[topic], settings=Settings(servers, url), outbox=Outbox(source="replication"))

    async def main():
        async with app.lifespan():
            number = int(first)
            while True:
                async with app.database.async_sessions() as session:
                    async with app.unit_of_work(session) as uow:
                        uow.publish(Changed("a", number))
                    print(number, flush=True)
                number += 1

    asyncio.run(main())
"""


def test_by_replication_kill_9_loses_and_reorders_nothing(
    embedded: Engine, url: str, unique: str, tmp_path: Path
) -> None:
    """S003-10.2: the writer and its relay killed in the middle of it, again and again."""
    script = tmp_path / "writer.py"
    script.write_text(textwrap.dedent(WRITER))
    committed = -1
    for _ in range(5):
        command = [sys.executable, str(script), embedded.bootstrap_servers, url, unique, str(committed + 1)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(60):
            committed = int(process.stdout.readline())
        process.kill()
        rest, _ = process.communicate()
        committed = max([committed, *(int(line) for line in rest.split("\n") if line.strip().isdigit())])
        # the last commit may not have been printed
        found = run(url, "SELECT payload FROM headwater_outbox")
        committed = max([committed, *(json.loads(payload)["data"]["number"] for (payload,) in found)])
    app = relaying(embedded, url, Topic(unique, key="account_id", events=[Changed]), Outbox(source="replication"))

    async def drain() -> None:
        async with app.lifespan():
            await drained(app)

    asyncio.run(drain())
    numbers = numbers_of(embedded, unique)
    first_seen = list(dict.fromkeys(numbers))
    assert set(first_seen) >= set(range(committed + 1))
    assert first_seen == sorted(first_seen)


@pytest.mark.parametrize("source", ["polling", "replication"])
def test_a_commit_wakes_its_relay(
    engine: Engine, url: str, unique: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S003-10.4: no commit waits for the relay's next look at the table. (both engines)"""
    monkeypatch.setattr("headwater.runtime.relay.POLL_SECONDS", 3600.0 if source == "polling" else 10.0)
    topic = Topic(unique, key="account_id", events=[Changed])
    app = relaying(engine, url, topic, Outbox(source=source))
    seen: set[int] = set()

    @app.handler(topic, group=unique)
    async def handle(event: Changed) -> None:
        seen.add(event.number)

    with Running(app):
        wait_until(lambda: app._relay is not None and bool(app._relay.leads), "the relay")
        for number in range(20):
            with app.database.sessions() as session, app.unit_of_work(session) as uow:
                uow.publish(Changed("a", number))
            wait_until(lambda number=number: number in seen, f"event {number}")


# The stream's bytes


def test_a_snapshot_knows_its_transactions() -> None:
    """Also where the low 32 bits have gone round."""
    found = parse_snapshot("100:105:101,103")
    assert [found.has(xid) for xid in (99, 100, 101, 102, 103, 104, 105, 106)] == [
        True, True, False, True, False, True, False, False,
    ]  # fmt: skip
    late = parse_snapshot(f"{(1 << 32) + 2}:{(1 << 32) + 5}:")
    assert [late.has(xid) for xid in ((1 << 32) - 3, 4, 5)] == [True, True, False]


@given(st.binary(max_size=60))
def test_garbage_is_malformed_or_passed_over(data: bytes) -> None:
    for kind in (b"", b"B", b"C", b"R", b"I"):
        try:
            found: Change | None = decode(kind + data)
        except Malformed:
            continue
        assert found is None or isinstance(found, tuple)
