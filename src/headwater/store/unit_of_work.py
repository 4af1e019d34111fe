"""A unit of work: business rows and the events about them, in one transaction of the user's own session.

    async with app.unit_of_work(session) as uow:      # with a sync Session: `with`
        session.add(order)
        uow.publish(OrderCreated(...))

It commits at the end, and rolls everything back when the block raises. Events are written as rows of the outbox just
before the commit, in the order of `publish`; nothing is sent from here.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from headwater.store.outbox import Outbox, OutboxRow

ToRow = Callable[[object], OutboxRow]
"""Finds the event's topic and key and puts it in its envelope; raises for an event that no topic lists."""


class WrongSession(TypeError):
    """The unit of work is used in another way than its session."""


class UnitOfWork:
    """For async and sync sessions: enter it the way the session is."""

    def __init__(
        self, session: "AsyncSession | Session", to_row: ToRow, outbox: Outbox, committed: Callable[[], None]
    ) -> None:
        """`committed` is called when rows were committed: the relay may go at once."""
        self.session = session
        self._to_row = to_row
        self._outbox = outbox
        self._committed = committed
        self._rows: list[OutboxRow] = []
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
            if self._rows:
                await session.execute(self._outbox.insert_rows(), self._outbox.values(self._rows))
            await session.commit()
        except BaseException:
            await session.rollback()
            raise
        if self._rows:
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
            if self._rows:
                session.execute(self._outbox.insert_rows(), self._outbox.values(self._rows))
            session.commit()
        except BaseException:
            session.rollback()
            raise
        if self._rows:
            self._committed()
