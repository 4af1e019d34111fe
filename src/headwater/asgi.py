"""Serving an ASGI application on an event loop that is not only its own, until it is told to stop."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

BACKLOG = 2048  # of a socket
STOP_SECONDS = 10  # for requests that are being answered


class CannotListen(Exception):
    """The address can't be used; the message says why."""


def bind(host: str, port: int) -> socket.socket:
    """Before anything is started that would have to be stopped again; nobody can connect before it is served. Raises
    CannotListen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise CannotListen(f"{host}:{port}: {os.strerror(error.errno or 0).lower()}") from None
    return listener


async def serve(asgi: Callable[..., Any], listener: socket.socket, stop: asyncio.Event) -> None:
    """Until `stop` is set and the requests under way are answered."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Any:
            """The process has its own."""
            yield

    config = uvicorn.Config(asgi, log_level="warning", access_log=False, timeout_graceful_shutdown=STOP_SECONDS)
    server = Server(config)

    async def end() -> None:
        await stop.wait()
        server.should_exit = True

    ending = asyncio.create_task(end())
    await server.serve(sockets=[listener])
    ending.cancel()
