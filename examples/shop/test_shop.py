"""The shop end to end: its own processes, real purchases, on the embedded broker and on Apache Kafka."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest
from confluent_kafka import Producer
from sqlalchemy import create_engine, text
from tests.conftest import Engine, Evidence
from tests.kit.clients import wait_until
from tests.kit.kafka import make_archive

from examples.run import APPS, Run, any_port, free_port
from examples.shop import analytics as analytics_service
from examples.shop import inventory as inventory_service
from examples.shop import notifications as notification_service
from examples.shop import warehouse as warehouse_service
from examples.shop.domain import (
    AUDIT,
    CATALOGUE,
    OrderCreated,
    StockReserved,
    cancellations,
    catalog,
    inventory,
    notifications,
    orders,
    payments,
    purchases,
    reserved,
    reviews,
    shipping,
    users,
)
from examples.shop.feed import body, feed
from examples.shop.table import SERVICES, collect
from headwater import App, Database, Envelope, Settings, Topic
from headwater.event.codec import Decoder, Unknown, encode
from headwater.event.data_format import WriterSchema, data_format
from headwater.event.envelope import Cause
from headwater.kafka.admin import KafkaAdmin
from headwater.kafka.reader import place_of, read_all
from headwater.operations.lag import partition_rows
from headwater.schema.schema import SchemaType

PURCHASES = 69_659
TOTAL_CENTS = 250_031_563
ENGINES = ("embedded", "kafka")


@pytest.fixture(params=ENGINES)
def shop(request: pytest.FixtureRequest) -> Iterator[Run]:
    if request.param == "kafka":
        make_archive()
    run = Run("shop", request.param, port=any_port)
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
        table, group, _ = SERVICES[row["service"]]
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


@pytest.fixture(scope="module", params=ENGINES)
def busy(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Fraud takes 50 ms, payment 200; there is little stock; carts are abandoned soon."""
    if request.param == "kafka":
        make_archive()
    settings = {
        "SHOP_FRAUD_MS": "50", "SHOP_PAYMENT_MS": "200", "SHOP_STOCK_PER_SKU": "2", "SHOP_CART_IDLE": "4s",
        "SHOP_DISPATCHED_AFTER": "200ms", "SHOP_DELIVERED_AFTER": "400ms",
        "HEADWATER_KAFKA_SESSION_TIMEOUT_MS": "6000",  # one that is killed is missed soon
    }  # fmt: skip
    run = Run("shop", request.param, settings, port=any_port)
    run.wait_ready()
    yield run
    assert run.stop() == 0


def order_of(order_id: str, *skus: str, **changes: object) -> dict[str, object]:
    lines = [{"sku": sku, "quantity": 1, "amountCents": 1000} for sku in skus or (f"sku-{order_id}",)]
    return {**body(next(purchases(1))), "orderId": order_id, "customerId": f"c-{order_id}", "lines": lines, **changes}


def place(url: str, order_id: str, *skus: str, **changes: object) -> httpx.Response:
    return httpx.post(f"{url}/orders", json=order_of(order_id, *skus, **changes), timeout=30)


def status_of(run: Run, order_id: str) -> str:
    return str(httpx.get(f"{run.url}/orders/{order_id}").json()["status"])


def wait_status(run: Run, order_id: str, status: str) -> None:
    wait_until(lambda: status_of(run, order_id) == status, f"{order_id} to be {status}", 60)


def told(run: Run, topic: Topic) -> list[Envelope]:
    """All events of a topic, in the order of their partitions."""
    settings, decoder = Settings(run.servers), Decoder(topic.events)
    return [decoder.decode(record.value() or b"") for record in read_all(settings, KafkaAdmin(settings), [topic.name])]


def of_order(run: Run, topic: Topic, order_id: str) -> list[str]:
    """The kinds of events of an order."""
    return [each.event_type for each in told(run, topic) if getattr(each.data, "order_id", None) == order_id]


def rows_of(run: Run, service: str, where: str = "1=1") -> int:
    with create_engine(f"sqlite:///{run.data / service}.db").connect() as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM {SERVICES[service][0]} WHERE {where}")).scalar_one())


@pytest.mark.server
def test_fraud_and_declined_payments_save_and_publish_nothing(busy: Run) -> None:
    """S003-1.3: 402 with the reason, no row, no event. (both engines)"""
    before = rows_of(busy, "orders")

    fraud = place(busy.url, "x-1", customerId="fraud-7")
    declined = place(busy.url, "x-2", paymentToken="declined")

    assert (fraud.status_code, fraud.json()) == (402, {"rejected": "Fraud risk detected"})
    assert (declined.status_code, declined.json()) == (402, {"rejected": "Insufficient funds"})
    assert rows_of(busy, "orders") == before
    assert [each for each in told(busy, orders) if each.data.order_id in ("x-1", "x-2")] == []


@pytest.mark.server
def test_an_accepted_order_says_where_it_is(busy: Run) -> None:
    """S003-1.4: 202 with `/orders/{id}`, which answers; the same order again is the same order. (both engines)"""
    answers = [place(busy.url, "y-1") for _ in range(2)]

    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].headers["location"] == "/orders/y-1"
    assert httpx.get(f"{busy.url}/orders/y-1").json()["orderId"] == "y-1"
    assert rows_of(busy, "orders", "order_id = 'y-1'") == 1
    assert httpx.get(f"{busy.url}/orders/none").status_code == 404
    for bad in (b"{", json.dumps(order_of("y-2", lines=[])).encode()):
        assert httpx.post(f"{busy.url}/orders", content=bad).status_code == 422


@pytest.mark.server
def test_the_answer_waits_for_fraud_and_payment_only(busy: Run) -> None:
    """S003-1.5: with all consumers stopped an order is answered after fraud and payment; nobody waits for a consumer. (both
    engines)"""
    others = [name for name in APPS["shop"] if name != "orders"]
    busy.control("stop", *others)
    seconds = []
    for number in range(20):
        started = time.perf_counter()
        assert place(busy.url, f"z-{number}").status_code == 202
        seconds.append(time.perf_counter() - started)
    busy.control("start", *others)
    busy.wait_ready()

    assert min(seconds) >= 0.25
    print(f"\nPOST /orders with fraud 50 ms and payment 200 ms: slowest of 20 {sorted(seconds)[-1] * 1000:.0f} ms")


def test_the_catalogue_has_exactly_the_seeds_events() -> None:
    """S001.1: 25 kinds of events, each with a schema, each read back as it was written."""
    names = {cls.__name__ for topic in CATALOGUE for cls in topic.events}
    assert names == {
        "UserRegistered",
        "UserUpdated",
        "UserDeactivated",
        "ProductCreated",
        "ProductUpdated",
        "ProductDiscontinued",
        "InventoryAdjusted",
        "InventoryReserved",
        "InventoryReleased",
        "CartCreated",
        "CartUpdated",
        "CartAbandoned",
        "OrderCreated",
        "OrderConfirmed",
        "OrderCancelled",
        "OrderShipped",
        "PaymentInitiated",
        "PaymentProcessed",
        "PaymentFailed",
        "PaymentRefunded",
        "ShippingCreated",
        "ShippingDispatched",
        "ShippingDelivered",
        "NotificationSent",
        "NotificationFailed",
    }
    assert len(names) == 25
    for topic in CATALOGUE:
        for cls in topic.events:
            for kind in SchemaType:
                form = data_format(kind)
                event: Any = msgspec.json.decode(json.dumps(example_of(cls)), type=cls)
                schema = WriterSchema(form.schema_of(cls), kind)
                assert form.reader(cls, schema)(form.writer(cls)(event)) == event
            encoded = encode(event, "test", Cause("c", None))
            assert Decoder([cls]).decode(encoded.value or b"").data == event


def example_of(cls: type) -> dict[str, object]:
    """Its JSON."""
    values: dict[str, object] = {"int": 7, "str": "text", "bool": True, "date": "2026-01-31"}
    line = {"sku": "cd-1", "quantity": 1, "amountCents": 1199}
    found = {}
    for each in msgspec.structs.fields(cls):
        name = getattr(each.type, "__name__", "")
        found[each.encode_name] = [line] if name == "list" or "list" in str(each.type) else values.get(name, "text")
    return found


@pytest.mark.server
def test_topics_are_those_of_the_seed(busy: Run) -> None:
    """S001.4: eight topics with 84 partitions and their retention. (both engines)"""
    admin = KafkaAdmin(Settings(busy.servers))
    day = 86_400_000
    wanted = {
        users.name: (12, 30), catalog.name: (8, 90), inventory.name: (16, 7), orders.name: (20, 365),
        payments.name: (12, 7 * 365), shipping.name: (8, 365), notifications.name: (4, 30), AUDIT: (4, 7 * 365),
    }  # fmt: skip
    counts = admin.partition_counts()
    found = {name: (counts[name], int(admin.topic_configs(name)["retention.ms"].value or 0) // day) for name in wanted}
    assert found == wanted
    assert sum(partitions for partitions, _ in found.values()) == 84


@pytest.mark.server
def test_one_order_is_one_story_of_seven_services(busy: Run) -> None:
    """S001.3: its events come of all seven services, have one correlation id, and each was caused by another one, or by the
    request: a tree. (both engines)"""
    sku = "sku-story"
    httpx.put(f"{busy.urls['catalog']}/products/{sku}", json={"title": "The last one", "priceCents": 1000})
    httpx.post(f"{busy.urls['inventory']}/stock/{sku}", json={"change": -1})
    line = {"sku": sku, "quantity": 1, "amountCents": 1000}
    httpx.put(f"{busy.urls['carts']}/carts/cart-story", json={"userId": "c-story", "lines": [line]})
    answer = httpx.post(
        f"{busy.url}/orders", json=order_of("story", sku, customerId="c-story", cartId="cart-story"),
        headers={"X-Correlation-ID": "story-42"}, timeout=30,
    )  # fmt: skip
    assert (answer.status_code, answer.headers["x-correlation-id"]) == (202, "story-42")

    def story() -> list[Envelope]:
        return [
            each for topic in (*CATALOGUE, reserved) for each in told(busy, topic) if each.correlation_id == "story-42"
        ]

    wanted = {"user-service", "catalog-service", "inventory-service", "cart-service", "order-service", "payment-service",
              "shipping-service"}  # fmt: skip
    wait_until(lambda: {each.source for each in story()} >= wanted, "all seven services", 60)
    wait_until(lambda: "ShippingDelivered" in {each.event_type for each in story()}, "its delivery", 60)
    events = {each.event_id: each for each in story()}
    roots = {each.causation_id for each in events.values() if each.causation_id not in events}
    assert len(roots) == 1, "the request"
    for each in events.values():
        seen = set()
        while each.causation_id in events:
            assert each.event_id not in seen
            seen.add(each.event_id)
            each = events[each.causation_id]
        assert each.event_type == "OrderCreated"


@pytest.mark.server
def test_the_last_one_sold_is_unavailable_until_there_are_more(busy: Run) -> None:
    """S001.6: the catalogue follows the stock. (both engines)"""
    sku = "sku-last"
    url = f"{busy.urls['catalog']}/products/{sku}"
    assert httpx.put(url, json={"title": "Rare", "priceCents": 1000}).status_code == 201
    assert httpx.get(url).json()["isAvailable"]
    for number in range(2):
        place(busy.url, f"last-{number}", sku)
    wait_until(lambda: not httpx.get(url).json()["isAvailable"], "it to be sold out", 60)
    assert httpx.post(f"{busy.urls['inventory']}/stock/{sku}", json={"change": 5}).json()["available"] == 5
    wait_until(lambda: httpx.get(url).json()["isAvailable"], "it to be there again", 60)
    assert httpx.delete(url).status_code == 204
    assert httpx.get(url).status_code == 404


@pytest.mark.server
def test_a_new_name_is_in_the_history_and_told_once(busy: Run) -> None:
    """S001.7: `UserUpdated` changes the name in the history of orders, and one notice goes out. (both engines)"""
    url = f"{busy.urls['users']}/users/c-name-1"
    for number in (1, 2):
        place(busy.url, f"name-{number}", customerId="c-name-1")

    def names() -> list[str]:
        return [each["customerName"] for each in httpx.get(f"{busy.urls['history']}/customers/c-name-1/orders").json()]

    wait_until(lambda: names() == ["Customer c-name-1"] * 2, "the history", 60)
    for _ in range(2):  # the same name again is no change
        assert httpx.put(url, json={"name": "Ada", "email": "ada@example.com"}).status_code == 200
    wait_until(lambda: names() == ["Ada"] * 2, "the new name", 60)

    def notices() -> list[str]:
        return [each.data.subject for each in told(busy, notifications) if each.data.customer_id == "c-name-1"]

    wait_until(lambda: "profile changed" in notices(), "the notice", 60)
    assert notices().count("profile changed") == 1
    assert httpx.delete(url).status_code == 204


@pytest.mark.server
def test_a_paid_order_is_shipped_and_delivered(busy: Run) -> None:
    """S001.8: `PaymentProcessed` leads to created, dispatched, delivered, in this order. (both engines)"""
    place(busy.url, "paid-1")
    wait_status(busy, "paid-1", "shipped")
    wait_until(lambda: len(of_order(busy, shipping, "paid-1")) == 3, "its delivery", 60)
    assert of_order(busy, shipping, "paid-1") == ["ShippingCreated", "ShippingDispatched", "ShippingDelivered"]
    assert of_order(busy, payments, "paid-1") == ["PaymentInitiated", "PaymentProcessed"]
    assert of_order(busy, orders, "paid-1") == ["OrderCreated", "OrderConfirmed", "OrderShipped"]


def available(run: Run, sku: str) -> int:
    return int(httpx.get(f"{run.urls['inventory']}/stock/{sku}").json()["available"])


@pytest.mark.server
def test_a_payment_that_fails_gives_the_stock_back(busy: Run) -> None:
    """S001.9: one `InventoryReleased`, one `OrderCancelled`, the stock as before, and nothing to refund; kill -9 of the
    services between. (both engines)"""
    place(busy.url, "unpaid-1", "sku-unpaid", paymentToken="expires")
    for name in ("payments", "inventory", "orders"):
        kill_service(busy, name)
    wait_status(busy, "unpaid-1", "cancelled")
    wait_until(lambda: available(busy, "sku-unpaid") == 2, "the stock", 60)
    assert httpx.get(f"{busy.url}/orders/unpaid-1").json()["reason"] == "PAYMENT_FAILED"
    wait_until(lambda: "InventoryReleased" in of_order(busy, inventory, "unpaid-1"), "the release", 60)
    assert of_order(busy, inventory, "unpaid-1") == ["InventoryReserved", "InventoryReleased"]
    assert of_order(busy, orders, "unpaid-1") == ["OrderCreated", "OrderCancelled"]
    assert of_order(busy, payments, "unpaid-1") == ["PaymentInitiated", "PaymentFailed"]


def kill_service(run: Run, name: str) -> None:
    """-9; the supervisor has started it again."""
    before = run.pids()[name]
    assert before is not None
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: run.pids()[name] not in (None, before), f"{name} to be started again")
    run.wait_ready()


@pytest.mark.server
def test_what_is_not_in_stock_is_cancelled_and_refunded_once(busy: Run) -> None:
    """S003-1.9, S003-1.10, S003-1.11: three lines, of the third there is none: the command has the seed's fields, what was
    reserved before is there again, one refund; all in stock: `inventory-reserved`, once. kill -9 between. (both engines)"""
    httpx.post(f"{busy.urls['inventory']}/stock/sku-none", json={"change": -2})
    before = httpx.get(f"{busy.urls['payment-gateway']}/ledger").json()["done"].get("refund", 0)
    place(busy.url, "short-1", "sku-a", "sku-b", "sku-none")
    place(busy.url, "whole-1", "sku-a", "sku-b")
    for name in ("inventory", "payments"):
        kill_service(busy, name)
    wait_status(busy, "short-1", "cancelled")
    wait_status(busy, "whole-1", "shipped")

    commands = [each.data for each in told(busy, cancellations) if each.data.order_id == "short-1"]
    assert [msgspec.to_builtins(each) for each in commands] == [
        {"orderId": "short-1", "reason": "INVENTORY_UNAVAILABLE", "failedSku": "sku-none",
         "triggeredBy": "inventory-reservation-service"}
    ]  # fmt: skip
    assert (available(busy, "sku-a"), available(busy, "sku-b"), available(busy, "sku-none")) == (1, 1, 0)
    wait_until(lambda: of_order(busy, payments, "short-1") == ["PaymentRefunded"], "the refund", 60)
    assert httpx.get(f"{busy.urls['payment-gateway']}/ledger").json()["done"]["refund"] == before + 1
    assert of_order(busy, reserved, "whole-1") == ["StockReserved"]
    assert of_order(busy, reserved, "short-1") == []


@pytest.mark.server
def test_a_cart_that_is_left_alone_is_abandoned_once(busy: Run) -> None:
    """S001.10: across a restart of its service exactly one `CartAbandoned`; none of a cart that is ordered. (both engines)"""
    url = busy.urls["carts"]
    line = {"sku": "sku-cart", "quantity": 1, "amountCents": 1000}
    for cart in ("left", "bought"):
        assert httpx.put(f"{url}/carts/{cart}", json={"userId": f"u-{cart}", "lines": [line]}).status_code == 201
    place(busy.url, "cart-1", "sku-cart", cartId="bought")
    busy.control("stop", "carts")
    busy.control("start", "carts")
    busy.wait_ready()

    def abandoned() -> list[str]:
        return [each.data.cart_id for each in told(busy, users) if each.event_type == "CartAbandoned"]

    wait_until(lambda: "left" in abandoned(), "the cart to be abandoned", 60)
    wait_until(lambda: httpx.get(f"{url}/carts/bought").status_code == 404, "the checkout", 60)
    assert [cart for cart in abandoned() if cart in ("left", "bought")] == ["left"]
    assert httpx.get(f"{url}/carts/left").json()["userId"] == "u-left"


@pytest.mark.server
def test_three_failed_payments_of_a_customer_are_one_signal(busy: Run) -> None:
    """S001.22: within ten minutes. (both engines)"""
    for number in range(4):
        place(busy.url, f"sus-{number}", customerId="c-sus", paymentToken="expires")
    for number in range(4):
        wait_status(busy, f"sus-{number}", "cancelled")

    def signals() -> list[str]:
        return [each.data.customer_id for each in told(busy, reviews)]

    wait_until(lambda: "c-sus" in signals(), "the signal", 60)
    assert signals().count("c-sus") == 1


@pytest.mark.server
def test_reading_works_with_the_broker_away(tmp_path: Path) -> None:
    """S001.15: `GET /orders/{id}` and `/health` answer, `/ready` says what is missing; back again, it is ready."""
    run = Run("shop", "embedded", port=any_port)
    run.wait_ready()
    try:
        assert place(run.url, "away-1").status_code == 202
        assert httpx.get(f"{run.url}/ready").json() == {"kafka": "ok", "database": "ok"}
        run.control("stop", "broker")
        assert httpx.get(f"{run.url}/orders/away-1").json()["orderId"] == "away-1"
        assert httpx.get(f"{run.url}/health").status_code == 200
        wait_until(lambda: httpx.get(f"{run.url}/ready", timeout=30).status_code == 503, "it not to be ready")
        assert place(run.url, "away-2").status_code == 202, "an order is accepted: its event waits in the outbox"
        run.control("start", "broker")
        wait_until(lambda: httpx.get(f"{run.url}/ready", timeout=30).status_code == 200, "it to be ready", 60)
        wait_until(lambda: status_of(run, "away-2") == "shipped", "the order to be shipped", 90)
    finally:
        assert run.stop() == 0


@pytest.mark.server
def test_any_service_may_be_away(busy: Run) -> None:
    """S001.11: orders are accepted while one of the seven is stopped, and all is done once it is back. (both engines)"""
    for name in ("users", "catalog", "carts", "inventory", "payments", "shipping"):
        busy.control("stop", name)
        assert place(busy.url, f"without-{name}").status_code == 202
        busy.control("start", name)
    for name in ("users", "catalog", "carts", "inventory", "payments", "shipping"):
        wait_status(busy, f"without-{name}", "shipped")


@pytest.mark.server
def test_the_audit_has_every_event_once(busy: Run) -> None:
    """S001.14: every event of every topic, exactly one record, and the verifier finds nothing. (both engines)"""
    place(busy.url, "audited-1")
    wait_status(busy, "audited-1", "shipped")
    wait_until(lambda: len(of_order(busy, shipping, "audited-1")) == 3, "its delivery", 60)
    of = [argument for topic in (*CATALOGUE, reserved, cancellations, reviews) for argument in ("--of", topic.name)]

    def verify() -> tuple[int, dict[str, Any]]:
        command = [sys.executable, "-m", "headwater", "audit", "verify", AUDIT, *of, "--json"]
        done = subprocess.run(
            [*command, "--bootstrap-servers", busy.servers], capture_output=True, text=True, check=False
        )
        return done.returncode, json.loads(done.stdout)

    wait_until(lambda: verify()[0] == 0, "the audit to have all", 60)
    _, found = verify()
    assert found["records"] - found["spare"] == found["events"] > 100


@pytest.mark.server
def test_events_that_come_twice_change_nothing(busy: Run) -> None:
    """S001.25: every record of every topic is produced once more, shuffled over the keys: rows and events of the orders stay as
    they are. (both engines)"""
    placed = [f"twice-{number}" for number in range(5)]
    for order_id in placed:
        place(busy.url, order_id)
    for order_id in placed:
        wait_status(busy, order_id, "shipped")
    wait_until(lambda: all(len(of_order(busy, shipping, each)) == 3 for each in placed), "their deliveries", 60)
    topics = (*CATALOGUE, reserved, cancellations, reviews)
    before = {topic.name: len(told(busy, topic)) for topic in topics}
    counts = {name: rows_of(busy, name) for name in SERVICES}
    stock = {sku: available(busy, sku) for sku in (f"sku-{order_id}" for order_id in placed)}
    producer = Producer({"bootstrap.servers": busy.servers})
    settings = Settings(busy.servers)
    copied = 0
    for record in read_all(settings, KafkaAdmin(settings), [topic.name for topic in topics]):
        name, partition = place_of(record)
        producer.produce(name, record.value(), record.key(), partition, headers=record.headers())
        copied += 1
    assert copied >= sum(before.values())
    assert producer.flush(30) == 0
    place(busy.url, "twice-last")
    wait_status(busy, "twice-last", "shipped")
    groups = {group: topic for _, group, topic in SERVICES.values() if group and topic}
    admin = KafkaAdmin(Settings(busy.servers))
    for group in groups:
        wait_until(lambda group=group: not sum(e.lag or 0 for e in partition_rows(admin, group)), group, 60)  # type: ignore[misc]
    assert {name: rows_of(busy, name) for name in SERVICES} == {name: count + 1 for name, count in counts.items()}
    assert {sku: available(busy, sku) for sku in stock} == stock
    for order_id in placed:  # what was there, and its copy
        assert sorted(of_order(busy, shipping, order_id)) == sorted(
            ["ShippingCreated", "ShippingDispatched", "ShippingDelivered"] * 2
        )


KILLED = """
    import asyncio, os, signal, sys, threading
    import httpx
    from sqlalchemy import Engine, event, text
    from examples.shop import orders
    from examples.shop.domain import purchases
    from examples.shop.feed import body

    name, whose, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
    is_committed = threading.Event()
    is_answered = threading.Event()
    seen = 0

    def point(*_):
        global seen
        is_relay = threading.current_thread().name.startswith("relay")
        if is_relay != (whose == "relay"):
            return
        if not is_committed.is_set() if is_relay else is_answered.is_set():
            return  # nothing of ours is in flight
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

    async def main():
        async with orders.app.lifespan():
            for what in ("begin", "before_cursor_execute", "after_cursor_execute", "commit"):
                event.listen(Engine, what, point)
            transport = httpx.ASGITransport(orders.web)
            async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
                some = [{**body(next(purchases(1))), "orderId": f"{name}-{i}"} for i in range(3)]
                first = await client.post("/orders", json=some[0])
                is_committed.set()
                await asyncio.gather(*(client.post("/orders", json=each) for each in some[1:]))
            is_answered.set()
            engine = orders.app.database.engine
            while True:
                with engine.connect() as connection:
                    if connection.execute(text("SELECT count(*) FROM headwater_outbox")).scalar_one() == 0:
                        break
                await asyncio.sleep(0.02)

    asyncio.run(main())
"""


MOST_POINTS = 100


class Killed(NamedTuple):
    kills: int
    points: int
    orders: int


def kill_everywhere(engine: Engine, url: str, folder: Path, name: str, whose: str, rounds: int) -> Killed:
    """Kill -9 before and after every statement, as often as that, with three orders in flight: in the end each order that is
    saved is published, and no other."""
    script = folder / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    environment = {
        **os.environ, "HEADWATER_BOOTSTRAP_SERVERS": engine.bootstrap_servers, "HEADWATER_DATABASE_URL": url,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip

    def run(order: str, at: int) -> int:
        command = [sys.executable, str(script), order, whose, str(at)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    kills = points = 0
    for round_ in range(rounds):
        for at in range(1, MOST_POINTS):
            if run(f"{name}-{round_}-{at}", at) == 0:
                break
            kills += 1
            points = max(points, at)
        else:
            raise AssertionError(f"after {MOST_POINTS} points it still has some")
    assert run(f"{name}-last", 0) == 0  # it publishes what was committed and not sent
    database = create_engine(Database(url).engine.url)
    with database.connect() as connection:
        saved = {row.order_id for row in connection.execute(text("SELECT order_id FROM orders"))}
    database.dispose()
    settings = Settings(engine.bootstrap_servers)
    decoder = Decoder([OrderCreated])
    published = set()
    for record in read_all(settings, KafkaAdmin(settings), [orders.name]):
        with contextlib.suppress(Unknown):
            published.add(decoder.decode(record.value() or b"").data.order_id)
    assert {order_id for order_id in published if order_id.startswith(name)} == saved
    return Killed(kills, points, len(saved))


@pytest.mark.server
@pytest.mark.parametrize(
    ("database_url", "whose"), [("sqlite", "service"), ("postgresql", "relay")], indirect=["database_url"]
)
def test_an_order_exists_if_and_only_if_its_event_is_published(
    embedded: Engine, database_url: str, tmp_path: Path, unique: str, whose: str
) -> None:
    """S003-1.4, S003-10.2: kill -9 before and after every statement of the order service, and of its relay."""
    found = kill_everywhere(embedded, database_url, tmp_path, unique, whose, 1)
    assert found.points >= (8 if whose == "service" else 4), "every statement was a point to die at"


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("whose", ["service", "relay"])
def test_ten_kills_at_every_statement(
    engine: Engine, database_url: str, tmp_path: Path, unique: str, whose: str, evidence: Evidence
) -> None:
    """S003-1.4: ten of each, with orders in flight. (both engines, both databases)"""
    found = kill_everywhere(engine, database_url, tmp_path, unique, whose, 10)
    evidence.write("order-kill-9", {"engine": engine.name, "database": database_url.partition(":")[0], "of": whose,
                                    "statements": found.points, "kills": found.kills, "orders": found.orders,
                                    "saved, not published": 0, "published, not saved": 0})  # fmt: skip


CHARGING = """
    import os, signal
    from headwater.runtime import lifecycle
    from examples._outside.payment import gateway
    from examples.shop.payments import app

    ask = gateway.capture

    async def capture(*arguments):
        await ask(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    if "DIES" in os.environ:
        gateway.capture = capture
    lifecycle.run(app)
"""


@pytest.mark.server
def test_a_kill_between_charge_and_commit_charges_once(embedded: Engine, tmp_path: Path) -> None:
    """S003-10.6: the gateway sees the same key at each attempt, and charges once."""
    port = free_port(0, "the payment gateway")
    url = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ, "HEADWATER_BOOTSTRAP_SERVERS": embedded.bootstrap_servers, "SHOP_PAYMENT_URL": url,
        "HEADWATER_DATABASE_URL": f"sqlite:///{tmp_path / 'payments.db'}", "PYTHONPATH": os.pathsep.join(sys.path),
        "HEADWATER_KAFKA_GROUP_INSTANCE_ID": "charging",
    }  # fmt: skip
    script = tmp_path / "charging.py"
    script.write_text(textwrap.dedent(CHARGING))
    bank = subprocess.Popen([sys.executable, "-m", "examples._outside.payment", "--port", str(port)])
    inventory_app = App("inventory", settings=Settings(embedded.bootstrap_servers), topics=[reserved])

    async def reserve() -> None:
        async with inventory_app.lifespan():
            await inventory_app.publish(StockReserved("charge-1", "c-1", 1000, "auth-ok-1"))

    try:
        asyncio.run(reserve())
        for _ in range(3):
            dying = subprocess.Popen([sys.executable, str(script)], env={**environment, "DIES": "1"})
            assert dying.wait(60) == -signal.SIGKILL
        living = subprocess.Popen([sys.executable, str(script)], env=environment)
        run = create_engine(environment["HEADWATER_DATABASE_URL"])

        def captured() -> int:
            with run.connect() as connection:
                return int(
                    connection.execute(text("SELECT count(*) FROM payments WHERE order_id = 'charge-1'")).scalar_one()
                )

        wait_until(lambda: captured() == 1, "the payment", 60)
        ledger = httpx.get(f"{url}/ledger").json()
        assert ledger["done"]["capture"] == 1
        assert ledger["asked"]["capture"] >= 4
        living.send_signal(signal.SIGTERM)
        assert living.wait(60) == 0
    finally:
        bank.terminate()
        bank.wait(10)


def test_tiers_are_the_seeds() -> None:
    """S003-1.6, S003-1.7, S003-1.8: what the lag of each service should stay under, and where it alarms."""
    tiers = {
        handler.group: handler.options.tier
        for service in (inventory_service, warehouse_service, notification_service, analytics_service)
        for handler in service.app.handlers
    }
    found = {group: (tier.target_seconds, tier.alarm_seconds) for group, tier in tiers.items() if tier is not None}
    assert found == {
        "inventory-reservation": (30, 30), "warehouse-fulfillment": (300, 600), "customer-notifications": (120, 600),
        "analytics-pipeline": (24 * 3600, 3600),
    }  # fmt: skip


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine_name", ENGINES)
def test_fifty_thousand_orders_an_hour_and_a_burst(engine_name: str, evidence: Evidence) -> None:
    """S003-1.1, S003-1.6, S003-1.7, S003-1.8: 14 a second for ten minutes, then 140 a second for one: no tier alarms, and all
    is done soon after."""
    alerts: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            alerts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    hook = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    run = Run("shop", engine_name, {"HEADWATER_ALERT_WEBHOOK": f"http://127.0.0.1:{hook.server_port}/"}, port=any_port)
    run.wait_ready()
    try:
        placed = asyncio.run(at_rate(run.url, 14, 600, 0))
        placed += asyncio.run(at_rate(run.url, 140, 60, placed))
        ended = time.monotonic()
        wait_until(lambda: settled(run, placed), "all services", 600)
        caught_up = time.monotonic() - ended
    finally:
        assert run.stop() == 0
        hook.shutdown()
    assert [alert for alert in alerts if alert["alert"] == "tier"] == []
    evidence.write("shop-peak", {"engine": engine_name, "orders": placed, "seconds until all is done": round(caught_up),
                                 "alarms": len(alerts)})  # fmt: skip


TRIES = 5


async def at_rate(url: str, per_second: int, seconds: int, first: int) -> int:
    """Orders of CDNOW's customers, evenly, all accepted; how many."""
    rows = list(purchases(first + per_second * seconds))[first:]
    accepted = 0
    began = time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=50)) as client:

        async def one(purchase: Any) -> None:
            nonlocal accepted
            for _ in range(TRIES):
                with contextlib.suppress(httpx.TransportError):  # a connection that was just closed as idle
                    answer = await client.post("/orders", json=body(purchase))
                    assert answer.status_code == 202, answer.text
                    accepted += 1
                    return
            raise AssertionError(f"{TRIES} connections in a row failed")

        async with asyncio.TaskGroup() as tasks:
            for i, purchase in enumerate(rows):
                await asyncio.sleep(max(0.0, began + i / per_second - time.monotonic()))
                tasks.create_task(one(purchase))
    return accepted


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("engine_name", ENGINES)
def test_all_purchases_to_the_cent(engine_name: str, evidence: Evidence) -> None:
    """S003-1.2: 69,659 purchases, 2,500,315.63 in every service."""
    run = Run("shop", engine_name, port=any_port)
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
