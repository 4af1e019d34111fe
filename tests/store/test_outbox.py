"""The outbox: published if and only if committed, in order, by one relay, on SQLite and PostgreSQL."""

import asyncio
import subprocess
import sys
import textwrap
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from headwater import App, Database, Event, Topic
from headwater.event.codec import Decoder
from headwater.kafka.admin import KafkaAdmin
from headwater.kafka.producer import KafkaProducer
from headwater.kafka.reader import read_all
from headwater.runtime import relay
from headwater.runtime.relay import Polling
from headwater.store import tables
from headwater.store.lock import Lock
from headwater.store.outbox import Outbox, OutboxRow
from tests.conftest import Engine
from tests.kit.clients import Confluent, wait_until
from tests.kit.postgres import Postgres
from tests.kit.running import settings_for


class Changed(Event):
    account_id: str
    number: int


class Noted(Event):
    account_id: str
    number: int
    note: str


def make_app(engine: Engine, url: str, name: str) -> tuple[App, Topic]:
    topic = Topic(name, key="account_id", events=[Changed], partitions=3)
    return App(name, topics=[topic], settings=settings_for(engine, url)), topic


def read_events(engine: Engine, topic: str, count: int) -> list[Changed]:
    decoder = Decoder([Changed])
    found = sorted(Confluent().consume(engine.bootstrap_servers, topic, count), key=lambda r: (r.partition, r.offset))
    return [decoder.decode(record.value or b"").data for record in found]


@pytest.mark.parametrize("session_kind", ["async", "sync"])
def test_an_event_is_published_if_and_only_if_its_transaction_commits(
    embedded: Engine, database_url: str, unique: str, session_kind: str
) -> None:
    """S003-1.4: what is rolled back is never seen; what is committed arrives. (both databases)"""
    app, _ = make_app(embedded, database_url, unique)

    async def main() -> None:
        async with app.lifespan():
            for number in range(20):
                try:
                    if session_kind == "async":
                        async with app.database.async_sessions() as session, app.unit_of_work(session) as uow:
                            uow.publish(Changed("a", number))
                            if number % 2:
                                raise RuntimeError("rolled back")
                    else:
                        with app.database.sessions() as session, app.unit_of_work(session) as uow:
                            uow.publish(Changed("a", number))
                            if number % 2:
                                raise RuntimeError("rolled back")
                except RuntimeError:
                    pass
            with app.database.engine.connect() as connection:
                while Outbox().status(connection).waiting:
                    connection.rollback()
                    await asyncio.sleep(0.01)

    asyncio.run(main())

    assert [event.number for event in read_events(embedded, unique, 10)] == list(range(0, 20, 2))


def test_commits_that_overtake_each_other_are_published_in_order(
    postgres: object, embedded: Engine, unique: str
) -> None:
    """A row with a lower position that commits later is not skipped, and nothing overtakes it. (PostgreSQL)"""
    from tests.kit.postgres import Postgres

    assert isinstance(postgres, Postgres)
    app, _ = make_app(embedded, postgres.url, unique)
    database: Database = app.database
    tables.metadata.drop_all(database.engine)
    tables.metadata.create_all(database.engine)
    slow, fast = database.sessions(), database.sessions()
    slow_uow = app.unit_of_work(slow).__enter__()
    slow.execute(text("SELECT pg_current_xact_id()"))
    slow.execute(Outbox().insert_rows(), Outbox().values([app._router.outbox_row(Changed("a", 1))]))
    with app.unit_of_work(fast) as uow:
        uow.publish(Changed("a", 2))

    with database.engine.connect() as connection:
        before = Outbox().read_rows(connection, 10)
        connection.rollback()
        slow_uow.__exit__(None, None, None)
        after = Outbox().read_rows(connection, 10)

    assert before == [], "the later row waits for the earlier one's transaction"
    decoder = Decoder([Changed])
    assert [decoder.decode(row.payload or b"").data.number for row in after] == [1, 2]
    tables.metadata.drop_all(database.engine)


def test_rows_that_are_under_way_are_not_read_again(database_url: str, unique: str) -> None:
    """One that comes later is, although its position is lower than theirs. (both databases)"""
    app, _ = make_app(Engine("none", "127.0.0.1:1"), database_url, unique)
    tables.metadata.drop_all(app.database.engine)
    tables.metadata.create_all(app.database.engine)

    def numbers(rows: list[OutboxRow]) -> list[int]:
        return [Decoder([Changed]).decode(row.payload or b"").data.number for row in rows]

    with app.unit_of_work(app.database.sessions()) as uow:
        for number in range(5):
            uow.publish(Changed("a", number))
    with app.database.engine.connect() as connection:
        rows = Polling(Outbox(), connection, 0, threading.Event())

        def next_rows(count: int) -> list[OutboxRow]:
            """Once no transaction is open, a server's own among them."""
            found: list[OutboxRow] = []
            wait_until(lambda: len(found.extend(rows.next(count - len(found), 0)) or found) == count, "the rows")
            return found

        first = next_rows(3)
        assert (numbers(first), numbers(next_rows(2)), rows.next(3, 0)) == ([0, 1, 2], [3, 4], [])
        with app.database.sessions() as session:
            session.execute(Outbox().insert_rows(), Outbox().values([app._router.outbox_row(Changed("b", 9))]))
            session.execute(text("UPDATE headwater_outbox SET position = -1 WHERE key = :key"), {"key": b"b"})
            session.commit()
        assert numbers(next_rows(1)) == [9]
        rows.settle(first)
        assert rows.next(3, 0) == []
        assert Outbox().status(connection).waiting == 3
    tables.metadata.drop_all(app.database.engine)


def test_nothing_overtakes_a_row_that_is_refused(
    embedded: Engine, database_url: str, unique: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However many batches are under way; what was sent before it may come again, in order; when it can be sent, all comes, in
    order. (both databases)"""
    monkeypatch.setattr(relay, "BATCH", 2)
    monkeypatch.setattr(relay, "FIRST_BATCH", 2)
    monkeypatch.setattr(relay, "TROUBLE_SECONDS", 0.2)
    topic = Topic(unique, key="account_id", events=[Noted])
    settings = settings_for(embedded, database_url)
    small = replace(settings, kafka={**settings.kafka, "message.max.bytes": "5000"})
    app = App(unique, topics=[topic], settings=small)
    tables.metadata.drop_all(app.database.engine)
    tables.metadata.create_all(app.database.engine)
    with app.unit_of_work(app.database.sessions()) as uow:
        for number in range(40):
            uow.publish(Noted("a", number, "x" * (8000 if number == 5 else 10)))

    def published() -> list[int]:
        admin = KafkaAdmin(settings)
        decoder = Decoder([Noted])
        return [decoder.decode(each.value() or b"").data.number for each in read_all(settings, admin, [unique])]

    held: list[bool] = []
    close = KafkaProducer.close

    def close_while_it_leads(self: KafkaProducer, seconds: float = 10.0) -> int:
        if seconds == 0.0:
            held.append(is_led(app))
        return close(self, seconds)

    monkeypatch.setattr(KafkaProducer, "close", close_while_it_leads)

    async def run(app: App, until: Callable[[], bool]) -> None:
        async with app.lifespan():
            await asyncio.to_thread(wait_until, until, "the relay", 60)

    asyncio.run(run(app, lambda: len(held) >= 3))
    assert set(published()) <= set(range(5))
    assert "Message size too large" in caplog.text
    assert all(held), "what is under way is given up while nobody else can lead"
    asyncio.run(run(App(unique, topics=[topic], settings=settings), lambda: 39 in published()))
    numbers = published()
    assert list(dict.fromkeys(numbers)) == list(range(40))
    assert numbers[numbers.index(5) :] == list(range(5, 40))


def is_led(app: App) -> bool:
    """Whether a relay of this database has its lock."""
    with app.database.own_connection("test") as connection:
        lock = Lock(app.database, "relay")
        if app.database.kind == "sqlite":
            found = lock.take(connection)
            lock.release()
            return not found
        query = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted")
        return bool(connection.execute(query).scalar_one())


def test_many_writers_keep_the_order_of_each_aggregate(embedded: Engine, database_url: str, unique: str) -> None:
    """S003-10.2: concurrent commits, each aggregate's events in the order of its commits. (both databases)"""
    app, _ = make_app(embedded, database_url, unique)
    writers, each = 4, 40

    def write(account: str, sessions: object) -> None:
        for number in range(each):
            with sessions() as session, app.unit_of_work(session) as uow:  # type: ignore[operator]
                uow.publish(Changed(account, number))

    async def main() -> None:
        async with app.lifespan():
            threads = [threading.Thread(target=write, args=(f"a{i}", app.database.sessions)) for i in range(writers)]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                await asyncio.sleep(0.01)
            with app.database.engine.connect() as connection:
                while Outbox().status(connection).waiting:
                    connection.rollback()
                    await asyncio.sleep(0.01)

    asyncio.run(main())

    seen: dict[str, list[int]] = defaultdict(list)
    for event in read_events(embedded, unique, writers * each):
        seen[event.account_id].append(event.number)
    assert dict(seen) == {f"a{i}": list(range(each)) for i in range(writers)}


class Base(DeclarativeBase): ...


class Account(Base):
    __tablename__ = "flushed_accounts"
    id: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int]


@pytest.mark.parametrize("autoflush", [True, False])
def test_who_changes_the_row_last_is_published_last(
    postgres: Postgres, embedded: Engine, unique: str, autoflush: bool
) -> None:
    """S003-10.2: two transactions change one row of the ORM and publish: in the end the row is what the last event says, as rows
    are locked before the outbox's have their positions. (PostgreSQL)"""
    app, _ = make_app(embedded, postgres.url, unique)
    tables.create_tables(app.database.engine)
    Base.metadata.create_all(app.database.engine)
    with Session(app.database.engine) as session, session.begin():
        session.execute(text("TRUNCATE headwater_outbox, flushed_accounts"))
        session.add(Account(id="a", number=0))
    together = threading.Barrier(2)
    decoder = Decoder([Changed])

    def change(number: int) -> None:
        with Session(app.database.engine, autoflush=autoflush) as session, app.unit_of_work(session) as uow:
            account = session.get(Account, "a")
            assert account is not None
            together.wait(30)
            account.number = number
            uow.publish(Changed("a", number))

    for number in range(0, 120, 2):
        threads = [threading.Thread(target=change, args=(number + i,)) for i in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with Session(app.database.engine) as session:
            row = session.scalar(select(Account.number))
            last = session.execute(
                text("SELECT payload FROM headwater_outbox ORDER BY position DESC LIMIT 1")
            ).scalar_one()
        assert decoder.decode(bytes(last)).data.number == row
    tables.metadata.drop_all(app.database.engine)
    Base.metadata.drop_all(app.database.engine)


def test_two_relays_take_turns(embedded: Engine, database_url: str, unique: str) -> None:
    """One relay works on a database at a time; when it goes, the other goes on. Nothing is doubled. (both databases)"""
    first, _ = make_app(embedded, database_url, unique)
    second, _ = make_app(embedded, database_url, unique)

    async def publish(app: App, numbers: range) -> None:
        for number in numbers:
            async with app.database.async_sessions() as session, app.unit_of_work(session) as uow:
                uow.publish(Changed("a", number))

    async def main() -> None:
        async with second.lifespan():
            async with first.lifespan():
                await publish(first, range(20))
                await publish(second, range(20, 40))
            await publish(second, range(40, 60))
            with second.database.engine.connect() as connection:
                deadline = time.monotonic() + 20
                while Outbox().status(connection).waiting:
                    connection.rollback()
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.02)

    asyncio.run(main())

    assert [event.number for event in read_events(embedded, unique, 60)] == list(range(60))


def test_the_relay_waits_for_a_broker_that_is_away(tmp_path: Path, broker: object, unique: str) -> None:
    """S000.11: with the broker down commits succeed; when it is back everything is published, in order."""
    from headwater.testing.broker import BrokerProcess

    assert isinstance(broker, BrokerProcess)
    engine = Engine("embedded", broker.bootstrap_servers)
    app, _ = make_app(engine, f"sqlite:///{tmp_path / 'x.db'}", unique)

    async def main() -> None:
        async with app.lifespan():
            broker.kill()
            for number in range(10):
                async with app.database.async_sessions() as session, app.unit_of_work(session) as uow:
                    uow.publish(Changed("a", number))
            again = BrokerProcess.start(broker.data, listen=engine.bootstrap_servers)
            broker.process = again.process
            with app.database.engine.connect() as connection:
                deadline = time.monotonic() + 60
                while Outbox().status(connection).waiting:
                    connection.rollback()
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.05)

    asyncio.run(main())

    assert [event.number for event in read_events(engine, unique, 10)] == list(range(10))


WRITER = """
    import asyncio, os, signal, sys
    from headwater import App, Event, Settings, Topic

    class Changed(Event):
        account_id: str
        number: int

    servers, url, name, crash_at = sys.argv[1:5]
    topic = Topic(name, key="account_id", events=[Changed], partitions=3)
    app = App(name, topics=[topic], settings=Settings(servers, url))

    async def main():
        async with app.lifespan():
            number = int(sys.argv[5])
            while True:
                async with app.database.async_sessions() as session:
                    uow = app.unit_of_work(session)
                    async with uow:
                        uow.publish(Changed("a", number))
                    print(number, flush=True)
                number += 1
                await asyncio.sleep(0)

    asyncio.run(main())
"""


def test_kill_9_of_writer_and_relay_loses_nothing_that_was_committed(
    embedded: Engine, database_url: str, unique: str, tmp_path: Path
) -> None:
    """S003-1.4, S003-10.2: killed at any moment: what was committed is published, in order; nothing else is."""
    script = tmp_path / "writer.py"
    script.write_text(textwrap.dedent(WRITER))
    committed = -1
    for _ in range(4):
        command = [
            sys.executable,
            str(script),
            embedded.bootstrap_servers,
            database_url,
            unique,
            "0",
            str(committed + 1),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(60):
            committed = int(process.stdout.readline())
        process.kill()
        rest, _ = process.communicate()
        committed = max([committed, *(int(line) for line in rest.split("\n") if line.strip().isdigit())])
        with Database(database_url).engine.connect() as connection:  # the last commit may not have been printed
            rows = Outbox().read_rows(connection, 100_000)
            numbers = [Decoder([Changed]).decode(row.payload or b"").data.number for row in rows]
            committed = max([committed, *numbers])
    app, _ = make_app(embedded, database_url, unique)

    async def drain() -> None:
        async with app.lifespan():
            with app.database.engine.connect() as connection:
                while Outbox().status(connection).waiting:
                    connection.rollback()
                    await asyncio.sleep(0.02)

    asyncio.run(drain())

    ends = KafkaAdmin(settings_for(embedded)).end_offsets([(unique, index) for index in range(3)])
    numbers = [event.number for event in read_events(embedded, unique, sum(ends.values()))]
    first_seen = list(dict.fromkeys(numbers))
    assert set(first_seen) >= set(range(committed + 1))
    assert first_seen == sorted(first_seen)
