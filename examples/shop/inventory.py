"""Inventory: reserves what was ordered, or notes a shortage. Group `inventory-reservation`."""

import os

from sqlalchemy import Column, Integer, MetaData, String, Table, update

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
    async with app.database.async_engine.begin() as connection:
        await connection.run_sync(metadata.create_all)


@app.handler(orders, group="inventory-reservation")
async def reserve_stock(event: OrderCreated, uow: UnitOfWork) -> None:
    session = uow.async_session
    line = event.lines[0]
    values = {"sku": line.sku, "quantity": line.quantity, "amount_cents": event.total_cents}
    if not await insert_once(session, effects, order_id=event.order_id, reserved=0, **values):
        return
    dialect = session.get_bind().dialect.name
    await session.execute(add_to(stock, dialect, {"sku": line.sku}, {"reserved": 0}))
    # One statement looks and takes: two orders can't both get the last one.
    taken = await session.execute(
        update(stock)
        .where(stock.c.sku == line.sku, stock.c.reserved + line.quantity <= STOCK_PER_SKU)
        .values(reserved=stock.c.reserved + line.quantity)
        .returning(stock.c.sku)
    )
    if taken.first() is not None:
        await session.execute(update(effects).where(effects.c.order_id == event.order_id).values(reserved=1))
