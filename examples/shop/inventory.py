"""Inventory: reserves all that was ordered, or nothing and has the order cancelled. Group `inventory-reservation`.

What was reserved before the line that there isn't enough of is given back in the same transaction: nobody ever sees it gone.
A cancelled order's stock is released.
"""

import os

import msgspec
from sqlalchemy import Column, Integer, MetaData, String, Table, Text, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples.shop.domain import (
    CancelOrder,
    InventoryAdjusted,
    InventoryReleased,
    InventoryReserved,
    OrderCancelled,
    OrderCreated,
    OrderLine,
    StockReserved,
    cancellations,
    inventory,
    orders,
    reserved,
)
from examples.upsert import insert_once
from examples.web import body_of, refused, serve
from headwater import App, UnitOfWork

app = App("inventory-service", topics=[inventory, reserved, cancellations])
metadata = MetaData()
effects = Table(
    "reservations",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("lines", Text, nullable=False),
    Column("amount_cents", Integer, nullable=False),
    Column("reserved", Integer, nullable=False),
)
stock = Table(
    "stock", metadata, Column("sku", String(64), primary_key=True), Column("available", Integer, nullable=False)
)

STOCK_PER_SKU = int(os.environ.get("SHOP_STOCK_PER_SKU", "1000000"))


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    change: int


@app.on_start
async def create_tables() -> None:
    async with app.database.async_engine.begin() as connection:
        await connection.run_sync(metadata.create_all)


@app.handler(orders, group="inventory-reservation", tier="30s")
async def follow_order(event: OrderCreated | OrderCancelled, uow: UnitOfWork) -> None:
    if isinstance(event, OrderCreated):
        await reserve(event, uow)
    else:
        await release(event, uow)


async def reserve(event: OrderCreated, uow: UnitOfWork) -> None:
    session = uow.async_session
    lines = msgspec.json.encode(event.lines).decode()
    values = {"lines": lines, "amount_cents": event.total_cents, "reserved": 0}
    if not await insert_once(session, effects, order_id=event.order_id, **values):
        return
    taken: list[tuple[OrderLine, int]] = []
    for line in event.lines:
        available = await move(session, line.sku, -line.quantity)
        if available is None:
            for before, _ in taken:
                await move(session, before.sku, before.quantity)
            uow.publish(CancelOrder(event.order_id, "INVENTORY_UNAVAILABLE", line.sku, "inventory-reservation-service"))
            return
        taken.append((line, available))
    await session.execute(update(effects).where(effects.c.order_id == event.order_id).values(reserved=1))
    for line, available in taken:
        uow.publish(InventoryReserved(line.sku, event.order_id, line.quantity, available))
    uow.publish(StockReserved(event.order_id, event.customer_id, event.total_cents, event.authorization_id))


async def release(event: OrderCancelled, uow: UnitOfWork) -> None:
    session = uow.async_session
    mine = update(effects).where(effects.c.order_id == event.order_id, effects.c.reserved == 1).values(reserved=0)
    row = (await session.execute(mine.returning(effects.c.lines))).first()
    for line in msgspec.json.decode(row.lines, type=list[OrderLine]) if row is not None else ():
        available = await move(session, line.sku, line.quantity)
        uow.publish(InventoryReleased(line.sku, event.order_id, line.quantity, available or 0))


async def move(session: AsyncSession, sku: str, change: int) -> int | None:
    """What is available afterwards; None, and nothing is moved, when there is not enough."""
    await insert_once(session, stock, sku=sku, available=STOCK_PER_SKU)
    # One statement looks and takes: two orders can't both get the last one.
    moved = await session.execute(
        update(stock)
        .where(stock.c.sku == sku, stock.c.available + change >= 0)
        .values(available=stock.c.available + change)
        .returning(stock.c.available)
    )
    found: int | None = moved.scalar_one_or_none()
    return found


async def post_stock(request: Request) -> Response:
    sku = request.path_params["sku"]
    try:
        change: Change = await body_of(request, Change)
    except msgspec.MsgspecError as error:
        return refused(error)
    async with app.database.async_sessions() as session, app.unit_of_work(session) as uow:
        available = await move(session, sku, change.change)
        if available is None:
            return JSONResponse({"error": "there is not as much"}, 409)
        uow.publish(InventoryAdjusted(sku, change.change, available))
    return JSONResponse({"sku": sku, "available": available})


async def get_stock(request: Request) -> Response:
    sku = request.path_params["sku"]
    async with app.database.async_sessions() as session:
        found = await session.scalar(select(stock.c.available).where(stock.c.sku == sku))
    return JSONResponse({"sku": sku, "available": STOCK_PER_SKU if found is None else found})


web = serve(
    app,
    "SHOP_INVENTORY_PORT",
    8004,
    [Route("/stock/{sku}", get_stock), Route("/stock/{sku}", post_stock, methods=["POST"])],
)
