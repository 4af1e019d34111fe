"""A broker as a process: listen, say `ready`, serve, stop cleanly on SIGTERM.

One event loop owns all state. Nothing is printed before the broker answers; then one line, `ready HOST:PORT`.
"""

import asyncio
import errno
import functools
import json
import logging
import os
import random
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from headwater.broker.broker_config import BrokerConfig
from headwater.broker.connection import Connection
from headwater.broker.dispatch import Dispatcher
from headwater.broker.housekeeping import Housekeeping
from headwater.broker.log.file_system import DiskFileSystem, FileSystem
from headwater.broker.log.flush import GroupCommitFlusher
from headwater.broker.log.log_directory import LogDirectory
from headwater.broker.node import Node
from headwater.broker.wire.frame import BufferPool
from headwater.clock import Clock, SystemClock

logger = logging.getLogger(__name__)

BACKLOG = 512
STOP_SECONDS = 5.0  # for answers that are under way


class CannotListen(Exception):
    """The address can't be had; the message says what to do."""


@dataclass(slots=True)
class BrokerOptions:
    data: Path
    host: str
    port: int
    config: BrokerConfig
    file_system: FileSystem = field(default_factory=DiskFileSystem)
    clock: Clock = field(default_factory=SystemClock)
    say_json: bool = False


class Broker:
    """A broker on a running loop."""

    def __init__(self, options: BrokerOptions, loop: asyncio.AbstractEventLoop) -> None:
        """Raises DirectoryError, OSError."""
        self._options = options
        self._loop = loop
        _raise_open_files_limit()
        config = options.config
        self.directory = LogDirectory(options.data, options.file_system, config.number("node.id"))
        self.node = Node(
            config, self.directory, options.clock, loop, random.Random(), functools.partial(GroupCommitFlusher, loop)
        )
        self.dispatcher = Dispatcher(self.node)
        self._pool = BufferPool()
        self._server: asyncio.Server | None = None
        self._housekeeping: Housekeeping | None = None

    async def start(self) -> None:
        """Load what the directory holds, then listen. Raises CannotListen, OSError."""
        listener = self._listen()
        self.node.load()
        host, port = listener.getsockname()[:2]
        self.node.host, self.node.port = self._advertised(host, port)
        max_frame_bytes = self.node.config.number("socket.request.max.bytes")
        self._housekeeping = Housekeeping(self.node, self.dispatcher, self._loop)
        self._server = await self._loop.create_server(
            lambda: Connection(self.dispatcher, self._pool, max_frame_bytes, self._loop), sock=listener, backlog=BACKLOG
        )
        self.listening = f"{self._options.host}:{port}"
        self.directory.say_owner(f"process {os.getpid()} (started {time.strftime('%H:%M')})")

    def _listen(self) -> socket.socket:
        options = self._options
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((options.host, options.port))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise CannotListen(
                    f"can't listen on {options.host}:{options.port}: {error.strerror or error}.\n"
                    "  --listen takes an address of this machine: 127.0.0.1:9092, or 0.0.0.0:9092 for all of them."
                ) from error
            raise CannotListen(
                f"can't listen on {options.host}:{options.port}: {os.strerror(error.errno or 0).lower()}.\n"
                "  Stop what uses the port, or choose another with --listen HOST:PORT (`headwater up`: --port); 0 is a free one."
            ) from error
        listener.setblocking(False)
        return listener

    def _advertised(self, host: str, port: int) -> tuple[str, int]:
        """What clients are told to connect to. "All interfaces" is no address: they get this machine's name."""
        text = self.node.config.text("advertised.listeners")
        if text:
            name, _, number = text.rpartition("://")[2].rpartition(":")
            return name, int(number)
        if host in ("0.0.0.0", "::"):
            return socket.gethostname(), port
        return host, port

    async def stop(self) -> None:
        """Answer what is under way, then leave the directory in order."""
        if self._server is not None:
            self._server.close()
        if self._housekeeping is not None:
            self._housekeeping.stop()
        self.node.groups.close()
        self.node.flusher.close()
        await asyncio.sleep(0)
        for connection in list(self.dispatcher.connections):
            connection.close()
        deadline = self._loop.time() + STOP_SECONDS
        while self.dispatcher.connections and self._loop.time() < deadline:
            await asyncio.sleep(0.01)
        for connection in list(self.dispatcher.connections):
            connection.abort()
        self.node.close()


def _raise_open_files_limit() -> None:
    """To what this process may have: every partition has files, every client a socket."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def serve(options: BrokerOptions) -> None:
    """Until SIGTERM or SIGINT. Raises DirectoryError, CannotListen, OSError."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    broker = Broker(options, loop)
    await broker.start()
    print(json.dumps({"ready": broker.listening}) if options.say_json else f"ready {broker.listening}", flush=True)
    await stopped.wait()
    logger.info("stopping")
    await broker.stop()


def run(options: BrokerOptions) -> None:
    """The whole life of a broker process."""
    if sys.platform == "win32":
        asyncio.run(serve(options))
    else:
        import uvloop

        uvloop.run(serve(options))
