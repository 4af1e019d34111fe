"""A projection into PostgreSQL: rebuilt by COPY, and followed as it runs, beside a hand-written loop that does the same.

200,000 purchases of 20,000 customers in six partitions: a row for each customer (counted up) and one for each order. The
hand-written loop is confluent-kafka's `consume(500)`, msgspec, dicts, and the same COPY at the end, with nothing of progress,
of failures, or of rows that don't fit in memory.
"""

import asyncio
import time
import uuid

import confluent_kafka
import msgspec
import psycopg
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from tests.kit.postgres import Postgres
from tests.kit.running import Running

from benchmarks.servers import Headwater
from benchmarks.table import Table
from headwater import App, Database, Event, Projection, Rows, Settings, Topic
from headwater.domain.rebuild import Rebuild
from headwater.runtime.schemas import Schemas
from headwater.store import tables

EVENTS = 200_000
CUSTOMERS = 20_000
ROUNDS = 3


class Bought(Event):
    order_id: str
    customer_id: str
    cents: int


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "bench_customers"
    customer_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    orders: Mapped[int]
    cents: Mapped[int]


class Order(Base):
    __tablename__ = "bench_orders"
    order_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    customer_id: Mapped[str] = mapped_column(String(64))
    cents: Mapped[int]


def projection_of(topic: Topic) -> Projection:
    projection = Projection("bench-customers", topics=[topic], tables=[Customer, Order])

    @projection.on
    def bought(event: Bought, rows: Rows) -> None:
        row = rows.get(Customer, event.customer_id) or Customer(customer_id=event.customer_id, orders=0, cents=0)
        row.orders += 1
        row.cents += event.cents
        rows.put(row)
        rows.put(Order(order_id=event.order_id, customer_id=event.customer_id, cents=event.cents))

    return projection


def fill(settings: Settings, topic: Topic) -> None:
    app = App("bench-writer", settings=settings, topics=[topic])

    async def publish() -> None:
        async with app.lifespan():
            for start in range(0, EVENTS, 5000):
                await app.publish_all(
                    [Bought(f"o-{i}", f"c-{i * 7919 % CUSTOMERS}", i % 1000) for i in range(start, start + 5000)]
                )

    asyncio.run(publish())


def rebuilt(settings: Settings, database: Database, projection: Projection) -> float:
    """Events a second."""
    started = time.perf_counter()
    result = Rebuild(projection, database, settings, Schemas(settings), lambda done, total: None).run(anew=True)
    assert result.events == EVENTS
    return EVENTS / (time.perf_counter() - started)


class Data(msgspec.Struct, rename="camel"):
    order_id: str
    customer_id: str
    cents: int


class Envelope(msgspec.Struct):
    data: Data


def by_hand(settings: Settings, url: str, topic: str) -> float:
    started = time.perf_counter()
    consumer = confluent_kafka.Consumer(
        {"bootstrap.servers": settings.bootstrap_servers, "group.id": uuid.uuid4().hex, "auto.offset.reset": "earliest"}
    )
    consumer.subscribe([topic])
    decode = msgspec.json.Decoder(Envelope).decode
    customers: dict[str, list[int]] = {}
    orders = []
    while len(orders) < EVENTS:
        for message in consumer.consume(500, 1.0):
            event = decode(message.value()).data
            row = customers.setdefault(event.customer_id, [0, 0])
            row[0] += 1
            row[1] += event.cents
            orders.append((event.order_id, event.customer_id, event.cents))
    consumer.close()
    with psycopg.connect(url) as connection, connection.cursor() as cursor:
        cursor.execute("DROP TABLE IF EXISTS hand_customers, hand_orders")
        cursor.execute("CREATE TABLE hand_customers (customer_id varchar(64) PRIMARY KEY, orders int, cents int)")
        cursor.execute(
            "CREATE TABLE hand_orders (order_id varchar(64) PRIMARY KEY, customer_id varchar(64), cents int)"
        )
        with cursor.copy("COPY hand_customers FROM STDIN") as copy:
            for id, row in customers.items():
                copy.write_row((id, *row))
        with cursor.copy("COPY hand_orders FROM STDIN") as copy:
            for order in orders:
                copy.write_row(order)
    return EVENTS / (time.perf_counter() - started)


def followed(settings: Settings, database: Database, topic: Topic) -> float:
    """As it runs, from nothing to the end."""
    projection = projection_of(topic)
    with database.engine.begin() as connection:
        for each in ("bench_customers", "bench_orders", "headwater_projections"):
            connection.exec_driver_sql(f"DROP TABLE IF EXISTS {each}")
    app = App("bench-reader", settings=settings, topics=[topic])
    projection.join(app)
    started = time.perf_counter()
    with Running(app), psycopg.connect(database.url.set(drivername="postgresql").render_as_string(False)) as connection:
        connection.autocommit = True
        while True:
            try:
                found = connection.execute("SELECT sum(orders) FROM bench_customers").fetchone()
            except psycopg.errors.UndefinedTable:
                found = None
            if found is not None and found[0] == EVENTS:
                break
            time.sleep(0.05)
    return EVENTS / (time.perf_counter() - started)


def run() -> None:
    table = Table("Projections into PostgreSQL", ("by hand", "headwater"))
    server = Headwater("embedded", {})
    postgres = Postgres().start()
    try:
        settings = Settings(server.address, postgres.url)
        topic = Topic("bench.events.purchases", key="customer_id", events=[Bought], partitions=6)
        fill(settings, topic)
        database = Database(postgres.url)
        tables.create_tables(database.engine)
        projection = projection_of(topic)
        values: dict[str, list[float]] = {"by hand": [], "headwater": []}
        for _ in range(ROUNDS):
            values["by hand"].append(by_hand(settings, postgres.url, topic.name))
            values["headwater"].append(rebuilt(settings, database, projection))
        table.add("rebuild by COPY", "events/s", values, "30,000")
        table.add("as it runs", "events/s", {"headwater": [followed(settings, database, topic)]}, "")
        asyncio.run(database.close())
    finally:
        postgres.stop()
        server.stop()
    table.print()
