"""Loyalty: a point per dollar, per customer. Group `loyalty-points`."""

from sqlalchemy import Column, Integer, MetaData, String, Table

from examples.shop.domain import OrderCreated, orders
from examples.upsert import add_to, insert_once
from headwater import App, UnitOfWork

app = App("loyalty-service")
metadata = MetaData()
effects = Table(
    "awards",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("customer_id", String(64), nullable=False),
    Column("points", Integer, nullable=False),
    Column("amount_cents", Integer, nullable=False),
)
accounts = Table(
    "accounts", metadata, Column("customer_id", String(64), primary_key=True), Column("points", Integer, nullable=False)
)


@app.on_start
async def create_tables() -> None:
    async with app.database.async_engine.begin() as connection:
        await connection.run_sync(metadata.create_all)


@app.handler(orders, group="loyalty-points")
async def award_points(event: OrderCreated, uow: UnitOfWork) -> None:
    session = uow.async_session
    points = event.total_cents // 100
    if await insert_once(
        session,
        effects,
        order_id=event.order_id,
        customer_id=event.customer_id,
        points=points,
        amount_cents=event.total_cents,
    ):
        dialect = session.get_bind().dialect.name
        await session.execute(add_to(accounts, dialect, {"customer_id": event.customer_id}, {"points": points}))
