"""Carts: one that is left alone for a while is abandoned; one that is ordered is not.

A timer for each cart, set anew with every change, in the transaction of the change: it survives restarts and fires once.
"""

import os

import msgspec
from sqlalchemy import Column, MetaData, String, Table, Text, delete, insert, select, update
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples.shop.domain import CartAbandoned, CartCreated, CartUpdated, OrderCreated, OrderLine, orders, users
from examples.web import body_of, refused, serve
from headwater import App, UnitOfWork

app = App("cart-service", topics=[users])
metadata = MetaData()
carts = Table(
    "carts",
    metadata,
    Column("cart_id", String(64), primary_key=True),
    Column("user_id", String(64), nullable=False),
    Column("lines", Text, nullable=False),
)
IDLE = os.environ.get("SHOP_CART_IDLE", "30m")


class Cart(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    user_id: str
    lines: list[OrderLine]


@app.on_start
async def create_tables() -> None:
    async with app.database.async_engine.begin() as connection:
        await connection.run_sync(metadata.create_all)


async def put_cart(request: Request) -> Response:
    cart_id = request.path_params["cart_id"]
    try:
        cart: Cart = await body_of(request, Cart)
    except msgspec.MsgspecError as error:
        return refused(error)
    lines = msgspec.json.encode(cart.lines).decode()
    async with app.database.async_sessions() as session, app.unit_of_work(session) as uow:
        known = await session.scalar(select(carts.c.cart_id).where(carts.c.cart_id == cart_id))
        if known is None:
            await session.execute(insert(carts).values(cart_id=cart_id, user_id=cart.user_id, lines=lines))
            uow.publish(CartCreated(cart.user_id, cart_id))
        else:
            await session.execute(update(carts).where(carts.c.cart_id == cart_id).values(lines=lines))
        uow.publish(CartUpdated(cart.user_id, cart_id, cart.lines))
        uow.schedule(CartAbandoned(cart.user_id, cart_id), after=IDLE, name=f"idle:{cart_id}")
    return JSONResponse({"cartId": cart_id}, 200 if known else 201)


async def get_cart(request: Request) -> Response:
    async with app.database.async_sessions() as session:
        row = (await session.execute(select(carts).where(carts.c.cart_id == request.path_params["cart_id"]))).first()
    if row is None:
        return JSONResponse({"error": "there is no such cart"}, 404)
    return JSONResponse({"cartId": row.cart_id, "userId": row.user_id, "lines": msgspec.json.decode(row.lines)})


@app.handler(orders, group="cart-checkout", delivery="effectively_once")
async def check_out(event: OrderCreated, uow: UnitOfWork) -> None:
    if event.cart_id is None:
        return
    uow.cancel(f"idle:{event.cart_id}")
    gone = delete(carts).where(carts.c.cart_id == event.cart_id).returning(carts.c.user_id)
    row = (await uow.async_session.execute(gone)).first()
    if row is not None:
        uow.publish(CartUpdated(row.user_id, event.cart_id, []))


web = serve(
    app,
    "SHOP_CARTS_PORT",
    8003,
    [Route("/carts/{cart_id}", get_cart), Route("/carts/{cart_id}", put_cart, methods=["PUT"])],
)
