"""Timers: events that are published at a time to come, once, whatever restarts in between.

Promise    A timer is set, moved and cancelled in the transaction of a unit of work. When it is due, its event becomes a row of
           the outbox and the timer goes, in one transaction: it fires once, and never before its time.
Not        An upper bound for how late: it fires when a process of the application runs. A timer that fires while it is being
           cancelled has fired; whoever handles its event may look at the state again.
Needs      The database's clock, which all processes share.
Proof      tests/store/test_schedule.py
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, Connection, delete, func, literal_column, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.dml import Delete, Insert

from headwater.store.outbox import Outbox, OutboxRow, decode_headers, encode_headers
from headwater.store.tables import timers

NOW_MS = {
    "postgresql": literal_column("CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)", BigInteger),
    "sqlite": literal_column("CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)", BigInteger),
}


class Timer(NamedTuple):
    name: str
    row: OutboxRow
    after_ms: int
    """From now, on the database's clock; or with `is_absolute` since 1970."""
    is_absolute: bool


class Fired(NamedTuple):
    rows: int
    wait_ms: int | None
    """Until the next one is due; None without one."""


def set_timer(dialect: str, application: str, timer: Timer) -> Insert:
    """One of the same name is replaced."""
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    due: Any = timer.after_ms if timer.is_absolute else NOW_MS[dialect] + timer.after_ms
    row = timer.row
    values = {
        "application": application,
        "name": timer.name,
        "due_ms": due,
        "event_id": row.event_id,
        "topic": row.topic,
        "key": row.key,
        "event_type": row.event_type,
        "payload": row.payload,
        "headers": encode_headers(row.headers),
    }
    statement = insert(timers).values(values)
    given = {name: statement.excluded[name] for name in values if name not in ("application", "name")}
    return statement.on_conflict_do_update(index_elements=["application", "name"], set_=given)


def cancel_timer(application: str, name: str) -> Delete:
    return delete(timers).where(timers.c.application == application, timers.c.name == name)


def fire(
    connection: Connection, application: str, outbox: Outbox, limit: int, stamped: Callable[[OutboxRow], OutboxRow]
) -> Fired:
    """Those of the application that are due become rows of the outbox, as `stamped` makes them. In the caller's transaction."""
    columns = timers.c
    dialect = connection.dialect.name
    (now,) = connection.execute(select(NOW_MS[dialect])).one()
    query = (
        select(columns.name, columns.event_id, columns.topic, columns.key, columns.event_type, columns.payload, columns.headers)
        .where(columns.application == application, columns.due_ms <= now)
        .order_by(columns.due_ms, columns.name)
        .limit(limit)
    )  # fmt: skip
    if dialect == "postgresql":
        query = query.with_for_update(skip_locked=True)  # another process fires those that it has
    found = connection.execute(query).all()
    if found:
        rows = [
            stamped(OutboxRow(id, topic, key, kind, payload, list(decode_headers(headers))))
            for _, id, topic, key, kind, payload, headers in found
        ]
        connection.execute(outbox.insert_rows(), outbox.values(rows))
        fired = columns.name.in_([name for name, *_ in found])
        connection.execute(delete(timers).where(columns.application == application, fired))
    later = select(func.min(columns.due_ms)).where(columns.application == application, columns.due_ms > now)
    next_due = connection.execute(later).scalar_one()
    return Fired(len(found), int(next_due - now) if next_due is not None else None)


def put_off_first(connection: Connection, application: str, milliseconds: int) -> str | None:
    """The timer that is due for longest is due later; its name."""
    columns = timers.c
    now = NOW_MS[connection.dialect.name]
    first = (
        select(columns.name)
        .where(columns.application == application, columns.due_ms <= now)
        .order_by(columns.due_ms, columns.name)
        .limit(1)
    )
    name = connection.execute(first).scalar_one_or_none()
    if name is not None:
        mine = (columns.application == application, columns.name == name)
        connection.execute(update(timers).where(*mine).values(due_ms=now + milliseconds))
    return name


def waiting(connection: Connection, application: str) -> int:
    """How many timers are set."""
    query = select(func.count()).select_from(timers).where(timers.c.application == application)
    return int(connection.execute(query).scalar_one())
