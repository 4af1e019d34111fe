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
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.dml import Delete, Insert

from headwater.store.database import is_unavailable
from headwater.store.outbox import Outbox, OutboxRow, decode_headers, encode_headers
from headwater.store.tables import timers

PUT_OFF_MS = 600_000
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
    put_off: list[tuple[str, Exception]]
    """Names of timers that can't become rows of the outbox, and why: they are tried again later, and hold up no other."""


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
    """Those of the application that are due become rows of the outbox, as `stamped` makes them. In the caller's transaction.
    Raises SQLAlchemyError when the database can't be used."""
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
    rows: dict[str, OutboxRow] = {}
    put_off: list[tuple[str, Exception]] = []
    for name, id, topic, key, kind, payload, headers in connection.execute(query).all():
        try:
            row = stamped(OutboxRow(id, topic, key, kind, payload, list(decode_headers(headers))))
            outbox.values([row])
            rows[name] = row
        except Exception as error:  # whatever is wrong with one is its own matter
            put_off.append((name, error))
    put_off += _insert(connection, outbox, rows)
    for names, statement in (
        (list(rows), delete(timers)),
        ([name for name, _ in put_off], update(timers).values(due_ms=now + PUT_OFF_MS)),
    ):
        if names:
            mine = (columns.application == application, columns.name.in_(names))
            connection.execute(statement.where(*mine))
    later = select(func.min(columns.due_ms)).where(columns.application == application, columns.due_ms > now)
    next_due = connection.execute(later).scalar_one()
    return Fired(len(rows), int(next_due - now) if next_due is not None else None, put_off)


def _insert(connection: Connection, outbox: Outbox, rows: dict[str, OutboxRow]) -> list[tuple[str, Exception]]:
    """All at once; where the database refuses that, one by one. Those that it refuses are taken out of `rows`."""
    if not rows:
        return []
    try:
        with connection.begin_nested():
            connection.execute(outbox.insert_rows(), outbox.values(list(rows.values())))
        return []
    except DBAPIError as error:
        if is_unavailable(error):
            raise
    refused: list[tuple[str, Exception]] = []
    for name, row in list(rows.items()):
        try:
            with connection.begin_nested():
                connection.execute(outbox.insert_rows(), outbox.values([row]))
        except DBAPIError as error:
            if is_unavailable(error):
                raise
            refused.append((name, error))
            del rows[name]
    return refused


def waiting(connection: Connection, application: str) -> int:
    """How many timers are set."""
    query = select(func.count()).select_from(timers).where(timers.c.application == application)
    return int(connection.execute(query).scalar_one())
