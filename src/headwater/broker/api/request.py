"""One request on its way through an API: who asks, in which version, and where the answer goes."""

import asyncio
from typing import TYPE_CHECKING, Protocol

from headwater.broker.wire.message import Message

if TYPE_CHECKING:
    from headwater.broker.connection import Buffers, Connection, Reply
    from headwater.broker.node import Node


class Outgoing(Protocol):
    """What the whole broker has under way to its clients."""

    stalled_bytes: int


class Request:
    __slots__ = ("body", "client_id", "connection", "node", "outgoing", "reply", "version")

    def __init__(
        self,
        outgoing: Outgoing,
        node: "Node",
        connection: "Connection",
        reply: "Reply",
        version: int,
        client_id: str,
        body: int,
    ) -> None:
        self.outgoing = outgoing
        self.node = node
        self.connection = connection
        self.reply = reply
        self.version = version
        self.client_id = client_id
        self.body = body
        """Where the request's body begins in its frame."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self.node.loop

    def respond(self, message: Message) -> None:
        self.reply.send([message.encode(self.version)])

    def respond_buffers(self, buffers: "Buffers") -> None:
        self.reply.send(buffers)
