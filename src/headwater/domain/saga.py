"""Saga: a long process over several services, in steps that are compensated in reverse when one fails.

    fulfilment = Saga(
        "fulfilment", key="order_id", starts=OrderPlaced, begin=lambda event: Fulfilment(event.order_id, event.cents),
        steps=[
            Step("reserve", lambda s: ReserveStock(s.order_id), StockReserved, StockRejected,
                 compensation=lambda s: ReleaseStock(s.order_id), compensated=StockReleased, deadline="30s"),
            Step("charge", lambda s: ChargePayment(s.order_id, s.cents), PaymentProcessed, PaymentFailed,
                 compensation=lambda s: RefundPayment(s.order_id), deadline="2m"),
        ],
        completed=lambda s: OrderConfirmed(s.order_id), failed=lambda s, reason: OrderCancelled(s.order_id, reason),
    )
    fulfilment.join(app, topics=[orders, stock, payments])

Promise    Each answer changes the saga once; its state, what it sends and its deadline are one transaction. In the end all
           steps are done, or all that may have been done was compensated, or it is stuck and `headwater sagas` shows it.
Not        Isolation: others see what is done before the saga is over.
Needs      Compensations that may come twice, and without anything to undo. Services that answer every command, or get a step's
           command before its compensation, as they do from one topic.
Proof      tests/domain/test_saga.py
"""

import functools
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar, Union, cast

import msgspec
from sqlalchemy import delete, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from headwater.declaration import WrongDeclaration
from headwater.domain.saga_decision import (
    Decision,
    Definition,
    Record,
    Status,
    Step,
    Wait,
    aligned,
    answer,
    deadline,
    resume,
    start,
)
from headwater.event.event import Event, EventMeta
from headwater.event.topic import Topic, field_names
from headwater.runtime.app import App
from headwater.runtime.handler import group_of
from headwater.runtime.retry import Retry
from headwater.settings import duration_seconds
from headwater.store.tables import sagas
from headwater.store.unit_of_work import UnitOfWork

S = TypeVar("S")
DEADLINE_PARTITIONS = 3
CLEAN_SECONDS = 60.0
CLEAN_ROWS = 1000
DEFAULT_RETRY = Retry()


class InvalidSaga(WrongDeclaration, ValueError):
    """A declaration that can't work; the message says what to change."""


class UnknownStep(Exception):
    """A saga is at a step that its declaration has no more."""


class StaleSaga(Exception):
    """Another event of the same saga was faster: tried again at once."""


class SagaDeadline(Event):
    """A step's answer did not come in time."""

    saga_id: str
    turn: int


def _deadline_class() -> type[SagaDeadline]:
    """One for each saga: a class of events has one topic."""
    made: Any = EventMeta("SagaDeadline", (SagaDeadline,), {})
    return cast(type[SagaDeadline], made)


class SagaRow(NamedTuple):
    """A saga, as it is kept."""

    id: str
    record: Record
    state: Any
    version: int


class Saga:
    def __init__(
        self,
        name: str,
        *,
        state: type[S],
        key: str,
        starts: type,
        begin: Callable[[Any], S],
        steps: Sequence[Step],
        completed: Callable[[S], object] | None = None,
        failed: Callable[[S, str], object] | None = None,
        kept: str = "30d",
    ) -> None:
        """name: of the saga, and what its groups begin with. state: a msgspec.Struct, dataclass or Event that holds what the
        steps need. key: the field that every event of it has, which says whose it is. starts, begin: the event that begins
        one, and its first state. completed, failed: what is published at the end. kept: for how long an ended one is, so that
        an answer that comes after its end finds it. Raises InvalidSaga, InvalidSetting."""
        if not steps:
            raise InvalidSaga(f"the saga {name} has no steps.")
        self.name = name
        self.steps = tuple(steps)
        self._kept = timedelta(seconds=duration_seconds(kept))
        self._next_clean = 0.0
        self._key = key
        self._starts = starts
        self._begin = begin
        self._definition = Definition(self.steps, completed, failed)
        self._state = state
        self._decode_state = msgspec.json.Decoder(state).decode
        self._deadline = _deadline_class()
        self.deadlines = Topic(
            f"{name}.deadlines", key="saga_id", events=[self._deadline], partitions=DEADLINE_PARTITIONS
        )
        answers = [cls for step in steps for cls in (step.done, step.failed, step.compensated) if cls is not None]
        self.events = [starts, *answers]
        twice = next((cls for cls in self.events if self.events.count(cls) > 1), None)
        if twice is not None:
            raise InvalidSaga(f"the saga {name} has {twice.__name__} twice: each event says one thing about one step.")
        names = [step.name for step in steps]
        if len(set(names)) < len(names):
            raise InvalidSaga(f"the saga {name} has two steps of one name: {', '.join(names)}.")
        for cls in self.events:
            if key not in field_names(cls):
                raise InvalidSaga(f"the saga {name} goes by {key!r}, which {cls.__name__} doesn't have.")
        for step in steps:
            if step.compensated is not None and step.compensation is None:
                raise InvalidSaga(
                    f"the step {step.name} of {name} has an answer to a compensation, and no compensation."
                )
            if step.deadline is not None:
                duration_seconds(step.deadline)

    def join(self, app: App, topics: Sequence[Topic], *, retry: Retry = DEFAULT_RETRY) -> None:
        """Handle the saga's events in this application: a group for each topic, `<saga>-<the topic's last word>`. topics:
        where its events are. Raises InvalidSaga, InvalidHandler."""
        listed = {cls for topic in topics for cls in topic.events}
        missing = [cls.__name__ for cls in self.events if cls not in listed]
        if missing:
            raise InvalidSaga(f"the saga {self.name} needs topics that list {', '.join(missing)}.")
        for topic in topics:
            events = [cls for cls in topic.events if cls in self.events]
            if events:
                self._handle(app, topic, topics, events, retry)
        self._handle(app, self.deadlines, topics, [self._deadline], retry)
        app.joined.append(self)

    def _handle(self, app: App, topic: Topic, among: Sequence[Topic], events: list[type], retry: Retry) -> None:
        async def handle(event: Any, uow: UnitOfWork) -> None:
            await self.handle(event, uow)

        handle.__name__ = f"{self.name}_saga"
        handle.__annotations__ = {"event": Union[tuple(events)], "uow": UnitOfWork}  # noqa: UP007 - made at run time
        group = group_of(self.name, topic, among)
        app.handler(topic, group=group, delivery="effectively_once", conflict=[StaleSaga], retry=retry)(handle)

    async def handle(self, event: Any, uow: UnitOfWork) -> None:
        """One event, in a unit of work of an async session. Raises StaleSaga."""
        id = str(event.saga_id if isinstance(event, SagaDeadline) else getattr(event, self._key))
        row = await uow.async_session.run_sync(self.load, id)
        decision = self._decide(row, event)
        if decision is not None:
            await uow.async_session.run_sync(functools.partial(self._save, id=id, row=row, decision=decision))
            self._send(id, decision, uow)
        if time.monotonic() >= self._next_clean:
            self._next_clean = time.monotonic() + CLEAN_SECONDS
            await uow.async_session.run_sync(self.clean)

    def _decide(self, row: SagaRow | None, event: Any) -> Decision | None:
        """Raises UnknownStep."""
        if type(event) is self._starts:
            return start(self._definition, self._begin(event)) if row is None else None
        if row is None:
            return None  # of a saga that never began: not ours
        row = row._replace(record=self._aligned(row))
        if isinstance(event, SagaDeadline):
            return deadline(self._definition, row.record, row.state, event.turn)
        return answer(self._definition, row.record, row.state, event)

    def _aligned(self, row: SagaRow) -> Record:
        """Raises UnknownStep."""
        record = aligned(self._definition, row.record)
        if record is None:
            raise UnknownStep(
                f"{self.name} {row.id} is at {row.record.names[row.record.step]}, which the saga has no more: keep a step as "
                "long as sagas are at it, `headwater sagas list` shows which."
            )
        return record

    def _send(self, id: str, decision: Decision, uow: UnitOfWork) -> None:
        for each in decision.publish:
            uow.publish(each)
        timer = f"saga:{self.name}:{id}"
        if decision.wait is None:
            uow.cancel(timer)
        else:
            wait: Wait = decision.wait
            uow.schedule(self._deadline(id, wait.turn), after=wait.after, name=timer)

    # Keeping

    def load(self, session: Session, id: str) -> SagaRow | None:
        columns = sagas.c
        query = select(columns.record, columns.state, columns.version).where(
            columns.saga == self.name, columns.id == id
        )
        found = session.execute(query).first()
        if found is None:
            return None
        record, state, version = found
        return SagaRow(id, msgspec.json.decode(record, type=Record), self._decode_state(state), version)

    def rows(self, session: Session, status: Status | None = None, limit: int = 1000) -> list[SagaRow]:
        """The oldest news first."""
        columns = sagas.c
        query = select(columns.id, columns.record, columns.state, columns.version).where(columns.saga == self.name)
        if status is not None:
            query = query.where(columns.status == status.value)
        return [
            SagaRow(id, msgspec.json.decode(record, type=Record), self._decode_state(state), version)
            for id, record, state, version in session.execute(query.order_by(columns.updated_at).limit(limit))
        ]

    def _save(self, session: Session, *, id: str, row: SagaRow | None, decision: Decision) -> None:
        """Raises StaleSaga."""
        values = {
            "status": decision.record.status.value,
            "record": msgspec.json.encode(decision.record).decode(),
            "state": msgspec.json.encode(decision.state).decode(),
        }
        if row is None:
            insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
            new = insert(sagas).values(saga=self.name, id=id, version=1, **values)
            written = session.execute(new.on_conflict_do_nothing().returning(sagas.c.version)).first()
        else:
            columns = sagas.c
            mine = (columns.saga == self.name, columns.id == id, columns.version == row.version)
            changed = update(sagas).where(*mine).values(version=row.version + 1, **values).returning(columns.version)
            written = session.execute(changed).first()
        if written is None:
            raise StaleSaga(f"{self.name} {id}")

    def clean(self, session: Session) -> int:
        """Delete some of the ended ones that were kept for long enough; how many."""
        columns = sagas.c
        old = (
            select(columns.id)
            .where(
                columns.saga == self.name,
                columns.status.in_([Status.COMPLETED.value, Status.FAILED.value]),
                columns.updated_at < datetime.now(UTC) - self._kept,
            )
            .order_by(columns.updated_at)
            .limit(CLEAN_ROWS)
        )
        gone = session.execute(
            delete(sagas).where(columns.saga == self.name, columns.id.in_(old)).returning(columns.id)
        )
        return len(gone.all())

    def resume(self, uow: UnitOfWork, id: str, *, is_compensated: bool = False) -> bool:
        """Of a stuck one, in a unit of work of a sync session: send the compensation again, or (is_compensated) take it as
        done by hand. False when it isn't stuck. Raises StaleSaga."""
        row = self.load(uow.sync_session, id)
        decision = None
        if row is not None:
            decision = resume(self._definition, self._aligned(row), row.state, is_compensated=is_compensated)
        if decision is None:
            return False
        self._save(uow.sync_session, id=id, row=row, decision=decision)
        self._send(id, decision, uow)
        return True
