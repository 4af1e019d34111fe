"""The story of a request: its correlation id is taken, made if missing, echoed, and carried by all that follows.

    web = CorrelationMiddleware(starlette_app)

An ASGI middleware: `X-Correlation-ID` becomes the correlation id of every event that the request publishes, and
`X-Request-ID`, or an id made here, their causation id.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from headwater.event.envelope import Cause, new_id, set_cause

CORRELATION = b"x-correlation-id"
REQUEST = b"x-request-id"
MAX_ID = 200

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class CorrelationMiddleware:
    def __init__(self, app: AsgiApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        correlation_id = _id_of(headers.get(CORRELATION)) or new_id()
        set_cause(Cause(correlation_id, _id_of(headers.get(REQUEST)) or new_id()))

        async def echo(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (CORRELATION, correlation_id.encode())]
            await send(message)

        await self.app(scope, receive, echo)


def _id_of(value: bytes | None) -> str | None:
    """What a client sends is put into headers and logs: only short printable text is taken."""
    if not value or len(value) > MAX_ID:
        return None
    text = value.decode("latin-1")
    return text if text.isprintable() else None
