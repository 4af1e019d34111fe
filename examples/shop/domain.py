"""What the shop speaks of: its 25 kinds of events, its topics, and rows of the CDNOW file as orders.

Events have the names of the seeds' catalogue (`OrderCreated`), topics the pattern `<domain>.events.<stream>` and
`<domain>.commands.<command>`. Carts are their users' and have no topic of their own.
"""

import csv
import gzip
import zlib
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import msgspec

from headwater import Event, Topic

PURCHASES = Path(__file__).parent / "data" / "cdnow_purchases.csv.gz"
SKUS = 500


class OrderLine(msgspec.Struct, frozen=True, rename="camel"):
    sku: str
    quantity: int
    amount_cents: int


# Users and their carts


class UserRegistered(Event):
    user_id: str
    name: str
    email: str


class UserUpdated(Event):
    user_id: str
    name: str
    email: str


class UserDeactivated(Event):
    user_id: str


class CartCreated(Event):
    user_id: str
    cart_id: str


class CartUpdated(Event):
    user_id: str
    cart_id: str
    lines: list[OrderLine]


class CartAbandoned(Event):
    user_id: str
    cart_id: str


# The catalogue


class ProductCreated(Event):
    sku: str
    title: str
    price_cents: int


class ProductUpdated(Event):
    sku: str
    title: str
    price_cents: int
    is_available: bool


class ProductDiscontinued(Event):
    sku: str


# Stock: each with what is left for sale of the product


class InventoryAdjusted(Event):
    sku: str
    change: int
    available: int


class InventoryReserved(Event):
    sku: str
    order_id: str
    quantity: int
    available: int


class InventoryReleased(Event):
    sku: str
    order_id: str
    quantity: int
    available: int


# Orders


class OrderCreated(Event):
    order_id: str
    customer_id: str
    ordered_on: date
    lines: list[OrderLine]
    total_cents: int
    authorization_id: str
    cart_id: str | None = None


class OrderConfirmed(Event):
    order_id: str
    customer_id: str


class OrderCancelled(Event):
    order_id: str
    customer_id: str
    reason: str
    total_cents: int
    authorization_id: str


class OrderShipped(Event):
    order_id: str
    customer_id: str


class StockReserved(Event):
    """All lines of an order are reserved."""

    order_id: str
    customer_id: str
    total_cents: int
    authorization_id: str


class CancelOrder(Event):
    order_id: str
    reason: str
    failed_sku: str
    triggered_by: str


# Payments


class PaymentInitiated(Event):
    order_id: str
    customer_id: str
    amount_cents: int


class PaymentProcessed(Event):
    order_id: str
    customer_id: str
    amount_cents: int
    capture_id: str


class PaymentFailed(Event):
    order_id: str
    customer_id: str
    reason: str


class PaymentRefunded(Event):
    order_id: str
    customer_id: str
    amount_cents: int
    refund_id: str


class ReviewCustomer(Event):
    """Somebody should look at the payments of a customer."""

    customer_id: str
    failures: int


# Shipping and notices


class ShippingCreated(Event):
    order_id: str
    amount_cents: int


class ShippingDispatched(Event):
    order_id: str


class ShippingDelivered(Event):
    order_id: str


class NotificationSent(Event):
    customer_id: str
    subject: str


class NotificationFailed(Event):
    customer_id: str
    subject: str
    reason: str


users = Topic(
    "users.events.user-lifecycle", key="user_id", partitions=12, retention="30d",
    events=[UserRegistered, UserUpdated, UserDeactivated, CartCreated, CartUpdated, CartAbandoned],
)  # fmt: skip
catalog = Topic(
    "catalog.events.product-lifecycle", key="sku", partitions=8, retention="90d",
    events=[ProductCreated, ProductUpdated, ProductDiscontinued],
)  # fmt: skip
inventory = Topic(
    "inventory.events.stock-movement", key="sku", partitions=16, retention="7d",
    events=[InventoryAdjusted, InventoryReserved, InventoryReleased],
)  # fmt: skip
orders = Topic(
    "orders.events.order-lifecycle", key="order_id", partitions=20, retention="1y",
    events=[OrderCreated, OrderConfirmed, OrderCancelled, OrderShipped],
)  # fmt: skip
payments = Topic(
    "payments.events.payment-lifecycle", key="order_id", partitions=12, retention="7y",
    events=[PaymentInitiated, PaymentProcessed, PaymentFailed, PaymentRefunded],
)  # fmt: skip
shipping = Topic(
    "shipping.events.shipment-lifecycle", key="order_id", partitions=8, retention="1y",
    events=[ShippingCreated, ShippingDispatched, ShippingDelivered],
)  # fmt: skip
notifications = Topic(
    "notifications.events.notice-lifecycle", key="customer_id", partitions=4, retention="30d",
    events=[NotificationSent, NotificationFailed],
)  # fmt: skip

reserved = Topic("orders.events.inventory-reserved", key="order_id", partitions=4, events=[StockReserved])
cancellations = Topic("orders.commands.cancel-order", key="order_id", partitions=4, events=[CancelOrder])
reviews = Topic("payments.commands.review-customer", key="customer_id", partitions=1, events=[ReviewCustomer])

CATALOGUE = (users, catalog, inventory, orders, payments, shipping, notifications)
"""The topics of the 25 kinds of events; the eighth is their audit."""
AUDIT = "audit.events.trail"


class Purchase(NamedTuple):
    """One row of the CDNOW file."""

    row: int
    """Its number in the file, from 1: rows repeat, so the number is what makes an order of its own."""
    customer_id: str
    day: date
    cds: int
    amount_cents: int

    @property
    def order_id(self) -> str:
        return f"cdnow-{self.row:05d}"

    @property
    def sku(self) -> str:
        """The file has no products: CRC-32 of the row number chooses one of 500."""
        return f"cd-{zlib.crc32(str(self.row).encode()) % SKUS:03d}"


def purchases(limit: int | None = None) -> Iterator[Purchase]:
    """Ordered by date, then row."""
    with gzip.open(PURCHASES, "rt", newline="") as file:
        rows = [
            Purchase(
                number,
                row["customer_id"],
                date.fromisoformat(row["date"]),
                int(row["cds"]),
                round(float(row["amount_usd"]) * 100),
            )
            for number, row in enumerate(csv.DictReader(file), 1)
        ]
    rows.sort(key=lambda purchase: (purchase.day, purchase.row))
    return iter(rows if limit is None else rows[:limit])
