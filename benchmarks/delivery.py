"""What the failure contract costs: handlers of each kind and delivery class beside hand-written loops and peers.

One core for the application: each candidate is one Python process's work, and the broker's is beside it. Rounds are
interleaved; the broker doesn't sync, so that the application is what is measured.
"""

import asyncio
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psycopg
from confluent_kafka import Consumer, Producer
from sqlalchemy import text
from tests.kit.install import CACHE
from tests.kit.postgres import Postgres

from benchmarks import quix_streams
from benchmarks.servers import NO_SYNC, Headwater, Kafka, Server
from benchmarks.table import Table
from headwater import App, Envelope, Event, Retry, Settings, Topic, UnitOfWork
from headwater.event.codec import encode
from headwater.event.envelope import Cause
from headwater.event_loop import new_event_loop

EVENTS = 200_000
PARTITIONS = 6
KEYED = 10_000
ROWS = 4_000
TRANSACTED = 60_000
PUBLISHED = 3_000
GATHERED = 60_000
STUCK = 200_000
MILLION = 1_000_000
ROUNDS = 3


class Placed(Event):
    order_id: str
    customer_id: str
    amount_cents: int
    note: str


class Echoed(Event):
    order_id: str
    amount_cents: int


def topic_of(name: str, partitions: int = PARTITIONS) -> Topic:
    return Topic(name, key="order_id", events=[Placed], partitions=partitions)


EVENTS_TOPIC = topic_of("events")
KEYED_TOPIC = topic_of("keyed", 1)
MILLION_TOPIC = topic_of("million")


def fill(server: Server, topic: Topic, count: int, keys: int | None = None) -> None:
    app = App("fill", topics=[topic], settings=Settings(server.address))

    async def create() -> None:
        async with app.lifespan():
            pass

    asyncio.run(create())
    producer = Producer(
        {"bootstrap.servers": server.address, "linger.ms": 5, "queue.buffering.max.messages": 2_000_000,
         "partitioner": "murmur2_random"}
    )  # fmt: skip
    for i in range(count):
        event = Placed(f"o-{i if keys is None else i % keys}", f"c-{i % 1000}", i, "")
        encoded = encode(event, "bench", Cause("c", None))
        producer.produce(topic.name, encoded.value, event.order_id.encode(), headers=encoded.headers)
    producer.flush(120)


class Count:
    """Until so many: the rate from the first to the last."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._count = 0
        self._first = 0.0
        self.rate = 0.0
        self.done = threading.Event()

    def add(self, count: int = 1) -> None:
        if not self._count:
            self._first = time.perf_counter()
        self._count += count
        if self._count >= self._wanted and not self.done.is_set():
            self.rate = self._count / (time.perf_counter() - self._first)
            self.done.set()


def run_app(app: App, count: Count, seconds: float = 300.0) -> float:
    async def run() -> None:
        stop = asyncio.Event()
        task = asyncio.create_task(app.run(stop))
        deadline = time.monotonic() + seconds
        while not count.done.is_set() and not task.done() and time.monotonic() < deadline:
            await asyncio.sleep(0.002)
        stop.set()
        await task

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run())
    assert count.done.is_set(), "it did not come to the end"
    return count.rate


def consumer_of(server: Server, group: str, **more: str) -> Consumer:
    return Consumer(
        {"bootstrap.servers": server.address, "group.id": group, "auto.offset.reset": "earliest",
         "fetch.queue.backoff.ms": 5, "enable.auto.offset.store": False, **more}
    )  # fmt: skip


def bare_async(server: Server, group: str) -> float:
    decoder = msgspec.json.Decoder()
    consumer = consumer_of(server, group)
    consumer.subscribe([EVENTS_TOPIC.name])
    count = Count(EVENTS)

    async def handle(event: object) -> None: ...

    async def run() -> None:
        while not count.done.is_set():
            messages = consumer.consume(500, 0.1)
            for message in messages:
                await handle(decoder.decode(message.value() or b""))
            for message in messages[-1:]:
                consumer.store_offsets(message)
            if messages:
                count.add(len(messages))

    asyncio.run(run())
    consumer.close()
    return count.rate


def bare_sync(server: Server, group: str) -> float:
    decoder = msgspec.json.Decoder()
    consumer = consumer_of(server, group)
    consumer.subscribe([EVENTS_TOPIC.name])
    count = Count(EVENTS)

    def handle(event: object) -> None: ...

    while not count.done.is_set():
        messages = consumer.consume(500, 0.1)
        for message in messages:
            handle(decoder.decode(message.value() or b""))
        for message in messages[-1:]:
            consumer.store_offsets(message)
        if messages:
            count.add(len(messages))
    consumer.close()
    return count.rate


def through_app(server: Server, group: str, kind: str) -> float:
    app = App(group, settings=Settings(server.address))
    count = Count(EVENTS)
    if kind == "async":

        @app.handler(EVENTS_TOPIC, group=group)
        async def handle(event: Placed) -> None:
            count.add()
    elif kind == "sync":

        @app.handler(EVENTS_TOPIC, group=group)
        def handle_sync(event: Placed) -> None:
            count.add()
    else:

        @app.handler(EVENTS_TOPIC, group=group)
        async def handle_batch(events: list[Placed]) -> None:
            count.add(len(events))

    return run_app(app, count)


def aiokafka_loop(server: Server, group: str) -> float:
    import aiokafka

    decoder = msgspec.json.Decoder()
    count = Count(EVENTS)

    async def run() -> None:
        consumer = aiokafka.AIOKafkaConsumer(
            EVENTS_TOPIC.name, bootstrap_servers=server.address, group_id=group, auto_offset_reset="earliest"
        )
        await consumer.start()
        try:
            while not count.done.is_set():
                for records in (await consumer.getmany(timeout_ms=100, max_records=500)).values():
                    for record in records:
                        decoder.decode(record.value)
                    count.add(len(records))
        finally:
            await consumer.stop()

    asyncio.run(run())
    return count.rate


def faststream_loop(server: Server, group: str, wanted: int = 10_000) -> float:
    """Its confluent broker, a typed handler per event, its own default acknowledgement."""
    from faststream.confluent import KafkaBroker

    count = Count(wanted)

    async def run() -> None:
        broker = KafkaBroker(server.address, logger=None)

        @broker.subscriber(EVENTS_TOPIC.name, group_id=group, auto_offset_reset="earliest")
        async def handle(event: dict) -> None:  # type: ignore[type-arg]
            count.add()

        await broker.start()
        while not count.done.is_set():
            await asyncio.sleep(0.01)
        await broker.stop()

    asyncio.run(run())
    return count.rate


def quix_loop(server: Server, group: str) -> float:
    """Untyped, one event after the other."""
    return quix_streams.rate(CACHE, server.address, EVENTS_TOPIC.name, group, EVENTS)


# Waiting handlers


def keyed_app(server: Server, group: str) -> float:
    app = App(group, settings=Settings(server.address))
    count = Count(KEYED)
    running: set[str] = set()

    @app.handler(KEYED_TOPIC, group=group, concurrency=256)
    async def handle(event: Placed) -> None:
        assert event.order_id not in running, "two of one key at once"
        running.add(event.order_id)
        await asyncio.sleep(0.002)
        running.discard(event.order_id)
        count.add()

    return run_app(app, count)


def keyed_bare(server: Server, group: str) -> float:
    """At most 256 keys at once, each in order, by hand; offsets stored when a batch is done."""
    decoder = msgspec.json.Decoder(type=dict)
    consumer = consumer_of(server, group)
    consumer.subscribe([KEYED_TOPIC.name])
    count = Count(KEYED)

    async def run() -> None:
        slots = asyncio.Semaphore(256)
        chains: dict[bytes, asyncio.Task[None]] = {}

        async def handle(message: object, before: "asyncio.Task[None] | None") -> None:
            if before is not None:
                await before
            async with slots:
                decoder.decode(message.value())  # type: ignore[attr-defined]
                await asyncio.sleep(0.002)
                count.add()

        while not count.done.is_set():
            messages = consumer.consume(500, 0.001)
            for message in messages:
                chains[message.key()] = asyncio.create_task(handle(message, chains.get(message.key())))
            await asyncio.sleep(0)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run())
    consumer.close()
    return count.rate


# A database


def make_effects(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS effects (order_id text, amount int)")
        connection.execute("CREATE TABLE IF NOT EXISTS seen (event_id text PRIMARY KEY)")
        connection.execute("TRUNCATE effects, seen")


def effectively_once_app(server: Server, group: str, url: str) -> float:
    make_effects(url)
    app = App(group, settings=Settings(server.address, url))
    count = Count(ROWS)

    @app.handler(KEYED_TOPIC, group=group, delivery="effectively_once", concurrency=16)
    async def handle(event: Placed, uow: UnitOfWork, envelope: Envelope) -> None:
        connection = await uow.async_session.connection()
        await connection.execute(
            text("INSERT INTO effects VALUES (:id, :amount)"), {"id": event.order_id, "amount": event.amount_cents}
        )
        count.add()

    return run_app(app, count)


def effectively_once_by_hand(server: Server, group: str, url: str) -> float:
    """The same statements through SQLAlchemy's async engine: a table of seen ids, one transaction per event, 16 keys at
    once, each in order."""
    from sqlalchemy.ext.asyncio import create_async_engine

    make_effects(url)
    decoder = msgspec.json.Decoder(type=dict)
    consumer = consumer_of(server, group)
    consumer.subscribe([KEYED_TOPIC.name])
    count = Count(ROWS)

    async def run() -> None:
        engine = create_async_engine(url.replace("postgresql://", "postgresql+psycopg://"), pool_size=16)
        slots = asyncio.Semaphore(16)
        chains: dict[bytes, asyncio.Task[None]] = {}

        async def handle(message: object, before: "asyncio.Task[None] | None") -> None:
            if before is not None:
                await before
            async with slots:
                event = decoder.decode(message.value())  # type: ignore[attr-defined]
                async with engine.begin() as connection:
                    new = await connection.execute(
                        text("INSERT INTO seen VALUES (:id) ON CONFLICT DO NOTHING RETURNING 1"),
                        {"id": event["eventId"]},
                    )
                    if new.first() is not None:
                        await connection.execute(
                            text("INSERT INTO effects VALUES (:id, :amount)"),
                            {"id": event["data"]["orderId"], "amount": event["data"]["amountCents"]},
                        )
                count.add()

        while not count.done.is_set():
            messages = consumer.consume(500, 0.001)
            for message in messages:
                chains[message.key()] = asyncio.create_task(handle(message, chains.get(message.key())))
            await asyncio.sleep(0.001)
        for chain in chains.values():
            chain.cancel()
        await asyncio.gather(*chains.values(), return_exceptions=True)
        await engine.dispose()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run())
    consumer.close()
    return count.rate


# Transactions, on Apache Kafka


def transacted_app(server: Server, group: str, records: int, delivery: str) -> float:
    topic = topic_of("transacted")
    echoes = Topic(f"echoes-{group}", key="order_id", events=[Echoed], partitions=PARTITIONS)
    app = App(group, topics=[echoes], settings=Settings(server.address))
    count = Count(TRANSACTED)

    @app.handler(topic, group=group, delivery=delivery, transaction_records=records, concurrency=1000)
    async def handle(event: Placed) -> Echoed:
        count.add()
        return Echoed(event.order_id, event.amount_cents)

    return run_app(app, count)


# Publishing


def publish_app(server: Server, name: str, count: int, gathered: bool) -> float:
    topic = Topic(name, key="order_id", events=[Placed], partitions=PARTITIONS)
    app = App(name, topics=[topic], settings=Settings(server.address))
    events = [Placed(f"o-{i}", "c", i, "") for i in range(count)]

    async def run() -> float:
        async with app.lifespan():
            await app.publish(events[0])
            started = time.perf_counter()
            if gathered:
                for i in range(0, count, 5000):
                    await asyncio.gather(*(app.publish(event) for event in events[i : i + 5000]))
            else:
                for event in events:
                    await app.publish(event)
            return count / (time.perf_counter() - started)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(run())


def publish_bare(server: Server, name: str, count: int, gathered: bool) -> float:
    producer = Producer({"bootstrap.servers": server.address, "linger.ms": 0 if not gathered else 5,
                         "queue.buffering.max.messages": 1_000_000})  # fmt: skip
    value = msgspec.json.encode(Placed("o-1", "c", 1, ""))
    producer.produce(name, value, b"k")
    producer.flush()
    started = time.perf_counter()
    for _ in range(count):
        producer.produce(name, value, b"k")
        if not gathered:
            producer.flush()
    producer.flush()
    return count / (time.perf_counter() - started)


# Memory behind a stuck key


def stuck(server: Server) -> tuple[float, float]:
    """Parked events a second, and MB of memory for each million of them."""
    topic = topic_of("stuck", 1)
    fill(server, topic, STUCK, keys=1)
    app = App("stuck", settings=Settings(server.address))

    @app.handler(topic, group="stuck", retry=Retry(1000, "1h"))
    async def handle(event: Placed) -> None:
        raise RuntimeError("stuck")

    from headwater.kafka.admin import KafkaAdmin

    admin = KafkaAdmin(Settings(server.address))

    async def run() -> tuple[float, float]:
        stop = asyncio.Event()
        task = asyncio.create_task(app.run(stop))
        loop = asyncio.get_running_loop()

        async def frontier() -> int:
            committed = await loop.run_in_executor(None, admin.committed, "stuck")
            return committed[topic.name, 0].offset if (topic.name, 0) in committed else 0

        while await frontier() < STUCK // 10:
            await asyncio.sleep(0.2)
        memory, at, started = resident_mb(), await frontier(), time.perf_counter()
        while await frontier() < STUCK:
            await asyncio.sleep(0.2)
        rate = (STUCK - at) / (time.perf_counter() - started)
        grown = (resident_mb() - memory) / (STUCK - at) * 1e6
        stop.set()
        await task
        return rate, grown

    return asyncio.run(run())


def beside_a_failing_key(server: Server, group: str, is_failing: bool) -> float:
    """A million events of 10,000 keys; one event in a thousand is of a key that always fails, or would. The hour in which
    it fails is shortened: it is tried every half second."""
    app = App(group, settings=Settings(server.address))
    count = Count(MILLION - MILLION // 1000 if is_failing else MILLION)

    @app.handler(MILLION_TOPIC, group=group, retry=Retry(1_000_000, "500ms"))
    async def handle(event: Placed) -> None:
        if is_failing and event.order_id == "bad":
            raise RuntimeError("always")
        count.add()

    return run_app(app, count)


def fill_million(server: Server) -> None:
    fill(server, MILLION_TOPIC, 1)
    producer = Producer(
        {"bootstrap.servers": server.address, "linger.ms": 5, "queue.buffering.max.messages": 2_000_000,
         "queue.buffering.max.kbytes": 2_000_000, "partitioner": "murmur2_random"}
    )  # fmt: skip
    for i in range(1, MILLION):
        key = "bad" if i % 1000 == 0 else f"o-{i % 10_000}"
        encoded = encode(Placed(key, "c", i, ""), "bench", Cause("c", None))
        producer.produce(MILLION_TOPIC.name, encoded.value, key.encode(), headers=encoded.headers)
        if i % 1000 == 0:
            producer.poll(0)
    producer.flush(120)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


Candidates = dict[str, Callable[[str], float]]


def measure(
    table: Table, name: str, aim: str, candidates: Candidates, rounds: int = ROUNDS, unit: str = "events/s"
) -> None:
    values: dict[str, list[float]] = {each: [] for each in candidates}
    for i in range(rounds):
        for each, run in candidates.items():
            values[each].append(run(f"{name}-{each}-{i}".replace(" ", "-").replace(",", "").replace("/", "-")))
    print("  " + name + ": " + ", ".join(f"{k} {statistics.median(v):,.0f}" for k, v in values.items()), flush=True)
    table.add(name, unit, values, aim)


def run() -> None:
    columns = ("by hand", "headwater", "headwater sync", "headwater batch", "aiokafka", "FastStream", "Quix Streams")
    table = Table("The failure contract's cost", columns)
    server = Headwater("headwater", NO_SYNC)
    postgres = Postgres().start()
    try:
        fill(server, EVENTS_TOPIC, EVENTS)
        fill(server, KEYED_TOPIC, KEYED, keys=1000)
        measure(
            table, "async handler that does nothing", "150,000/s",
            {
                "by hand": lambda g: bare_async(server, g),
                "headwater": lambda g: through_app(server, g, "async"),
                "aiokafka": lambda g: aiokafka_loop(server, g),
                "FastStream": lambda g: faststream_loop(server, g),
                "Quix Streams": lambda g: quix_loop(server, g),
            },
        )  # fmt: skip
        measure(
            table, "sync handler, batch handler", "170,000/s, 350,000/s",
            {
                "by hand": lambda g: bare_sync(server, g),
                "headwater sync": lambda g: through_app(server, g, "sync"),
                "headwater batch": lambda g: through_app(server, g, "batch"),
            },
        )  # fmt: skip
        measure(
            table, "2 ms of waiting, 1,000 keys, one partition", "45,000/s",
            {"by hand": lambda g: keyed_bare(server, g), "headwater": lambda g: keyed_app(server, g)},
        )  # fmt: skip
        measure(
            table, "effectively_once on PostgreSQL, one row", "0.7",
            {
                "by hand": lambda g: effectively_once_by_hand(server, g, postgres.url),
                "headwater": lambda g: effectively_once_app(server, g, postgres.url),
            },
        )  # fmt: skip
        measure(
            table, "publish, awaited one by one", "6,000/s",
            {
                "by hand": lambda g: publish_bare(server, g, PUBLISHED, False),
                "headwater": lambda g: publish_app(server, g, PUBLISHED, False),
            },
        )  # fmt: skip
        measure(
            table, "publish, gathered", "250,000/s",
            {
                "by hand": lambda g: publish_bare(server, g, GATHERED, True),
                "headwater": lambda g: publish_app(server, g, GATHERED, True),
            },
        )  # fmt: skip
        rate, grown = stuck(server)
        table.add("parking behind one stuck key", "events/s", {"headwater": [rate]}, "")
        table.add("memory for a million events behind it", "MB", {"headwater": [grown]}, "bounded")
    finally:
        server.stop()
        postgres.stop()
    table.print()
    failing_key()
    transactions()


def failing_key() -> None:
    table = Table("A key that fails, with a million events of others", ("no key fails", "one key fails"))
    server = Headwater("headwater", NO_SYNC)
    try:
        fill_million(server)
        measure(
            table, "async handler that does nothing", "0.9",
            {
                "no key fails": lambda g: beside_a_failing_key(server, g, False),
                "one key fails": lambda g: beside_a_failing_key(server, g, True),
            },
        )  # fmt: skip
    finally:
        server.stop()
    table.print()


def transactions() -> None:
    table = Table("exactly_once on Apache Kafka, beside at_least_once", ("at_least_once", "exactly_once"))
    kafka = Kafka("kafka", {})
    try:
        fill(kafka, topic_of("transacted"), TRANSACTED)
        for records in (1000, 10_000):
            measure(
                table, f"{records:,} records a transaction", "0.5" if records == 1000 else "0.8",
                {
                    "at_least_once": lambda g, n=records: transacted_app(kafka, g, n, "at_least_once"),
                    "exactly_once": lambda g, n=records: transacted_app(kafka, g, n, "exactly_once"),
                },
            )  # fmt: skip
    finally:
        kafka.stop()
    table.print()


if __name__ == "__main__":
    run()
