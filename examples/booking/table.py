"""`python -m examples.booking.table`: what Redis, OpenSearch and those who send notices say, live."""

import json
import os
import time
import urllib.request
from typing import NamedTuple

import redis
from opensearchpy.exceptions import OpenSearchException
from rich.console import Console
from rich.live import Live
from rich.table import Table

from examples.booking.index import SLOTS, Index

REFRESH_SECONDS = 1.0


class Row(NamedTuple):
    what: str
    how_many: int


def collect() -> list[Row]:
    return [Row("slots taken, in Redis", taken()), Row("slots free, in OpenSearch", free()), Row("SMS sent", sent())]


def taken() -> int:
    client = redis.Redis.from_url(os.environ["BOOKING_REDIS_URL"])
    try:
        return sum(int(client.bitcount(key)) for key in client.scan_iter("taken:*", count=1000))
    finally:
        client.close()


def free() -> int:
    client = Index().client
    try:
        client.indices.refresh(index=SLOTS)
        return int(client.count(index=SLOTS, body={"query": {"term": {"free": True}}})["count"])
    except OpenSearchException:
        return 0  # nobody has a schedule yet
    finally:
        client.close()


def sent() -> int:
    with urllib.request.urlopen(f"{os.environ['BOOKING_SMS_URL']}/messages", timeout=5) as answer:
        return len(json.load(answer))


def render(rows: list[Row], before: list[Row] | None, seconds: float) -> Table:
    table = Table(title="Booking", title_justify="left", box=None, header_style="bold")
    for name in ("what", "how many", "per second"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for place, row in enumerate(rows):
        rate = (row.how_many - before[place].how_many) / seconds if before else 0.0
        table.add_row(row.what, f"{row.how_many:,}", f"{rate:+,.0f}")
    return table


def main() -> None:
    before: list[Row] | None = None
    console = Console()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            started = time.monotonic()
            rows = collect()
            live.update(render(rows, before, REFRESH_SECONDS), refresh=True)
            if not console.is_terminal:
                live.console.print(render(rows, before, REFRESH_SECONDS))
            before = rows
            time.sleep(max(0.0, REFRESH_SECONDS - (time.monotonic() - started)))


if __name__ == "__main__":
    main()
