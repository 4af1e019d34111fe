"""exactly_once: a batch of events is read, handled and written in one Kafka transaction, with the group's offsets.

    begin -> hand a batch to the owners -> all of it is handled, or parked in the same transaction -> offsets -> commit

Nothing of the group is begun outside a transaction: retries and redrives go with the next batch. When anything can't be
written, and when the handler's surroundings are out, the transaction is aborted: nobody who reads `read_committed` has
seen any of it. The owners are thrown away, and new ones begin where the group has committed.

Batches are sized so that one takes about a second: the broker aborts a transaction after `transaction.timeout.ms`, here
10 s, which is also how long the successor of a killed process may wait. A handler that takes longer for one event needs
a longer one (HEADWATER_KAFKA_TRANSACTION_TIMEOUT_MS).

Fencing is KIP-447's: the offsets are committed with the group's generation.
"""

import asyncio
import contextlib
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Protocol, TypeVar

import msgspec

from headwater.event.codec import Encoded
from headwater.event.topic import Topic
from headwater.kafka.consumer import Message, TopicPartition
from headwater.kafka.producer import Acknowledged, Headers, LoopProducer, NotPublished, TransactionalProducer
from headwater.runtime import crash_point
from headwater.runtime.frontier import Waiting, decode_metadata, encode_metadata
from headwater.runtime.owner import Owner
from headwater.runtime.pace import Pace

logger = logging.getLogger(__name__)

TARGET_SECONDS = 1.0
LINGER_SECONDS = 0.002
IDLE_SECONDS = 0.1
FIRST_TROUBLE_SECONDS = 0.2
LONGEST_TROUBLE_SECONDS = 30.0
COMMIT_SECONDS = 30.0


T = TypeVar("T")


class Aborted(Exception):
    """The transaction can't be committed; the message says why."""


class Encode(Protocol):
    """Finds an event's topic and key and puts it in its envelope."""

    def __call__(self, event: object) -> tuple[Topic, bytes, Encoded]: ...


_attempted_in: ContextVar[int] = ContextVar("headwater_transaction", default=0)


class TransactionEffects:
    """What a handler returns goes into the transaction that it was called in; that it got there shows when that
    commits. A handler that comes back when it is over, of a partition that is gone or after an abort, writes nothing."""

    def __init__(self, transactions: "Transactions", encode: Encode) -> None:
        self._transactions = transactions
        self._encode = encode

    def begin(self) -> None:
        """A handler is about to be called, in this context."""
        _attempted_in.set(self._transactions.number)

    async def publish(self, event: object) -> None:
        self.publish_all_sync([event])

    def publish_sync(self, event: object) -> None:
        self.publish_all_sync([event])

    async def publish_all(self, events: Sequence[object]) -> None:
        self.publish_all_sync(events)

    def publish_all_sync(self, events: Sequence[object]) -> None:
        """All or none. Raises NotPublished, NoTopic."""
        encoded = [self._encode(event) for event in events]
        for topic, key, each in encoded:
            self._transactions.write(_attempted_in.get(), topic.name, key, each)

    def unit_of_work(self) -> object:
        raise NotImplementedError("exactly_once takes no unit of work")

    sync_unit_of_work = unit_of_work

    async def release(self, uow: object) -> None:
        raise NotImplementedError("exactly_once takes no unit of work")


class Transactions:
    def __init__(
        self,
        new_producer: Callable[[], TransactionalProducer],
        group_metadata: Callable[[], object],
        topic: str,
        pace: Pace,
        most_records: int,
        loop: asyncio.AbstractEventLoop,
        committed: Callable[[int, int, int], None],
        reset: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """committed: told of partition, token and offset. reset: throws the owners away, and begins at the committed
        offsets. failed: told when it can't go on at all."""
        self._failed = failed
        self._new_producer = new_producer
        self._group_metadata = group_metadata
        self._topic = topic
        self._pace = pace
        self._most = most_records
        self._size = min(100, most_records)
        self._loop = loop
        self._committed = committed
        self._reset = reset
        self._producer: TransactionalProducer | None = None
        self._loop_producer: LoopProducer | None = None
        self._incoming: deque[tuple[Owner, Sequence[Message]]] = deque()
        self._owners: set[Owner] = set()
        self._wake = asyncio.Event()
        self._trouble: str | None = None
        self._is_closing = False
        self._is_busy = False
        self._is_held = False
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="transaction")
        self._task: asyncio.Task[None] | None = None
        self.number = 0
        """Of the transaction that is open; 0 when there is none."""
        self._count = 0
        self._is_out = False
        self._is_told = False
        """The group's commits say why it waits."""
        self._closing = asyncio.Event()
        pace.is_shut = True
        pace.breaker.only_unavailable = True

    def start(self) -> None:
        self._task = self._loop.create_task(self._run())
        self._task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self._failed(error)  # a group that stands still in silence would be worse than an end

    async def close(self) -> None:
        self._is_closing = True
        self._closing.set()
        self._wake.set()
        if self._task is not None:
            await self._task
        if self._producer is not None:
            await self._in_thread(functools.partial(self._producer.close, 1.0))
        self._executor.shutdown(wait=False)

    # Owners

    def add(self, owner: Owner, messages: Sequence[Message]) -> None:
        if not owner.is_stopping:
            self._incoming.append((owner, messages))
            self._wake.set()

    def join(self, owner: Owner) -> None:
        self._owners.add(owner)
        self._wake.set()

    def leave(self, owner: Owner) -> None:
        if owner in self._owners and self.number:
            self._trouble = "a partition was taken away in the middle"  # what it wrote must not be committed
        self._owners.discard(owner)
        self._incoming = deque((other, messages) for other, messages in self._incoming if other is not owner)

    async def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers,
        *,
        partition: int,
    ) -> Acknowledged:
        """A record of the protocol's own, in the transaction. Raises NotPublished."""
        if self._loop_producer is None:
            raise NotPublished("no transaction is open")
        try:
            return await self._loop_producer.send(topic, key, value, headers, partition=partition)
        except NotPublished as error:
            self._trouble = str(error)
            raise

    def write(self, number: int, topic: str, key: bytes, encoded: Encoded) -> None:
        """From any thread. Raises NotPublished when that transaction is over."""
        producer = self._producer
        if producer is None or number != self.number or not number:
            raise NotPublished("the transaction that this belongs to is over")
        producer.send(topic, key, encoded.value, encoded.headers, functools.partial(self._written, number))

    def _written(self, number: int, result: Acknowledged | NotPublished) -> None:
        if isinstance(result, NotPublished) and number == self.number:
            self._trouble = str(result)

    # The loop

    async def _run(self) -> None:
        pause = FIRST_TROUBLE_SECONDS
        while not self._is_closing:
            if not self._has_work():
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), IDLE_SECONDS)
                continue
            self._is_busy = True
            try:
                started = self._loop.time()
                await self._one()
                pause = FIRST_TROUBLE_SECONDS
                if self._is_out:
                    self._is_out = self._is_told = False
                    self._pace.recovered()
                self._resize(self._loop.time() - started)
            except Exception as error:
                if not isinstance(error, Aborted | NotPublished):
                    logger.exception("transaction_failed topic=%s", self._topic)
                logger.warning(
                    "transaction_aborted topic=%s next_try_seconds=%.1f reason=%s", self._topic, pause, error
                )
                must_tell = self._is_out and not self._is_told and not self._is_closing
                places, group = self._places_that_wait(str(error)) if must_tell else [], self._group_metadata()
                await self._abort()
                if places:
                    await self._tell(places, group)
                if not self._is_closing:
                    self._reset()
                self._is_busy = False
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), pause)
                pause = min(pause * 2, LONGEST_TROUBLE_SECONDS)
            finally:
                self._is_busy = False

    def _has_work(self) -> bool:
        if self._is_held:
            return False
        return any(owner.is_loaded for owner, _ in self._incoming) or any(owner.has_due for owner in self._owners)

    def _resize(self, seconds: float) -> None:
        if seconds > TARGET_SECONDS:
            self._size = max(1, self._size // 2)
        elif seconds < TARGET_SECONDS / 2:
            self._size = min(self._most, self._size * 2)

    async def _one(self) -> None:
        """One transaction. Raises Aborted, NotPublished."""
        if self._producer is None:
            self._producer = await self._in_thread(self._new_producer)
            self._loop_producer = LoopProducer(self._producer, self._loop)
        self._trouble = None
        producer = self._producer
        await self._in_thread(producer.begin)
        self._count += 1
        self.number = self._count
        owners = set(self._owners)
        self._pace.is_shut = False
        await self._feed()
        for owner in owners | self._owners:
            owner.go_on()
        await self._until_idle()
        self._pace.is_shut = True
        await self._until_idle()
        crash_point.reached("before_commit")
        positions: list[tuple[Owner, int, str]] = []
        for owner in self._owners:
            owner.look()
            if owner.committable is not None and owner.committable != owner.last_committed:
                positions.append((owner, *owner.committable))
        if self._trouble is not None:
            raise Aborted(self._trouble)
        offsets = [TopicPartition(self._topic, owner.partition, offset, text) for owner, offset, text in positions]
        await self._in_thread(lambda: producer.commit(offsets, self._group_metadata(), COMMIT_SECONDS))
        self.number = 0
        crash_point.reached("after_commit")
        for owner, offset, text in positions:
            owner.last_committed = (offset, text)
            self._committed(owner.partition, owner.assignment.token, offset)

    async def _feed(self) -> None:
        """A batch, over all partitions; what comes within 2 ms shares the transaction."""
        left = self._size
        ends = self._loop.time() + LINGER_SECONDS
        while left > 0:
            found = next((i for i, (owner, _) in enumerate(self._incoming) if owner.is_loaded), None)
            if found is None:
                if self._loop.time() >= ends:
                    return
                await asyncio.sleep(LINGER_SECONDS / 2)
                continue
            owner, messages = self._incoming[found]
            del self._incoming[found]
            if len(messages) > left:
                self._incoming.insert(found, (owner, messages[left:]))
                messages = messages[:left]
            left -= len(messages)
            owner.add(messages)

    async def _until_idle(self) -> None:
        """Until all that was handed over is settled. Raises Aborted when that must not be waited for."""
        while True:
            if self._pace.breaker.is_open:
                outage = self._pace.breaker.outage
                assert outage is not None
                self._is_out = True
                raise Aborted(outage.reason)
            if self._trouble is not None:
                raise Aborted(self._trouble)
            if all(owner.is_idle for owner in self._owners):
                return
            if self._is_closing:
                raise Aborted("the application stops")
            await asyncio.sleep(0.0005)

    async def _abort(self) -> None:
        self.number = 0
        self._pace.is_shut = True
        self._incoming.clear()
        for owner in self._owners:
            owner.stop()
            owner.cancel()
        self._owners.clear()
        self._pace.start_anew()
        producer, self._producer, self._loop_producer = self._producer, None, None
        if producer is not None:
            await self._in_thread(producer.abort)
            await self._in_thread(functools.partial(producer.close, 1.0))
        self._size = 1

    def _places_that_wait(self, reason: str) -> list[TopicPartition]:
        """What the group has committed, with the reason why it doesn't go on."""
        waiting = Waiting(reason, time.time_ns() // 1_000_000)
        places = []
        for owner in self._owners:
            offset, progress = owner.work.began_at, owner.assignment.progress
            if owner.last_committed is not None:
                offset, progress = owner.last_committed[0], decode_metadata(owner.last_committed[1]) or progress
            if offset is not None:
                text = encode_metadata(msgspec.structs.replace(progress, waiting=waiting))
                places.append(TopicPartition(self._topic, owner.partition, offset, text))
        return places

    async def _tell(self, places: list[TopicPartition], group: object) -> None:
        """In a transaction that has nothing else: what was aborted took its commit with it. group: the generation that
        the places belong to; a later one may have gone on from there. Tried once."""
        self._is_told = True
        producer: TransactionalProducer | None = None
        try:
            producer = await self._in_thread(self._new_producer)
            await self._in_thread(producer.begin)
            await self._in_thread(functools.partial(producer.commit, places, group, COMMIT_SECONDS))
        except Exception as error:
            logger.warning("outage_not_committed topic=%s reason=%s", self._topic, error)
            if producer is not None:
                with contextlib.suppress(Exception):
                    await self._in_thread(producer.abort)
        finally:
            if producer is not None:
                await self._in_thread(functools.partial(producer.close, 1.0))

    def hold(self) -> None:
        """Begin no transaction until `go_on`: partitions are about to go."""
        self._is_held = True

    async def drain(self, seconds: float) -> None:
        """Let the transaction under way come to its end."""
        deadline = self._loop.time() + seconds
        while self._is_busy and self._loop.time() < deadline:
            await asyncio.sleep(0.001)

    def go_on(self) -> None:
        self._is_held = False
        self._wake.set()

    async def _in_thread(self, function: Callable[[], T]) -> T:
        """Raises Aborted."""
        try:
            return await self._loop.run_in_executor(self._executor, function)
        except NotPublished as error:
            raise Aborted(str(error)) from None


def unique_id(group: str) -> str:
    """A transactional id of its own for each producer: what fences is the group's generation."""
    return f"headwater-{group}-{time.time_ns():x}"
