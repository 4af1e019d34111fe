"""Inventory: reserves what was ordered, or notes a shortage. Group `inventory-reservation`."""

import os

from sqlalchemy import Column, Integer, MetaData, String, Table, select

from examples.shop.domain import OrderCreated, orders
from examples.shop.effects import add_to, insert_once
from headwater import App, UnitOfWork

app = App("inventory-service")
metadata = MetaData()
effects = Table(
    "reservations",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("sku", String(64), nullable=False),
    Column("quantity", Integer, nullable=False),
    Column("amount_cents", Integer, nullable=False),
    Column("reserved", Integer, nullable=False),
)
stock = Table(
    "stock", metadata, Column("sku", String(64), primary_key=True), Column("reserved", Integer, nullable=False)
)

STOCK_PER_SKU = int(os.environ.get("SHOP_STOCK_PER_SKU", "1000000"))


@app.on_start
async def create_tables() -> None:
    assert app.database is not None
    async with app.database.async_engine.begin() as connection:
        await connection.run_sync(metadata.create_all)


@app.handler(orders, group="inventory-reservation")
async def reserve_stock(event: OrderCreated, uow: UnitOfWork) -> None:
    session = uow.async_session
    line = event.lines[0]
    taken = await session.scalar(select(stock.c.reserved).where(stock.c.sku == line.sku)) or 0
    available = taken + line.quantity <= STOCK_PER_SKU
    is_new = await insert_once(
        session,
        effects,
        order_id=event.order_id,
        sku=line.sku,
        quantity=line.quantity,
        amount_cents=event.total_cents,
        reserved=int(available),
    )
    if is_new and available:
        dialect = session.get_bind().dialect.name
        await session.execute(add_to(stock, dialect, {"sku": line.sku}, {"reserved": line.quantity}))
