"""Users: registered, changed, deactivated; who orders without being known is registered by that."""

import msgspec
from sqlalchemy import Boolean, Column, MetaData, String, Table, insert, select, update
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples.shop.domain import OrderCreated, UserDeactivated, UserRegistered, UserUpdated, orders, users
from examples.upsert import insert_once
from examples.web import body_of, refused, serve
from headwater import App, UnitOfWork

app = App("user-service", topics=[users])
metadata = MetaData()
accounts = Table(
    "users",
    metadata,
    Column("user_id", String(64), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("email", String(200), nullable=False),
    Column("is_active", Boolean, nullable=False),
)


class Person(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    email: str


@app.on_start
async def create_tables() -> None:
    async with app.database.async_engine.begin() as connection:
        await connection.run_sync(metadata.create_all)


@app.handler(orders, group="user-registration")
async def register_guest(event: OrderCreated, uow: UnitOfWork) -> None:
    name, email = f"Customer {event.customer_id}", f"{event.customer_id}@example.com"
    if await insert_once(
        uow.async_session, accounts, user_id=event.customer_id, name=name, email=email, is_active=True
    ):
        uow.publish(UserRegistered(event.customer_id, name, email))


async def put_user(request: Request) -> Response:
    user_id = request.path_params["user_id"]
    try:
        person: Person = await body_of(request, Person)
    except msgspec.MsgspecError as error:
        return refused(error)
    values = {"name": person.name, "email": person.email, "is_active": True}
    async with app.database.async_sessions() as session, app.unit_of_work(session) as uow:
        known = (await session.execute(select(accounts).where(accounts.c.user_id == user_id))).first()
        if known is None:
            await session.execute(insert(accounts).values(user_id=user_id, **values))
            uow.publish(UserRegistered(user_id, person.name, person.email))
        elif (known.name, known.email, known.is_active) != (person.name, person.email, True):
            await session.execute(update(accounts).where(accounts.c.user_id == user_id).values(**values))
            uow.publish(UserUpdated(user_id, person.name, person.email))
    return JSONResponse({"userId": user_id, "name": person.name, "email": person.email}, 200 if known else 201)


async def delete_user(request: Request) -> Response:
    user_id = request.path_params["user_id"]
    async with app.database.async_sessions() as session, app.unit_of_work(session) as uow:
        gone = update(accounts).where(accounts.c.user_id == user_id, accounts.c.is_active).values(is_active=False)
        if (await session.execute(gone.returning(accounts.c.user_id))).first() is None:
            return JSONResponse({"error": "there is no such user"}, 404)
        uow.publish(UserDeactivated(user_id))
    return Response(status_code=204)


web = serve(
    app,
    "SHOP_USERS_PORT",
    8001,
    [Route("/users/{user_id}", put_user, methods=["PUT"]), Route("/users/{user_id}", delete_user, methods=["DELETE"])],
)
