"""A unit of work: business rows and the events about them, in one transaction of the user's own session.

    async with app.unit_of_work(session) as uow:      # with a sync Session: `with`
        session.add(order)
        uow.publish(OrderCreated(...))

It commits at the end, and rolls everything back when the block raises. Events are written as rows of the outbox just
before the commit, in the order of `publish`; nothing is sent from here.
"""

from collections.abc import Callable, Iterator
from datetime import datetime
from types import TracebackType
from typing import Self

from sqlalchemy import Executable
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from headwater.settings import duration_seconds
from headwater.store.outbox import Outbox, OutboxRow
from headwater.store.schedule import Timer, cancel_timer, set_timer

MAX_TIMER_NAME = 400

ToRow = Callable[[object], OutboxRow]
"""Finds the event's topic and key and puts it in its envelope; raises for an event that no topic lists."""


class WrongSession(TypeError):
    """The unit of work is used in another way than its session."""


class WrongTimer(ValueError):
    """A timer that can't be set; the message says what to give."""


class UnitOfWork:
    """For async and sync sessions: enter it the way the session is."""

    def __init__(
        self,
        session: "AsyncSession | Session",
        to_row: ToRow,
        outbox: Outbox,
        application: str,
        committed: Callable[[], None],
    ) -> None:
        """`committed` is called when rows were committed: the relay may go at once."""
        self.session = session
        self._to_row = to_row
        self._outbox = outbox
        self._application = application
        self._committed = committed
        self._rows: list[OutboxRow] = []
        self._timers: dict[str, Timer | None] = {}
        """By name, what is to become of them: set, or cancelled."""
        self._is_over = False

    @property
    def async_session(self) -> AsyncSession:
        """Raises WrongSession."""
        if not isinstance(self.session, AsyncSession):
            raise WrongSession("this unit of work has a sync session: use `with` and `sync_session`.")
        return self.session

    @property
    def sync_session(self) -> Session:
        """Raises WrongSession."""
        if not isinstance(self.session, Session):
            raise WrongSession("this unit of work has an async session: use `async with` and `async_session`.")
        return self.session

    def publish(self, event: object) -> str:
        """The event goes to its topic if this unit of work commits; its event id."""
        if self._is_over:
            raise WrongSession("this unit of work is over: what is published now would never be sent.")
        row = self._to_row(event)
        self._rows.append(row)
        return row.event_id

    def schedule(
        self, event: object, *, after: str | None = None, at: datetime | None = None, name: str | None = None
    ) -> str:
        """Publish the event after a duration (`30m`), or at a time, if this unit of work commits; the timer's name.

        name: of the timer, its event id when None. One of the same name is replaced. Raises InvalidSetting, WrongTimer.
        """
        if self._is_over:
            raise WrongSession("this unit of work is over: what is scheduled now would never be sent.")
        if (after is None) == (at is None):
            raise WrongTimer(
                "a timer has a duration or a time: schedule(event, after='30m') or schedule(event, at=...)."
            )
        row = self._to_row(event)
        self._outbox.values([row])  # what can't become a row of the outbox is refused here, not when it is due
        name = name if name is not None else row.event_id
        if len(name) > MAX_TIMER_NAME:
            raise WrongTimer(f"the timer's name has {len(name)} characters: {MAX_TIMER_NAME} at most.")
        if at is not None:
            if at.tzinfo is None:
                raise WrongTimer(f"{at.isoformat()} has no zone: give datetimes one, as in datetime.now(UTC).")
            self._timers[name] = Timer(name, row, round(at.timestamp() * 1000), True)
        else:
            self._timers[name] = Timer(name, row, round(duration_seconds(after or "") * 1000), False)
        return name

    def cancel(self, name: str) -> None:
        """The timer of that name does not fire, if this unit of work commits; nothing happens when there is none."""
        self._timers[name] = None

    @property
    def _has_work(self) -> bool:
        return bool(self._rows or self._timers)

    def _statements(self, dialect: str) -> Iterator[tuple[Executable, list[dict[str, object]] | None]]:
        if self._rows:
            yield self._outbox.insert_rows(), self._outbox.values(self._rows)
        for name, timer in self._timers.items():
            if timer is not None:
                yield set_timer(dialect, self._application, timer), None
            else:
                yield cancel_timer(self._application, name), None

    async def __aenter__(self) -> Self:
        _ = self.async_session
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session = self.async_session
        self._is_over = True
        if error is not None:
            await session.rollback()
            return
        try:
            await session.flush()  # its rows are locked before the outbox's have their positions
            for statement, values in self._statements(session.get_bind().dialect.name):
                await session.execute(statement, values)
            await session.commit()
        except BaseException:
            await session.rollback()
            raise
        if self._has_work:
            self._committed()

    def __enter__(self) -> Self:
        _ = self.sync_session
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session = self.sync_session
        self._is_over = True
        if error is not None:
            session.rollback()
            return
        try:
            session.flush()
            for statement, values in self._statements(session.get_bind().dialect.name):
                session.execute(statement, values)
            session.commit()
        except BaseException:
            session.rollback()
            raise
        if self._has_work:
            self._committed()
