"""Shipping: a paid order is packed, dispatched and delivered, which takes its time. Group `shipping-fulfillment`."""

import os

from sqlalchemy import Column, Integer, MetaData, String, Table

from examples.shop.domain import (
    PaymentProcessed,
    ShippingCreated,
    ShippingDelivered,
    ShippingDispatched,
    payments,
    shipping,
)
from examples.upsert import insert_once
from headwater import App, UnitOfWork

app = App("shipping-service", topics=[shipping])
metadata = MetaData()
effects = Table(
    "parcels",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("amount_cents", Integer, nullable=False),
)
DISPATCHED_AFTER = os.environ.get("SHOP_DISPATCHED_AFTER", "1s")
DELIVERED_AFTER = os.environ.get("SHOP_DELIVERED_AFTER", "3s")


@app.on_start
async def create_tables() -> None:
    async with app.database.async_engine.begin() as connection:
        await connection.run_sync(metadata.create_all)


@app.handler(payments, group="shipping-fulfillment")
async def ship(event: PaymentProcessed, uow: UnitOfWork) -> None:
    if await insert_once(uow.async_session, effects, order_id=event.order_id, amount_cents=event.amount_cents):
        uow.publish(ShippingCreated(event.order_id, event.amount_cents))
        uow.schedule(ShippingDispatched(event.order_id), after=DISPATCHED_AFTER)
        uow.schedule(ShippingDelivered(event.order_id), after=DELIVERED_AFTER)
