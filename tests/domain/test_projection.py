"""Projections: rows by random changes beside a plain dict; the whole on both engines and both databases."""

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from hypothesis import given, strategies
from sqlalchemy import ForeignKey, Index, String, create_engine, func, select, text
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from typer.testing import CliRunner

from headwater import App, Envelope, Event, Projection, Rows, Tombstone, Topic
from headwater.domain import projector, rebuild, repeats
from headwater.domain.projection import InvalidProjection
from headwater.domain.rebuild import CannotRebuild, Rebuild
from headwater.domain.repeats import Repeats
from headwater.kafka.admin import KafkaAdmin
from headwater.kafka.consumer import headers_of
from headwater.kafka.reader import place_of, read_all
from headwater.operations.lag import partition_rows
from headwater.runtime.handler import InvalidHandler
from headwater.runtime.schemas import Schemas
from headwater.store import read_model
from headwater.store import rows as rows_module
from headwater.store.database import Database
from headwater.store.rows import InvalidReadModel, Side, TableRows, shape_of
from tests.conftest import Engine
from tests.kit.clients import wait_until
from tests.kit.commands import commands
from tests.kit.running import Running, settings_for


class Bought(Event):
    order_id: str
    customer_id: str
    cents: int


class Renamed(Event):
    customer_id: str
    name: str


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customers_read"
    customer_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    orders: Mapped[int]
    cents: Mapped[int]
    name: Mapped[str] = mapped_column(default="?")
    __table_args__ = (Index("customers_read_cents", "cents"),)


class Order(Base):
    __tablename__ = "orders_read"
    order_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    customer_id: Mapped[str] = mapped_column(String(64), index=True)
    customer_name: Mapped[str | None]


def purchases_of(*topics: Topic, version: str = "1") -> Projection:
    """Customers with their orders and names."""
    projection = Projection("customers", topics=topics, tables=[Customer, Order], version=version)

    @projection.on
    def bought(event: Bought, rows: Rows) -> None:
        customer = rows.get(Customer, event.customer_id) or Customer(customer_id=event.customer_id, orders=0, cents=0)
        customer.orders += 1
        customer.cents += event.cents
        rows.put(customer)
        rows.put(Order(order_id=event.order_id, customer_id=event.customer_id, customer_name=customer.name))

    @projection.on
    def renamed(event: Renamed, rows: Rows) -> None:
        customer = rows.get(Customer, event.customer_id) or Customer(customer_id=event.customer_id, orders=0, cents=0)
        customer.name = event.name
        rows.put(customer)
        for order in rows.find(Order, customer_id=event.customer_id):
            order.customer_name = event.name
            rows.put(order)

    return projection


def bought_events(count: int, start: int = 0) -> list[Bought]:
    return [Bought(f"o-{i}", f"c-{i * 7 % 13}", i) for i in range(start, start + count)]


def expected(events: list[Bought]) -> dict[str, tuple[int, int]]:
    totals: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for event in events:
        orders, cents = totals[event.customer_id]
        totals[event.customer_id] = (orders + 1, cents + event.cents)
    return dict(totals)


class World:
    """A topic, an application with the projection, and what is in its database."""

    def __init__(
        self, engine: Engine, url: str, name: str, projection: Callable[..., Projection] = purchases_of
    ) -> None:
        self.engine = engine
        self.url = url
        self.topic = Topic(name, key="customer_id", events=[Bought, Renamed], partitions=3)
        self.projection = projection(self.topic)
        self.app = self.new_app()

    def new_app(self, projection: Projection | None = None) -> App:
        app = App("reader", settings=settings_for(self.engine, self.url), topics=[self.topic])
        (projection or self.projection).join(app)
        return app

    def publish(self, *events: object) -> None:
        app = App("writer", settings=settings_for(self.engine), topics=[self.topic])

        async def publish() -> None:
            async with app.lifespan():
                await app.publish_all(events)

        asyncio.run(publish())

    def query(self, statement: Any) -> list[Any]:
        """Nothing, while its tables are not there yet."""
        engine = create_engine(Database(self.url).engine.url)
        try:
            with engine.connect() as connection:
                return list(connection.execute(statement).all())
        except (OperationalError, ProgrammingError) as error:
            if "no such table" in str(error) or "does not exist" in str(error):
                return []
            raise
        finally:
            engine.dispose()

    def totals(self) -> dict[str, tuple[int, int]]:
        return {
            row[0]: (row[1], row[2])
            for row in self.query(select(Customer.customer_id, Customer.orders, Customer.cents))
        }

    def count(self) -> int:
        return sum(orders for orders, _ in self.totals().values())

    def rebuild(
        self, projection: Projection | None = None, *, tell: Callable[[int, int], None] | None = None, **options: bool
    ) -> Any:
        database = Database(self.url)
        settings = settings_for(self.engine, self.url)
        made = Rebuild(
            projection or self.projection, database, settings, Schemas(settings), tell or (lambda done, total: None)
        )
        try:
            return made.run(**options)
        finally:
            asyncio.run(database.close())

    def progress(self, side: Side = Side.LIVE) -> read_model.Progress | None:
        found = self.query(text(f"SELECT progress FROM headwater_projections WHERE side = '{side}'"))
        return msgspec.json.decode(found[0][0], type=read_model.Progress) if found else None


@pytest.fixture
def world(engine: Engine, database_url: str, unique: str) -> World:
    return World(engine, database_url, unique)


@pytest.fixture
def small(embedded: Engine, tmp_path: Path, unique: str) -> World:
    """On one engine and one database."""
    return World(embedded, f"sqlite:///{tmp_path / 'small.db'}", unique)


# As it runs


def test_rows_follow_the_events_of_a_topic(world: World) -> None:
    """Every event changes the rows once, and its group shows no lag. (both engines, both databases)"""
    events = bought_events(300)
    world.publish(*events[:100])
    with Running(world.app):
        wait_until(lambda: world.count() == 100, "a hundred events")
        world.publish(*events[100:], Renamed("c-0", "Ada"))
        wait_until(lambda: ("Ada",) in world.query(select(Customer.name)), "all events")
        admin = KafkaAdmin(world.app.settings)
        places = [(world.topic.name, i) for i in range(3)]

        def has_lag() -> bool:
            committed = admin.committed("customers")
            return any(place not in committed or committed[place].offset < end
                       for place, end in admin.end_offsets(places).items())  # fmt: skip

        wait_until(lambda: not has_lag(), "no lag")
    assert world.totals() == expected(events)
    names = {row[0] for row in world.query(select(Order.customer_name).where(Order.customer_id == "c-0"))}
    assert names == {"Ada"}
    progress = world.progress()
    assert progress is not None
    assert progress.events == 301


APPLICATION = """
    from headwater import App, Topic
    from tests.domain.test_projection import Bought, Renamed, purchases_of

    topic = Topic("{topic}", key="customer_id", events=[Bought, Renamed], partitions=3)
    app = App("reader", topics=[topic])
    purchases_of(topic, version="{version}").join(app)
"""


def module_of(world: World, folder: Path, version: str = "1") -> str:
    """Of the application, for other processes and for commands."""
    name = f"projected_{world.topic.name}"
    (folder / f"{name}.py").write_text(textwrap.dedent(APPLICATION.format(topic=world.topic.name, version=version)))
    sys.modules.pop(name, None)
    return f"{name}:app"


def environment_of(world: World, folder: Path) -> dict[str, str]:
    return {
        "HEADWATER_BOOTSTRAP_SERVERS": world.engine.bootstrap_servers,
        "HEADWATER_DATABASE_URL": world.url,
        "PYTHONPATH": os.pathsep.join([str(folder), os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
    }


def started(world: World, folder: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "headwater", *arguments]
    return subprocess.Popen(command, env={**os.environ, **environment_of(world, folder)}, cwd=folder)


def test_kill_9_applies_no_event_twice_and_leaves_none_out(world: World, tmp_path: Path) -> None:
    """Rows and progress are one transaction: killed at any moment, the rows are those of the events. (both engines and
    databases)"""
    target = module_of(world, tmp_path)
    chance = random.Random(7)
    events = bought_events(1200)
    for round_ in range(5):
        world.publish(*events[round_ * 240 : round_ * 240 + 240])
        process = started(world, tmp_path, "run", target)
        try:
            wanted = round_ * 240 + chance.randrange(1, 200)
            wait_until(lambda: world.count() >= wanted, "some of them", 40)  # noqa: B023
        finally:
            process.kill()
            process.wait()
    with Running(world.app):
        wait_until(lambda: world.count() == len(events), "all events", 40)
    assert world.totals() == expected(events)


def test_another_process_takes_over(small: World, tmp_path: Path) -> None:
    """One process at a time applies; when it is killed, the other goes on."""
    target = module_of(small, tmp_path)
    events = bought_events(200)
    first = started(small, tmp_path, "run", target)
    try:
        small.publish(*events[:100])
        wait_until(lambda: small.count() == 100, "the first", 40)
        with Running(small.app):
            small.publish(*events[100:150])
            wait_until(lambda: small.count() == 150, "the first again", 40)
            first.kill()
            first.wait()
            small.publish(*events[150:])
            wait_until(lambda: small.count() == 200, "the other", 40)
    finally:
        first.kill()
        first.wait()
    assert small.totals() == expected(events)


def test_a_job_brings_a_projection_up_to_now(small: World, tmp_path: Path) -> None:
    """S001.12: `headwater run --until-now` ends when the rows are those of all that was there."""
    events = bought_events(100)
    small.publish(*events)
    job = started(small, tmp_path, "run", "--until-now", module_of(small, tmp_path))
    assert job.wait(60) == 0
    assert small.totals() == expected(events)


def refusing(topic: Topic) -> Projection:
    """It can't apply negative amounts."""
    projection = Projection("customers", topics=[topic], tables=[Customer])

    @projection.on
    def bought(event: Bought, rows: Rows) -> None:
        if event.cents < 0:
            raise ValueError("a negative amount")
        row = rows.get(Customer, event.customer_id) or Customer(customer_id=event.customer_id, orders=0, cents=0)
        row.orders += 1
        row.cents += event.cents
        rows.put(row)

    return projection


def test_an_event_that_fails_holds_up_its_partition_alone(
    engine: Engine, database_url: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is behind it waits, the other partitions go on, and a restart changes nothing; its group says what its partition
    waits for, until it doesn't. Left out, it is left out of a rebuild too. (both engines, both databases)"""
    monkeypatch.setattr(projector, "LONGEST_PAUSE_SECONDS", 0.5)
    world = World(engine, database_url, unique, refusing)
    first, bad, behind = Bought("o-1", "c-bad", 1), Bought("o-2", "c-bad", -1), Bought("o-3", "c-bad", 5)
    others = bought_events(60)
    world.publish(first)
    world.publish(bad)
    world.publish(behind, *others)

    def stuck() -> tuple[read_model.Stuck, ...]:
        progress = world.progress()
        return progress.stuck if progress is not None else ()

    for _ in range(2):
        with Running(world.app):
            wait_until(lambda: bool(stuck()) and stuck()[0].attempts >= 2, "the event to be tried again")
            assert world.totals()["c-bad"] == (1, 1)
            same = stuck()[0].partition
        world.app = world.new_app()
    assert "a negative amount" in stuck()[0].error

    def waiting() -> list[tuple[int, str]]:
        rows = partition_rows(KafkaAdmin(world.app.settings), "customers")
        return [(row.partition, row.waiting.partition(": ")[2]) for row in rows if row.waiting is not None]

    with Running(world.app):
        wait_until(
            lambda: waiting() == [(same, "an event failed: ValueError: a negative amount")],
            "its group to say what it waits for",
        )
        event = stuck()[0]
        database = Database(world.url)
        with database.engine.begin() as connection:
            progress = read_model.load_progress(connection, "customers", Side.LIVE, lock=True)
            assert progress is not None
            read_model.save_progress(
                connection, "customers", Side.LIVE, progress.without(event.topic, event.partition, event.offset)
            )
        wait_until(lambda: world.totals().get("c-bad") == (2, 6) and world.count() == 62, "what was behind it")
        assert stuck() == ()
        wait_until(lambda: waiting() == [], "its group to say that it goes on")
    assert world.totals() == expected([first, behind, *others])
    assert same == event.partition
    result = world.rebuild(check=True)
    assert result.is_equal


# Built anew


def test_a_rebuild_beside_the_live_one_is_never_behind_it(world: World) -> None:
    """S000.14: while events come and somebody reads, the rebuilt rows take the place of the live ones: no reader sees fewer
    than before, or a table that isn't there; in the end the digests are equal. (both engines, both databases)"""
    events = bought_events(3500)
    world.publish(*events[:2000])
    troubles: list[str] = []
    further: list[int] = []

    def get_further(done: int, total: int) -> None:
        """The live side does, while it is rebuilt up to the ends of before."""
        if not further:
            before = world.count()
            world.publish(*events[3000:])
            wait_until(lambda: world.count() >= before + 500, "the live side")
            further.append(before)

    stop = threading.Event()

    def read() -> None:
        """As its users do: one statement after another."""
        engine = create_engine(Database(world.url).engine.url)
        seen = 0
        while not stop.is_set():
            try:
                with engine.connect() as connection:
                    total = connection.execute(select(func.sum(Customer.orders))).scalar_one() or 0
            except Exception as error:
                troubles.append(str(error))
                break
            if total < seen:
                troubles.append(f"{total} after {seen}")
            seen = total
        engine.dispose()

    with Running(world.app):
        wait_until(lambda: world.count() == 2000, "the first 2,000")
        reader = threading.Thread(target=read)
        reader.start()
        writer = threading.Thread(target=lambda: [world.publish(*events[i : i + 100]) for i in range(2000, 3000, 100)])
        writer.start()
        try:
            world.rebuild(tell=get_further)
            writer.join()
            wait_until(lambda: world.count() == 3500, "all events")
        finally:
            writer.join()
            stop.set()
            reader.join()
        assert not troubles
        progress = world.progress()
        assert progress is not None
        assert progress.generation == 1
        assert world.progress(Side.REBUILD) is None
        result = world.rebuild(check=True)
    assert result.is_equal
    assert [each.rows for each in result.live] == [13, 3500]
    assert world.totals() == expected(events)


def test_a_check_that_was_stopped_takes_nothing_from_the_next_rebuild(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked no further than the live side was, whatever there was to read: what it leaves behind says so. (both engines and
    databases)"""
    monkeypatch.setattr(rebuild, "SAVE_EVENTS", 1)
    events = bought_events(200)
    world.publish(*events[:100])
    with Running(world.app):
        wait_until(lambda: world.count() == 100, "the first 100")
    world.publish(*events[100:])

    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.rebuild(check=True, tell=stop)
    assert world.progress(Side.REBUILD) is not None
    with pytest.raises(CannotRebuild, match="a rebuild of customers was stopped"):
        world.rebuild(check=True)

    world.rebuild()

    with Running(world.new_app()):
        wait_until(lambda: world.count() == 200, "all events")
    assert world.totals() == expected(events)


def copy_all(world: World) -> None:
    """Each record of the topic once more, where it is."""
    settings = settings_for(world.engine)
    producer = Producer({"bootstrap.servers": world.engine.bootstrap_servers})
    for record in read_all(settings, KafkaAdmin(settings), [world.topic.name]):
        producer.produce(
            world.topic.name, record.value(), record.key(), place_of(record)[1], headers=headers_of(record)
        )
    assert producer.flush(30) == 0


def test_an_event_that_was_published_twice_counts_once(world: World) -> None:
    """As an outbox does whose relay dies before it has deleted what was acknowledged; live, after a restart, and in a rebuild
    that was stopped in between. (both engines and databases)"""
    events = bought_events(100)
    world.publish(*events[:50])
    copy_all(world)
    with Running(world.app):
        world.publish(Bought("last-1", "c-last", 1))
        wait_until(lambda: "c-last" in world.totals(), "the last one")
    assert world.totals() == expected([*events[:50], Bought("last-1", "c-last", 1)])

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    copy_all(world)
    with pytest.raises(KeyboardInterrupt):
        world.rebuild(tell=stop)
    world.publish(*events[50:])
    copy_all(world)
    world.publish(Bought("last-2", "c-later", 1))
    with Running(world.new_app()):
        wait_until(lambda: "c-later" in world.totals(), "the last one after a restart")
        world.rebuild()
        wait_until(lambda: world.count() == 102, "all of them")
        assert world.rebuild(check=True).is_equal
    assert world.totals() == expected([*events, Bought("last-1", "c-last", 1), Bought("last-2", "c-later", 1)])


NOW = datetime.now(UTC)
RECORDS = strategies.lists(strategies.integers(0, 12), max_size=60)


@given(RECORDS, strategies.integers(0, 60), strategies.integers(1, 12), strategies.integers(1, 9))
def test_repeats_are_the_same_from_wherever_one_reads(events: list[int], start: int, window: int, batch: int) -> None:
    """A record is a repeat if and only if its event stands within the window before it; also when a batch is asked for twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeats, "WINDOW", window)
        known, place = Repeats(), ("t", 0)

        def is_repeat(i: int) -> bool:
            return known.has(place, i, Envelope(str(events[i]), "Bought", "1.0", NOW, "shop", "c", None, None))

        for i in range(max(0, start - window), min(start, len(events))):
            is_repeat(i)
        for first in range(start, len(events), batch):
            those = range(first, min(first + batch, len(events)))
            for _ in range(2):
                assert [is_repeat(i) for i in those] == [events[i] in events[max(0, i - window) : i] for i in those]
            known.passed({place: those.stop})


def test_an_id_is_its_sources() -> None:
    """Two sources may count their events alike."""
    known = Repeats()
    sources = ("shop", "mail", "shop")
    found = [
        known.has(("t", 0), i, Envelope("1", "Told", "1.0", NOW, of, "c", None, None)) for i, of in enumerate(sources)
    ]
    assert found == [False, False, True]


def test_a_lost_read_model_is_built_from_the_log(world: World) -> None:
    """S000.14: with the rows and the progress gone, the rows of the rebuild have the digest of those that were lost. (both
    engines and databases)"""
    world.publish(*bought_events(200), Renamed("c-3", "Bo"))
    with Running(world.app):
        wait_until(lambda: ("Bo",) in world.query(select(Customer.name)) and world.count() == 200, "all events")
    before = world.rebuild(check=True).live
    with Database(world.url).engine.begin() as connection:
        read_model.drop(connection, world.projection.shapes(Side.LIVE))
        read_model.drop_progress(connection, "customers", Side.LIVE)

    world.rebuild()

    assert world.rebuild(check=True).live == before
    with Running(world.new_app()):
        world.publish(Bought("o-new", "c-3", 1))
        wait_until(lambda: world.count() == 201, "one more")


def test_a_row_that_was_changed_by_hand_is_found(world: World) -> None:
    """`--check` compares the rows with what the events make of them, and changes nothing. (both engines, both databases)"""
    world.publish(*bought_events(100))
    with Running(world.app):
        wait_until(lambda: world.count() == 100, "all events")
    assert world.rebuild(check=True).is_equal
    with Database(world.url).engine.begin() as connection:
        connection.execute(text("UPDATE customers_read SET cents = cents + 1 WHERE customer_id = 'c-1'"))
    result = world.rebuild(check=True)
    assert not result.is_equal
    assert [live == rebuilt for live, rebuilt in zip(result.live, result.rebuilt, strict=True)] == [False, True]
    assert world.totals()["c-1"] != expected(bought_events(100))["c-1"]
    world.rebuild()
    assert world.totals() == expected(bought_events(100))


class OtherBase(DeclarativeBase):
    pass


class CustomerOfTwo(OtherBase):
    """The table of the next version."""

    __tablename__ = "customers_read"
    customer_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    orders: Mapped[int]
    cents: Mapped[int]
    largest_cents: Mapped[int]


def next_version(topic: Topic) -> Projection:
    projection = Projection("customers", topics=[topic], tables=[CustomerOfTwo], version="2")

    @projection.on
    def bought(event: Bought, rows: Rows) -> None:
        row = rows.get(CustomerOfTwo, event.customer_id)
        if row is None:
            row = CustomerOfTwo(customer_id=event.customer_id, orders=0, cents=0, largest_cents=0)
        row.orders += 1
        row.cents += event.cents
        row.largest_cents = max(row.largest_cents, event.cents)
        rows.put(row)

    return projection


def test_a_new_version_waits_for_its_rows(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Other columns, other functions: the new version says what it needs, while the old one goes on; after the rebuild the
    old one says so. (both engines, both databases)"""
    events = bought_events(150)
    world.publish(*events[:50])
    new = next_version(world.topic)
    with Running(world.app):
        wait_until(lambda: world.count() == 50, "the old version")
        world.publish(*events[50:100])
        wait_until(lambda: world.count() == 100, "the old version")
        world.rebuild(new)
        world.publish(*events[100:])
        wait_until(lambda: "the rows are of version 2, and this is version 1" in caplog.text, "the old version's error")
        with Running(world.new_app(new)):
            wait_until(lambda: world.count() == 150, "the new version")
    found = {row[0]: row[1] for row in world.query(select(CustomerOfTwo.customer_id, CustomerOfTwo.largest_cents))}
    assert found == {id: max(e.cents for e in events if e.customer_id == id) for id in expected(events)}


def doubled(topic: Topic) -> Projection:
    """The same columns, other functions."""
    projection = Projection("customers", topics=[topic], tables=[Customer, Order], version="2")

    @projection.on
    def bought(event: Bought, rows: Rows) -> None:
        row = rows.get(Customer, event.customer_id) or Customer(customer_id=event.customer_id, orders=0, cents=0)
        row.orders += 1
        row.cents += 2 * event.cents
        rows.put(row)

    return projection


def test_the_old_version_writes_nothing_into_the_new_ones_rows(small: World, caplog: pytest.LogCaptureFixture) -> None:
    """It is at work when they are exchanged, and stops there."""
    events = bought_events(120)
    small.publish(*events[:50])
    new = doubled(small.topic)
    with Running(small.app):
        wait_until(lambda: small.count() == 50, "the old version")
        small.rebuild(new)
        small.publish(*events[50:])
        wait_until(lambda: "and this is version 1" in caplog.text, "the old version's error")
    with Running(small.new_app(new)):
        wait_until(lambda: small.count() == 120, "the new version")
    assert small.totals() == {id: (orders, 2 * cents) for id, (orders, cents) in expected(events).items()}


def test_a_rebuild_that_was_stopped_goes_on(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and progress of a rebuild are saved together: begun again, it reads what is left, and its rows are right."""
    monkeypatch.setattr("headwater.domain.rebuild.SAVE_EVENTS", 100)
    monkeypatch.setattr("headwater.kafka.reader.TAKE", 50)
    events = bought_events(1000)
    small.publish(*events)

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise Stopped

    settings = settings_for(small.engine, small.url)
    database = Database(small.url)
    with database.engine.begin() as connection:
        read_model.projections.metadata.create_all(connection)
    with pytest.raises(Stopped):
        Rebuild(small.projection, database, settings, Schemas(settings), stop).run()
    first = small.progress(Side.REBUILD)
    assert first is not None
    assert 400 <= first.events < 1000
    live = read_model.Progress("1", skipped=((small.topic.name, 0, 0),))
    with database.engine.begin() as connection:  # somebody leaves out what it has applied
        read_model.save_progress(connection, "customers", Side.LIVE, live)
    with pytest.raises(CannotRebuild, match=r":0:0 is left out since this rebuild passed it: run it again with --anew"):
        small.rebuild()
    with database.engine.begin() as connection:
        read_model.drop_progress(connection, "customers", Side.LIVE)
    result = small.rebuild()
    assert result.events == 1000
    assert small.totals() == expected(events)


def test_what_is_left_out_while_a_rebuild_runs_stops_its_exchange(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows have the event: they never take the place of the live ones. Begun anew, they don't."""
    events = bought_events(40)
    small.publish(*events)
    with Running(small.app):
        wait_until(lambda: small.count() == 40, "all events")
    exchange = Rebuild._exchange

    def leave_out(self: Rebuild, *arguments: Any) -> None:
        with Database(small.url).engine.begin() as connection:
            live = read_model.load_progress(connection, "customers", Side.LIVE, lock=True)
            assert live is not None
            read_model.save_progress(connection, "customers", Side.LIVE, live.without(small.topic.name, 0, 0))
        exchange(self, *arguments)

    before = small.totals()
    with monkeypatch.context() as patched:
        patched.setattr(Rebuild, "_exchange", leave_out)
        with pytest.raises(CannotRebuild, match="is left out since this rebuild passed it"):
            small.rebuild()
    assert small.totals() == before
    small.rebuild(anew=True)
    assert sum(orders for orders, _ in small.totals().values()) == 39


def test_what_retention_has_taken_is_not_passed_over(world: World) -> None:
    """A rebuild that could not have all events is refused, unless that is wanted. (both engines, both databases)"""
    world.publish(*bought_events(60))
    with Running(world.app):
        wait_until(lambda: world.count() == 60, "all events")
    before = world.totals()
    client = AdminClient({"bootstrap.servers": world.engine.bootstrap_servers})
    for future in client.delete_records([TopicPartition(world.topic.name, i, 2) for i in (0, 1)]).values():
        future.result(10)
    with pytest.raises(CannotRebuild, match=r"retention has taken the beginning of .* and of 1 more"):
        world.rebuild()
    assert world.totals() == before
    world.rebuild(allow_gap=True)
    assert sum(orders for orders, _ in world.totals().values()) == 56


def test_a_reader_that_holds_a_table_holds_up_the_exchange_and_loses_nothing(
    embedded: Engine, postgres: Any, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PostgreSQL, while the live side is always further: the exchange waits for who reads, and the rows are right."""
    monkeypatch.setattr("headwater.domain.rebuild.ROUNDS", 0)
    monkeypatch.setattr(read_model, "LOCK_TIMEOUT", "200ms")
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {unique}")
    world = World(embedded, f"postgresql://postgres@127.0.0.1:{postgres.port}/{unique}", unique)
    events = bought_events(400)
    world.publish(*events[:200])
    held: list[Any] = []

    def get_further(done: int, total: int) -> None:
        """The live side does; and somebody begins to read."""
        if not held:
            world.publish(*events[200:])
            wait_until(lambda: world.count() == 400, "the live side")
            reader = psycopg.connect(f"{world.url}")
            reader.execute("SELECT count(*) FROM customers_read")
            held.append(reader)
            threading.Timer(1.0, reader.close).start()

    with Running(world.app):
        wait_until(lambda: world.count() == 200, "the first 200")
        world.rebuild(tell=get_further)
    assert held
    assert world.totals() == expected(events)
    assert world.rebuild(check=True).is_equal


def test_what_new_tables_would_lack_refuses_a_rebuild(embedded: Engine, postgres: Any, unique: str) -> None:
    """On PostgreSQL: a policy, an index made by hand, a view of it, a foreign key to it, and what else would be lost is named
    before anything is built."""
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {unique}")
    world = World(embedded, f"postgresql://postgres@127.0.0.1:{postgres.port}/{unique}", unique)
    world.publish(*bought_events(5))
    with Running(world.app):
        wait_until(lambda: world.count() == 5, "all events")
    for make, name, drop in (
        ("CREATE POLICY mine ON customers_read USING (true)", "the policy mine", "DROP POLICY mine ON customers_read"),
        ("CREATE INDEX by_hand ON orders_read (customer_name)", "the index by_hand", "DROP INDEX by_hand"),
        ("CREATE VIEW rich AS SELECT customer_id FROM customers_read WHERE cents > 10", "the view rich", "DROP VIEW rich"),
        ("CREATE TABLE theirs (id text REFERENCES customers_read)", "the foreign key theirs_id_fkey of theirs",
         "DROP TABLE theirs"),
        ("GRANT SELECT (cents) ON customers_read TO PUBLIC", "rights on the column cents",
         "REVOKE SELECT (cents) ON customers_read FROM PUBLIC"),
    ):  # fmt: skip
        with Database(world.url).engine.begin() as connection:
            connection.execute(text(make))
        with pytest.raises(CannotRebuild, match=name):
            world.rebuild()
        with Database(world.url).engine.begin() as connection:
            connection.execute(text(drop))
    world.rebuild()


def test_a_stuck_event_in_a_quiet_topic_is_tried_with_growing_pauses(
    small: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing else comes meanwhile; it is alerted once; a function that can apply it ends it."""
    monkeypatch.setattr(projector, "FIRST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(projector, "SHOW_SECONDS", 0.2)
    world = World(small.engine, small.url, small.topic.name, refusing)
    world.publish(Bought("o-1", "c-bad", -1))

    def attempts() -> int:
        progress = world.progress()
        return progress.stuck[0].attempts if progress is not None and progress.stuck else 0

    with Running(world.app):
        wait_until(lambda: attempts() >= 6, "six attempts")
    assert "projection_failed" not in caplog.text
    assert caplog.text.count("alert alert=projection state=raised") == 1
    forgiving = Projection("customers", topics=[world.topic], tables=[Customer])

    @forgiving.on
    def bought(event: Bought, rows: Rows) -> None:
        rows.put(Customer(customer_id=event.customer_id, orders=1, cents=event.cents))

    with Running(world.new_app(forgiving)):
        wait_until(lambda: world.count() == 1, "the event")
    assert attempts() == 0


def test_two_rebuilds_are_refused(small: World) -> None:
    """The second says that there is a first."""
    small.publish(*bought_events(10))
    refused: list[str] = []
    database = Database(small.url)
    settings = settings_for(small.engine, small.url)
    with database.engine.begin() as connection:
        read_model.projections.metadata.create_all(connection)

    def meanwhile(done: int, total: int) -> None:
        try:
            small.rebuild()
        except CannotRebuild as error:
            refused.append(str(error))

    Rebuild(small.projection, database, settings, Schemas(settings), meanwhile).run()
    assert refused
    assert "is being rebuilt already" in refused[0]


def test_names_and_rights_outlive_a_rebuild(embedded: Engine, postgres: Any, unique: str) -> None:
    """On PostgreSQL: others may read what they could, and keys and indexes have the names that were declared."""
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {unique}")
        connection.execute(f"CREATE ROLE {unique}_reader")
    world = World(embedded, f"postgresql://postgres@127.0.0.1:{postgres.port}/{unique}", unique)
    world.publish(*bought_events(20))
    with Running(world.app):
        wait_until(lambda: world.count() == 20, "all events")
    names = text("SELECT indexname FROM pg_indexes WHERE schemaname = 'public' AND tablename LIKE '%_read' ORDER BY 1")
    rights = text("SELECT privilege_type FROM information_schema.table_privileges WHERE grantee = :role")
    before = world.query(names)
    with Database(world.url).engine.begin() as connection:
        connection.execute(text(f"GRANT SELECT ON customers_read TO {unique}_reader"))
    for _ in range(2):
        world.rebuild()
        assert world.query(names) == before
        assert world.query(rights.bindparams(role=f"{unique}_reader")) == [("SELECT",)]
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {unique} WITH (FORCE)")
        connection.execute(f"DROP ROLE {unique}_reader")


# Its commands


def test_commands_show_rebuild_compare_and_leave_out(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`headwater projections list|rebuild|digest|skip`: lag and what waits, exit code 1 for what isn't well."""
    target = module_of(small, tmp_path)
    for name, value in environment_of(small, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, Any]:
        result = CliRunner().invoke(commands, ["projections", *arguments, "--json"])
        return result.exit_code, json.loads(result.stdout) if result.stdout else result.stderr

    small.publish(*bought_events(40))
    with Running(small.app):
        wait_until(lambda: small.count() == 40, "all events")
        wait_until(lambda: run("list", target)[1][0]["lag"] == 0, "no lag")
    code, (row,) = run("list", target)
    assert (code, row["name"], row["events"], row["waits_for"], row["rebuilding"]) == (0, "customers", 40, [], False)
    assert run("rebuild", target, "customers", "--check")[1]["equal"] is True
    code, digests = run("digest", target, "customers")
    assert [(each["table"], each["rows"]) for each in digests] == [("customers_read", 13), ("orders_read", 40)]
    with Database(small.url).engine.begin() as connection:
        connection.execute(text("DELETE FROM customers_read WHERE customer_id = 'c-1'"))
    code, found = run("rebuild", target, "customers", "--check")
    assert (code, found["equal"]) == (1, False)
    code, found = run("rebuild", target, "customers")
    assert (code, found["events"]) == (0, 40)
    assert small.totals() == expected(bought_events(40))

    for row_version, obstacles in (
        ("0", [{"event": None, "reason": "a rebuild: its rows are of version 0, and it is of version 1"}]),
        ("1", []),
    ):
        with Database(small.url).engine.begin() as connection:
            progress = read_model.load_progress(connection, "customers", Side.LIVE)
            assert progress is not None
            other = msgspec.structs.replace(progress, version=row_version)
            read_model.save_progress(connection, "customers", Side.LIVE, other)
        code, (row,) = run("list", target)
        assert (code, row["waits_for"]) == (1 if obstacles else 0, obstacles)

    place = f"{small.topic.name}:0:7"
    assert run("skip", target, "customers", place, "--force") == (0, {"skipped": place})
    assert run("list", target)[1][0]["skipped"] == [place]
    assert run("skip", target, "customers", place, "--undo") == (0, {"unskipped": place})
    assert run("list", target)[1][0]["skipped"] == []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.py").write_text(
        "from headwater import App, Projection\nProjection('x', topics=['t'], tables=[int])\n"
    )
    for arguments, code, words in (
        (("skip", target, "customers", "x"), 1, "names no event"),
        (("skip", target, "customers", "other:0:1"), 1, "doesn't read other"),
        (("skip", target, "customers", place), 1, "doesn't wait for"),
        (("skip", target, "customers", place, "--undo"), 1, "doesn't leave out"),
        (("rebuild", target, "nobody"), 1, "has no projection 'nobody': customers"),
        (("list", "no.module:app"), 2, "there is no module"),
        (("list", "wrong:app"), 2, "the topics of x are Topics"),
    ):
        result = CliRunner().invoke(commands, ["projections", *arguments])
        assert (result.exit_code, result.stdout) == (code, "")
        assert words in result.stderr
    monkeypatch.setenv("HEADWATER_DATABASE_URL", f"sqlite:///{tmp_path / 'nowhere.db'}")
    sys.modules.pop(target.partition(":")[0], None)
    for command in ("projections", "outbox", "sagas"):
        action = "status" if command == "outbox" else "list"
        result = CliRunner().invoke(commands, [command, action, target])
        assert result.exit_code == 1
        assert "nowhere.db: the application makes it when it starts" in result.stderr.replace("\n", " ")
    assert not (tmp_path / "nowhere.db").exists()


# Tombstones


class Profile(Event):
    customer_id: str
    name: str


class ProfileRow(Base):
    __tablename__ = "profiles_read"
    customer_id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]


def test_a_tombstone_takes_its_row_away(engine: Engine, unique: str, tmp_path: Path) -> None:
    """Of a compacted topic: the newest of each key, and nothing for keys that are gone. (both engines)"""
    topic = Topic(unique, key="customer_id", events=[Profile], partitions=2, compacted=True)
    projection = Projection("profiles", topics=[topic], tables=[ProfileRow])

    @projection.on
    def changed(event: Profile, rows: Rows) -> None:
        rows.put(ProfileRow(customer_id=event.customer_id, name=event.name))

    @projection.on
    def gone(event: Tombstone, rows: Rows) -> None:
        rows.delete(ProfileRow, event.key.decode())

    app = App("profiles-service", settings=settings_for(engine, f"sqlite:///{tmp_path / 'x.db'}"), topics=[topic])
    projection.join(app)

    async def publish() -> None:
        for event in (Profile("a", "Ada"), Profile("b", "Bo"), Tombstone(topic, "a"), Profile("c", "Cy")):
            await app.publish(event)

    def rows() -> list[tuple[str, str]]:
        with app.database.engine.connect() as connection:
            if not read_model.is_there(connection, shape_of(ProfileRow)):
                return []
            return [tuple(row) for row in connection.execute(text("SELECT * FROM profiles_read ORDER BY 1"))]

    app.on_start(publish)
    with Running(app):
        wait_until(lambda: rows() == [("b", "Bo"), ("c", "Cy")], "the rows")


# Declarations


def test_what_cannot_work_is_refused(unique: str, tmp_path: Path) -> None:
    """With what to change."""
    topic = Topic(unique, key="customer_id", events=[Bought])

    class Linked(Base):
        __tablename__ = f"linked_{unique}"
        id: Mapped[str] = mapped_column(primary_key=True)
        order_id: Mapped[str] = mapped_column(ForeignKey("orders_read.order_id"))

    for build, words in (
        (lambda: Projection("x", topics=[topic], tables=[Bought]), "no mapped class"),
        (lambda: Projection("x", topics=[topic], tables=[Linked]), "foreign keys"),
        (lambda: Projection("x", topics=[], tables=[Customer]), "needs topics and tables"),
        (lambda: Projection("x", topics=["orders"], tables=[Customer]), "are Topics, as the App has them"),
    ):
        with pytest.raises((InvalidProjection, InvalidReadModel), match=words):
            build()
    projection = Projection("x", topics=[topic], tables=[Customer])

    async def handles(event: Bought) -> None: ...
    async def later(event: Bought, rows: Rows) -> None: ...
    def nothing(event: Bought) -> None: ...
    def stranger(event: Renamed, rows: Rows) -> None: ...
    def good(event: Bought, rows: Rows) -> None: ...

    for function, words in (
        (later, "is async"),
        (nothing, "takes an event and rows"),
        (stranger, "none of x's topics lists"),
    ):
        with pytest.raises(InvalidProjection, match=words):
            projection.on(function)
    app = App("x", settings=settings_for(Engine("none", "127.0.0.1:1"), f"sqlite:///{tmp_path / 'x.db'}"))
    with pytest.raises(InvalidProjection, match="has no functions"):
        projection.join(app)
    projection.on(good)
    with pytest.raises(InvalidProjection, match="two functions for Bought"):
        projection.on(good)
    projection.join(app)
    other = Projection("y", topics=[topic], tables=[Customer])
    other.on(good)
    with pytest.raises(InvalidProjection, match="y and x both have the table of Customer"):
        other.join(app)
    with pytest.raises(InvalidProjection, match="both have the table"):
        projection.join(app)
    app.beside.clear()
    app.handler(topic, group="x")(handles)
    with pytest.raises(InvalidHandler, match="has a group x already"):
        projection.join(app)


# Rows


CHANGES = strategies.lists(
    strategies.tuples(
        strategies.sampled_from(["put", "get", "delete", "find", "write", "forget"]),
        strategies.integers(0, 5),
        strategies.integers(0, 3),
    ),
    max_size=60,
)


def play(url: str, changes: list[tuple[str, int, int]], *, is_empty: bool) -> None:
    """The same changes on rows and on a dict; what is asked is answered the same, and so is the table in the end."""
    engine = Database(url).engine
    shape = shape_of(Customer)
    with engine.begin() as connection:
        read_model.drop(connection, [shape])
        read_model.create(connection, [shape])
    model: dict[str, int] = {}
    rows = TableRows(shape, is_empty=is_empty)
    with engine.begin() as connection:
        for what, key, value in changes:
            id = f"c-{key}"
            if what == "put":
                rows.put(Customer(customer_id=id, orders=value, cents=1))
                model[id] = value
            elif what == "delete":
                rows.delete((id,))
                model.pop(id, None)
            elif what == "get":
                found = rows.get(connection, (id,))
                assert (found.orders if found is not None else None) == model.get(id)
            elif what == "find":
                found = [row.customer_id for row in rows.find(connection, {"orders": value})]
                assert found == sorted(id for id, orders in model.items() if orders == value)
            else:
                rows.write(connection)
                if what == "forget":
                    rows.forget()
        rows.write(connection)
        assert dict(connection.execute(select(Customer.customer_id, Customer.orders)).all()) == model  # type: ignore[arg-type]
    engine.dispose()


@given(CHANGES, strategies.booleans())
def test_rows_in_memory_are_those_of_the_table(changes: list[tuple[str, int, int]], is_empty: bool) -> None:
    """Whatever is read, put, deleted, found and written in whatever order."""
    with tempfile.TemporaryDirectory() as folder:
        play(f"sqlite:///{folder}/x.db", changes, is_empty=is_empty)


def test_rows_by_copy_are_those_of_the_table(postgres: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on PostgreSQL, with COPY for all that is written: 150 random histories."""
    monkeypatch.setattr(rows_module, "COPY_ROWS", 1)
    kinds = ["put", "get", "delete", "find", "write", "forget"]
    for seed in range(150):
        chance = random.Random(seed)
        changes = [(chance.choice(kinds), chance.randrange(6), chance.randrange(4)) for _ in range(40)]
        play(postgres.url, changes, is_empty=bool(seed % 2))
