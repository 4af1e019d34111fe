"""Outbox: events that are published if, and only if, the business transaction commits.

Promise    A row written in a unit of work reaches its topic at least once, in the order of the commits of its key; the
           event id travels as a header, so that a consumer can make it once.
Not        Order between keys. The order of the commits of PostgreSQL transactions that share no row: those of one key
           go in the order of their inserts. Anything, if rows are written outside the transaction that they speak of.
Needs      PostgreSQL: the transaction-id horizon (rows below pg_snapshot_xmin are complete, no open transaction can
           still put one before them). SQLite: one writer at a time, so positions become visible in order.
Proof      tests/store/test_outbox.py::test_commits_that_overtake_each_other_are_published_in_order
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from sqlalchemy import Connection, delete, func, insert, select, text
from sqlalchemy.sql.dml import Insert

from headwater.store.tables import outbox

Headers = list[tuple[str, str | bytes | None]]


class OutboxRow(NamedTuple):
    """An event that waits to be published."""

    event_id: str
    topic: str
    key: bytes | None
    event_type: str
    payload: bytes | None
    """None: a tombstone."""
    headers: Headers
    position: int = 0


_encode_headers = msgspec.msgpack.Encoder().encode
_decode_headers = msgspec.msgpack.Decoder(list[tuple[str, bytes]]).decode


def insert_rows() -> Insert:
    """The statement that `values` are for."""
    return insert(outbox)


def values(rows: Sequence[OutboxRow]) -> list[dict[str, object]]:
    return [
        {
            "event_id": row.event_id,
            "topic": row.topic,
            "key": row.key,
            "event_type": row.event_type,
            "payload": row.payload,
            "headers": _encode_headers(row.headers),
        }
        for row in rows
    ]


def read_rows(connection: Connection, limit: int) -> list[OutboxRow]:
    """The next rows to publish, in order: none that an open transaction could still come before."""
    columns = outbox.c
    query = (
        select(
            columns.event_id,
            columns.topic,
            columns.key,
            columns.event_type,
            columns.payload,
            columns.headers,
            columns.position,
        )
        .order_by(columns.position)
        .limit(limit)
    )
    if connection.dialect.name == "postgresql":
        query = query.where(text("xact_id < pg_snapshot_xmin(pg_current_snapshot())"))
    return [
        OutboxRow(id_, topic, key, kind, payload, list(_decode_headers(headers)), position)
        for id_, topic, key, kind, payload, headers, position in connection.execute(query)
    ]


def delete_rows(connection: Connection, rows: Sequence[OutboxRow]) -> None:
    """They were published."""
    connection.execute(delete(outbox).where(outbox.c.position.in_([row.position for row in rows])))


def waiting(connection: Connection) -> int:
    """How many rows are not published yet."""
    return int(connection.execute(select(func.count()).select_from(outbox)).scalar_one())


def rows_older_than(connection: Connection, seconds: float) -> int:
    """How many rows wait longer than that."""
    if connection.dialect.name == "postgresql":
        old = text("created_at < now() - make_interval(secs => :seconds)")
    else:
        old = text("created_at < datetime('now', '-' || :seconds || ' seconds')")
    query = select(func.count()).select_from(outbox).where(old)
    return int(connection.execute(query, {"seconds": seconds}).scalar_one())
