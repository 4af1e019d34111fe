"""The order service: `POST /orders`, with fraud and payment inline and everything else through the outbox; and what becomes
of an order.

An order and the event about it are one transaction: the order exists if and only if it is published. A request that
is sent again with the same `orderId` is the same order, charged once: the payment is known by the request's
`Idempotency-Key`, or else by the order.
"""

import asyncio
import os
from contextlib import suppress
from datetime import date
from typing import Any

import msgspec
from sqlalchemy import Column, Integer, MetaData, String, Table, Text, insert, select, update
from sqlalchemy.exc import IntegrityError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples._outside.payment import gateway
from examples.shop.domain import (
    CancelOrder,
    OrderCancelled,
    OrderConfirmed,
    OrderCreated,
    OrderLine,
    OrderShipped,
    PaymentFailed,
    PaymentProcessed,
    ShippingDispatched,
    cancellations,
    orders,
    payments,
    shipping,
)
from examples.web import serve
from headwater import App, UnitOfWork

app = App("order-service", topics=[orders])

metadata = MetaData()
order_table = Table(
    "orders",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("customer_id", String(64), nullable=False),
    Column("ordered_on", String(10), nullable=False),
    Column("lines", Text, nullable=False),
    Column("amount_cents", Integer, nullable=False),
    Column("authorization_id", String(128), nullable=False),
    Column("status", String(16), nullable=False),
    Column("reason", String(64), nullable=False),
)

FRAUD_SECONDS = float(os.environ.get("SHOP_FRAUD_MS", "0")) / 1000
FRAUDULENT = "fraud-"  # customers whose id begins so are refused


class PlaceOrder(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    order_id: str
    customer_id: str
    ordered_on: date
    lines: list[OrderLine]
    payment_token: str
    cart_id: str | None = None

    @property
    def total_cents(self) -> int:
        return sum(line.amount_cents for line in self.lines)

    @property
    def is_complete(self) -> bool:
        lines = self.lines and all(line.sku and line.quantity > 0 and line.amount_cents >= 0 for line in self.lines)
        return bool(self.order_id and self.customer_id and lines)


@app.on_start
async def create_tables() -> None:
    async with app.database.async_engine.begin() as connection:
        await connection.run_sync(metadata.create_all)


async def is_high_risk(order: PlaceOrder) -> bool:
    if FRAUD_SECONDS:
        await asyncio.sleep(FRAUD_SECONDS)
    return order.customer_id.startswith(FRAUDULENT)


async def place_order(request: Request) -> Response:
    try:
        order = msgspec.json.decode(await request.body(), type=PlaceOrder)
    except ClientDisconnect:
        return Response(status_code=400)  # nobody is there to read it
    except msgspec.MsgspecError as error:
        return JSONResponse({"rejected": f"the order can't be read: {error}"}, 422)
    if not order.is_complete:
        message = "an order has an orderId, a customerId, and lines with a sku, a quantity and an amount"
        return JSONResponse({"rejected": message}, 422)
    if await is_high_risk(order):
        return JSONResponse({"rejected": "Fraud risk detected"}, 402)
    key = request.headers.get("Idempotency-Key", order.order_id)
    payment = await gateway.authorize(order.payment_token, order.total_cents, key)
    if not payment.is_successful:
        return JSONResponse({"rejected": payment.decline_reason}, 402)
    async with app.database.async_sessions() as session:
        known = await session.scalar(select(order_table.c.order_id).where(order_table.c.order_id == order.order_id))
        if known is None:
            with suppress(IntegrityError):  # the same order, sent twice at once: the other one is it
                await _save(session, order, payment.id or "")
    location = f"/orders/{order.order_id}"
    return JSONResponse(
        {"orderId": order.order_id, "status": "accepted", "location": location}, 202, {"location": location}
    )


async def _save(session: Any, order: PlaceOrder, authorization_id: str) -> None:
    async with app.unit_of_work(session) as uow:
        await session.execute(
            insert(order_table).values(
                order_id=order.order_id,
                customer_id=order.customer_id,
                ordered_on=order.ordered_on.isoformat(),
                lines=msgspec.json.encode(order.lines).decode(),
                amount_cents=order.total_cents,
                authorization_id=authorization_id,
                status="accepted",
                reason="",
            )
        )
        uow.publish(
            OrderCreated(
                order_id=order.order_id,
                customer_id=order.customer_id,
                ordered_on=order.ordered_on,
                lines=order.lines,
                total_cents=order.total_cents,
                authorization_id=authorization_id,
                cart_id=order.cart_id,
            )
        )


async def get_order(request: Request) -> Response:
    async with app.database.async_sessions() as session:
        row = (
            await session.execute(select(order_table).where(order_table.c.order_id == request.path_params["order_id"]))
        ).first()
    if row is None:
        return JSONResponse({"error": "there is no such order"}, 404)
    return JSONResponse(
        {
            "orderId": row.order_id,
            "customerId": row.customer_id,
            "orderedOn": row.ordered_on,
            "lines": msgspec.json.decode(row.lines),
            "totalCents": row.amount_cents,
            "status": row.status,
            "reason": row.reason,
        }
    )


# What becomes of it


@app.handler(cancellations, group="order-cancellation", delivery="effectively_once")
async def cancel_unreserved(event: CancelOrder, uow: UnitOfWork) -> None:
    await cancel(event.order_id, event.reason, uow)


@app.handler(payments, group="order-payment", delivery="effectively_once")
async def follow_payment(event: PaymentProcessed | PaymentFailed, uow: UnitOfWork) -> None:
    if isinstance(event, PaymentFailed):
        await cancel(event.order_id, "PAYMENT_FAILED", uow)
    elif await advance(event.order_id, "accepted", "confirmed", uow):
        uow.publish(OrderConfirmed(event.order_id, event.customer_id))


@app.handler(shipping, group="order-shipping", delivery="effectively_once")
async def follow_shipping(event: ShippingDispatched, uow: UnitOfWork) -> None:
    # the payment's event and this one are of different topics: this may be the first of them
    row = await advance(event.order_id, "confirmed", "shipped", uow)
    if row is None:
        row = await advance(event.order_id, "accepted", "shipped", uow)
        if row is not None:
            uow.publish(OrderConfirmed(event.order_id, row.customer_id))
    if row is not None:
        uow.publish(OrderShipped(event.order_id, row.customer_id))


async def cancel(order_id: str, reason: str, uow: UnitOfWork) -> None:
    """Once, and only before it is confirmed."""
    row = await advance(order_id, "accepted", "cancelled", uow, reason)
    if row is not None:
        uow.publish(OrderCancelled(order_id, row.customer_id, reason, row.amount_cents, row.authorization_id))


async def advance(order_id: str, before: str, after: str, uow: UnitOfWork, reason: str = "") -> Any:
    """The order, if it was there and is here now."""
    columns = order_table.c
    moved = update(order_table).where(columns.order_id == order_id, columns.status == before)
    found = await uow.async_session.execute(moved.values(status=after, reason=reason).returning(order_table))
    return found.first()


web = serve(
    app,
    "SHOP_ORDERS_PORT",
    8000,
    [Route("/orders", place_order, methods=["POST"]), Route("/orders/{order_id}", get_order)],
)
