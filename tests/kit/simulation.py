"""A broker without sockets, threads or a real disk: requests go in as values, answers come out, time is stepped."""

import asyncio
import random
import struct
from collections.abc import Callable
from pathlib import Path

from headwater.broker.broker_config import BrokerConfig
from headwater.broker.connection import Reply
from headwater.broker.dispatch import Dispatcher
from headwater.broker.log.flush import SteppedFlusher
from headwater.broker.log.log_directory import LogDirectory
from headwater.broker.node import Node
from headwater.broker.purgatory import Delay
from headwater.broker.wire.message import Message
from headwater.testing.clock import ManualClock
from headwater.testing.file_system import MemoryFileSystem

HOME = Path("/data")


class Answers:
    """The client's end of a connection: what was answered, in order."""

    def __init__(self, on_answer: Callable[[bytes], None] | None = None) -> None:
        self.frames: list[bytes] = []
        self.peer_host = "/127.0.0.1"
        self.delay: Delay | None = None
        self.last_active = 0.0
        self._expected: list[Reply] = []
        self._on_answer = on_answer

    def expect(self, head: bytes) -> Reply:
        reply = Reply(self, head)  # type: ignore[arg-type]
        self._expected.append(reply)
        return reply

    def withdraw(self, reply: Reply) -> None:
        self._expected.remove(reply)

    def mute_until(self, reply: Reply) -> None:
        """Nothing is read here by itself."""

    def replied(self, reply: Reply) -> None:
        while self._expected and self._expected[0].buffers is not None:
            frame = b"".join(bytes(part) for part in self._expected.pop(0).buffers or [])
            self.frames.append(frame)
            if self._on_answer is not None:
                self._on_answer(frame)

    def close(self) -> None:
        """The broker gave the connection up."""


class SimulatedBroker:
    def __init__(
        self,
        disk: MemoryFileSystem,
        loop: asyncio.AbstractEventLoop,
        settings: dict[str, str] | None = None,
        clock: ManualClock | None = None,
    ) -> None:
        self.clock = clock or ManualClock()
        self.disk = disk
        config = BrokerConfig(settings or {})
        self.node = Node(config, LogDirectory(HOME, disk, 1), self.clock, loop, random.Random(0), self._new_flusher)
        self.node.load()
        self.dispatcher = Dispatcher(self.node)

    def _new_flusher(self, on_durable: object) -> SteppedFlusher:
        self.flusher = SteppedFlusher(on_durable)  # type: ignore[arg-type]
        return self.flusher

    def send(self, key: int, version: int, body: bytes, client: Answers, flexible: bool = False) -> None:
        """One request. Raises MalformedMessage where a real connection would be closed."""
        head = struct.pack(">hhih", key, version, 1, 4) + b"test" + (b"\x00" if flexible else b"")
        self.dispatcher.handle(memoryview(bytearray(head + body)), client)  # type: ignore[arg-type]

    def ask(self, key: int, version: int, request: Message) -> bytes:
        """The body of the answer to a request that doesn't wait."""
        client = Answers()
        flexible = version >= request.FLEXIBLE
        self.send(key, version, bytes(request.encode(version)), client, flexible)
        return client.frames[0][9 if flexible else 8 :]


def produce_body(topic: str, partition: int, batch: bytes, acks: int = -1) -> bytes:
    """A Produce request, version 8."""
    name = topic.encode()
    return (
        struct.pack(">hhi", -1, acks, 1000)
        + struct.pack(">ih", 1, len(name))
        + name
        + struct.pack(">iii", 1, partition, len(batch))
        + batch
    )


def produce_answer(frame: bytes, topic: str) -> tuple[int, int]:
    """(error code, base offset) of a Produce answer, version 8, with its frame size and correlation id."""
    at = 8 + 4 + 2 + len(topic) + 4 + 4
    code, offset = struct.unpack_from(">hq", frame, at)
    return code, offset
