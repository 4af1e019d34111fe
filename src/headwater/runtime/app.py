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
from enum import StrEnum
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from headwater.asgi import CannotListen, bind, serve
from headwater.event.event import Tombstone
from headwater.event.topic import Topic
from headwater.kafka.admin import KafkaAdmin
from headwater.kafka.producer import (
    Acknowledged,
    KafkaProducer,
    LoopProducer,
    NotPublished,
    Profile,
    TransactionalProducer,
)
from headwater.runtime import topics
from headwater.runtime.alert import Alerts
from headwater.runtime.handler import Function, Handler, InvalidHandler, Options, Tier
from headwater.runtime.history import History
from headwater.runtime.job import Job
from headwater.runtime.publish import Router
from headwater.runtime.relay import Relay
from headwater.runtime.retry import Delivery, Errors, GivingUp, Retry
from headwater.runtime.schemas import Schemas
from headwater.runtime.subscription import Beside, CannotStart, Runner, Subscription, Surroundings
from headwater.runtime.timers import Timers
from headwater.runtime.tracing import AsgiApp, CorrelationMiddleware
from headwater.runtime.transaction import unique_id
from headwater.settings import Settings, from_environment
from headwater.store import tables
from headwater.store.database import Database
from headwater.store.outbox import Outbox
from headwater.store.unit_of_work import UnitOfWork

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Function)

STOP_SECONDS = 20.0
JOB_LOOK_SECONDS = 0.3
DEFAULT_RETRY = Retry()


class JobCutOff(Exception):
    """A bounded job was stopped before its end; the next one goes on there."""


class App:
    def __init__(
        self,
        name: str,
        *,
        topics: Sequence[Topic] = (),
        settings: Settings | None = None,
        database: Database | None = None,
        profile: Profile = Profile.LATENCY,
        outbox: Outbox | None = None,
    ) -> None:
        """topics: those that the application publishes to; those of its handlers are known anyway.
        outbox: its table, when it is not our own; see headwater.store.outbox.
        settings: HEADWATER_* of the environment when None. Raises InvalidSetting, InvalidDatabase, NoTopic.
        """
        self.name = name
        self.settings = settings or from_environment(os.environ)
        if database is None and self.settings.database_url is not None:
            database = Database(self.settings.database_url)
        self._database = database
        self.outbox = outbox or Outbox()
        self.handlers: list[Handler] = []
        self.joined: list[object] = []
        """Sagas and other patterns that are at work in this application."""
        self.beside: list[Beside] = []
        """What reads topics on its own, such as projections."""
        self._profile = profile
        self._router = Router(name)
        self._router.add(topics)
        self._published = {topic.name for topic in topics}
        """Topics that it says it publishes to; those of its handlers may be somebody else's."""
        self._web: tuple[AsgiApp, str, int] | None = None
        self._producer: KafkaProducer | None = None
        self._loop_producer: LoopProducer | None = None
        self._admin: KafkaAdmin | None = None
        self._relay: Relay | None = None
        self._timers: Timers | None = None
        self._users = 0
        self._failed: Callable[[Exception], None] | None = None
        self._before: list[Callable[[], Awaitable[None]]] = []
        self._alerts = Alerts(self.settings.alert_webhook, name)
        self._history: History | None = None
        self._schemas = Schemas(self.settings)
        self._topic_ids: dict[str, str] = {}
        self._retentions: dict[str, int] = {}

    @property
    def database(self) -> Database:
        """Raises CannotStart when there is none."""
        if self._database is None:
            raise CannotStart(
                f"{self.name} needs a database: set HEADWATER_DATABASE_URL. `headwater up` keeps one for each application in its "
                "data folder, sqlite:///headwater-data/NAME.db."
            )
        return self._database

    @property
    def topics(self) -> list[Topic]:
        return list(self._router.topics.values())

    @property
    def _read(self) -> list[Topic]:
        return [
            *(handler.topic for handler in self.handlers),
            *(topic for each in self.beside for topic in each.topics),
        ]

    # Declaring

    def handler(
        self,
        topic: Topic,
        *,
        group: str,
        delivery: str = "at_least_once",
        retry: Retry | None = DEFAULT_RETRY,
        giving_up: str = "skip",
        poison: Errors = (),
        conflict: Errors = (),
        unavailable: Errors = (),
        concurrency: int = 100,
        threads: int = 8,
        batch: int = 500,
        tier: str | Tier | None = None,
        group_protocol: str | None = None,
        outside_effects: bool = False,
        on_gap: str = "stop",
        transaction_records: int = 1000,
    ) -> Callable[[F], F]:
        """The function handles the topic's events, in a consumer group of its own. Raises InvalidHandler, NoTopic.

        delivery: at_most_once, at_least_once, effectively_once (with a UnitOfWork) or exactly_once (Kafka to Kafka).
        retry: how often and when a failed event is tried again; None: in place, for ever, without a retry topic.
        giving_up: skip (the next event of the key goes on) or hold (the key waits for a redrive or a discard).
        poison, conflict, unavailable: error types of the handler's own; see headwater.runtime.retry.
        concurrency: how many keys at once, in this process. threads: of a sync handler. batch: the most events that a
        batch handler gets. transaction_records: the most that share a Kafka transaction under exactly_once.
        tier: the lag in seconds that alarms, "30s", or Tier(target="24h", alarm="1h").
        group_protocol: consumer for KIP-848; classic, or None for what the settings say.
        outside_effects: it acts on the world outside: a replay leaves it silent unless asked.
        on_gap: what happens when retention has passed the frontier: stop, or skip with an alert.
        """
        options = Options(
            _one_of(Delivery, "delivery", delivery), retry, _one_of(GivingUp, "giving_up", giving_up), tuple(poison),
            tuple(conflict), tuple(unavailable), concurrency, threads, batch,
            Tier(tier, tier) if isinstance(tier, str) else tier, group_protocol, outside_effects, on_gap,
            transaction_records,
        )  # fmt: skip

        def register(function: F) -> F:
            self._check_group(group)
            handler = Handler(function, topic, group, options)
            self._router.add([topic])
            self.handlers.append(handler)
            return function

        return register

    def run_beside(self, beside: Beside) -> None:
        """Run it whenever the handlers run. Raises InvalidHandler, NoTopic."""
        self._check_group(beside.name)
        self._router.add(beside.topics)
        self.beside.append(beside)

    def _check_group(self, group: str) -> None:
        """Raises InvalidHandler."""
        if group in [*(each.group for each in self.handlers), *(each.name for each in self.beside)]:
            raise InvalidHandler(
                f"{self.name} has a group {group} already: each handler, projection and audit is a group of its own."
            )

    def on_start(self, function: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        """Awaited before anything is handled or served, when publishing works already: tables, caches."""
        self._before.append(function)
        return function

    def web(self, asgi: AsgiApp, *, host: str = "127.0.0.1", port: int = 8000) -> None:
        """Serve an ASGI application in the same process, with correlation ids (needs headwater[web])."""
        self._web = (CorrelationMiddleware(asgi), host, port)

    async def check(self, seconds: float = 2.0) -> dict[str, str]:
        """What it needs, each `ok` or what is wrong with it: for `/ready`. A process whose broker is away still answers what it
        can from its database: that is `/health`."""
        loop = asyncio.get_running_loop()
        checks = {"kafka": loop.run_in_executor(None, self._check_kafka, seconds)}
        if self._database is not None:
            checks["database"] = loop.run_in_executor(None, self._check_database)
        found = {}
        for name, future in checks.items():
            try:
                await asyncio.wait_for(future, seconds + 1)
                found[name] = "ok"
            except Exception as error:  # whatever its driver raises
                found[name] = (str(error) or f"no answer within {seconds:.0f} s").splitlines()[0]
        return found

    def _check_kafka(self, seconds: float) -> None:
        """Raises AdminError."""
        if self._admin is None:
            self._admin = KafkaAdmin(self.settings)
        self._admin.check_reachable(seconds)

    def _check_database(self) -> None:
        connection = self.database.engine.raw_connection()  # outside any transaction: SQLite's would wait for writers
        try:
            connection.cursor().execute("SELECT 1")
        finally:
            connection.close()

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

    async def publish_all(self, events: Sequence[object]) -> None:
        """All of them at once. Raises NotPublished, NoTopic."""
        await asyncio.gather(*(self.publish(event) for event in events))

    def publish_all_sync(self, events: Sequence[object]) -> None:
        """`publish_all` for threads without an event loop."""
        for event in events:
            self.publish_sync(event)

    def begin(self) -> None:
        """See `headwater.runtime.delivery.Effects`: nothing is to be prepared."""

    def unit_of_work(self, session: AsyncSession | Session | None = None) -> UnitOfWork:
        """On the caller's own session, or on a new async one of this application's database."""
        database = self.database  # whose outbox the relay reads
        if session is None:
            session = database.async_sessions()
        return UnitOfWork(session, self._router.outbox_row, self.outbox, self.name, self._committed)

    def sync_unit_of_work(self) -> UnitOfWork:
        return UnitOfWork(self.database.sessions(), self._router.outbox_row, self.outbox, self.name, self._committed)

    async def release(self, uow: UnitOfWork) -> None:
        await uow.async_session.close()

    def _committed(self) -> None:
        if self._relay is not None:
            self._relay.wake()
        if self._timers is not None:
            self._timers.wake()

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
        await loop.run_in_executor(None, self._make_topics)
        await loop.run_in_executor(None, self._check_transactions)
        await loop.run_in_executor(None, self.prepare_schemas)
        if self._database is not None:
            await loop.run_in_executor(None, tables.create_tables, self.database.engine)
            await loop.run_in_executor(None, self.outbox.prepare, self.database.engine)
        if self.settings.history is not None and self._history is None:
            self._history = History(self.settings.history)
        self._producer = KafkaProducer(self.settings, self._profile, self._producer_failed)
        self._loop_producer = LoopProducer(self._producer, loop)
        if self._database is not None:
            self._relay = Relay(self.database, self.settings, self.outbox)
            self._relay.start()
            self._timers = Timers(self.database, self.name, self.outbox, self._relay.wake)
            self._timers.start()
        for function in self._before:
            await function()

    async def _close(self) -> None:
        loop = asyncio.get_running_loop()
        if self._timers is not None:
            await loop.run_in_executor(None, self._timers.stop)
            self._timers = None
        if self._relay is not None:
            await loop.run_in_executor(None, self._relay.stop)
            self._relay = None
        if self._producer is not None:
            await loop.run_in_executor(None, self._producer.close)
            self._producer = self._loop_producer = None
        if self._database is not None:
            await self.database.close()
        await loop.run_in_executor(None, self._alerts.close)

    def prepare_schemas(self) -> None:
        """So that events of topics with schemas can be published. Blocks. Raises UnusableSchema, RegistryUnreachable."""
        self._router.framed = self._schemas.prepare(self.topics, self._published)

    def _check_handlers(self) -> None:
        """What can be known to go wrong. Raises InvalidHandler."""
        for each in self.beside:
            if each.needs_database and self._database is None:
                raise InvalidHandler(f"{each.name} keeps its rows in a database: set HEADWATER_DATABASE_URL.")
        for handler in self.handlers:
            if handler.uow_parameter is not None and self._database is None:
                raise InvalidHandler(
                    f"the handler {handler.name} takes a UnitOfWork, but there is no database: set HEADWATER_DATABASE_URL."
                )
            for cls in handler.returns:
                if cls is not Tombstone and not self._router.lists(cls):
                    raise InvalidHandler(
                        f"the handler {handler.name} returns {cls.__name__}, which no topic of the application lists: "
                        f"give the App its topic, App({self.name!r}, topics=[...])."
                    )

    def _producer_failed(self, error: NotPublished) -> None:
        """In the poll thread: the client can't go on. A process that is supervised starts again."""
        logger.critical("producer_failed app=%s error=%s", self.name, error)
        if self._failed is not None:
            self._failed(error)

    def _make_topics(self) -> None:
        """Raises CannotStart, AdminError."""
        topics.make(self.name, self.topics, self.handlers, self.settings)
        self._topic_ids = topics.ids(sorted({topic.name for topic in self._read}), self.settings)
        self._retentions = topics.retentions_ms(self.handlers, self.settings)

    def _check_transactions(self) -> None:
        """Raises CannotStart."""
        for handler in self.handlers:
            if handler.delivery is Delivery.EXACTLY_ONCE:
                try:
                    TransactionalProducer(self.settings, unique_id(handler.group)).close(1.0)
                except NotPublished as error:
                    raise CannotStart(
                        f"the handler {handler.name} is exactly_once, which needs transactions, and this cluster refuses them "
                        f"({error}). The embedded broker has none yet: run on Apache Kafka, or use effectively_once."
                    ) from None
                return

    async def run(self, stop: asyncio.Event, *, until_now: bool = False) -> None:
        """Until `stop` is set. until_now: until its handlers have handled all that their topics have at the start, dead letters
        and retries among it. Raises CannotStart, AdminError, ConsumerFailed, NotPublished."""
        loop = asyncio.get_running_loop()
        failure: asyncio.Future[None] = loop.create_future()

        def failed(error: Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended already
                loop.call_soon_threadsafe(_fail, failure, error)

        self._failed = failed
        listener = self._bind_web()
        async with self.lifespan():
            around = self._surroundings(failed)
            subscriptions = self._subscribe(around, loop)
            runners: list[Runner] = []
            web = (
                asyncio.create_task(serve(self._web[0], listener, stop)) if self._web and listener is not None else None
            )
            stopping = asyncio.create_task(stop.wait())
            caught_up: asyncio.Task[None] | None = None
            try:
                for each in self.beside:
                    runners.append(await loop.run_in_executor(None, each.begin, around, self._topic_ids))
                if until_now:
                    caught_up = asyncio.create_task(self._catch_up(runners))
                logger.info("running app=%s handlers=%d", self.name, len(subscriptions))
                waited = [task for task in (stopping, failure, web, caught_up) if task is not None]
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            finally:
                stop.set()
                logger.info("stopping app=%s", self.name)
                for subscription in subscriptions:
                    subscription.request_stop(STOP_SECONDS)
                for runner in runners:
                    await loop.run_in_executor(None, runner.stop)
                while any(each.is_alive for each in subscriptions):
                    await asyncio.sleep(0.01)
                for subscription in subscriptions:
                    await subscription.close()
                stopping.cancel()
                if caught_up is not None:
                    caught_up.cancel()
            if caught_up is not None and not failure.done():
                if not caught_up.done() or caught_up.cancelled():
                    raise JobCutOff(f"{self.name} was stopped before it had handled all that was there.")
                caught_up.result()
            if web is not None:
                await web
        if failure.done():
            failure.result()

    async def _catch_up(self, runners: Sequence[Runner]) -> None:
        """Returns when each group has settled what its topic has now. Raises AdminError, CannotStart."""
        if not self._read:
            raise CannotStart(f"{self.name} has no handlers: there is nothing that could be done up to now.")
        loop = asyncio.get_running_loop()
        work = [(handler.group, handler.topic.name) for handler in self.handlers]
        job = Job(
            self.settings,
            work,
            [
                (runner, [topic.name for topic in each.topics])
                for runner, each in zip(runners, self.beside, strict=True)
            ],
        )
        await loop.run_in_executor(None, job.take_ends)
        while not await loop.run_in_executor(None, job.is_done):
            await asyncio.sleep(JOB_LOOK_SECONDS)

    def _surroundings(self, failed: Callable[[Exception], None]) -> Surroundings:
        assert self._loop_producer is not None
        return Surroundings(
            self.settings,
            self,
            self._loop_producer,
            self._database,
            self._alerts,
            self._history,
            failed,
            self._router.encode,
            self._schemas,
            lambda handler, partitions: topics.grow(handler, partitions, self.settings),
        )

    def _subscribe(self, around: Surroundings, loop: asyncio.AbstractEventLoop) -> list[Subscription]:
        subscriptions = [
            Subscription(
                handler, around, self._topic_ids[handler.topic.name], self._retentions.get(handler.topic.name, -1), loop
            )
            for handler in self.handlers
        ]
        for each in subscriptions:
            each.start()
        return subscriptions

    def _bind_web(self) -> socket.socket | None:
        """Raises CannotStart."""
        if self._web is None:
            return None
        _, host, port = self._web
        try:
            return bind(host, port)
        except CannotListen as error:
            raise CannotStart(
                f"{self.name} can't serve {error}. Stop what uses the port, or give `app.web` another."
            ) from None


Choice = TypeVar("Choice", bound=StrEnum)


def _one_of(choices: type[Choice], name: str, value: str) -> Choice:
    """Raises InvalidHandler."""
    try:
        return choices(value)
    except ValueError:
        raise InvalidHandler(f"{name}={value!r} is not known: {', '.join(choices)}.") from None


def _fail(future: "asyncio.Future[None]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
