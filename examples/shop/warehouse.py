"""Warehouse: creates a shipment per order. Group `warehouse-fulfillment`."""

from sqlalchemy import Column, Integer, MetaData, String, Table

from examples.shop.domain import OrderCreated, orders
from examples.upsert import insert_once
from headwater import App, Tier, UnitOfWork

app = App("warehouse-service")
metadata = MetaData()
effects = Table(
    "shipments",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("sku", String(64), nullable=False),
    Column("quantity", Integer, nullable=False),
    Column("amount_cents", Integer, nullable=False),
)


@app.on_start
async def create_tables() -> None:
    async with app.database.async_engine.begin() as connection:
        await connection.run_sync(metadata.create_all)


@app.handler(orders, group="warehouse-fulfillment", tier=Tier(target="5m", alarm="10m"))
async def create_shipment(event: OrderCreated, uow: UnitOfWork) -> None:
    line = event.lines[0]
    await insert_once(
        uow.async_session,
        effects,
        order_id=event.order_id,
        sku=line.sku,
        quantity=line.quantity,
        amount_cents=event.total_cents,
    )
