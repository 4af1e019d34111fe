"""The catalogue: products, and whether there are any left, which the stock's events say."""

import msgspec
from sqlalchemy import Boolean, Column, Integer, MetaData, String, Table, func, insert, select, update
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples.shop.domain import (
    SKUS,
    InventoryAdjusted,
    InventoryReleased,
    InventoryReserved,
    ProductCreated,
    ProductDiscontinued,
    ProductUpdated,
    catalog,
    inventory,
)
from examples.web import body_of, refused, serve
from headwater import App, UnitOfWork

app = App("catalog-service", topics=[catalog])
metadata = MetaData()
products = Table(
    "products",
    metadata,
    Column("sku", String(64), primary_key=True),
    Column("title", String(200), nullable=False),
    Column("price_cents", Integer, nullable=False),
    Column("is_available", Boolean, nullable=False),
    Column("is_discontinued", Boolean, nullable=False),
)
FIRST_PRICE_CENTS = 1199


class Product(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    title: str
    price_cents: int


@app.on_start
async def fill() -> None:
    """The CDs that the purchases are of."""
    async with app.database.async_engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    async with app.database.async_sessions() as session, app.unit_of_work(session) as uow:
        if await session.scalar(select(func.count()).select_from(products)):
            return
        rows = [{"sku": f"cd-{i:03d}", "title": f"CD {i}", "price_cents": FIRST_PRICE_CENTS} for i in range(SKUS)]
        await session.execute(insert(products).values(is_available=True, is_discontinued=False), rows)
        for row in rows:
            uow.publish(ProductCreated(**row))  # type: ignore[arg-type]


@app.handler(inventory, group="catalog-availability", delivery="effectively_once")
async def follow_stock(event: InventoryAdjusted | InventoryReserved | InventoryReleased, uow: UnitOfWork) -> None:
    is_available = event.available > 0
    session = uow.async_session
    changed = await session.execute(
        update(products)
        .where(products.c.sku == event.sku, products.c.is_available != is_available)
        .values(is_available=is_available)
        .returning(products.c.title, products.c.price_cents)
    )
    row = changed.first()
    if row is not None:
        uow.publish(ProductUpdated(event.sku, row.title, row.price_cents, is_available))


async def put_product(request: Request) -> Response:
    sku = request.path_params["sku"]
    try:
        product: Product = await body_of(request, Product)
    except msgspec.MsgspecError as error:
        return refused(error)
    values = {"title": product.title, "price_cents": product.price_cents}
    async with app.database.async_sessions() as session, app.unit_of_work(session) as uow:
        known = (await session.execute(select(products).where(products.c.sku == sku))).first()
        if known is None:
            await session.execute(insert(products).values(sku=sku, is_available=True, is_discontinued=False, **values))
            uow.publish(ProductCreated(sku, product.title, product.price_cents))
        else:
            await session.execute(update(products).where(products.c.sku == sku).values(**values))
            uow.publish(ProductUpdated(sku, product.title, product.price_cents, known.is_available))
    return JSONResponse({"sku": sku}, 200 if known else 201)


async def delete_product(request: Request) -> Response:
    sku = request.path_params["sku"]
    async with app.database.async_sessions() as session, app.unit_of_work(session) as uow:
        ended = update(products).where(products.c.sku == sku, ~products.c.is_discontinued).values(is_discontinued=True)
        if (await session.execute(ended.returning(products.c.sku))).first() is None:
            return JSONResponse({"error": "there is no such product"}, 404)
        uow.publish(ProductDiscontinued(sku))
    return Response(status_code=204)


async def get_product(request: Request) -> Response:
    async with app.database.async_sessions() as session:
        row = (await session.execute(select(products).where(products.c.sku == request.path_params["sku"]))).first()
    if row is None or row.is_discontinued:
        return JSONResponse({"error": "there is no such product"}, 404)
    return JSONResponse(
        {"sku": row.sku, "title": row.title, "priceCents": row.price_cents, "isAvailable": row.is_available}
    )


web = serve(
    app,
    "SHOP_CATALOG_PORT",
    8002,
    [
        Route("/products/{sku}", get_product),
        Route("/products/{sku}", put_product, methods=["PUT"]),
        Route("/products/{sku}", delete_product, methods=["DELETE"]),
    ],
)
