"""The outbox: published if and only if committed, in order, by one relay, on SQLite and PostgreSQL."""

import asyncio
import subprocess
import sys
import textwrap
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest
from sqlalchemy import text

from headwater import App, Database, Event, Topic
from headwater.event.codec import Decoder
from headwater.kafka.admin import KafkaAdmin
from headwater.store import tables
from headwater.store.outbox import Outbox
from tests.conftest import Engine
from tests.kit.clients import Confluent
from tests.kit.running import settings_for


class Changed(Event):
    account_id: str
    number: int


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
