"""What the examples' web sides share: health apart from readiness, and requests that can't be read."""

import os
from collections.abc import Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from headwater import App


def serve(app: App, variable: str, port: int, routes: Sequence[Route]) -> Starlette:
    """Served with the application's handlers, on the port that a variable of the environment says, or else on that one."""

    async def health(request: Request) -> JSONResponse:
        """The process answers; its database is enough for that."""
        return JSONResponse({"status": "up"})

    async def ready(request: Request) -> JSONResponse:
        """Everything it needs is there."""
        found = await app.check()
        return JSONResponse(found, 200 if set(found.values()) == {"ok"} else 503)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> Any:
        async with app.lifespan():
            yield

    web = Starlette(routes=[*routes, Route("/health", health), Route("/ready", ready)], lifespan=lifespan)
    app.web(web, port=int(os.environ.get(variable, port)))
    return web


async def body_of(request: Request, cls: type[Any]) -> Any:
    """Raises MsgspecError."""
    return msgspec.json.decode(await request.body(), type=cls)


def refused(error: Exception) -> JSONResponse:
    return JSONResponse({"error": f"the request can't be read: {error}"}, 422)
