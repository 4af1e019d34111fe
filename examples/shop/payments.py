"""Payments: captures what was authorized once the stock is reserved, refunds what is cancelled.

Charging twice is kept off three times: the gateway knows the handler's key, `IdempotencyKey`, which every attempt has; the
order's row is there once; the event goes with the row, through the outbox. No transaction is open while the gateway is
asked.
"""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Column, Integer, MetaData, String, Table, update

from examples._outside.payment import gateway
from examples.shop.domain import (
    OrderCancelled,
    PaymentFailed,
    PaymentInitiated,
    PaymentProcessed,
    PaymentRefunded,
    ReviewCustomer,
    StockReserved,
    orders,
    payments,
    reserved,
    reviews,
)
from examples.upsert import insert_once
from headwater import App, IdempotencyKey
from headwater.stream.pattern import repeated

app = App("payment-service", topics=[payments, reviews])
metadata = MetaData()
effects = Table(
    "payments",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("customer_id", String(64), nullable=False),
    Column("amount_cents", Integer, nullable=False),
    Column("status", String(16), nullable=False),
)
SUSPICIOUS_FAILURES = 3


@app.on_start
async def create_tables() -> None:
    async with app.database.async_engine.begin() as connection:
        await connection.run_sync(metadata.create_all)


@app.handler(reserved, group="payment-capture", outside_effects=True)
async def capture(event: StockReserved, key: IdempotencyKey) -> None:
    result = await gateway.capture(event.authorization_id, event.total_cents, key)
    status = "captured" if result.is_successful else "failed"
    async with app.unit_of_work() as uow:
        if not await insert_once(
            uow.async_session, effects, order_id=event.order_id, customer_id=event.customer_id,
            amount_cents=event.total_cents, status=status,
        ):  # fmt: skip
            return
        uow.publish(PaymentInitiated(event.order_id, event.customer_id, event.total_cents))
        if result.is_successful:
            uow.publish(PaymentProcessed(event.order_id, event.customer_id, event.total_cents, result.id or ""))
        else:
            uow.publish(PaymentFailed(event.order_id, event.customer_id, result.decline_reason or ""))


@app.handler(orders, group="payment-refund", outside_effects=True)
async def refund(event: OrderCancelled, key: IdempotencyKey) -> None:
    if event.reason == "PAYMENT_FAILED":
        return  # nothing was charged
    result = await gateway.refund(event.authorization_id, event.total_cents, key)
    async with app.unit_of_work() as uow:
        session = uow.async_session
        new = await insert_once(
            session, effects, order_id=event.order_id, customer_id=event.customer_id, amount_cents=event.total_cents,
            status="refunded",
        )  # fmt: skip
        if not new:
            captured = update(effects).where(effects.c.order_id == event.order_id, effects.c.status == "captured")
            changed = await session.execute(captured.values(status="refunded").returning(effects.c.order_id))
            new = changed.first() is not None
        if new:
            uow.publish(PaymentRefunded(event.order_id, event.customer_id, event.total_cents, result.id or ""))


def suspicious(customer_id: str, times: Sequence[datetime]) -> ReviewCustomer:
    return ReviewCustomer(customer_id, len(times))


repeated(
    "suspicious-payments",
    of=PaymentFailed,
    by="customer_id",
    count=SUSPICIOUS_FAILURES,
    within="10m",
    signal=suspicious,
).join(app, topics=[payments])
