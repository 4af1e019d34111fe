"""Notifications: an e-mail and an SMS for every order, and one for what changes; written to a table. Group
`customer-notifications`."""

from sqlalchemy import Column, Integer, MetaData, String, Table

from examples.shop.domain import (
    NotificationFailed,
    NotificationSent,
    OrderCancelled,
    OrderCreated,
    UserUpdated,
    notifications,
    orders,
    users,
)
from examples.upsert import insert_once
from headwater import App, Envelope, Tier, UnitOfWork

app = App("notification-service", topics=[notifications])
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
others = Table(
    "other_notices",
    metadata,
    Column("event_id", String(64), primary_key=True),
    Column("customer_id", String(64), nullable=False),
    Column("email", String(400), nullable=False),
)
UNREACHABLE = "bounce-"  # customers whose id begins so have no address that works


@app.on_start
async def create_tables() -> None:
    async with app.database.async_engine.begin() as connection:
        await connection.run_sync(metadata.create_all)


@app.handler(orders, group="customer-notifications", tier=Tier(target="2m", alarm="10m"))
async def tell_about_order(event: OrderCreated | OrderCancelled, uow: UnitOfWork, envelope: Envelope) -> None:
    if isinstance(event, OrderCancelled):
        text = f"Dear customer {event.customer_id}, your order {event.order_id} is cancelled: {event.reason}."
        await tell(uow, envelope, event.customer_id, "order cancelled", text)
        return
    dollars = f"{event.total_cents / 100:.2f}"
    new = await insert_once(
        uow.async_session,
        effects,
        order_id=event.order_id,
        customer_id=event.customer_id,
        email=f"Dear customer {event.customer_id}, your order {event.order_id} over ${dollars} is confirmed.",
        sms=f"Order {event.order_id}: ${dollars}, confirmed.",
        correlation_id=envelope.correlation_id,
        amount_cents=event.total_cents,
    )
    if new:
        say(uow, event.customer_id, "order accepted")


@app.handler(users, group="profile-notifications")
async def tell_about_profile(event: UserUpdated, uow: UnitOfWork, envelope: Envelope) -> None:
    await tell(uow, envelope, event.user_id, "profile changed", f"Dear {event.name}, your profile was changed.")


async def tell(uow: UnitOfWork, envelope: Envelope, customer_id: str, subject: str, email: str) -> None:
    if await insert_once(uow.async_session, others, event_id=envelope.event_id, customer_id=customer_id, email=email):
        say(uow, customer_id, subject)


def say(uow: UnitOfWork, customer_id: str, subject: str) -> None:
    if customer_id.startswith(UNREACHABLE):
        uow.publish(NotificationFailed(customer_id, subject, "the address is unknown"))
    else:
        uow.publish(NotificationSent(customer_id, subject))
