"""`python -m examples.shop.feed`: CDNOW's customers, buying again.

Purchases go to the order service ordered by date, then row; the purchases of a day are spread evenly over it, and time
runs faster by `--speed-up`. A request that fails is sent again: the order id makes it the same order.
"""

import argparse
import asyncio
import time
from collections.abc import Iterator
from datetime import date
from itertools import groupby

import httpx

from examples.shop.domain import Purchase, purchases

AT_ONCE = 16
TRIES = 1200  # ten minutes: the order service may be stopped for a while
PAUSE_SECONDS = 0.5
DAY_SECONDS = 86_400


def schedule(rows: Iterator[Purchase], speed_up: float) -> Iterator[tuple[float, Purchase]]:
    """(seconds after the start, purchase); all at once for a speed-up of 0."""
    first: date | None = None
    for day, bought in groupby(rows, key=lambda purchase: purchase.day):
        first = first or day
        group = list(bought)
        for place, purchase in enumerate(group):
            seconds = (day - first).days * DAY_SECONDS + place * DAY_SECONDS / len(group)
            yield (seconds / speed_up if speed_up else 0.0), purchase


def body(purchase: Purchase, payment_token: str = "card") -> dict[str, object]:
    return {
        "orderId": purchase.order_id,
        "customerId": purchase.customer_id,
        "orderedOn": purchase.day.isoformat(),
        "lines": [{"sku": purchase.sku, "quantity": purchase.cds, "amountCents": purchase.amount_cents}],
        "paymentToken": payment_token,
    }


async def feed(url: str, limit: int | None, speed_up: float) -> int:
    """Place the orders; how many were accepted."""
    started = time.monotonic()
    accepted = 0
    room = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=30, limits=httpx.Limits(max_connections=AT_ONCE)) as client:

        async def place(purchase: Purchase) -> None:
            nonlocal accepted
            try:
                for _ in range(TRIES):
                    try:
                        response = await client.post("/orders", json=body(purchase))
                    except httpx.TransportError:
                        await asyncio.sleep(PAUSE_SECONDS)
                        continue
                    if response.status_code < 500:
                        accepted += response.status_code == 202
                        return
                    await asyncio.sleep(PAUSE_SECONDS)
                raise RuntimeError(f"{purchase.order_id} was not answered in {TRIES} tries")
            finally:
                room.release()

        async with asyncio.TaskGroup() as tasks:
            for seconds, purchase in schedule(purchases(limit), speed_up):
                await asyncio.sleep(max(0.0, started + seconds - time.monotonic()))
                await room.acquire()
                tasks.create_task(place(purchase))
    return accepted


def main() -> None:
    parser = argparse.ArgumentParser(description="Feed the shop with CDNOW's purchases.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--limit", type=int, help="only the first so many purchases")
    parser.add_argument("--speed-up", type=float, default=7_200, help="seconds of 1997 per second; 0: no waiting")
    options = parser.parse_args()
    print(f"accepted {asyncio.run(feed(options.url, options.limit, options.speed_up))} orders")


if __name__ == "__main__":
    main()
