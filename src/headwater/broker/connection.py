"""One client's connection: bytes in, frames to the dispatcher, answers out in the order of the requests.

Order     Produce requests are taken one after the other without waiting for the sync of the one before, because group
          commit lives on that. Any other request waits until those before it are answered, and mutes the connection
          until it is answered itself (a long poll, a rebalance), as in Kafka.
Fairness  A connection is read for at most READ_BUDGET bytes per turn of the loop: a bulk producer can't starve others.
Memory    A client that doesn't read its answers isn't read from either; what waits for such clients counts against
          one limit for the whole broker, and large answers get smaller as it fills.
Faults    Bytes that don't follow the protocol close this connection, and only this one.
"""

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING, cast

from headwater.broker.purgatory import Delay
from headwater.broker.wire.errors import MalformedMessage
from headwater.broker.wire.frame import SIZE, BufferPool, FrameReader

if TYPE_CHECKING:
    from headwater.broker.dispatch import Dispatcher

logger = logging.getLogger(__name__)

READ_BUDGET = 512 * 1024
MAX_PIPELINED = 1024  # requests of one connection that wait for their answers
WRITE_HIGH_WATER = 256 * 1024
WRITE_TURN = 4 * 1024 * 1024  # bytes of answers after which others have their turn
PRODUCE = b"\x00\x00"  # its API key

Buffers = list[bytes | bytearray | memoryview]


class Reply:
    """The place of one answer in the connection's order."""

    __slots__ = ("_connection", "buffers", "head")

    def __init__(self, connection: "Connection", head: bytes) -> None:
        self._connection = connection
        self.head = head
        """Correlation id and, for flexible answers, the empty tagged fields."""
        self.buffers: Buffers | None = None

    def send(self, body: Buffers) -> None:
        size = len(self.head)
        for part in body:
            size += len(part)
        self.buffers = [SIZE.pack(size) + self.head, *body]
        self._connection.replied(self)

    @property
    def is_sent(self) -> bool:
        return self.buffers is not None

    @property
    def connection(self) -> "Connection":
        return self._connection


class Connection(asyncio.BufferedProtocol):
    def __init__(
        self, dispatcher: "Dispatcher", pool: BufferPool, max_frame_bytes: int, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._dispatcher = dispatcher
        self._loop = loop
        self._reader = FrameReader(max_frame_bytes, pool)
        self._transport: asyncio.Transport | None = None
        self._replies: deque[Reply] = deque()
        self._muted_by: Reply | None = None
        self._is_held = False
        """The next frame waits for the answers before it."""
        self._budget = READ_BUDGET
        self._written = 0
        self._turn_scheduled = False
        self._closing = False
        self._reading = True
        self._writing_paused = False
        self._handling = False
        self._stalled_bytes = 0
        self.peer_host = ""
        self.last_active = loop.time()
        self.delay: Delay | None = None
        """The long poll that mutes the connection."""

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's own doesn't derive from it
        transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        peer = transport.get_extra_info("peername")
        self.peer_host = f"/{peer[0]}" if peer else "/unknown"
        self._dispatcher.connected(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._closing = True
        self._reader.release()
        self._replies.clear()
        self._dispatcher.stalled_bytes -= self._stalled_bytes
        self._stalled_bytes = 0
        if self.delay is not None:
            self.delay.cancel()
        self._dispatcher.disconnected(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.offer()

    def buffer_updated(self, nbytes: int) -> None:
        self._reader.received(nbytes)
        self._budget -= nbytes
        self.last_active = self._loop.time()
        self._process()
        if self._budget <= 0:
            self._pause()
            self._take_turns()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._writing_paused = True
        if self._transport is not None:
            self._stalled_bytes = self._transport.get_write_buffer_size()
            self._dispatcher.stalled_bytes += self._stalled_bytes
            self._pause()

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._dispatcher.stalled_bytes -= self._stalled_bytes
        self._stalled_bytes = 0
        self._go_on()

    # Requests

    def _process(self) -> None:
        """Hand over the frames that have arrived, unless something holds the connection."""
        if self._closing or self._handling:
            return
        self._handling = True
        written = self._written
        try:
            while self._muted_by is None and not self._writing_paused and not self._closing:
                frame = self._reader.next_frame()
                self._is_held = False
                if frame is None:
                    break
                if self._replies and (frame[:2] != PRODUCE or len(self._replies) >= MAX_PIPELINED):
                    # Its turn comes when those before it are answered. Until then it stays in the buffer: what has been
                    # taken out of it is overwritten by what arrives next.
                    self._reader.put_back(frame)
                    self._is_held = True
                    break
                self._dispatcher.handle(frame, self)
                if self._written - written > WRITE_TURN:
                    self._take_turns()
                    break
        except MalformedMessage as error:
            logger.warning("connection_closed peer=%s reason=%s", self.peer_host, error)
            self.close()
        finally:
            self._handling = False
        if self._reader.waiting_bytes and (self._muted_by is not None or self._is_held or self._turn_scheduled):
            self._pause()  # the buffer has no room for more than what waits

    def expect(self, head: bytes) -> Reply:
        """The next answer's place."""
        reply = Reply(self, head)
        self._replies.append(reply)
        return reply

    def withdraw(self, reply: Reply) -> None:
        """The latest request gets no answer (acks=0)."""
        assert self._replies[-1] is reply
        self._replies.pop()

    def mute_until(self, reply: Reply) -> None:
        self._muted_by = reply

    # Answers

    def replied(self, reply: Reply) -> None:
        replies, transport = self._replies, self._transport
        if transport is None:
            return
        while replies and replies[0].buffers is not None:
            buffers = replies.popleft().buffers or []
            self._written += sum(map(len, buffers))
            transport.writelines(buffers)
        if self._muted_by is reply:
            self._muted_by = None
        if not self._reading or self._is_held:
            self._go_on()

    def close(self) -> None:
        """Answers that are under way still go out, if the client reads them."""
        if self._transport is not None and not self._closing:
            self._closing = True
            self._transport.close()

    def abort(self) -> None:
        self._closing = True
        if self._transport is not None:
            self._transport.abort()

    def close_idle(self) -> None:
        """Nobody reads here: what is under way is given up with it."""
        if self._transport is not None and self._transport.get_write_buffer_size():
            self.abort()
        else:
            self.close()

    # Flow

    def _pause(self) -> None:
        if self._reading and self._transport is not None and not self._closing:
            self._reading = False
            self._transport.pause_reading()

    def _take_turns(self) -> None:
        """Go on in the next turn of the loop: others come first."""
        if not self._turn_scheduled:
            self._turn_scheduled = True
            self._loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._turn_scheduled = False
        self._budget = READ_BUDGET
        self._go_on()

    def _go_on(self) -> None:
        """What waits in the buffer first, then the socket."""
        if self._handling or self._turn_scheduled:
            return
        self._process()
        if (
            not self._reading
            and self._transport is not None
            and not self._closing
            and self._muted_by is None
            and not self._is_held
            and not self._writing_paused
            and not self._turn_scheduled
        ):
            self._reading = True
            self._transport.resume_reading()
