"""Notifications: one e-mail and one SMS per order, written to a table. Group `customer-notifications`."""

from sqlalchemy import Column, Integer, MetaData, String, Table

from examples.shop.domain import OrderCreated, orders
from examples.shop.effects import insert_once
from headwater import App, Envelope, UnitOfWork

app = App("notification-service")
metadata = MetaData()
effects = Table(
    "notices",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("customer_id", String(64), nullable=False),
    Column("email", String(400), nullable=False),
    Column("sms", String(160), nullable=False),
    Column("correlation_id", String(200), nullable=False),
    Column("amount_cents", Integer, nullable=False),
)


@app.on_start
async def create_tables() -> None:
    async with app.database.async_engine.begin() as connection:
        await connection.run_sync(metadata.create_all)


@app.handler(orders, group="customer-notifications")
async def confirm_order(event: OrderCreated, uow: UnitOfWork, envelope: Envelope) -> None:
    dollars = f"{event.total_cents / 100:.2f}"
    await insert_once(
        uow.async_session,
        effects,
        order_id=event.order_id,
        customer_id=event.customer_id,
        email=f"Dear customer {event.customer_id}, your order {event.order_id} over ${dollars} is confirmed.",
        sms=f"Order {event.order_id}: ${dollars}, confirmed.",
        correlation_id=envelope.correlation_id,
        amount_cents=event.total_cents,
    )
