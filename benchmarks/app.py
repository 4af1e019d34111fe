"""The application half beside a bare loop: events a second through a typed handler, and the time to the first one."""

import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time

import msgspec
from confluent_kafka import Consumer, Producer

from benchmarks.servers import NO_SYNC, Headwater
from benchmarks.table import Table
from headwater import App, Event, Settings, Topic
from headwater.event.codec import encode
from headwater.event.envelope import Cause

EVENTS = 300_000
PARTITIONS = 6
ROUNDS = 3


class Placed(Event):
    order_id: str
    customer_id: str
    amount_cents: int
    note: str


TOPIC = Topic("events", key="order_id", events=[Placed], partitions=PARTITIONS)


def fill(server: Headwater) -> None:
    app = App("fill", topics=[TOPIC], settings=Settings(server.address))

    async def create() -> None:
        async with app.lifespan():
            pass

    asyncio.run(create())
    producer = Producer(
        {"bootstrap.servers": server.address, "linger.ms": 5, "queue.buffering.max.messages": 1_000_000}
    )
    for i in range(EVENTS):
        event = Placed(f"o-{i}", f"c-{i % 1000}", i, "")
        encoded = encode(event, "bench", Cause("c", None))
        producer.produce(TOPIC.name, encoded.value, event.order_id.encode(), headers=encoded.headers)
    producer.flush(60)


def bare_loop(server: Headwater, group: str) -> float:
    """confluent-kafka, consume(500), msgspec, a coroutine awaited per event, offsets committed per second."""
    decoder = msgspec.json.Decoder()
    consumer = Consumer(
        {"bootstrap.servers": server.address, "group.id": group, "auto.offset.reset": "earliest",
         "fetch.queue.backoff.ms": 5, "enable.auto.offset.store": False}
    )  # fmt: skip
    consumer.subscribe([TOPIC.name])

    async def handle(event: object) -> None: ...

    async def run() -> float:
        count, started = 0, 0.0
        while count < EVENTS:
            messages = consumer.consume(500, 0.1)
            if messages and not started:
                started = time.perf_counter()
            for message in messages:
                await handle(decoder.decode(message.value() or b""))
            for message in messages[-1:]:
                consumer.store_offsets(message)
            count += len(messages)
        return EVENTS / (time.perf_counter() - started)

    rate = asyncio.run(run())
    consumer.close()
    return rate


def through_app(server: Headwater, group: str, kind: str) -> float:
    app = App(group, settings=Settings(server.address))
    count = 0
    first = [0.0]
    done = threading.Event()

    def counted() -> None:
        nonlocal count
        if not count:
            first[0] = time.perf_counter()
        count += 1
        if count == EVENTS:
            done.set()

    if kind == "async":

        @app.handler(TOPIC, group=group)
        async def handle(event: Placed) -> None:
            counted()
    else:

        @app.handler(TOPIC, group=group)
        def handle_sync(event: Placed) -> None:
            counted()

    async def run() -> float:
        stop = asyncio.Event()
        task = asyncio.create_task(app.run(stop))
        while not done.is_set():
            await asyncio.sleep(0.005)
        seconds = time.perf_counter() - first[0]
        stop.set()
        await task
        return EVENTS / seconds

    return asyncio.run(run())


FIRST_EVENT = """
import asyncio, json, sys, time
started = time.perf_counter()
from headwater import App, Event, Settings, Topic

class Placed(Event):
    order_id: str
    customer_id: str
    amount_cents: int
    note: str

topic = Topic("events", key="order_id", events=[Placed], partitions=6)
app = App("first", settings=Settings(sys.argv[1]))

async def main():
    stop = asyncio.Event()

    @app.handler(topic, group=sys.argv[2])
    async def handle(event: Placed) -> None:
        if not stop.is_set():
            print(json.dumps(time.perf_counter() - started), flush=True)
            stop.set()

    await app.run(stop)

asyncio.run(main())
"""


def start_to_first_event(server: Headwater, group: str) -> float:
    command = [sys.executable, "-c", FIRST_EVENT, server.address, group]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)) * 1000


def run() -> None:
    table = Table("An application beside a bare confluent-kafka loop", ("bare loop", "app async", "app sync"))
    server = Headwater("headwater", NO_SYNC)
    try:
        fill(server)
        values: dict[str, list[float]] = {"bare loop": [], "app async": [], "app sync": []}
        for i in range(ROUNDS):
            values["bare loop"].append(bare_loop(server, f"bare-{i}"))
            values["app async"].append(through_app(server, f"async-{i}", "async"))
            values["app sync"].append(through_app(server, f"sync-{i}", "sync"))
            print("  " + ", ".join(f"{k} {statistics.median(v):,.0f}" for k, v in values.items()), flush=True)
        table.add("handler that does nothing", "events/s", values, "120,000 async")
        firsts = [start_to_first_event(server, f"first-{i}") for i in range(ROUNDS)]
        table.add("process start to first event", "ms", {"app async": firsts}, "400")
    finally:
        server.stop()
    table.print()
