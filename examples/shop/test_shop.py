"""The shop end to end: its own processes, real purchases, on the embedded broker and on Apache Kafka."""

import asyncio
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import create_engine, text
from tests.conftest import Engine, Evidence
from tests.kit.clients import Confluent, wait_until
from tests.kit.kafka import make_archive

from examples.run import APPS, Run
from examples.shop.domain import OrderCreated, purchases
from examples.shop.feed import body, feed
from examples.shop.table import SERVICES, collect
from headwater import Settings
from headwater.cli.groups import partition_rows
from headwater.event.codec import Decoder
from headwater.kafka.admin import KafkaAdmin

PURCHASES = 69_659
TOTAL_CENTS = 250_031_563
ENGINES = ("embedded", "kafka")


@pytest.fixture(params=ENGINES)
def shop(request: pytest.FixtureRequest) -> Iterator[Run]:
    if request.param == "kafka":
        make_archive()
    run = Run("shop", request.param)
    run.wait_ready()
    yield run
    assert run.stop() == 0


def settled(run: Run, orders: int) -> bool:
    return all(row.orders == orders and not row.lag for row in collect(run.data, run.servers))


@pytest.mark.server
def test_every_service_has_every_purchase_once(shop: Run) -> None:
    """S003-1.2: after N orders each effect exists once per order, and the totals agree to the cent. (both engines)"""
    count = 400
    expected = sum(purchase.amount_cents for purchase in purchases(count))

    accepted = asyncio.run(feed(shop.url, count, 0))
    wait_until(lambda: settled(shop, count), "all services", 90)

    assert accepted == count
    rows = collect(shop.data, shop.servers)
    assert {row.service: (row.orders, row.amount_cents) for row in rows} == dict.fromkeys(SERVICES, (count, expected))


@pytest.mark.server
def test_the_table_shows_what_the_databases_and_groups_say(shop: Run) -> None:
    """The numbers on the terminal are those of the services' databases and of `groups describe`. (both engines)"""
    asyncio.run(feed(shop.url, 50, 0))
    wait_until(lambda: settled(shop, 50), "all services")

    command = [
        sys.executable,
        "-m",
        "examples.shop.table",
        "--data",
        str(shop.data),
        "--bootstrap-servers",
        shop.servers,
    ]
    shown = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)

    admin = KafkaAdmin(Settings(shop.servers))
    for row in shown:
        table, group = SERVICES[row["service"]]
        with create_engine(f"sqlite:///{shop.data / row['service']}.db").connect() as connection:
            orders, amount = connection.execute(text(f"SELECT count(*), sum(amount_cents) FROM {table}")).one()
        assert (row["orders"], row["amount_cents"]) == (orders, amount)
        if group is not None:
            assert row["lag"] == sum(each.lag or 0 for each in partition_rows(admin, group))


@pytest.mark.server
def test_a_service_that_is_stopped_fails_no_order_and_catches_up(shop: Run) -> None:
    """S000.5: orders are accepted while a service is down, and it has them all when it is back. (both engines)"""
    asyncio.run(feed(shop.url, 30, 0))
    shop.control("stop", "loyalty")
    accepted = asyncio.run(feed(shop.url, 80, 0))
    wait_until(
        lambda: {r.orders for r in collect(shop.data, shop.servers) if r.service != "loyalty"} == {80}, "the others"
    )
    behind = next(row for row in collect(shop.data, shop.servers) if row.service == "loyalty")
    assert behind.orders <= 30
    shop.control("start", "loyalty")

    wait_until(lambda: settled(shop, 80), "loyalty to catch up", 60)
    assert accepted == 80


@pytest.fixture(scope="module")
def slow_shop() -> Iterator[Run]:
    """Fraud takes 50 ms, payment 200; there is little stock."""
    run = Run("shop", "embedded", {"SHOP_FRAUD_MS": "50", "SHOP_PAYMENT_MS": "200", "SHOP_STOCK_PER_SKU": "2"})
    run.wait_ready()
    yield run
    assert run.stop() == 0


def place(url: str, **changes: object) -> httpx.Response:
    order = {**body(next(purchases(1))), **changes}
    return httpx.post(f"{url}/orders", json=order, timeout=10)


def rows_of(run: Run, service: str, where: str = "1=1") -> int:
    with create_engine(f"sqlite:///{run.data / service}.db").connect() as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM {SERVICES[service][0]} WHERE {where}")).scalar_one())


@pytest.mark.server
def test_fraud_and_declined_payments_save_and_publish_nothing(slow_shop: Run) -> None:
    """S003-1.3: 402 with the reason, no row, no event."""
    before = rows_of(slow_shop, "orders")
    admin = KafkaAdmin(Settings(slow_shop.servers))
    places = [("orders.events.order-lifecycle", index) for index in range(20)]
    ends = admin.end_offsets(places)

    fraud = place(slow_shop.url, orderId="x-1", customerId="fraud-7")
    declined = place(slow_shop.url, orderId="x-2", paymentToken="declined")

    assert (fraud.status_code, fraud.json()) == (402, {"rejected": "Fraud risk detected"})
    assert (declined.status_code, declined.json()) == (402, {"rejected": "Insufficient funds"})
    assert rows_of(slow_shop, "orders") == before
    assert admin.end_offsets(places) == ends


@pytest.mark.server
def test_an_accepted_order_says_where_it_is(slow_shop: Run) -> None:
    """S003-1.4: 202 with `/orders/{id}`, which answers; the same order again is the same order."""
    answers = [place(slow_shop.url, orderId="y-1") for _ in range(2)]

    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].headers["location"] == "/orders/y-1"
    assert httpx.get(f"{slow_shop.url}/orders/y-1").json()["orderId"] == "y-1"
    assert rows_of(slow_shop, "orders", "order_id = 'y-1'") == 1
    assert httpx.get(f"{slow_shop.url}/orders/none").status_code == 404
    assert httpx.post(f"{slow_shop.url}/orders", content=b"{").status_code == 422


@pytest.mark.server
def test_the_answer_waits_for_fraud_and_payment_only(slow_shop: Run) -> None:
    """S003-1.5: with all consumers stopped an order is answered after fraud and payment; nobody waits for a consumer."""
    for name in APPS["shop"]:
        if name != "orders":
            slow_shop.control("stop", name)
    seconds = []
    for number in range(20):
        started = time.perf_counter()
        assert place(slow_shop.url, orderId=f"z-{number}").status_code == 202
        seconds.append(time.perf_counter() - started)
    for name in APPS["shop"]:
        slow_shop.control("start", name)

    assert min(seconds) >= 0.25
    assert sorted(seconds)[-1] < 3.0
    print(f"\nPOST /orders with fraud 50 ms and payment 200 ms: slowest of 20 {sorted(seconds)[-1] * 1000:.0f} ms")


@pytest.mark.server
def test_the_correlation_id_of_a_request_reaches_every_service(slow_shop: Run) -> None:
    """A web request's X-Correlation-ID is taken, echoed, and carried by the events."""
    order = {**body(next(purchases(1))), "orderId": "corr-1"}
    answer = httpx.post(f"{slow_shop.url}/orders", json=order, headers={"X-Correlation-ID": "story-42"}, timeout=10)
    assert answer.headers["x-correlation-id"] == "story-42"

    wait_until(lambda: rows_of(slow_shop, "notifications", "correlation_id = 'story-42'") == 1, "the notice")


@pytest.mark.server
def test_a_shortage_is_noted_and_sells_nothing_twice(slow_shop: Run) -> None:
    """With two of each in stock the third order is noted as a shortage: the stock is never oversold."""
    for number in range(4):
        assert place(slow_shop.url, orderId=f"s-{number}", sku="scarce", quantity=1).status_code == 202

    wait_until(lambda: rows_of(slow_shop, "inventory", "sku = 'scarce'") == 4, "four reservations", 60)
    assert rows_of(slow_shop, "inventory", "sku = 'scarce' AND reserved = 1") == 2


KILLED = """
    import asyncio, os, signal, sys
    import httpx
    from sqlalchemy import event
    from examples.shop import orders
    from examples.shop.domain import purchases
    from examples.shop.feed import body

    order_id, at = sys.argv[1], int(sys.argv[2])
    seen = 0

    def point(*_):
        global seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

    async def main():
        async with orders.app.lifespan():
            engine = orders.app.database.async_engine.sync_engine
            for name in ("begin", "before_cursor_execute", "after_cursor_execute", "commit"):
                event.listen(engine, name, point)
            transport = httpx.ASGITransport(orders.web)
            async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
                order = {**body(next(purchases(1))), "orderId": order_id}
                response = await client.post("/orders", json=order)
            print(response.status_code, seen, flush=True)

    asyncio.run(main())
"""


@pytest.mark.server
def test_an_order_exists_if_and_only_if_its_event_is_published(embedded: Engine, tmp_path: Path, unique: str) -> None:
    """S003-1.4, S003-10.2: kill -9 before and after every statement of the order service."""
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    url = f"sqlite:///{tmp_path / 'orders.db'}"
    environment = {
        **os.environ,
        "HEADWATER_BOOTSTRAP_SERVERS": embedded.bootstrap_servers,
        "HEADWATER_DATABASE_URL": url,
        "PYTHONPATH": os.getcwd(),
    }
    killed = 0
    for at in range(1, 40):
        done = subprocess.run(
            [sys.executable, str(script), f"{unique}-{at}", str(at)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
        killed += 1
    assert killed >= 8, "every statement was a point to die at"
    # One more start, which publishes what was committed and not sent.
    subprocess.run(
        [sys.executable, str(script), f"{unique}-last", "0"], env=environment, check=True, capture_output=True
    )
    with create_engine(url).connect() as connection:
        saved = {row.order_id for row in connection.execute(text("SELECT order_id FROM orders"))}
        left = text("SELECT count(*) FROM headwater_outbox")
        wait_until(
            lambda: connection.execute(left).scalar_one() == 0 or drain(environment, script, unique), "an empty outbox"
        )

    topic = "orders.events.order-lifecycle"
    admin = KafkaAdmin(Settings(embedded.bootstrap_servers))
    count = sum(admin.end_offsets([(topic, index) for index in range(20)]).values())
    decoder = Decoder([OrderCreated])
    published = {
        decoder.decode(record.value or b"").data.order_id
        for record in Confluent().consume(embedded.bootstrap_servers, topic, count)
    }
    assert {order_id for order_id in published if order_id.startswith(unique)} == saved


def drain(environment: dict[str, str], script: Path, unique: str) -> bool:
    """Start the service once more: its relay goes on where it stopped."""
    subprocess.run(
        [sys.executable, str(script), f"{unique}-last", "0"], env=environment, check=True, capture_output=True
    )
    return False


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("engine_name", ENGINES)
def test_all_purchases_to_the_cent(engine_name: str, evidence: Evidence) -> None:
    """S003-1.2: 69,659 purchases, 2,500,315.63 in every service."""
    run = Run("shop", engine_name)
    run.wait_ready()
    started = time.monotonic()
    try:
        assert asyncio.run(feed(run.url, None, 0)) == PURCHASES
        accepted = time.monotonic() - started
        wait_until(lambda: settled(run, PURCHASES), "all services", 2400)
        rows = collect(run.data, run.servers)
    finally:
        assert run.stop() == 0
    assert {(row.orders, row.amount_cents) for row in rows} == {(PURCHASES, TOTAL_CENTS)}
    evidence.write(
        "shop-all-purchases",
        {
            "engine": engine_name,
            "orders": PURCHASES,
            "total": f"{TOTAL_CENTS / 100:.2f}",
            "seconds to accept": round(accepted),
            "seconds until settled": round(time.monotonic() - started),
        },
    )
