"""Timers: set, moved and cancelled with the transaction, fired once, through restarts. On SQLite and PostgreSQL."""

import asyncio
import json
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from headwater import App, Event, Topic
from headwater.kafka.admin import KafkaAdmin
from headwater.settings import InvalidSetting
from headwater.store import schedule, tables
from headwater.store.unit_of_work import UnitOfWork, WrongTimer
from tests.conftest import Engine
from tests.kit.clients import Confluent, wait_until
from tests.kit.running import settings_for


class Reminded(Event):
    account_id: str
    number: int


def make_app(engine: Engine, url: str, name: str) -> App:
    return App(name, topics=[Topic(name, key="account_id", events=[Reminded])], settings=settings_for(engine, url))


def envelopes(engine: Engine, topic: str, count: int) -> list[dict[str, Any]]:
    return [json.loads(record.value or b"") for record in Confluent().consume(engine.bootstrap_servers, topic, count)]


def in_unit_of_work(app: App) -> UnitOfWork:
    return app.unit_of_work(app.database.sessions())


def left(app: App) -> int:
    with app.database.engine.connect() as connection:
        return schedule.waiting(connection, app.name) + app.outbox.status(connection).waiting


@pytest.mark.parametrize("session_kind", ["async", "sync"])
def test_a_timer_fires_once_and_not_before_its_time(
    embedded: Engine, database_url: str, unique: str, session_kind: str
) -> None:
    """S001.10: the event happens when it fires; what is rolled back, cancelled or replaced does not. (both databases)"""
    app = make_app(embedded, database_url, unique)
    set_at: dict[int, datetime] = {}

    def fill(uow: UnitOfWork, number: int) -> None:
        set_at[number] = datetime.now(UTC)
        uow.schedule(Reminded("a", number), after="300ms", name=f"t{number}")

    async def main() -> None:
        async with app.lifespan():
            if session_kind == "async":
                async with app.database.async_sessions() as session, app.unit_of_work(session) as uow:
                    fill(uow, 1)
                    uow.schedule(Reminded("a", 2), at=datetime.now(UTC) + timedelta(seconds=0.5))
                    uow.schedule(Reminded("a", 3), after="1h", name="moved")
                    uow.schedule(Reminded("a", 4), after="400ms", name="cancelled")
            else:
                with in_unit_of_work(app) as sync_uow:
                    fill(sync_uow, 1)
                    sync_uow.schedule(Reminded("a", 2), at=datetime.now(UTC) + timedelta(seconds=0.5))
                    sync_uow.schedule(Reminded("a", 3), after="1h", name="moved")
                    sync_uow.schedule(Reminded("a", 4), after="400ms", name="cancelled")
            with in_unit_of_work(app) as again:
                again.schedule(Reminded("a", 5), after="700ms", name="moved")
                again.cancel("cancelled")
                again.cancel("never set")
            lost = in_unit_of_work(app).__enter__()
            lost.schedule(Reminded("a", 6), after="1ms")
            lost.__exit__(RuntimeError, RuntimeError("rolled back"), None)
            await asyncio.to_thread(wait_until, lambda: left(app) == 0, "the timers to fire")

    asyncio.run(main())
    found = envelopes(embedded, unique, 3)
    assert [each["data"]["number"] for each in found] == [1, 2, 5]
    assert datetime.fromisoformat(found[0]["timestamp"]) - set_at[1] >= timedelta(seconds=0.29)


def test_a_timer_survives_restarts_and_many_processes(embedded: Engine, database_url: str, unique: str) -> None:
    """Set before a stop, due while nobody runs; several applications fire side by side, each timer once. (both databases)"""
    first = make_app(embedded, database_url, unique)
    tables.create_tables(first.database.engine)
    with in_unit_of_work(first) as uow:
        for number in range(300):
            uow.schedule(Reminded("a", number), after="100ms" if number % 2 else "1200ms")
    time.sleep(0.15)  # due while nobody runs: that is what is tested

    async def main() -> None:
        apps = [make_app(embedded, database_url, unique) for _ in range(3)]
        async with apps[0].lifespan(), apps[1].lifespan(), apps[2].lifespan():
            await asyncio.to_thread(wait_until, lambda: left(apps[0]) == 0, "the timers to fire")

    asyncio.run(main())
    numbers = [each["data"]["number"] for each in envelopes(embedded, unique, 300)]
    assert sorted(numbers) == list(range(300))


PROGRAM = """
    import asyncio, sys
    from headwater import App, Event, Settings, Topic

    class Reminded(Event):
        account_id: str
        number: int

    servers, url, name, first = sys.argv[1:5]
    app = App(name, topics=[Topic(name, key="account_id", events=[Reminded])], settings=Settings(servers, url))

    async def main():
        async with app.lifespan():
            number = int(first)
            while True:
                async with app.database.async_sessions() as session, app.unit_of_work(session) as uow:
                    uow.schedule(Reminded("a", number), after="20ms", name=f"n{number}")
                print(number, flush=True)
                number += 1

    asyncio.run(main())
"""


def test_kill_9_loses_no_timer(engine: Engine, database_url: str, unique: str, tmp_path: Path) -> None:
    """S004.16: killed while timers are set and fire, again and again: each that was committed fires, and none becomes two
    events. (both engines, both databases)"""
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM))
    committed: set[int] = set()
    for start in range(0, 40_000, 10_000):
        command = [sys.executable, str(script), engine.bootstrap_servers, database_url, unique, str(start)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        committed |= {int(process.stdout.readline()) for _ in range(40)}
        process.kill()
        rest, _ = process.communicate()
        committed |= {int(line) for line in rest.split("\n")[:-1]}
    app = make_app(engine, database_url, unique)

    async def drain() -> None:
        async with app.lifespan():
            await asyncio.to_thread(wait_until, lambda: left(app) == 0, "the timers to fire")

    asyncio.run(drain())
    (end,) = KafkaAdmin(settings_for(engine)).end_offsets([(unique, 0)]).values()
    ids: dict[int, set[str]] = defaultdict(set)
    for each in envelopes(engine, unique, end):
        ids[each["data"]["number"]].add(each["eventId"])
    assert committed <= set(ids)
    assert all(len(each) == 1 for each in ids.values())


def test_a_timer_that_can_not_be_fired_holds_up_no_other(embedded: Engine, database_url: str, unique: str) -> None:
    """It is put off and said; the others fire. (both databases)"""
    app = make_app(embedded, database_url, unique)
    tables.create_tables(app.database.engine)
    with in_unit_of_work(app) as uow:
        uow.schedule(Reminded("a", 1), after="1ms", name="bad")
        uow.schedule(Reminded("a", 2), after="50ms", name="good")
    with app.database.engine.begin() as connection:
        connection.execute(text("UPDATE headwater_timers SET headers = payload WHERE name = 'bad'"))

    async def main() -> None:
        async with app.lifespan():
            await asyncio.to_thread(wait_until, lambda: left(app) == 1, "the other timer to fire")

    asyncio.run(main())
    assert [each["data"]["number"] for each in envelopes(embedded, unique, 1)] == [2]


def test_applications_that_share_a_database_have_timers_of_their_own(
    embedded: Engine, database_url: str, unique: str
) -> None:
    """Of one name: neither replaces, cancels or fires the other's. (both databases)"""
    one, other = make_app(embedded, database_url, f"{unique}1"), make_app(embedded, database_url, f"{unique}2")
    tables.create_tables(one.database.engine)
    for number, app in enumerate((one, other)):
        with in_unit_of_work(app) as uow:
            uow.schedule(Reminded("a", number), after="100ms", name="cart")

    async def main(app: App) -> None:
        async with app.lifespan():
            await asyncio.to_thread(wait_until, lambda: left(app) == 0, "the timer to fire")

    asyncio.run(main(one))
    asyncio.run(main(other))
    for number, name in enumerate((f"{unique}1", f"{unique}2")):
        assert [each["data"]["number"] for each in envelopes(embedded, name, 1)] == [number]


def test_wrong_timers_are_refused(tmp_path: Path) -> None:
    app = App(
        "a",
        topics=[Topic("t", key="account_id", events=[Reminded])],
        settings=settings_for(Engine("none", "127.0.0.1:1"), f"sqlite:///{tmp_path / 'x.db'}"),
    )
    uow = in_unit_of_work(app)
    for arguments, said in [
        ({}, "a duration or a time"),
        ({"after": "1s", "at": datetime.now(UTC)}, "a duration or a time"),
        ({"at": datetime(2030, 1, 1)}, "zone"),
        ({"after": "1s", "name": "x" * 401}, "400"),
    ]:
        with pytest.raises(WrongTimer, match=said):
            uow.schedule(Reminded("a", 1), **arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidSetting):
        uow.schedule(Reminded("a", 1), after="soon")
