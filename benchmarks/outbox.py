"""The outbox on PostgreSQL: rows a second through the relay, and from the commit to a consumer.

Rows: 100,000 of 1,000 keys wait when the relay starts. By hand: one thread that reads 1,000 rows in order, produces them, waits
for their acknowledgements and deletes them, over and over, by psycopg and confluent-kafka alone.

Latency: 1,000 orders a second, evenly, each a transaction with a row of its own and an event; from the return of the commit to
the handler's call in the same process. Synced at each commit: without synchronous_commit, PostgreSQL shows its log to those who
stream it every 200 ms.
"""

import asyncio
import statistics
import threading
import time
import uuid

import confluent_kafka
import psycopg
from sqlalchemy import text
from tests.kit.postgres import Postgres
from tests.kit.running import Running

from benchmarks.servers import Headwater
from benchmarks.table import Table
from headwater import App, Database, Event, Outbox, Settings, Topic
from headwater.store import tables

ROWS = 100_000
KEYS = 1000
ROUNDS = 3
RATE = 1000
SECONDS = 10
BATCH = 1000


class Placed(Event):
    order_id: str
    cents: int
    note: str


def fill(app: App, database: Database) -> None:
    """Rows as `uow.publish` writes them."""
    note = "x" * 100
    for start in range(0, ROWS, 10_000):
        with app.unit_of_work(database.sessions()) as uow:
            for i in range(start, start + 10_000):
                uow.publish(Placed(f"o-{i % KEYS}", i, note))


def by_hand(url: str, servers: str) -> float:
    """Rows a second."""
    producer = confluent_kafka.Producer({"bootstrap.servers": servers, "enable.idempotence": True, "linger.ms": 1})
    started = time.perf_counter()
    done = 0
    with psycopg.connect(url) as connection:
        while done < ROWS:
            rows = connection.execute(
                "SELECT position, topic, key, payload FROM headwater_outbox ORDER BY position LIMIT %s", [BATCH]
            ).fetchall()
            for _, topic, key, payload in rows:
                producer.produce(topic, payload, key)
            assert producer.flush(30) == 0
            connection.execute("DELETE FROM headwater_outbox WHERE position = ANY(%s)", [[row[0] for row in rows]])
            connection.commit()
            done += len(rows)
    return ROWS / (time.perf_counter() - started)


def relayed(app: App, url: str) -> float:
    async def drain() -> float:
        started = time.perf_counter()
        async with app.lifespan():
            with psycopg.connect(url, autocommit=True) as connection:
                while True:
                    left = connection.execute("SELECT 1 FROM headwater_outbox LIMIT 1").fetchone()
                    if left is None:
                        return ROWS / (time.perf_counter() - started)
                    await asyncio.sleep(0.02)

    return asyncio.run(drain())


def latencies(settings: Settings, source: str) -> list[float]:
    """Milliseconds, sorted."""
    topic = Topic(f"bench.events.{uuid.uuid4().hex}", key="order_id", events=[Placed], partitions=6)
    app = App("bench-latency", settings=settings, topics=[topic], outbox=Outbox(source=source))
    committed: dict[int, float] = {}
    handled: dict[int, float] = {}

    @app.handler(topic, group=topic.name, retry=None)
    async def handle(event: Placed) -> None:
        handled[event.cents] = time.perf_counter()

    def place(first: int, step: int) -> None:
        with app.database.engine.connect() as connection:
            connection.execute(text("SELECT 1"))
        began = time.perf_counter()
        for i in range(first, RATE * SECONDS, step):
            pause = began + i / RATE - time.perf_counter()
            if pause > 0:
                time.sleep(pause)
            with app.database.sessions() as session, app.unit_of_work(session) as uow:
                session.execute(text("INSERT INTO bench_orders VALUES (:id)"), {"id": i})
                uow.publish(Placed(f"o-{i}", i, "x" * 100))
            committed[i] = time.perf_counter()

    with app.database.engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS bench_orders"))
        connection.execute(text("CREATE TABLE bench_orders (id int PRIMARY KEY)"))
    with Running(app):
        with app.unit_of_work(app.database.sessions()) as uow:
            uow.publish(Placed("warm", -1, ""))
        while not handled:
            time.sleep(0.05)
        handled.clear()
        threads = [threading.Thread(target=place, args=(i, 4)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        deadline = time.monotonic() + 60
        while len(handled) < RATE * SECONDS and time.monotonic() < deadline:
            time.sleep(0.05)
    return sorted(1000 * (handled[i] - committed[i]) for i in handled)


def run() -> None:
    table = Table("The outbox on PostgreSQL", ("by hand", "polling", "replication"))
    server = Headwater("embedded", {})
    postgres = Postgres(fsync=True).start()
    try:
        settings = Settings(server.address, postgres.url)
        topic = Topic("bench.events.orders", key="order_id", events=[Placed], partitions=6)
        values: dict[str, list[float]] = {"by hand": [], "polling": [], "replication": []}
        for _ in range(ROUNDS):
            for name in values:
                source = name if name != "by hand" else "polling"
                app = App("bench-relay", settings=settings, topics=[topic], outbox=Outbox(source=source))
                database = app.database
                tables.create_tables(database.engine)
                if source == "replication":
                    asyncio.run(_make_slot(app))
                fill(app, database)
                if name == "by hand":
                    values[name].append(by_hand(postgres.url, server.address))
                else:
                    values[name].append(relayed(app, postgres.url))
                asyncio.run(database.close())
        table.add("rows", "rows/s", values, "60,000")
        found = {source: latencies(settings, source) for source in ("polling", "replication")}
        table.add("commit to handler, median", "ms", {name: [statistics.median(ms)] for name, ms in found.items()}, "5")
        table.add("commit to handler, p99", "ms", {name: [ms[int(len(ms) * 0.99)]] for name, ms in found.items()}, "20")
    finally:
        postgres.stop()
        server.stop()
    table.print()


async def _make_slot(app: App) -> None:
    """By a first start: what is written from then on comes out of it."""
    async with app.lifespan():
        while app._relay is None or not app._relay.leads:
            await asyncio.sleep(0.05)
        await asyncio.sleep(1.0)
