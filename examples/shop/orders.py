"""The order service: `POST /orders`, with fraud and payment inline and everything else through the outbox.

An order and the event about it are one transaction: the order exists if and only if it is published. A request that
is sent again with the same `orderId` is the same order, charged once.
"""

import asyncio
import os
from contextlib import asynccontextmanager, suppress
from datetime import date
from typing import Any

import msgspec
from sqlalchemy import Column, Integer, MetaData, String, Table, insert, select
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples._outside.payment import PaymentGateway
from examples.shop.domain import OrderCreated, OrderLine, orders
from headwater import App

app = App("order-service", topics=[orders])

metadata = MetaData()
order_table = Table(
    "orders",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("customer_id", String(64), nullable=False),
    Column("ordered_on", String(10), nullable=False),
    Column("sku", String(64), nullable=False),
    Column("quantity", Integer, nullable=False),
    Column("amount_cents", Integer, nullable=False),
    Column("authorization_id", String(128), nullable=False),
)

FRAUD_SECONDS = float(os.environ.get("SHOP_FRAUD_MS", "0")) / 1000
PAYMENT_SECONDS = float(os.environ.get("SHOP_PAYMENT_MS", "0")) / 1000
FRAUDULENT = "fraud-"  # customers whose id begins so are refused

payments = PaymentGateway(PAYMENT_SECONDS)


class PlaceOrder(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    order_id: str
    customer_id: str
    ordered_on: date
    sku: str
    quantity: int
    amount_cents: int
    payment_token: str


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
    if not order.order_id or not order.customer_id or order.quantity < 1 or order.amount_cents < 0:
        return JSONResponse({"rejected": "an order has an orderId, a customerId, a quantity and an amount"}, 422)
    if await is_high_risk(order):
        return JSONResponse({"rejected": "Fraud risk detected"}, 402)
    payment = await payments.authorize(order.payment_token, order.amount_cents, order.order_id)
    if not payment.is_successful:
        return JSONResponse({"rejected": payment.decline_reason}, 402)
    async with app.database.async_sessions() as session:
        known = await session.scalar(select(order_table.c.order_id).where(order_table.c.order_id == order.order_id))
        if known is None:
            with suppress(IntegrityError):  # the same order, sent twice at once: the other one is it
                await _save(session, order, payment.authorization_id or "")
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
                sku=order.sku,
                quantity=order.quantity,
                amount_cents=order.amount_cents,
                authorization_id=authorization_id,
            )
        )
        uow.publish(
            OrderCreated(
                order_id=order.order_id,
                customer_id=order.customer_id,
                ordered_on=order.ordered_on,
                lines=[OrderLine(order.sku, order.quantity, order.amount_cents)],
                total_cents=order.amount_cents,
                authorization_id=authorization_id,
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
            "sku": row.sku,
            "quantity": row.quantity,
            "amountCents": row.amount_cents,
        }
    )


async def health(request: Request) -> Response:
    return JSONResponse({"status": "up"})


@asynccontextmanager
async def lifespan(_: Starlette) -> Any:
    async with app.lifespan():
        yield


web = Starlette(
    routes=[
        Route("/orders", place_order, methods=["POST"]),
        Route("/orders/{order_id}", get_order),
        Route("/health", health),
    ],
    lifespan=lifespan,
)
app.web(web, port=int(os.environ.get("SHOP_PORT", "8000")))
