"""The delivery classes, and what happens to events that fail: on both engines, and on Apache Kafka what needs it."""

import asyncio
import threading
import time
from collections import Counter

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from sqlalchemy import Column, Integer, MetaData, String, Table, insert, select, text

from headwater import App, Event, Retry, Topic, UnitOfWork
from headwater.kafka.admin import KafkaAdmin
from headwater.kafka.consumer import OutOfRange, headers_of
from headwater.runtime.handler import InvalidHandler
from headwater.runtime.retry_topic import DeadLetter, read_dead_letter
from headwater.runtime.subscription import CannotStart
from tests.conftest import Engine
from tests.kit.clients import wait_until
from tests.kit.postgres import Postgres
from tests.kit.running import Running, settings_for


class Paid(Event):
    account: str
    number: int


class Booked(Event):
    account: str
    number: int


metadata = MetaData()
effects = Table(
    "effects",
    metadata,
    Column("serial", Integer, primary_key=True, autoincrement=True),
    Column("account", String(64), nullable=False),
    Column("number", Integer, nullable=False),
)


def topic_for(name: str, partitions: int = 2) -> Topic:
    return Topic(name, key="account", events=[Paid], partitions=partitions)


def publish_all(engine: Engine, topic: Topic, events: list[Paid]) -> None:
    app = App("publisher", topics=[topic], settings=settings_for(engine))

    async def main() -> None:
        async with app.lifespan():
            await asyncio.gather(*(app.publish(event) for event in events))

    asyncio.run(main())


def read_topic(
    engine: Engine, topic: str, count: int, isolation: str = "read_uncommitted", seconds: float = 30.0
) -> list:
    consumer = Consumer(
        {"bootstrap.servers": engine.bootstrap_servers, "group.id": "reader", "isolation.level": isolation}
    )
    found: list = []
    wait_until(lambda: bool(consumer.list_topics(topic, 10).topics[topic].partitions), f"the topic {topic}")
    partitions = consumer.list_topics(topic, 10).topics[topic].partitions
    consumer.assign([TopicPartition(topic, index, 0) for index in partitions])
    wait_until(lambda: found.extend(consumer.consume(500, 0.2)) or len(found) >= count, f"{count} of {topic}", seconds)
    consumer.close()
    return found


def dead_letters(engine: Engine, topic: str, group: str, count: int) -> list[DeadLetter]:
    return [
        read_dead_letter(m.partition(), m.offset(), m.key(), m.value(), headers_of(m))
        for m in read_topic(engine, f"{topic}.{group}.dead", count)
    ]


def test_a_spent_event_is_dead_lettered_and_the_next_of_its_key_goes_on(engine: Engine, unique: str) -> None:
    """S001.16: after its attempts an event is a dead letter with its reason, bytes untouched; `skip` goes on."""
    topic = topic_for(unique)
    app = App(unique, settings=settings_for(engine))
    seen: list[tuple[str, int]] = []
    tries: Counter[int] = Counter()

    @app.handler(topic, group=unique, retry=Retry(3, "100ms"))
    async def handle(event: Paid) -> None:
        if event.account == "a" and event.number == 2:
            tries[event.number] += 1
            raise RuntimeError("no such account")
        seen.append((event.account, event.number))

    publish_all(engine, topic, [Paid(account, i) for i in range(5) for account in ("a", "b")])
    with Running(app):
        wait_until(lambda: len(seen) >= 9, "all others")

    assert [n for account, n in seen if account == "a"] == [0, 1, 3, 4]
    assert [n for account, n in seen if account == "b"] == [0, 1, 2, 3, 4]
    (letter,) = dead_letters(engine, unique, unique, 1)
    (source,) = [
        m
        for m in read_topic(engine, unique, 10)
        if (m.partition(), m.offset()) == (letter.partition, letter.source.offset)
    ]
    assert (letter.source.key, letter.source.value) == (source.key(), source.value())
    assert letter.source.headers == headers_of(source)
    assert letter.attempted.attempts == 3
    assert letter.attempted.kind == "transient"
    assert "no such account" in letter.attempted.error


def test_hold_keeps_the_key_until_somebody_decides(engine: Engine, unique: str) -> None:
    """S001.16: with giving_up="hold" nothing of a key is handled after its dead letter, over a restart too."""
    topic = topic_for(unique, 1)
    seen: list[tuple[str, int]] = []

    def make() -> App:
        app = App(unique, settings=settings_for(engine))

        @app.handler(topic, group=unique, retry=Retry(1), giving_up="hold", poison=[ZeroDivisionError])
        async def handle(event: Paid) -> None:
            if (event.account, event.number) == ("a", 1):
                raise ZeroDivisionError
            seen.append((event.account, event.number))

        return app

    publish_all(engine, topic, [Paid(account, i) for i in range(4) for account in ("a", "b")])
    with Running(make()):
        wait_until(lambda: len(seen) >= 5, "what is not held")
        dead_letters(engine, unique, unique, 1)
    publish_all(engine, topic, [Paid(account, 4) for account in ("a", "b")])
    with Running(make()):
        wait_until(lambda: ("b", 4) in seen, "the other key after the restart")

    assert [n for account, n in seen if account == "a"] == [0]
    assert [n for account, n in seen if account == "b"] == [0, 1, 2, 3, 4]


def test_parked_events_survive_a_restart_in_order(engine: Engine, unique: str) -> None:
    """S001.16: what is parked belongs to whoever owns the partition next."""
    topic = topic_for(unique, 1)
    broken = threading.Event()
    broken.set()
    seen: list[tuple[str, int]] = []

    def make() -> App:
        app = App(unique, settings=settings_for(engine))

        @app.handler(topic, group=unique, retry=Retry(100, "300ms"))
        async def handle(event: Paid) -> None:
            if event.account == "a" and broken.is_set():
                raise RuntimeError("not now")
            seen.append((event.account, event.number))

        return app

    publish_all(engine, topic, [Paid(account, i) for i in range(20) for account in ("a", "b")])
    admin = KafkaAdmin(settings_for(engine))
    with Running(make()):
        wait_until(lambda: len(seen) >= 20, "the other key")
        wait_until(
            lambda: (position := admin.committed(unique).get((unique, 0))) is not None and position.offset == 40,
            "the frontier",
        )
    broken.clear()
    publish_all(engine, topic, [Paid("a", 20)])
    with Running(make()):
        wait_until(lambda: len(seen) >= 41, "what was parked, and what came after it")

    assert [n for account, n in seen if account == "a"] == list(range(21))


def test_an_outage_under_exactly_once_is_told_by_the_group(kafka: Engine, unique: str) -> None:
    """S004.9: what is aborted takes its commit with it; the group's commits say why it waits all the same. (Apache Kafka:
    the embedded broker has no transactions yet)"""
    topic = topic_for(unique, 1)
    app = App(unique, settings=settings_for(kafka))
    out = threading.Event()
    seen: list[int] = []

    @app.handler(topic, group=unique, delivery="exactly_once", unavailable=[ConnectionError])
    async def handle(event: Paid) -> None:
        if out.is_set():
            raise ConnectionError("connection refused")
        seen.append(event.number)

    admin = KafkaAdmin(settings_for(kafka))

    def has_come_to(end: int) -> bool:
        return {p.offset for p in admin.committed(unique).values()} == {end}

    out.set()
    publish_all(kafka, topic, [Paid(f"a{i}", i) for i in range(10)])
    with Running(app):
        wait_until(lambda: "connection refused" in str(admin.committed(unique)), "the reason, before anything was done")
        out.clear()
        wait_until(lambda: has_come_to(10), "the first ten")
        assert "refused" not in str(admin.committed(unique))
        out.set()
        publish_all(kafka, topic, [Paid(f"a{i}", i) for i in range(10, 20)])
        wait_until(lambda: "connection refused" in str(admin.committed(unique)), "the reason, later on")
        assert has_come_to(10)
        out.clear()
        wait_until(lambda: has_come_to(20), "the others")
    assert seen == list(range(20))


def test_an_outage_parks_nothing_and_ends_by_itself(engine: Engine, unique: str) -> None:
    """S001.16: while the database is out the handler waits as a whole, says so, and counts no attempt."""
    topic = topic_for(unique, 1)
    app = App(unique, settings=settings_for(engine))
    out = threading.Event()
    out.set()
    seen: list[int] = []
    tried: list[int] = []

    class NoDatabase(Exception):
        pass

    @app.handler(topic, group=unique, unavailable=[NoDatabase], retry=Retry(1))
    async def handle(event: Paid) -> None:
        tried.append(event.number)
        await asyncio.sleep(0)
        if out.is_set():
            raise NoDatabase("connection refused")
        seen.append(event.number)

    publish_all(engine, topic, [Paid(f"a{i}", i) for i in range(300)])
    admin = KafkaAdmin(settings_for(engine))
    with Running(app):
        wait_until(lambda: "connection refused" in str(admin.committed(unique)), "the reason in the commit")
        tries = len(tried)
        time.sleep(1)
        assert len(tried) - tries < 10, "one event probes"
        out.clear()
        wait_until(lambda: len(seen) >= 300, "recovery", 60)
        wait_until(lambda: "refused" not in str(admin.committed(unique)), "the reason to be gone")

    assert sorted(seen) == list(range(300))
    assert admin.end_offsets([(f"{unique}.{unique}.retry", 0), (f"{unique}.{unique}.dead", 0)]) == {
        (f"{unique}.{unique}.retry", 0): 0,
        (f"{unique}.{unique}.dead", 0): 0,
    }


@pytest.mark.parametrize("kind", ["async", "sync", "batch", "sync batch"])
def test_an_effect_happens_once_however_often_its_event_is_delivered(
    engine: Engine, database_url: str, unique: str, kind: str
) -> None:
    """S001.25, S003-2.4: effectively_once: each event delivered three times, effects once and in order of the key."""
    topic = topic_for(unique)
    app = App(unique, settings=settings_for(engine, database_url))

    @app.on_start
    async def create() -> None:
        metadata.create_all(app.database.engine)

    options = {"group": unique, "delivery": "effectively_once"}
    if kind == "async":

        @app.handler(topic, **options)
        async def handle(event: Paid, uow: UnitOfWork) -> None:
            await uow.async_session.execute(insert(effects).values(account=event.account, number=event.number))
    elif kind == "sync":

        @app.handler(topic, **options)
        def handle_sync(event: Paid, uow: UnitOfWork) -> None:
            uow.sync_session.execute(insert(effects).values(account=event.account, number=event.number))
    elif kind == "batch":

        @app.handler(topic, **options)
        async def handle_batch(events: list[Paid], uow: UnitOfWork) -> None:
            for event in events:
                await uow.async_session.execute(insert(effects).values(account=event.account, number=event.number))
    else:

        @app.handler(topic, **options)
        def handle_batch_sync(events: list[Paid], uow: UnitOfWork) -> None:
            for event in events:
                uow.sync_session.execute(insert(effects).values(account=event.account, number=event.number))

    publish_all(engine, topic, [Paid(f"a{i % 5}", i) for i in range(40)])
    records = sorted(read_topic(engine, unique, 40), key=lambda m: (m.partition(), m.offset()))
    producer = Producer({"bootstrap.servers": engine.bootstrap_servers})
    for _ in range(2):
        for message in records:
            producer.produce(
                unique, message.value(), message.key(), partition=message.partition(), headers=message.headers()
            )
    producer.flush(10)
    admin = KafkaAdmin(settings_for(engine))
    with Running(app):
        wait_until(lambda: sum(p.offset for p in admin.committed(unique).values()) == 120, "all deliveries", 60)
    with app.database.engine.connect() as connection:
        rows = connection.execute(select(effects.c.account, effects.c.number).order_by(effects.c.serial)).all()
        left = connection.execute(text("SELECT count(*) FROM headwater_inbox")).scalar_one()
    app.database.engine.dispose()

    assert sorted(number for _, number in rows) == list(range(40))
    for account in {account for account, _ in rows}:
        numbers = [number for each, number in rows if each == account]
        assert numbers == sorted(numbers)
    assert left == 40


def test_a_batch_with_a_bad_event_fails_nobody_else(engine: Engine, unique: str) -> None:
    """S001.16: an outcome per event; an exception falls back to one by one, and order per key stays."""
    topic = topic_for(unique)
    app = App(unique, settings=settings_for(engine))
    seen: list[Paid] = []
    sizes: list[int] = []

    @app.handler(topic, group=unique, retry=Retry(2, "100ms"))
    async def handle(events: list[Paid]) -> list[Exception | None]:
        sizes.append(len(events))
        if any(event.number == 77 for event in events):
            raise ValueError("the whole batch")
        outcomes: list[Exception | None] = [ValueError("this one") if event.number == 33 else None for event in events]
        seen.extend(event for event, outcome in zip(events, outcomes, strict=True) if outcome is None)
        return outcomes

    publish_all(engine, topic, [Paid(f"a{i % 10}", i) for i in range(200)])
    with Running(app):
        wait_until(lambda: {event.number for event in seen} == set(range(200)) - {33, 77}, "all others")
        letters = dead_letters(engine, unique, unique, 2)

    assert {b"33" in (letter.source.value or b"") or b"77" in (letter.source.value or b"") for letter in letters} == {
        True
    }
    assert max(sizes) > 1
    firsts: dict[str, list[int]] = {}
    for event in seen:
        if event.number not in firsts.setdefault(event.account, []):
            firsts[event.account].append(event.number)
    # those behind a failed one of their key are handled again behind it, never lost
    assert all(numbers == sorted(numbers) for account, numbers in firsts.items() if account not in ("a3", "a7"))


@pytest.mark.parametrize("on_gap", ["stop", "skip"])
def test_a_gap_is_skipped_if_that_is_wanted_and_else_said(engine: Engine, unique: str, on_gap: str) -> None:
    """S001.13: where retention has passed the frontier, the handler goes on at what is left, or says what to do."""
    topic = topic_for(unique, 1)
    seen: list[int] = []

    def make() -> App:
        app = App(unique, settings=settings_for(engine))

        @app.handler(topic, group=unique, on_gap=on_gap)
        async def handle(event: Paid) -> None:
            seen.append(event.number)

        return app

    admin = KafkaAdmin(settings_for(engine))

    def has_come_to(end: int) -> bool:
        return {p.offset for p in admin.committed(unique).values()} == {end}

    publish_all(engine, topic, [Paid(f"a{i % 3}", i) for i in range(5)])
    with Running(make()):
        wait_until(lambda: has_come_to(5), "the first five")
    publish_all(engine, topic, [Paid(f"a{i % 3}", i) for i in range(5, 20)])
    client = AdminClient({"bootstrap.servers": engine.bootstrap_servers})
    for future in client.delete_records([TopicPartition(unique, 0, 12)]).values():
        future.result()
    if on_gap == "stop":
        with pytest.raises(OutOfRange, match="groups reset"), Running(make()) as running:
            wait_until(lambda: running.error is not None, "the end")
        return
    with Running(make()):
        wait_until(lambda: has_come_to(20), "the rest")
        publish_all(engine, topic, [Paid("a1", 20)])
        wait_until(lambda: has_come_to(21), "what comes later")
    assert seen == [*range(5), *range(12, 21)]


def test_at_most_once_commits_before_it_handles(engine: Engine, unique: str) -> None:
    """S004.7: when the handler is called its event is committed; a failure is not tried again."""
    topic = topic_for(unique, 1)
    app = App(unique, settings=settings_for(engine))
    admin = KafkaAdmin(settings_for(engine))
    committed: list[int] = []
    seen: list[int] = []

    @app.handler(topic, group=unique, delivery="at_most_once")
    def handle(event: Paid) -> None:
        committed.append(admin.committed(unique)[unique, 0].offset)
        seen.append(event.number)
        if event.number == 3:
            raise RuntimeError("once is enough")

    publish_all(engine, topic, [Paid("a", i) for i in range(10)])
    with Running(app):
        wait_until(lambda: len(seen) >= 10, "all events")
        (letter,) = dead_letters(engine, unique, unique, 1)

    assert seen == list(range(10))
    assert all(offset > number for offset, number in zip(committed, seen, strict=True))
    assert letter.attempted.attempts == 1


@pytest.mark.parametrize("kind", ["async", "sync", "batch"])
def test_exactly_once_reads_handles_and_writes_in_one_transaction(kafka: Engine, unique: str, kind: str) -> None:
    """S004.9: output equals input for readers of what is committed, also past failing and bad events. (Apache Kafka: the
    embedded broker has no transactions yet)"""
    topic = topic_for(unique)
    bookings = Topic(f"{unique}.booked", key="account", events=[Booked], partitions=2)
    app = App(unique, topics=[bookings], settings=settings_for(kafka))
    failures: Counter[int] = Counter()

    def book(event: Paid) -> Booked:
        if event.number % 100 == 7 and failures[event.number] < 3:
            failures[event.number] += 1
            raise RuntimeError("later")
        if event.number == 123:
            raise ZeroDivisionError
        return Booked(event.account, event.number)

    def outcome_of(event: Paid) -> Booked | Exception:
        try:
            return book(event)
        except Exception as error:
            return error

    options = {"delivery": "exactly_once", "group": unique, "retry": Retry(10, "100ms"), "poison": [ZeroDivisionError]}
    if kind == "async":

        @app.handler(topic, **options)
        async def handle(event: Paid) -> Booked:
            return book(event)
    elif kind == "batch":

        @app.handler(topic, **options)
        async def handle_batch(events: list[Paid]) -> list[Booked | Exception]:
            return [outcome_of(event) for event in events]
    else:

        @app.handler(topic, **options)
        def handle_sync(event: Paid) -> Booked:
            return book(event)

    publish_all(kafka, topic, [Paid(f"a{i % 10}", i) for i in range(500)])
    with Running(app):
        found = read_topic(kafka, bookings.name, 499, "read_committed", 60)
        (letter,) = dead_letters(kafka, unique, unique, 1)
        admin = KafkaAdmin(settings_for(kafka))
        wait_until(lambda: sum(p.offset for p in admin.committed(unique).values()) == 500, "the commit")

    from headwater.event.codec import Decoder

    events = [
        Decoder([Booked]).decode(m.value()).data for m in sorted(found, key=lambda m: (m.partition(), m.offset()))
    ]
    assert Counter(event.number for event in events) == Counter(set(range(500)) - {123})
    for account in {event.account for event in events}:
        numbers = [event.number for event in events if event.account == account]
        assert numbers == sorted(numbers)
    assert b"123" in (letter.source.value or b"")


def test_exactly_once_is_refused_where_there_are_no_transactions(embedded: Engine, unique: str) -> None:
    """The start says so, and what to do."""
    app = App(unique, settings=settings_for(embedded))

    @app.handler(topic_for(unique), group=unique, delivery="exactly_once")
    async def handle(event: Paid) -> None: ...

    async def main() -> None:
        async with app.lifespan():
            pass

    with pytest.raises(CannotStart, match="use effectively_once"):
        asyncio.run(main())


def test_a_delivery_class_that_can_not_be_kept_is_refused() -> None:
    """S004.6: an unknown class, effectively once without a unit of work, exactly once with one: errors that say why."""
    topic = topic_for("t")
    app = App("a", topics=[topic])

    async def plain(event: Paid) -> None: ...
    async def with_uow(event: Paid, uow: UnitOfWork) -> None: ...

    with pytest.raises(InvalidHandler, match="at_most_once, at_least_once"):
        app.handler(topic, group="g", delivery="twice")(plain)
    with pytest.raises(InvalidHandler, match="takes no UnitOfWork"):
        app.handler(topic, group="g", delivery="effectively_once")(plain)
    with pytest.raises(InvalidHandler, match="use effectively_once"):
        app.handler(topic, group="g", delivery="exactly_once")(with_uow)
    with pytest.raises(InvalidHandler, match="stop or skip"):
        app.handler(topic, group="g", on_gap="ignore")(plain)


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_effectively_once_takes_four_statements(embedded: Engine, postgres: object, unique: str, kind: str) -> None:
    """BEGIN, the inbox row, the handler's own, COMMIT: one statement more than the handler's own transaction has."""
    from sqlalchemy import event as listen

    url = f"postgresql://postgres@127.0.0.1:{postgres.port}/postgres"  # type: ignore[attr-defined]
    topic = topic_for(unique, 1)
    app = App(unique, settings=settings_for(embedded, url))
    statements: list[str] = []
    seen: list[int] = []
    if kind == "async":

        @app.handler(topic, group=unique, delivery="effectively_once")
        async def handle(event: Paid, uow: UnitOfWork) -> None:
            await uow.async_session.execute(text("SELECT 1"))
            seen.append(event.number)
    else:

        @app.handler(topic, group=unique, delivery="effectively_once")
        def handle_sync(event: Paid, uow: UnitOfWork) -> None:
            uow.sync_session.execute(text("SELECT 1"))
            seen.append(event.number)

    engine = app.database.async_engine.sync_engine if kind == "async" else app.database.engine

    @listen.listens_for(engine, "begin")
    def begin(connection: object) -> None:
        statements.append("BEGIN")

    @listen.listens_for(engine, "before_cursor_execute")
    def execute(connection: object, cursor: object, statement: str, *_: object) -> None:
        statements.append(statement.split()[0])

    @listen.listens_for(engine, "commit")
    def commit(connection: object) -> None:
        statements.append("COMMIT")

    publish_all(embedded, topic, [Paid("a", i) for i in range(10)])
    with Running(app):
        wait_until(lambda: len(seen) == 10, "the events")
    app.database.engine.dispose()

    wanted = ["BEGIN", "INSERT", "SELECT", "COMMIT"]
    joined = " ".join(statements)
    assert joined.count(" ".join(wanted)) == 10, joined


def test_a_database_that_goes_down_parks_nothing_and_doubles_nothing(embedded: Engine, unique: str) -> None:
    """S001.16: PostgreSQL ends in the middle and comes back: the handler waits, says so, and each effect happens once."""
    server = Postgres(fsync=True).start()  # what it has acknowledged survives its crash
    topic = topic_for(unique)
    app = App(unique, settings=settings_for(embedded, server.url))
    admin = KafkaAdmin(settings_for(embedded))

    @app.on_start
    async def create() -> None:
        metadata.create_all(app.database.engine)

    @app.handler(topic, group=unique, delivery="effectively_once", concurrency=4, retry=Retry(2, "100ms"))
    async def handle(event: Paid, uow: UnitOfWork) -> None:
        await uow.async_session.execute(insert(effects).values(account=event.account, number=event.number))
        await asyncio.sleep(0.03)

    publish_all(embedded, topic, [Paid(f"a{i % 20}", i) for i in range(600)])
    try:
        with Running(app):
            wait_until(lambda: sum(p.offset for p in admin.committed(unique).values()) > 50, "the first ones")
            server.crash()
            wait_until(lambda: "waiting" in str(admin.committed(unique)), "the reason in the commit")
            server.begin()
            wait_until(lambda: sum(p.offset for p in admin.committed(unique).values()) == 600, "the end", 90)
            with app.database.engine.connect() as connection:
                numbers = [number for (number,) in connection.execute(select(effects.c.number))]
    finally:
        app.database.engine.dispose()
        server.stop()

    assert sorted(numbers) == list(range(600))
    places = [(f"{unique}.{unique}.{kind}", index) for kind in ("retry", "dead") for index in range(2)]
    assert set(admin.end_offsets(places).values()) == {0}


class Panic(BaseException):
    """As compiled extensions raise."""


@pytest.mark.parametrize("kind", ["async", "sync"])
@pytest.mark.parametrize("how", ["finally", "cancelled", "exit", "panic", "stop"])
def test_a_handler_that_breaks_in_odd_ways_fails_like_any_other(
    embedded: Engine, unique: str, how: str, kind: str
) -> None:
    """S001.16: an error out of `finally`, a cancellation that is the handler's own, SystemExit, and what is no Exception
    at all, are failures of their event and nothing else."""
    topic = topic_for(unique, 1)
    app = App(unique, settings=settings_for(embedded))
    seen: list[tuple[str, int]] = []

    def break_at_one(event: Paid) -> None:
        if event.account == "odd" and event.number == 1:
            if how != "finally":
                odd = {"cancelled": asyncio.CancelledError, "exit": SystemExit, "panic": Panic, "stop": StopIteration}
                raise odd[how]
            try:
                raise ValueError("first")
            finally:
                raise RuntimeError("out of finally")
        seen.append((event.account, event.number))

    if kind == "async":

        @app.handler(topic, group=unique, retry=Retry(2, "100ms"))
        async def handle(event: Paid) -> None:
            break_at_one(event)
    else:

        @app.handler(topic, group=unique, retry=Retry(2, "100ms"))
        def handle_sync(event: Paid) -> None:
            break_at_one(event)

    publish_all(embedded, topic, [Paid(account, i) for i in range(4) for account in ("odd", "even")])
    with Running(app):
        wait_until(lambda: len(seen) == 7, "all others")
        (letter,) = dead_letters(embedded, unique, unique, 1)

    assert [number for account, number in seen if account == "odd"] == [0, 2, 3]
    assert letter.attempted.attempts == 2
