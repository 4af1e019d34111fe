"""The history of orders, by customer, with their names: a projection, which `headwater projections rebuild` makes anew."""

from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples.shop.domain import (
    OrderCancelled,
    OrderConfirmed,
    OrderCreated,
    OrderShipped,
    UserRegistered,
    UserUpdated,
    orders,
    users,
)
from examples.web import serve
from headwater import App, Projection, Rows

app = App("history-service")


class Base(DeclarativeBase):
    pass


class CustomerName(Base):
    __tablename__ = "customer_names"
    customer_id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]


class PastOrder(Base):
    __tablename__ = "past_orders"
    order_id: Mapped[str] = mapped_column(primary_key=True)
    customer_id: Mapped[str] = mapped_column(index=True)
    customer_name: Mapped[str]
    ordered_on: Mapped[str]
    total_cents: Mapped[int]
    status: Mapped[str]


history = Projection("order-history", topics=[orders, users], tables=[CustomerName, PastOrder])


@history.on
def created(event: OrderCreated, rows: Rows) -> None:
    known = rows.get(CustomerName, event.customer_id)
    rows.put(
        PastOrder(
            order_id=event.order_id,
            customer_id=event.customer_id,
            customer_name=known.name if known is not None else event.customer_id,
            ordered_on=event.ordered_on.isoformat(),
            total_cents=event.total_cents,
            status="accepted",
        )
    )


@history.on
def moved(event: OrderConfirmed | OrderCancelled | OrderShipped, rows: Rows) -> None:
    order = rows.get(PastOrder, event.order_id)
    if order is not None:
        order.status = {OrderConfirmed: "confirmed", OrderCancelled: "cancelled", OrderShipped: "shipped"}[type(event)]
        rows.put(order)


@history.on
def named(event: UserRegistered | UserUpdated, rows: Rows) -> None:
    rows.put(CustomerName(customer_id=event.user_id, name=event.name))
    for order in rows.find(PastOrder, customer_id=event.user_id):
        order.customer_name = event.name
        rows.put(order)


history.join(app)


async def get_orders(request: Request) -> Response:
    query = select(PastOrder).where(PastOrder.customer_id == request.path_params["customer_id"])
    async with app.database.async_sessions() as session:
        found = (await session.scalars(query.order_by(PastOrder.ordered_on, PastOrder.order_id))).all()
    return JSONResponse(
        [
            {
                "orderId": each.order_id,
                "customerName": each.customer_name,
                "orderedOn": each.ordered_on,
                "totalCents": each.total_cents,
                "status": each.status,
            }
            for each in found
        ]
    )


web = serve(app, "SHOP_HISTORY_PORT", 8005, [Route("/customers/{customer_id}/orders", get_orders)])
