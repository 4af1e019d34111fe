"""`POST /orders` of the shop, with fraud and payment of 0 ms, on one core: beside the same handler without Headwater.

Without it, an order is the row alone: no event, no outbox, no relay, no correlation id. Everything else is the same code,
served the same way, on PostgreSQL. The server has a core to itself, database, broker and load the other.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from tests.kit.ports import free_ports
from tests.kit.postgres import Postgres

from benchmarks.servers import Headwater
from benchmarks.table import Table

ROUNDS = 3
SECONDS = 8.0
CONNECTIONS = 16
SERVER_CORE, OTHER_CORE = {0}, {1}


class Bare:
    """As much of an App as the handler needs, without events."""

    def __init__(self, database: Any) -> None:
        self.database = database

    @asynccontextmanager
    async def unit_of_work(self, session: Any) -> AsyncIterator[Any]:
        yield self
        await session.commit()

    def publish(self, event: object) -> None: ...


def serve(kind: str, port: int) -> None:
    os.sched_setaffinity(0, SERVER_CORE)
    os.environ["SHOP_ORDERS_PORT"] = str(port)
    from examples.shop import orders

    if kind == "headwater":
        from headwater.runtime import lifecycle

        orders.app.handlers.clear()
        lifecycle.run(orders.app)
        return
    import uvicorn
    from starlette.applications import Starlette
    from starlette.routing import Route

    bare: Any = Bare(orders.app.database)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await orders.create_tables()
        orders.app = bare
        yield

    web = Starlette(routes=[Route("/orders", orders.place_order, methods=["POST"])], lifespan=lifespan)
    uvicorn.run(web, host="127.0.0.1", port=port, log_level="error", loop="uvloop")


async def load(port: int, name: str) -> float:
    """Requests a second."""
    count = 0
    deadline = time.perf_counter() + SECONDS

    async def client(number: int) -> None:
        nonlocal count
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        i = 0
        while time.perf_counter() < deadline:
            i += 1
            order = {
                "orderId": f"{name}-{number}-{i}", "customerId": f"c-{i}", "orderedOn": "2026-01-31", "paymentToken": "card",
                "lines": [{"sku": "cd-1", "quantity": 1, "amountCents": 1199}],
            }  # fmt: skip
            body = json.dumps(order).encode()
            head = f"POST /orders HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert b" 202 " in answer.split(b"\r\n", 1)[0], answer
            length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(int(length.split(b":")[1]))
            count += 1
        writer.close()

    await asyncio.gather(*(client(number) for number in range(CONNECTIONS)))
    return count / SECONDS


def measure(kind: str, url: str, servers: str, name: str) -> float:
    port = free_ports(1)[0]
    environment = {**os.environ, "HEADWATER_DATABASE_URL": url, "HEADWATER_BOOTSTRAP_SERVERS": servers,
                   "HEADWATER_KAFKA_LINGER_MS": "5"}  # fmt: skip
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS orders")
        connection.execute("DROP TABLE IF EXISTS headwater_outbox")
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.orders", kind, str(port)], env=environment)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                asyncio.run(asyncio.wait_for(_connect(port), 1))
                break
            except OSError:
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.1)
        time.sleep(1.0)
        return asyncio.run(load(port, name))
    finally:
        process.terminate()
        process.wait(60)


async def _connect(port: int) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()


def run() -> None:
    os.sched_setaffinity(0, OTHER_CORE)
    table = Table("POST /orders on one core", ("without", "headwater"))
    server = Headwater("embedded", {})
    postgres = Postgres().start()
    try:
        values: dict[str, list[float]] = {"without": [], "headwater": []}
        for round_ in range(ROUNDS):
            for kind, found in values.items():
                found.append(measure(kind, postgres.url, server.address, f"{kind}-{round_}"))
        table.add("POST /orders", "req/s", values, "0.8")
    finally:
        postgres.stop()
        server.stop()
        os.sched_setaffinity(0, SERVER_CORE | OTHER_CORE)
    table.print()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
