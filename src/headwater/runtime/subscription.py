"""A handler in its consumer group, in this process: the threads, the owners of its partitions, and what they share."""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Protocol

from sqlalchemy.exc import SQLAlchemyError

from headwater.event.topic import Topic
from headwater.kafka.admin import AdminError, KafkaAdmin
from headwater.kafka.consumer import Begun, KafkaConsumer, Message
from headwater.kafka.producer import LoopProducer, TransactionalProducer
from headwater.runtime.alert import Alerts
from headwater.runtime.assignment import Assignment
from headwater.runtime.breaker import Outage
from headwater.runtime.consumer_thread import ConsumerThread
from headwater.runtime.daemon_executor import DaemonExecutor
from headwater.runtime.decoding import SchemaSource
from headwater.runtime.delivery import Calls, Effects
from headwater.runtime.doors import PartitionDoors
from headwater.runtime.frontier import Progress
from headwater.runtime.handler import Handler
from headwater.runtime.history import History
from headwater.runtime.lane import Attempted
from headwater.runtime.owner import Owner
from headwater.runtime.pace import Pace
from headwater.runtime.retry import Delivery
from headwater.runtime.retry_reader import RetryReader
from headwater.runtime.retry_topic import SourceRecord
from headwater.runtime.strands import StrandPool
from headwater.runtime.transaction import Encode, TransactionEffects, Transactions, unique_id
from headwater.settings import Settings
from headwater.store import inbox
from headwater.store.database import Database

logger = logging.getLogger(__name__)

LAG_SECONDS = 1.0  # between looks at the lag
CLEAN_SECONDS = 3600.0  # between cleanings of the inbox
KEPT_BEYOND_RETENTION = timedelta(days=7)


class CannotStart(Exception):
    """The application can't start; the message says what to do."""


class Surroundings(NamedTuple):
    """What an application gives all its subscriptions."""

    settings: Settings
    effects: Effects
    producer: LoopProducer
    database: Database | None
    alerts: Alerts
    history: History | None
    failed: Callable[[Exception], None]
    encode: Encode
    schemas: SchemaSource
    grow: Callable[[Handler, int], None]
    """See that the handler's retry and dead-letter topics have so many partitions. Raises AdminError."""


class Runner(Protocol):
    """What a `Beside` has begun."""

    def stop(self) -> None:
        """What is at work is finished first, within a bound. Blocks."""

    def is_done(self, ends: Mapping[tuple[str, int], int]) -> bool:
        """Whether it is as far as these offsets, by topic and partition. Blocks."""


class Beside(Protocol):
    """What an application runs beside its handlers, reading topics on its own."""

    @property
    def name(self) -> str: ...

    @property
    def topics(self) -> Sequence[Topic]: ...

    @property
    def needs_database(self) -> bool: ...

    def begin(self, around: Surroundings, topic_ids: Mapping[str, str]) -> Runner:
        """Blocks."""


class Subscription:
    def __init__(
        self, handler: Handler, around: Surroundings, topic_id: str, retention_ms: int, loop: asyncio.AbstractEventLoop
    ) -> None:
        """retention_ms: of the source topic; -1 is for ever."""
        self._handler = handler
        self._around = around
        self._topic_id = topic_id
        self._retention_ms = retention_ms
        self._loop = loop
        options = handler.options
        self._policy = handler.policy()
        executor = DaemonExecutor(options.threads, f"handler-{handler.group}")
        self._pace = Pace(handler.name, options.concurrency, _now_ms, self._breaker_changed)
        consumer = KafkaConsumer(around.settings, handler.group, options.group_protocol)
        self._transactions: Transactions | None = None
        effects: Effects = around.effects
        if handler.delivery is Delivery.EXACTLY_ONCE:
            self._transactions = Transactions(
                lambda: TransactionalProducer(around.settings, unique_id(handler.group)),
                lambda: self._thread.group_metadata,
                handler.topic.name,
                self._pace,
                options.transaction_records,
                loop,
                self.committed,
                lambda: self._thread.reset(),
                around.failed,
            )
            effects = TransactionEffects(self._transactions, around.encode)  # type: ignore[assignment]
        self._calls = Calls(handler, effects, executor, topic_id, around.schemas)
        self._strands = None
        if not handler.is_async and not handler.batch:
            self._strands = StrandPool(self._calls.begin, self._calls.attempt_sync, executor, options.threads, loop)
        self._owner_name = f"{socket.gethostname()}:{os.getpid()}"
        self._reader = RetryReader(
            around.settings,
            handler.retry_topic,
            handler.dead_topic,
            loop,
            lambda partitions: around.grow(handler, partitions),
            around.failed,
            is_transactional=handler.delivery is Delivery.EXACTLY_ONCE,
        )
        self._owners: dict[int, Owner] = {}
        self._watch: asyncio.Task[None] | None = None
        self._thread = ConsumerThread(
            consumer,
            handler.topic.name,
            loop,
            self,
            around.failed,
            commits_first=handler.delivery is Delivery.AT_MOST_ONCE,
            commits=self._transactions is None,
        )

    def start(self) -> None:
        if self._policy.retry is not None:
            self._reader.start()
        if self._transactions is not None:
            self._transactions.start()
        self._thread.start()
        self._watch = self._loop.create_task(self._keep_watch())

    def request_stop(self, seconds: float) -> None:
        self._thread.request_stop(seconds)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive

    async def close(self) -> None:
        if self._transactions is not None:
            await self._transactions.close()
        self._reader.stop()
        if self._watch is not None:
            self._watch.cancel()

    # Told by the consumer thread

    def new_owner(self, begun: Begun, progress: Progress, token: int, space: Callable[[], None]) -> Owner:
        handler, around = self._handler, self._around
        assignment = Assignment(handler.topic.name, begun.partition, token, begun.committed, progress, self._topic_id)
        doors = PartitionDoors(
            handler,
            assignment,
            self._calls,
            self._transactions or around.producer,
            self._reader,
            owner_name=self._owner_name,
            database=around.database,
            history=around.history,
            dead_lettered=self._dead_lettered,
        )
        return Owner(
            self._policy,
            assignment,
            doors,
            self._pace,
            threads=self._strands,
            space=space,
            failed=around.failed,
            writes_history=around.history is not None,
        )

    def assigned(self, owner: Owner) -> None:
        self._owners[owner.partition] = owner
        if self._transactions is not None:
            self._on_loop(self._transactions.join, owner)
        if self._policy.retry is not None:
            self._reader.add(owner)

    def taken_away(self, owner: Owner) -> None:
        if self._owners.get(owner.partition) is owner:
            del self._owners[owner.partition]
        if self._policy.retry is not None:
            self._reader.remove(owner)
        if self._transactions is not None:
            self._on_loop(self._transactions.leave, owner)

    def add(self, work: list[tuple[Owner, list[Message]]]) -> None:
        for owner, batch in work:
            if self._transactions is not None:
                self._transactions.add(owner, batch)
            else:
                owner.add(batch)

    def about_to_go(self, seconds: float) -> None:
        if self._transactions is not None:
            self._on_loop(self._transactions.hold)
            with contextlib.suppress(TimeoutError, RuntimeError):
                drained = asyncio.run_coroutine_threadsafe(self._transactions.drain(seconds), self._loop)
                drained.result(seconds + 1.0)

    def went(self) -> None:
        if self._transactions is not None:
            self._on_loop(self._transactions.go_on)

    def _on_loop(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the application is gone
            self._loop.call_soon_threadsafe(function, *arguments)

    def committed(self, partition: int, token: int, offset: int) -> None:
        if self._around.history is not None:
            self._around.history.write("commit", self._handler.group, partition, token, o=offset)

    def gap(self, partition: int, message: str) -> bool:
        if self._handler.options.on_gap != "skip" or self._is_another_topic():
            return False
        self._around.alerts.happened("gap", self._handler.group, self._handler.topic.name, message.split("\n")[0])
        return True

    def _is_another_topic(self) -> bool:
        """Whether the topic was deleted and made again, which is no gap: an application that starts anew knows it."""
        try:
            (found,) = KafkaAdmin(self._around.settings).describe_topics([self._handler.topic.name])
        except (AdminError, ValueError):
            return True
        return found.topic_id != self._topic_id

    # Alerts

    def _breaker_changed(self, outage: Outage | None) -> None:
        alerts, group, topic = self._around.alerts, self._handler.group, self._handler.topic.name
        if outage is not None:
            alerts.raised("breaker", group, topic, outage.reason)
        else:
            alerts.recovered("breaker", group, topic)

    def _dead_lettered(self, source: SourceRecord, attempted: Attempted) -> None:
        self._around.alerts.happened(
            "dead_letter",
            self._handler.group,
            self._handler.topic.name,
            f"offset {source.offset} after {attempted.attempts} attempts, {attempted.kind}: {attempted.error}",
        )

    def lag_seconds(self) -> float:
        """How old the oldest event is that was taken and is not settled; 0 when there is none."""
        waiting = [owner.first_waiting_ms for owner in list(self._owners.values())]
        oldest = min((moment for moment in waiting if moment is not None and moment > 0), default=None)
        return max(0.0, time.time() - oldest / 1000) if oldest is not None else 0.0

    async def _keep_watch(self) -> None:
        """The lag against the tier, and the age of the inbox."""
        next_cleaning = 0.0
        while True:
            self._check_tier()
            if time.monotonic() >= next_cleaning:
                next_cleaning = time.monotonic() + CLEAN_SECONDS
                await self._clean_inbox()
            await asyncio.sleep(LAG_SECONDS)

    def _check_tier(self) -> None:
        tier = self._handler.options.tier
        if tier is None:
            return
        lag = self.lag_seconds()
        alerts, group, topic = self._around.alerts, self._handler.group, self._handler.topic.name
        if lag > tier.alarm_seconds:
            alerts.raised(
                "tier", group, topic, f"the oldest unsettled event is {lag:.0f} s old, the alarm is {tier.alarm}"
            )
        elif lag <= tier.target_seconds:
            alerts.recovered("tier", group, topic, f"the lag is below {tier.target}")

    async def _clean_inbox(self) -> None:
        """What is older than the topic keeps can't be delivered again."""
        database = self._around.database
        if self._handler.delivery is not Delivery.EFFECTIVELY_ONCE or database is None or self._retention_ms < 0:
            return
        before = datetime.now(UTC) - timedelta(milliseconds=self._retention_ms) - KEPT_BEYOND_RETENTION

        def clean() -> int:
            with database.sessions() as session, session.begin():
                return inbox.delete_older(session, self._handler.group, before)

        try:
            gone = await self._loop.run_in_executor(None, clean)
            logger.info("inbox_cleaned group=%s rows=%d", self._handler.group, gone)
        except (SQLAlchemyError, AdminError) as error:
            logger.warning("inbox_not_cleaned group=%s error=%s", self._handler.group, str(error).split("\n")[0])


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
