"""A lane: the events of one assigned partition, handled one after the other.

Promise   Events are handled in the order of their offsets. An event counts as settled when its handler has returned and
          what it returned is published; the frontier, the first offset that is not settled, is all that is ever
          committed. A handler that raises is tried again, the same event, with growing pauses; the partition waits, and
          says so in its committed metadata. Nothing is skipped but what can't be decoded.
Not       More than one event of a partition at a time.

A lane belongs to one assignment of its partition: after a revoke it handles nothing more, and a new one begins.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from contextvars import copy_context
from typing import NamedTuple, Protocol

import msgspec

from headwater.event.codec import Undecodable, Unknown
from headwater.event.envelope import Cause, Envelope, set_cause
from headwater.kafka.consumer import Message
from headwater.runtime.handler import Handler
from headwater.store.unit_of_work import UnitOfWork

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 30.0
TURN_SECONDS = 0.005  # of handlers that never wait, before others have their turn
MAX_ERROR = 1000
METADATA_PREFIX = "hw1:"
MAX_METADATA = 4000  # Kafka's limit is 4,096 (offset.metadata.max.bytes)


class Waiting(msgspec.Struct, frozen=True):
    """Why a partition does not go on, as it stands in the committed metadata."""

    offset: int
    attempts: int
    error: str
    since_ms: int


class HandlerFailed(NamedTuple):
    """A sync handler raised, in its thread."""

    error: Exception


class Effects(Protocol):
    """What a lane needs of its application."""

    def unit_of_work(self) -> UnitOfWork:
        """On a new async session, which is closed by `release`."""

    def sync_unit_of_work(self) -> UnitOfWork: ...

    async def release(self, uow: UnitOfWork) -> None: ...

    def publish(self, event: object) -> Awaitable[object]: ...

    def publish_sync(self, event: object) -> object: ...

    async def dead_letter(self, handler: Handler, message: Message, reason: str) -> None: ...


class Lane:
    def __init__(
        self,
        handler: Handler,
        partition: int,
        effects: Effects,
        executor: Executor,
        space: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """`space` is called when buffered events were handled, `failed` when the lane itself breaks."""
        self.partition = partition
        self.frontier: int | None = None
        """The first offset that is not settled; None before the first event. Read by the consumer thread."""
        self.waiting: Waiting | None = None
        self.taken = 0
        self.taken_bytes = 0
        """Handed over so far; counted by the consumer thread, which bounds what is taken and not done."""
        self.done = 0
        self.done_bytes = 0
        self.stopped = threading.Event()
        self._handler = handler
        self._effects = effects
        self._executor = executor
        self._space = space
        self._failed = failed
        self._queue: deque[list[Message]] = deque()
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._is_stopping = False
        self._is_cancelled = False
        self._task: asyncio.Task[None] | None = None

    @property
    def metadata(self) -> str:
        """What goes with the committed offset."""
        waiting = self.waiting
        if waiting is None:
            return METADATA_PREFIX
        text = METADATA_PREFIX + msgspec.json.encode(waiting).decode()
        if len(text) > MAX_METADATA:
            short = msgspec.structs.replace(waiting, error=waiting.error[:500] + "...")
            text = METADATA_PREFIX + msgspec.json.encode(short).decode()
        return text

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def add(self, messages: list[Message]) -> None:
        if not self._is_stopping:
            self._queue.append(messages)
            self._wake.set()

    def stop(self) -> None:
        """Begin no further event; `stopped` is set when the one at work is done."""
        self._is_stopping = True
        self._stopping.set()
        self._wake.set()

    def cancel(self) -> None:
        """The time for stopping is over: an async handler is cancelled, its event stays unsettled."""
        self._is_cancelled = True
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            while not self._is_stopping:
                if not self._queue:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                messages = self._queue.popleft()
                if self._handler.is_async:
                    await self._handle_async(messages)
                else:
                    await self._handle_sync(messages)
                self.done += len(messages)
                self.done_bytes += sum(len(message.value() or b"") for message in messages)
                self._space()
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            logger.warning("handler_cancelled handler=%s partition=%d", self._handler.name, self.partition)
        except Exception as error:
            logger.exception("lane_failed handler=%s partition=%d", self._handler.name, self.partition)
            self._failed(error)  # a partition that stands still in silence would be worse than an end
        finally:
            self.stopped.set()

    # Async handlers

    async def _handle_async(self, messages: list[Message]) -> None:
        handler = self._handler
        decode, function = handler.decoder.decode, handler.function
        plain = handler.uow_parameter is None and handler.envelope_parameter is None
        turn_ends = time.perf_counter() + TURN_SECONDS
        for message in messages:
            if self._is_stopping:
                return
            if time.perf_counter() > turn_ends:  # handlers that never wait must not keep the loop to themselves
                await asyncio.sleep(0)
                turn_ends = time.perf_counter() + TURN_SECONDS
            if message.value() is None and handler.topic.is_compacted:
                self.frontier = _after(message)  # a tombstone: it says that there is no event any more
                continue
            try:
                envelope = decode(message.value())
            except Unknown:
                self.frontier = _after(message)
                continue
            except Undecodable as reason:
                await self._dead_letter(message, str(reason))
                continue
            set_cause(Cause(envelope.correlation_id, envelope.event_id, envelope.metadata))
            if plain:
                try:
                    result = await function(envelope.data)
                    if result is not None:
                        await self._effects.publish(result)
                    self.frontier = _after(message)
                    continue
                except Exception as error:
                    first: BaseException | None = error
                except asyncio.CancelledError as error:
                    if self._is_cancelled:
                        raise
                    first = error  # the handler's own: a failure like any other
            else:
                first = None
            if not await self._until_handled(message, lambda e=envelope: self._call_async(e), first):  # type: ignore[misc]
                return
            self.frontier = _after(message)

    async def _call_async(self, envelope: Envelope) -> None:
        handler, effects = self._handler, self._effects
        if handler.uow_parameter is None:
            result = await handler.function(envelope.data, **handler.arguments(envelope, None))
            if result is not None:
                await effects.publish(result)
            return
        uow = effects.unit_of_work()
        try:
            async with uow:
                result = await handler.function(envelope.data, **handler.arguments(envelope, uow))
                if result is not None:
                    uow.publish(result)
        finally:
            await effects.release(uow)

    # Sync handlers: a whole batch goes to a thread, and comes back at its end or at the first event that fails

    async def _handle_sync(self, messages: list[Message]) -> None:
        loop = asyncio.get_running_loop()
        start = 0
        while start < len(messages) and not self._is_stopping:
            context = copy_context()
            start, trouble = await loop.run_in_executor(
                self._executor, context.run, self._handle_in_thread, messages, start
            )
            if trouble is None:
                continue
            message = messages[start]
            if isinstance(trouble, Undecodable):
                await self._dead_letter(message, str(trouble))
            elif isinstance(trouble, HandlerFailed):
                envelope = self._handler.decoder.decode(message.value())

                async def again(envelope: Envelope = envelope) -> None:
                    await loop.run_in_executor(self._executor, copy_context().run, self._call_sync, envelope)

                if not await self._until_handled(message, again, trouble.error):
                    return
                self.frontier = _after(message)
            start += 1

    def _handle_in_thread(self, messages: list[Message], start: int) -> tuple[int, Undecodable | HandlerFailed | None]:
        """How far it came, and what stopped it."""
        decode = self._handler.decoder.decode
        for i in range(start, len(messages)):
            if self._is_stopping:
                return i, None
            message = messages[i]
            if message.value() is not None or not self._handler.topic.is_compacted:
                try:
                    envelope = decode(message.value())
                except Unknown:
                    self.frontier = _after(message)
                    continue
                except Undecodable as error:
                    return i, error
                try:
                    self._call_sync(envelope)
                except Exception as error:
                    return i, HandlerFailed(error)
            self.frontier = _after(message)
        return len(messages), None

    def _call_sync(self, envelope: Envelope) -> None:
        handler, effects = self._handler, self._effects
        set_cause(Cause(envelope.correlation_id, envelope.event_id, envelope.metadata))
        if handler.uow_parameter is None:
            result = handler.function(envelope.data, **handler.arguments(envelope, None))
            if result is not None:
                effects.publish_sync(result)
            return
        uow = effects.sync_unit_of_work()
        try:
            with uow:
                result = handler.function(envelope.data, **handler.arguments(envelope, uow))
                if result is not None:
                    uow.publish(result)
        finally:
            uow.sync_session.close()

    # Failures

    async def _until_handled(
        self, message: Message, call: Callable[[], Awaitable[None]], error: BaseException | None
    ) -> bool:
        """Call until it succeeds; False when the lane is stopped before. `error` is that of a call already made."""
        attempts, pause = 0, FIRST_PAUSE_SECONDS
        since_ms = round(time.time() * 1000)
        while True:
            if error is None:
                try:
                    await call()
                    if self.waiting is not None:
                        logger.info(
                            "handler_recovered handler=%s partition=%d offset=%d attempts=%d",
                            self._handler.name, self.partition, message.offset(), attempts + 1,
                        )  # fmt: skip
                        self.waiting = None
                    return True
                except Exception as raised:
                    error = raised
                except asyncio.CancelledError as raised:
                    if self._is_cancelled:
                        raise
                    error = raised
            attempts += 1
            self.frontier = _after(message) - 1
            self.waiting = Waiting(self.frontier, attempts, _said_by(error), since_ms)
            logger.warning(
                "handler_failed handler=%s topic=%s partition=%d offset=%d attempt=%d next_try_seconds=%.1f error=%s",
                self._handler.name, self._handler.topic.name, self.partition, message.offset(), attempts, pause,
                self.waiting.error, exc_info=error if attempts == 1 else None,
            )  # fmt: skip
            error = None
            try:
                await asyncio.wait_for(self._stopping.wait(), pause)
                return False
            except TimeoutError:
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    async def _dead_letter(self, message: Message, reason: str) -> None:
        """What can't be decoded now can't be decoded later: set aside, byte for byte, and go on."""
        logger.error(
            "event_undecodable handler=%s topic=%s partition=%d offset=%d reason=%s",
            self._handler.name, self._handler.topic.name, self.partition, message.offset(), reason,
        )  # fmt: skip

        async def set_aside() -> None:
            await self._effects.dead_letter(self._handler, message, reason)

        if await self._until_handled(message, set_aside, None):
            self.frontier = _after(message)


def _after(message: Message) -> int:
    """The offset behind the record."""
    return (message.offset() or 0) + 1


def _said_by(error: BaseException) -> str:
    """The error's own words, in a form that can be committed, logged and shown whatever they are."""
    try:
        words = str(error)
    except Exception:
        words = "(it can't be put in words)"
    text = f"{type(error).__name__}: {words}"[:MAX_ERROR]
    return text.encode("utf-8", "replace").decode().replace("\0", " ")
