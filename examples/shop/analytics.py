"""Analytics: orders and revenue per day, by a sync handler. Group `analytics-pipeline`."""

from sqlalchemy import Column, Integer, MetaData, String, Table

from examples.shop.domain import OrderCreated, orders
from examples.upsert import add_to, insert_once_sync
from headwater import App, Tier, UnitOfWork

app = App("analytics-service")
metadata = MetaData()
effects = Table(
    "facts",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("day", String(10), nullable=False),
    Column("amount_cents", Integer, nullable=False),
)
days = Table(
    "days",
    metadata,
    Column("day", String(10), primary_key=True),
    Column("orders", Integer, nullable=False),
    Column("amount_cents", Integer, nullable=False),
)


@app.on_start
async def create_tables() -> None:
    metadata.create_all(app.database.engine)


@app.handler(orders, group="analytics-pipeline", tier=Tier(target="24h", alarm="1h"))
def count_order(event: OrderCreated, uow: UnitOfWork) -> None:
    session = uow.sync_session
    day = event.ordered_on.isoformat()
    if insert_once_sync(session, effects, order_id=event.order_id, day=day, amount_cents=event.total_cents):
        dialect = session.get_bind().dialect.name
        session.execute(add_to(days, dialect, {"day": day}, {"orders": 1, "amount_cents": event.total_cents}))
