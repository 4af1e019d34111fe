"""`python -m examples.shop.table`: what each service has done and how far behind it is, live.

Numbers come from the services' own databases, lags from their consumer groups: nothing is reported by anybody.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from examples.shop.domain import orders, payments, reserved
from headwater import Settings, Topic
from headwater.kafka.admin import AdminError, KafkaAdmin

SERVICES = {
    # name: (table, group, the topic that it reads)
    "orders": ("orders", None, None),
    "inventory": ("reservations", "inventory-reservation", orders),
    "payments": ("payments", "payment-capture", reserved),
    "shipping": ("parcels", "shipping-fulfillment", payments),
    "warehouse": ("shipments", "warehouse-fulfillment", orders),
    "notifications": ("notices", "customer-notifications", orders),
    "loyalty": ("awards", "loyalty-points", orders),
    "analytics": ("facts", "analytics-pipeline", orders),
    "invoices": ("invoices", "invoice-generation", orders),
}
REFRESH_SECONDS = 1.0


class Row(NamedTuple):
    service: str
    orders: int
    amount_cents: int
    lag: int | None
    """Events that its group has not committed; None for the order service, which has no group."""


def collect(data: Path, servers: str) -> list[Row]:
    """One row a service, in the order of SERVICES."""
    admin = KafkaAdmin(Settings(servers))
    rows = []
    for name, (table, group, topic) in SERVICES.items():
        count, amount = _effects(data / f"{name}.db", table)
        rows.append(Row(name, count, amount, _lag(admin, group, topic) if group and topic else None))
    return rows


def _effects(path: Path, table: str) -> tuple[int, int]:
    if not path.exists():
        return 0, 0
    engine = create_engine(f"sqlite:///file:{path}?mode=ro&uri=true")
    try:
        with engine.connect() as connection:
            count, amount = connection.execute(
                text(f"SELECT count(*), coalesce(sum(amount_cents), 0) FROM {table}")
            ).one()
            return int(count), int(amount)
    except SQLAlchemyError:
        return 0, 0  # the service has not made its table yet
    finally:
        engine.dispose()


def _lag(admin: KafkaAdmin, group: str, topic: Topic) -> int:
    try:
        committed = admin.committed(group)
        places = [(topic.name, index) for index in range(topic.partitions)]
        ends = admin.end_offsets(places)
    except AdminError:
        return 0
    return sum(end - (committed[place].offset if place in committed else 0) for place, end in ends.items())


def render(rows: list[Row], before: list[Row] | None, seconds: float) -> Table:
    table = Table(
        title="The shop: purchases at CDNOW, 1997 to 1998", title_justify="left", box=None, header_style="bold"
    )
    for name in ("service", "orders", "per second", "total", "lag"):
        table.add_column(name, justify="left" if name == "service" else "right")
    for place, row in enumerate(rows):
        rate = (row.orders - before[place].orders) / seconds if before else 0.0
        lag = "" if row.lag is None else f"{row.lag:,}"
        behind = row.lag is not None and row.lag > 1000
        table.add_row(
            row.service,
            f"{row.orders:,}",
            f"{rate:,.0f}",
            f"${row.amount_cents / 100:,.2f}",
            f"[red]{lag}[/]" if behind else lag,
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="What the shop's services have done.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bootstrap-servers", required=True)
    parser.add_argument("--json", action="store_true", help="print once, for programs")
    options = parser.parse_args()
    if options.json:
        print(json.dumps([row._asdict() for row in collect(options.data, options.bootstrap_servers)]))
        return
    before: list[Row] | None = None
    console = Console()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            started = time.monotonic()
            rows = collect(options.data, options.bootstrap_servers)
            live.update(render(rows, before, REFRESH_SECONDS), refresh=True)
            if not console.is_terminal:
                live.console.print(render(rows, before, REFRESH_SECONDS))
            before = rows
            time.sleep(max(0.0, REFRESH_SECONDS - (time.monotonic() - started)))


if __name__ == "__main__":
    main()
