"""What the shop speaks of: its events and topics, and rows of the CDNOW file as orders.

Event names are those of the event catalogue (`OrderCreated`), topic names follow `<domain>.events.<stream>`.
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


class OrderCreated(Event):
    order_id: str
    customer_id: str
    ordered_on: date
    lines: list[OrderLine]
    total_cents: int
    authorization_id: str


orders = Topic("orders.events.order-lifecycle", key="order_id", events=[OrderCreated], partitions=20, retention="1y")


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
