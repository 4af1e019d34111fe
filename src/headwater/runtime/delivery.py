"""Calling a handler for one event, by its delivery class.

at_most_once, at_least_once   the handler, then what it returns is published and acknowledged
effectively_once              in one transaction of the database: the inbox row, the handler's rows, the outbox rows of
                              what it returns. An event whose row is there was handled before, and is passed over.
exactly_once                  what it returns goes into the Kafka transaction that the batch is in

Statements for an event under effectively_once: BEGIN, the inbox row, the handler's own, one for the outbox if it
publishes, COMMIT.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from contextvars import copy_context
from typing import Protocol

from headwater.event.codec import SchemaMissing, Undecodable, Unknown
from headwater.event.envelope import Cause, Envelope, set_cause
from headwater.runtime.assignment import Received
from headwater.runtime.decoding import SchemaSource, TopicDecoder
from headwater.runtime.handler import Handler
from headwater.runtime.lane import Attempted
from headwater.runtime.retry import Delivery
from headwater.store import inbox
from headwater.store.unit_of_work import UnitOfWork


class GivenUpBefore(Undecodable):
    """The inbox says that the event was given up on; its dead letter may be missing."""


class Effects(Protocol):
    """What calling a handler needs of its application."""

    def unit_of_work(self) -> UnitOfWork:
        """On a new async session, which is closed by `release`."""

    def sync_unit_of_work(self) -> UnitOfWork: ...

    async def release(self, uow: UnitOfWork) -> None: ...

    def begin(self) -> None:
        """A handler is about to be called, in this context."""

    async def publish(self, event: object) -> object: ...

    def publish_sync(self, event: object) -> object: ...

    async def publish_all(self, events: Sequence[object]) -> object: ...

    def publish_all_sync(self, events: Sequence[object]) -> object: ...


class WrongOutcome(TypeError):
    """A batch handler returned something else than an outcome per event."""


class Calls:
    def __init__(
        self, handler: Handler, effects: Effects, executor: Executor, topic_id: str, schemas: SchemaSource
    ) -> None:
        self._handler = handler
        self._effects = effects
        self._executor = executor
        self._decoder = TopicDecoder(handler.topic, handler.classes, topic_id, schemas)
        self.decode = self._decoder.decode
        self.begin = effects.begin
        self._is_transactional = handler.delivery is Delivery.EXACTLY_ONCE
        self._has_inbox = handler.delivery is Delivery.EFFECTIVELY_ONCE
        self._is_plain = handler.uow_parameter is None and not handler.arguments_of_event and not handler.batch

    async def _decode_after(self, missing: SchemaMissing, event: Received) -> Envelope:
        """Raises RegistryUnreachable, Unknown, Undecodable."""
        await asyncio.get_running_loop().run_in_executor(None, self._decoder.look_up, missing.id)
        return self.decode(event)

    def is_wanted(self, event: Received) -> bool:
        try:
            self.decode(event)
        except Unknown:
            return False
        except Undecodable:
            pass
        return True

    # Async handlers

    async def attempt(self, event: Received, attempted: Attempted | None, generation: int) -> None:
        handler = self._handler
        self.begin()
        if not handler.is_async:
            context = copy_context()
            run = asyncio.get_running_loop().run_in_executor
            await run(self._executor, context.run, self._call_sync, event, generation, attempted)
            return
        try:
            envelope = self.decode(event)
        except SchemaMissing as missing:
            envelope = await self._decode_after(missing, event)
        set_cause(Cause(envelope.correlation_id, envelope.event_id, envelope.metadata))
        if self._is_plain:
            result = await handler.function(envelope.data)
            if result is not None:
                await self._effects.publish(result)
            return
        if handler.batch:
            outcomes = await self._call_batch([envelope], [event], generation, attempted)
            if outcomes[0] is not None:
                raise outcomes[0]
            return
        if handler.uow_parameter is None:
            result = await handler.function(envelope.data, **handler.arguments(envelope, event, None))
            if result is not None:
                await self._effects.publish(result)
            return
        uow = self._effects.unit_of_work()
        try:
            async with uow:
                if self._has_inbox and not await uow.async_session.run_sync(
                    self._claim, envelope.event_id, generation, attempted
                ):
                    return
                result = await handler.function(envelope.data, **handler.arguments(envelope, event, uow))
                if result is not None:
                    uow.publish(result)
        finally:
            await self._effects.release(uow)

    def _claim(self, session: object, event_id: str, generation: int, attempted: Attempted | None) -> bool:
        """Whether the event is this transaction's to handle."""
        is_redriven = attempted is not None and attempted.is_redriven
        state = inbox.claim(session, self._handler.group, event_id, generation, is_redriven)  # type: ignore[arg-type]
        if state is inbox.State.DEAD:
            raise GivenUpBefore("it was given up on before")
        return state is None

    # Sync handlers

    def attempt_sync(self, event: Received, generation: int) -> None:
        """In a thread, in which `begin` was called."""
        self._call_sync(event, generation, None)

    def _call_sync(self, event: Received, generation: int, attempted: Attempted | None) -> None:
        handler, effects = self._handler, self._effects
        envelope = self._decoder.decode_now(event)
        set_cause(Cause(envelope.correlation_id, envelope.event_id, envelope.metadata))
        if self._is_plain:
            result = handler.function(envelope.data)
            if result is not None:
                effects.publish_sync(result)
            return
        if handler.batch:
            outcomes = self._call_batch_sync([envelope], generation, attempted)
            if outcomes[0] is not None:
                raise outcomes[0]
            return
        if handler.uow_parameter is None:
            result = handler.function(envelope.data, **handler.arguments(envelope, event, None))
            if result is not None:
                effects.publish_sync(result)
            return
        uow = effects.sync_unit_of_work()
        try:
            with uow:
                if self._has_inbox and not self._claim(uow.sync_session, envelope.event_id, generation, attempted):
                    return
                result = handler.function(envelope.data, **handler.arguments(envelope, event, uow))
                if result is not None:
                    uow.publish(result)
        finally:
            uow.sync_session.close()

    # Batch handlers

    async def attempt_batch(self, events: Sequence[Received], generation: int) -> list[BaseException | None]:
        """An outcome per event; those that can't be decoded never reach the handler. Raises what the handler raises. Under
        exactly_once it raises the first bad outcome as well: what was published for an event that is handled once more
        could not be taken back."""
        self.begin()
        outcomes: list[BaseException | None] = [None] * len(events)
        envelopes: list[Envelope] = []
        places: list[int] = []
        for i, event in enumerate(events):
            try:
                try:
                    envelope = self.decode(event)
                except SchemaMissing as missing:
                    envelope = await self._decode_after(missing, event)
                envelopes.append(envelope)
                places.append(i)
            except Unknown:
                pass
            except Undecodable as error:
                if self._is_transactional:
                    raise
                outcomes[i] = error
        if envelopes:
            if self._handler.is_async:
                found = await self._call_batch(envelopes, events, generation, None)
            else:
                context = copy_context()
                run = asyncio.get_running_loop().run_in_executor
                found = await run(self._executor, context.run, self._call_batch_sync, envelopes, generation, None)
            for i, outcome in zip(places, found, strict=True):
                outcomes[i] = outcome
        return outcomes

    async def _call_batch(
        self, envelopes: list[Envelope], events: Sequence[Received], generation: int, attempted: Attempted | None
    ) -> list[BaseException | None]:
        handler = self._handler
        if handler.uow_parameter is None:
            result = await handler.function([envelope.data for envelope in envelopes])
            return await self._outcomes(result, len(envelopes))
        uow = self._effects.unit_of_work()
        try:
            async with uow:
                fresh = envelopes
                if self._has_inbox:
                    fresh = await uow.async_session.run_sync(self._claim_all, envelopes, generation, attempted)
                if fresh:
                    result = await handler.function(
                        [envelope.data for envelope in fresh], **{handler.uow_parameter: uow}
                    )
                    self._outcomes_in(uow, result, len(fresh))
        finally:
            await self._effects.release(uow)
        return [None] * len(envelopes)

    def _call_batch_sync(
        self, envelopes: list[Envelope], generation: int, attempted: Attempted | None
    ) -> list[BaseException | None]:
        handler = self._handler
        if handler.uow_parameter is None:
            result = handler.function([envelope.data for envelope in envelopes])
            checked = self._checked(result, len(envelopes))
            self._effects.publish_all_sync(_events_of(checked))
            return [each if isinstance(each, BaseException) else None for each in checked]
        uow = self._effects.sync_unit_of_work()
        try:
            with uow:
                fresh = (
                    self._claim_all(uow.sync_session, envelopes, generation, attempted)
                    if self._has_inbox
                    else envelopes
                )
                if fresh:
                    result = handler.function([envelope.data for envelope in fresh], **{handler.uow_parameter: uow})
                    self._outcomes_in(uow, result, len(fresh))
        finally:
            uow.sync_session.close()
        return [None] * len(envelopes)

    def _claim_all(
        self, session: object, envelopes: list[Envelope], generation: int, attempted: Attempted | None
    ) -> list[Envelope]:
        return [each for each in envelopes if self._claim(session, each.event_id, generation, attempted)]

    async def _outcomes(self, result: object, count: int) -> list[BaseException | None]:
        checked = self._checked(result, count)
        await self._effects.publish_all(_events_of(checked))
        return [each if isinstance(each, BaseException) else None for each in checked]

    def _checked(self, result: object, count: int) -> Sequence[object]:
        checked = checked_outcomes(result, count)
        bad = next((each for each in checked if isinstance(each, BaseException)), None)
        if bad is not None and self._is_transactional:
            raise bad
        return checked

    def _outcomes_in(self, uow: UnitOfWork, result: object, count: int) -> None:
        """One bad event rolls the transaction back; then they are handled one by one. Raises its error."""
        for each in checked_outcomes(result, count):
            if isinstance(each, BaseException):
                raise each
            if each is not None:
                uow.publish(each)


def _events_of(outcomes: Sequence[object]) -> list[object]:
    return [each for each in outcomes if each is not None and not isinstance(each, BaseException)]


def checked_outcomes(result: object, count: int) -> Sequence[object]:
    """Raises WrongOutcome."""
    if result is None:
        return [None] * count
    if not isinstance(result, Sequence) or len(result) != count:
        raise WrongOutcome(
            f"a batch handler returns None, or a list with one outcome for each of its {count} events: None, an event to "
            f"publish, or an exception. It returned {type(result).__name__}."
        )
    return result
