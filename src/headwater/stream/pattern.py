"""Patterns in the events of a key: so many within a time, or one without another.

    failures = repeated("payment-failures", of=PaymentFailed, by="user_id", count=3, within="10m",
                        signal=lambda user_id, times: SuspiciousPayments(user_id, len(times)))
    abandoned = absent("abandoned-carts", after=CartChanged, without=OrderCreated, by="cart_id", within="30m",
                       signal=lambda cart_id: CartAbandoned(cart_id))
    failures.join(app, topics=[payments])
    abandoned.join(app, topics=[carts, orders])

Promise    Times are those of the events (their envelopes'), not of their arrival: what comes out of order counts where it
           belongs. What is known of a key is kept in the application's database, with the signal in one transaction: a
           restart forgets nothing and signals nothing twice.
Not        What comes later than twice the time. A signal that was published is not taken back: an event that comes late, and
           would have made another window of what was signalled, makes none. `absent` waits on the database's clock until the
           event's time and `within` are over: the other event, when it arrives after that, arrives too late.
Proof      tests/stream/test_pattern.py
"""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Union

import msgspec
from sqlalchemy import delete, func, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from headwater.declaration import WrongDeclaration
from headwater.event.envelope import Envelope
from headwater.event.topic import Topic, field_names
from headwater.runtime.app import App
from headwater.runtime.handler import group_of
from headwater.runtime.retry import Retry
from headwater.settings import duration_seconds
from headwater.store.tables import patterns
from headwater.store.unit_of_work import UnitOfWork

DEFAULT_RETRY = Retry()
KEPT = timedelta(days=7)
"""Beyond twice the time of a pattern: how far partitions may be apart."""
CLEAN_SECONDS = 60.0  # between looks for keys that nothing more can come of
# Two topics may have an event of the key at once.
LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")


class InvalidPattern(WrongDeclaration, ValueError):
    """A pattern that can't be looked for; the message says what to change."""


class Known(msgspec.Struct, frozen=True):
    """What is kept of a key."""

    times: tuple[datetime, ...] = ()
    """Of the events that count, ascending."""
    signalled: tuple[tuple[datetime, datetime], ...] = ()
    """The first and the last time of each signal: what is between them counts no more."""
    others: tuple[datetime, ...] = ()
    """Of the events that others must be without, ascending."""

    @property
    def newest(self) -> datetime | None:
        found = [*self.times[-1:], *self.others[-1:], *(last for _, last in self.signalled)]
        return max(found, default=None)


class Outcome(NamedTuple):
    known: Known
    publish: object | None = None
    wait: tuple[object, datetime] | None = None
    """An event to be published when the pattern's time is over since then, unless something comes between."""
    cancels: tuple[datetime, ...] = ()
    """Of what waited: the times that it waited since."""


Decide = Callable[[Any, str, datetime, Known], Outcome]


def repeated(
    name: str, *, of: type, by: str, count: int, within: str, signal: Callable[[str, Sequence[datetime]], object]
) -> "Pattern":
    """So many events of a class, of one key, within a time: one signal, with their times; then they count no more. Raises
    InvalidPattern, InvalidSetting."""
    if count < 2:
        raise InvalidPattern(f"the pattern {name} has count={count}: at least 2.")
    span = timedelta(seconds=duration_seconds(within))

    def decide(event: Any, key: str, at: datetime, known: Known) -> Outcome:
        since = max(at, known.newest or at) - 2 * span
        signalled = tuple(each for each in known.signalled if each[1] >= since)
        if at < since or any(first <= at <= last for first, last in signalled):
            return Outcome(msgspec.structs.replace(known, signalled=signalled))
        times = sorted((*known.times, at))
        for i in range(len(times) - count + 1):
            window = times[i : i + count]
            if window[-1] - window[0] <= span and at in window:
                left = tuple(each for each in times if not window[0] <= each <= window[-1])
                return Outcome(Known(left, (*signalled, (window[0], window[-1]))), signal(key, window))
        return Outcome(Known(tuple(each for each in times if each >= since), signalled))

    return Pattern(name, by, span, (of,), decide)


def absent(
    name: str, *, after: type, without: type, by: str, within: str, signal: Callable[[str], object]
) -> "Pattern":
    """An event that is not followed by another one, of the same key, within a time. The newest one counts: another one of
    its class begins the time anew. Raises InvalidPattern, InvalidSetting."""
    if after is without:
        raise InvalidPattern(f"the pattern {name} is {after.__name__} without itself.")
    span = timedelta(seconds=duration_seconds(within))

    def decide(event: Any, key: str, at: datetime, known: Known) -> Outcome:
        since = max(at, known.newest or at) - 2 * span
        times = tuple(each for each in known.times if each >= since)
        others = tuple(each for each in known.others if each >= since)
        before = tuple(each for each in times if each <= at <= each + span)  # neither of them is alone any more
        if type(event) is not after:
            return Outcome(Known(times, others=_thinned((*others, at), span)), cancels=before)
        found = Known(_thinned((*times, at), span), others=others)
        if at in times:
            return Outcome(known)
        if at < since or any(at <= each <= at + span for each in (*times, *others)):
            return Outcome(found, cancels=before)  # a newer one counts, or the other event has come
        return Outcome(found, wait=(signal(key), at), cancels=before)

    return Pattern(name, by, span, (after, without), decide)


def _thinned(times: Sequence[datetime], span: timedelta) -> tuple[datetime, ...]:
    """Without those that tell nothing: whether some time follows another one within the span, its neighbours tell as well."""
    found: list[datetime] = []
    for at in sorted(set(times)):
        while len(found) >= 2 and at - found[-2] <= span:
            found.pop()
        found.append(at)
    return tuple(found)


class Pattern:
    """See `repeated` and `absent`."""

    def __init__(self, name: str, by: str, within: timedelta, events: tuple[type, ...], decide: Decide) -> None:
        self.name = name
        self.events = events
        self._by = by
        self._within = within
        self._decide = decide
        self._next_clean = 0.0
        for cls in events:
            if by not in field_names(cls):
                raise InvalidPattern(f"the pattern {name} goes by {by!r}, which {cls.__name__} doesn't have.")

    def join(self, app: App, topics: Sequence[Topic], *, retry: Retry = DEFAULT_RETRY) -> None:
        """Look for it in this application: a group for each topic, `<pattern>-<the topic's last word>`. Raises InvalidPattern,
        InvalidHandler."""
        missing = [cls.__name__ for cls in self.events if not any(cls in topic.events for topic in topics)]
        if missing:
            raise InvalidPattern(f"the pattern {self.name} needs topics that list {', '.join(missing)}.")
        for topic in topics:
            events = [cls for cls in topic.events if cls in self.events]
            if events:
                self._handle(app, topic, topics, events, retry)
        app.joined.append(self)

    def _handle(self, app: App, topic: Topic, among: Sequence[Topic], events: list[type], retry: Retry) -> None:
        async def handle(event: Any, envelope: Envelope, uow: UnitOfWork) -> None:
            await self.handle(event, envelope.timestamp, uow)

        handle.__name__ = f"{self.name}_pattern"
        handle.__annotations__ = {"event": Union[tuple(events)], "envelope": Envelope, "uow": UnitOfWork}  # noqa: UP007
        group = group_of(self.name, topic, among)
        app.handler(topic, group=group, delivery="effectively_once", retry=retry)(handle)

    async def handle(self, event: Any, at: datetime, uow: UnitOfWork) -> None:
        """One event, in a unit of work of an async session. at: its time."""
        key = str(getattr(event, self._by))
        at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
        outcome = await uow.async_session.run_sync(self._step, event, key, at)
        if outcome.publish is not None:
            uow.publish(outcome.publish)
        for since in outcome.cancels:
            uow.cancel(self._timer(key, since))
        if outcome.wait is not None:
            signal, since = outcome.wait
            uow.schedule(signal, at=since + self._within, name=self._timer(key, since))

    def _timer(self, key: str, since: datetime) -> str:
        return f"pattern:{self.name}:{key}:{since.timestamp():.6f}"

    def _step(self, session: Session, event: Any, key: str, at: datetime) -> Outcome:
        columns = patterns.c
        is_postgres = session.get_bind().dialect.name == "postgresql"
        if is_postgres:
            session.execute(LOCK, {"name": f"{self.name} {key}"})
        query = select(columns.known).where(columns.pattern == self.name, columns.key == key)
        found = session.execute(query).scalar_one_or_none()
        outcome = self._decide(event, key, at, msgspec.json.decode(found, type=Known) if found is not None else Known())
        insert = postgresql.insert if is_postgres else sqlite.insert
        newest = max(at, outcome.known.newest or at)
        values = {"known": msgspec.json.encode(outcome.known).decode(), "newest_ms": round(newest.timestamp() * 1000)}
        statement = insert(patterns).values(pattern=self.name, key=key, **values)
        session.execute(statement.on_conflict_do_update(index_elements=["pattern", "key"], set_=values))
        if time.monotonic() >= self._next_clean:
            self._next_clean = time.monotonic() + CLEAN_SECONDS
            # by the pattern's own time: after an outage, what waits is as old as what is known
            latest = select(func.max(columns.newest_ms)).where(columns.pattern == self.name)
            newest_ms = session.execute(latest).scalar_one() or 0
            kept_ms = round((2 * self._within + KEPT).total_seconds() * 1000)
            session.execute(
                delete(patterns).where(columns.pattern == self.name, columns.newest_ms < newest_ms - kept_ms)
            )
        return outcome
