"""An application: its topics, its handlers, what it publishes, and its life from start to stop.

    app = App("inventory", topics=[inventory_events])

    @app.handler(orders, group="inventory-reservation")
    async def reserve_stock(event: OrderCreated, uow: UnitOfWork) -> StockReserved: ...

`headwater run module:app` runs it: declared topics are created, every handler joins its own consumer group, the outbox
is relayed, a web application given to `app.web` is served. On SIGTERM nothing new begins, what is at work has 20 s to
finish, then the frontier is committed, the groups are left, and the exit code is 0.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from headwater.event.topic import Topic
from headwater.kafka.admin import KafkaAdmin
from headwater.kafka.consumer import KafkaConsumer, Message, headers_of
from headwater.kafka.producer import Acknowledged, KafkaProducer, LoopProducer, NotPublished, Profile
from headwater.runtime.consumer_thread import ConsumerThread
from headwater.runtime.daemon_executor import DaemonExecutor
from headwater.runtime.handler import Function, Handler, InvalidHandler
from headwater.runtime.lane import Lane
from headwater.runtime.publish import Router
from headwater.runtime.relay import Relay
from headwater.runtime.tracing import AsgiApp, CorrelationMiddleware
from headwater.settings import Settings, from_environment
from headwater.store import tables
from headwater.store.database import Database
from headwater.store.unit_of_work import UnitOfWork

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Function)

STOP_SECONDS = 20.0
WEB_STOP_SECONDS = 10  # for requests that are being answered
SYNC_HANDLERS = 8  # threads, per sync handler
DEFAULT_MAX_MESSAGE_BYTES = "1048588"
DEAD_LETTER_ROOM = 64 * 1024  # for the headers that say where a dead letter came from
DEAD_RETENTION_MS = 90 * 24 * 3600 * 1000


class CannotStart(Exception):
    """The application can't start; the message says what to do."""


class App:
    def __init__(
        self,
        name: str,
        *,
        topics: Sequence[Topic] = (),
        settings: Settings | None = None,
        database: Database | None = None,
        profile: Profile = Profile.LATENCY,
    ) -> None:
        """topics: those that the application publishes to; those of its handlers are known anyway.
        settings: HEADWATER_* of the environment when None. Raises InvalidSetting, InvalidDatabase, NoTopic.
        """
        self.name = name
        self.settings = settings or from_environment(os.environ)
        if database is None and self.settings.database_url is not None:
            database = Database(self.settings.database_url)
        self._database = database
        self.handlers: list[Handler] = []
        self._profile = profile
        self._router = Router(name)
        self._router.add(topics)
        self._web: tuple[AsgiApp, str, int] | None = None
        self._producer: KafkaProducer | None = None
        self._loop_producer: LoopProducer | None = None
        self._relay: Relay | None = None
        self._users = 0
        self._failed: Callable[[Exception], None] | None = None
        self._before: list[Callable[[], Awaitable[None]]] = []

    @property
    def database(self) -> Database:
        """Raises CannotStart when there is none."""
        if self._database is None:
            raise CannotStart(
                f"{self.name} needs a database: set HEADWATER_DATABASE_URL, as in sqlite:///{self.name}.db."
            )
        return self._database

    @property
    def topics(self) -> list[Topic]:
        return list(self._router.topics.values())

    # Declaring

    def handler(self, topic: Topic, *, group: str) -> Callable[[F], F]:
        """The function handles the topic's events, in a consumer group of its own. Raises InvalidHandler, NoTopic."""

        def register(function: F) -> F:
            if any(handler.group == group for handler in self.handlers):
                raise InvalidHandler(f"the group {group} has a handler already: each handler is a group of its own.")
            handler = Handler(function, topic, group)
            self._router.add([topic])
            self.handlers.append(handler)
            return function

        return register

    def on_start(self, function: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        """Awaited before anything is handled or served, when publishing works already: tables, caches."""
        self._before.append(function)
        return function

    def web(self, asgi: AsgiApp, *, host: str = "127.0.0.1", port: int = 8000) -> None:
        """Serve an ASGI application in the same process, with correlation ids (needs headwater[web])."""
        self._web = (CorrelationMiddleware(asgi), host, port)

    # Publishing

    async def publish(self, event: object) -> Acknowledged:
        """Return when all in-sync replicas have it. Raises NotPublished, NoTopic."""
        if self._loop_producer is None:
            raise CannotStart(f"{self.name} is not running: publish inside `app.lifespan` or a handler.")
        topic, key, encoded = self._router.encode(event)
        return await self._loop_producer.send(topic.name, key, encoded.value, encoded.headers)

    def publish_sync(self, event: object) -> Acknowledged:
        """`publish` for threads without an event loop."""
        if self._producer is None:
            raise CannotStart(f"{self.name} is not running: publish inside `app.lifespan` or a handler.")
        topic, key, encoded = self._router.encode(event)
        return self._producer.send_and_wait(topic.name, key, encoded.value, encoded.headers)

    def unit_of_work(self, session: AsyncSession | Session | None = None) -> UnitOfWork:
        """On the caller's own session, or on a new async one of this application's database."""
        database = self.database  # whose outbox the relay reads
        if session is None:
            session = database.async_sessions()
        return UnitOfWork(session, self._router.outbox_row, self._wake_relay)

    def sync_unit_of_work(self) -> UnitOfWork:
        return UnitOfWork(self.database.sessions(), self._router.outbox_row, self._wake_relay)

    async def release(self, uow: UnitOfWork) -> None:
        await uow.async_session.close()

    def _wake_relay(self) -> None:
        if self._relay is not None:
            self._relay.wake()

    async def dead_letter(self, handler: Handler, message: Message, reason: str) -> None:
        """The record, byte for byte, with where it came from. Raises NotPublished."""
        assert self._loop_producer is not None
        headers = headers_of(message)
        headers += [
            ("headwater-topic", (message.topic() or "").encode()),
            ("headwater-partition", str(message.partition()).encode()),
            ("headwater-offset", str(message.offset()).encode()),
            ("headwater-group", handler.group.encode()),
            ("headwater-class", b"poison"),
            ("headwater-error", reason.encode("utf-8", "replace")[:1000]),
        ]
        await self._loop_producer.send(
            handler.dead_topic, message.key(), message.value(), headers, partition=message.partition() or 0
        )

    # Life

    @contextlib.asynccontextmanager
    async def lifespan(self, _: object = None) -> AsyncIterator[None]:
        """The publishing half: topics, producer, relay. For Starlette and FastAPI: `lifespan=app.lifespan`."""
        if self._users == 0:
            try:
                await self._open()
            except BaseException:
                await self._close()
                raise
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                await self._close()

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        self._check_handlers()
        await loop.run_in_executor(None, self._create_topics)
        if self._database is not None:
            await loop.run_in_executor(None, tables.create_tables, self.database.engine)
        self._producer = KafkaProducer(self.settings, self._profile, self._producer_failed)
        self._loop_producer = LoopProducer(self._producer, loop)
        if self._database is not None:
            self._relay = Relay(self.database, self.settings)
            self._relay.start()
        for function in self._before:
            await function()

    async def _close(self) -> None:
        loop = asyncio.get_running_loop()
        if self._relay is not None:
            await loop.run_in_executor(None, self._relay.stop)
            self._relay = None
        if self._producer is not None:
            await loop.run_in_executor(None, self._producer.close)
            self._producer = self._loop_producer = None
        if self._database is not None:
            await self.database.close()

    def _check_handlers(self) -> None:
        """What can be known to go wrong. Raises InvalidHandler."""
        for handler in self.handlers:
            if handler.uow_parameter is not None and self._database is None:
                raise InvalidHandler(
                    f"the handler {handler.name} takes a UnitOfWork, but there is no database: set HEADWATER_DATABASE_URL."
                )
            for cls in handler.returns:
                if not self._router.lists(cls):
                    raise InvalidHandler(
                        f"the handler {handler.name} returns {cls.__name__}, which no topic of the application lists: "
                        f"give the App its topic, App({self.name!r}, topics=[...])."
                    )

    def _producer_failed(self, error: NotPublished) -> None:
        """In the poll thread: the client can't go on. A process that is supervised starts again."""
        logger.critical("producer_failed app=%s error=%s", self.name, error)
        if self._failed is not None:
            self._failed(error)

    def _create_topics(self) -> None:
        """What is declared and missing is made; what is there is left as it is. Raises CannotStart, AdminError."""
        admin = KafkaAdmin(self.settings)
        admin.check_reachable()
        present = admin.partition_counts()
        wanted = {topic.name: (topic.partitions, topic.configs) for topic in self.topics}
        for handler in self.handlers:
            partitions, configs = handler.topic.partitions, handler.topic.configs
            if handler.topic.name in present:
                partitions = present[handler.topic.name]
                if handler.dead_topic not in present:
                    configs = {name: each.value for name, each in admin.topic_configs(handler.topic.name).items()}
            largest = int(configs.get("max.message.bytes", DEFAULT_MAX_MESSAGE_BYTES)) + DEAD_LETTER_ROOM
            dead = {"retention.ms": str(DEAD_RETENTION_MS), "max.message.bytes": str(largest)}
            wanted[handler.dead_topic] = (partitions, dead)
        missing = {name: shape for name, shape in wanted.items() if name not in present}
        if missing and not self.settings.create_topics:
            commands = "\n".join(
                f"  headwater topics create {name} --partitions {partitions}"
                + "".join(f" --config {key}={value}" for key, value in configs.items())
                for name, (partitions, configs) in missing.items()
            )
            raise CannotStart(
                f"{self.name} needs topics that are missing, and may not create them. Create them:\n{commands}"
            )
        for name, (partitions, configs) in missing.items():
            admin.create_topic(name, partitions, configs=configs)

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set. Raises CannotStart, AdminError, ConsumerFailed, NotPublished."""
        loop = asyncio.get_running_loop()
        failure: asyncio.Future[None] = loop.create_future()

        def failed(error: Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended already
                loop.call_soon_threadsafe(_fail, failure, error)

        self._failed = failed
        listener = self._bind_web()
        async with self.lifespan():
            threads = [self._consume(handler, loop, failed) for handler in self.handlers]
            web = asyncio.create_task(self._serve_web(listener, stop)) if listener is not None else None
            stopping = asyncio.create_task(stop.wait())
            logger.info("running app=%s handlers=%d", self.name, len(threads))
            try:
                waited = [task for task in (stopping, failure, web) if task is not None]
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            finally:
                stop.set()
                logger.info("stopping app=%s", self.name)
                for thread in threads:
                    thread.request_stop(STOP_SECONDS)
                while any(thread.is_alive for thread in threads):
                    await asyncio.sleep(0.01)
                stopping.cancel()
            if web is not None:
                await web
        if failure.done():
            failure.result()

    def _consume(
        self, handler: Handler, loop: asyncio.AbstractEventLoop, failed: Callable[[Exception], None]
    ) -> ConsumerThread:
        executor = DaemonExecutor(SYNC_HANDLERS, f"handler-{handler.group}")
        thread = ConsumerThread(
            KafkaConsumer(self.settings, handler.group),
            handler.topic.name,
            loop,
            lambda partition, space: Lane(handler, partition, self, executor, space, failed),
            failed,
        )
        thread.start()
        return thread

    def _bind_web(self) -> socket.socket | None:
        """Raises CannotStart."""
        if self._web is None:
            return None
        _, host, port = self._web
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            listener.close()
            raise CannotStart(
                f"{self.name} can't serve {host}:{port}: {os.strerror(error.errno or 0).lower()}. "
                "Stop what uses the port, or give `app.web` another."
            ) from None
        return listener

    async def _serve_web(self, listener: socket.socket, stop: asyncio.Event) -> None:
        import uvicorn

        assert self._web is not None

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Any:
                """The application's own stop counts."""
                yield

        config = uvicorn.Config(
            self._web[0], log_level="warning", access_log=False, timeout_graceful_shutdown=WEB_STOP_SECONDS
        )
        server = Server(config)

        async def end() -> None:
            await stop.wait()
            server.should_exit = True

        ending = asyncio.create_task(end())
        await server.serve(sockets=[listener])
        ending.cancel()


def _fail(future: "asyncio.Future[None]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
