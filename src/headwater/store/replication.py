"""The outbox by PostgreSQL's logical replication: rows as their transactions commit, in that order, without asking.

The table stays the truth. A slot that is new, or was lost because nobody read it for long, is made behind a snapshot: what the
snapshot has is published from the table, in the order of the inserts, then what the stream has and the snapshot hasn't. When
that is done it is written down (as the publication's comment), and from then on all comes from the stream. What was
published before a restart and not confirmed comes again, and is passed over because the table hasn't it any more.

The disk that a slot holds is bounded by the server's max_slot_wal_keep_size, without which nothing starts.

Source: PostgreSQL's documentation, "Streaming Replication Protocol". psycopg has no replication of its own; libpq's COPY BOTH
is used through it.
"""

import contextlib
import hashlib
import re
import selectors
import struct
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import psycopg
from sqlalchemy import URL, Connection, Engine, text

from headwater.store.outbox import InvalidOutbox, Outbox, OutboxRow, StreamLost
from headwater.store.pgoutput import Begin, Commit, Insert, Malformed, Relation, decode, value_of

KEEP_ALIVE_SECONDS = 5.0  # PostgreSQL gives a reader up that says nothing for wal_sender_timeout, 60 s
RECOVERED_ROWS = 1000
POSTGRES_EPOCH_SECONDS = 946_684_800  # 2000-01-01
OPTIONS = "-c bytea_output=hex -c client_encoding=utf8"
LOOK_SECONDS = 0.05
SETTLE_TRIES = 5
SNAPSHOT_SECONDS = 10.0
NO_COLUMN = (-1, 0)
WHOLE = "all that was in the table before the slot is published"


class Snapshot(NamedTuple):
    """Of transactions, as pg_current_snapshot says it."""

    xmax: int
    in_progress: frozenset[int]

    def has(self, xid: int) -> bool:
        """Whether it sees that transaction, of which the low 32 bits are given."""
        full = (self.xmax & ~0xFFFFFFFF) | xid
        if full - self.xmax > 1 << 31:
            full -= 1 << 32
        elif self.xmax - full > 1 << 31:
            full += 1 << 32
        return full < self.xmax and full not in self.in_progress


def parse_snapshot(words: str) -> Snapshot:
    """xmin:xmax:xip,xip,..."""
    _, xmax, xips = words.split(":")
    return Snapshot(int(xmax), frozenset(int(xip) for xip in xips.split(",") if xip))


def slot_name(outbox: Outbox, database: str, schema: str) -> str:
    """Of the slot, which is the server's, and of the publication: no other database's, and no other table's."""
    told_apart = hashlib.sha256(f"{database}\0{schema}\0{outbox.name}".encode()).hexdigest()[:16]
    return f"headwater_{re.sub('[^a-z0-9_]', '_', outbox.name.lower())[:30]}_{told_apart}"


def check_server(engine: Engine) -> None:
    """Raises InvalidOutbox."""
    with engine.connect() as connection:
        level = connection.execute(text("SHOW wal_level")).scalar_one()
        if level != "logical":
            raise InvalidOutbox(
                f"replication needs wal_level=logical, and it is {level}: ALTER SYSTEM SET wal_level = 'logical', and "
                "restart PostgreSQL."
            )
        kept = connection.execute(text("SHOW max_slot_wal_keep_size")).scalar_one()
        if kept == "-1":
            raise InvalidOutbox(
                "replication needs a bound for the log that a slot holds while nobody reads it: "
                "ALTER SYSTEM SET max_slot_wal_keep_size = '4GB'; SELECT pg_reload_conf()."
            )


class Replication:
    """A source of rows; `connection` is that of the relay, for all that is no replication."""

    def __init__(self, outbox: Outbox, url: URL, connection: Connection) -> None:
        self._outbox = outbox
        self._url = url
        self._connection = connection
        self._slot = ""
        self._stream: Any = None
        self._recovery: Iterator[list[OutboxRow]] | None = None
        self._snapshot: Snapshot | None = None
        """Of a recovery, until the stream has come as far as it."""
        self._columns: dict[int, list[tuple[int, int]]] = {}
        """By relation: where each column of the outbox is, and its type."""
        self._skips = False
        """The transaction that is being read was in the snapshot."""
        self._may_be_published = False
        """... was committed before the beginning, and its rows may have been published since."""
        self._given = self._settled = 0
        """Rows that were given out, and how many of them were settled."""
        self._marks: deque[tuple[int, int]] = deque()
        """How far the log was read when so many were given out."""
        self._known_lsn = 0
        """The log's end at the beginning: what is before it may have been published."""
        self._is_inside = False
        self._old: dict[int, int] = {}
        """Positions of rows that may have been published, among those that are being read, with their transactions."""
        self._xid = 0
        self._read_lsn = 0
        """Behind the last transaction that was read whole."""
        self._confirmed_lsn = 0
        self._last_word = 0.0

    def open(self) -> None:
        """Raises SQLAlchemyError, StreamLost."""
        where = text("SELECT relnamespace::regnamespace::text FROM pg_class WHERE oid = CAST(:table AS regclass)")
        schema = self._connection.execute(where, {"table": self._outbox.name}).scalar_one()
        self._slot = slot_name(self._outbox, self._url.database or "", schema)
        if self._prepare():
            self._recovery = self._recover(self._take_snapshot())
        query = text("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
        self._known_lsn = int(self._connection.execute(query).scalar_one())
        self._connection.rollback()

    def close(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(Exception):
                self._say()
            with contextlib.suppress(Exception):
                self._stream.close()
            self._stream = None

    def _prepare(self) -> bool:
        """A publication, and a slot that can be read; whether it is new."""
        connection = self._connection
        published = text(
            "SELECT obj_description(p.oid, 'pg_publication'), EXISTS (SELECT 1 FROM pg_publication_rel r "
            "WHERE r.prpubid = p.oid AND r.prrelid = CAST(:table AS regclass)) FROM pg_publication p WHERE pubname = :name"
        )
        publication = connection.execute(published, {"name": self._slot, "table": self._outbox.name}).first()
        if publication is not None and not publication[1]:  # the table of this name is another one now
            connection.execute(text(f"DROP PUBLICATION {self._slot}"))
            publication = None
        if publication is None:
            connection.execute(
                text(f"CREATE PUBLICATION {self._slot} FOR TABLE {self._outbox.name} WITH (publish = 'insert')")
            )
        connection.commit()
        found = connection.execute(
            text(
                "SELECT wal_status FROM pg_replication_slots WHERE slot_name = :name AND database = current_database()"
            ),
            {"name": self._slot},
        ).first()
        connection.commit()
        if found is not None and found[0] != "lost" and publication is not None and publication[0] == WHOLE:
            return False
        self._note("new")
        if found is not None:
            connection.execute(text("SELECT pg_drop_replication_slot(:name)"), {"name": self._slot})
            connection.commit()
        connection.execute(text("SELECT pg_create_logical_replication_slot(:name, 'pgoutput')"), {"name": self._slot})
        connection.commit()
        return True

    def _note(self, state: str) -> None:
        self._connection.execute(text(f"COMMENT ON PUBLICATION {self._slot} IS '{state}'"))
        self._connection.commit()

    def _take_snapshot(self) -> str:
        """Behind the slot, and when all are over that were under way when it was made: with synchronous replication, one may
        be committed before the slot begins and not be seen yet."""
        under_way = parse_snapshot(self._current_snapshot()).in_progress
        deadline = time.monotonic() + SNAPSHOT_SECONDS
        while time.monotonic() < deadline:
            words = self._current_snapshot()
            if not under_way & parse_snapshot(words).in_progress:
                self._snapshot = parse_snapshot(words)
                return words
            time.sleep(LOOK_SECONDS)
        raise StreamLost(f"transactions have been open for {SNAPSHOT_SECONDS:.0f} s since the slot was made")

    def _current_snapshot(self) -> str:
        words = self._connection.execute(text("SELECT pg_current_snapshot()::text")).scalar_one()
        self._connection.rollback()
        return str(words)

    def _recover(self, words: str) -> Iterator[list[OutboxRow]]:
        """What the table has in the snapshot."""
        connection = self._connection
        visible = text(f"pg_visible_in_snapshot({self._outbox.xact_id}, CAST(:snapshot AS pg_snapshot))")
        after = -1
        while True:
            rows = self._outbox.read_all(connection, after, RECOVERED_ROWS, visible, {"snapshot": words})
            connection.rollback()
            if not rows:
                return
            after = rows[-1].position
            yield rows

    def _start(self) -> None:
        """Raises StreamLost."""
        parts: dict[str, Any] = {
            **self._url.translate_connect_args(username="user", database="dbname"),
            **self._url.query,
        }
        parts["options"] = f"{parts.get('options', '')} {OPTIONS}".strip()  # the URL's own: a search path, say
        try:
            self._stream = psycopg.connect(**parts, replication="database", autocommit=True)
        except psycopg.Error as error:
            raise StreamLost(str(error)) from None
        options = f"proto_version '1', publication_names '{self._slot}'"
        pgconn = self._stream.pgconn
        pgconn.send_query(f'START_REPLICATION SLOT "{self._slot}" LOGICAL 0/0 ({options})'.encode())
        result = pgconn.get_result()
        if result is None or result.status != psycopg.pq.ExecStatus.COPY_BOTH:
            said = pgconn.get_error_message()
            self.close()
            raise StreamLost(f"the slot {self._slot} can't be read: {said}")
        self._columns.clear()
        self._is_inside = self._skips = False
        self._read_lsn = self._confirmed_lsn = 0

    # As the relay uses it

    def next(self, limit: int, seconds: float) -> list[OutboxRow]:
        """Rows that are there, or come within that time. Raises SQLAlchemyError, StreamLost."""
        if self._recovery is not None:
            rows = next(self._recovery, None)
            if rows is not None:
                self._given += len(rows)
                return rows
            if self._settled < self._given:
                return []  # what is written down below must be true first
            self._recovery = None
            self._note(WHOLE)
        if self._stream is None:
            self._start()
        try:
            return self._read(limit, seconds)
        except (psycopg.Error, Malformed) as error:
            raise StreamLost(str(error)) from None

    def _read(self, limit: int, seconds: float) -> list[OutboxRow]:
        found: list[OutboxRow] = []
        deadline = time.monotonic() + seconds
        pgconn = self._stream.pgconn
        while len(found) < limit:
            size, data = pgconn.get_copy_data(1)
            if size > 0:
                self._take(bytes(data), found)
            elif size == 0:
                left = 0.0 if found else deadline - time.monotonic()
                if not self._has_input(max(0.0, left)):
                    break
                pgconn.consume_input()
            else:
                raise StreamLost(f"the server has ended the stream of {self._slot}")
        found = self._without_published(found)
        self._given += len(found)
        if self._marks and self._marks[-1][0] == self._given:
            self._marks.pop()
        self._marks.append((self._given, self._read_lsn))
        self._confirm()
        self.keep_alive()
        return found

    def _has_input(self, seconds: float) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self._stream.pgconn.socket, selectors.EVENT_READ)
            return bool(selector.select(seconds))

    def _without_published(self, found: list[OutboxRow]) -> list[OutboxRow]:
        """Of what was committed before the beginning, that which the table still has to publish."""
        old = [row for row in found if row.position in self._old]
        if not old:
            return found
        # with synchronous replication, a transaction is in the log before anybody sees it: what isn't seen yet isn't gone
        seen = parse_snapshot(self._current_snapshot())
        waiting = self._outbox.unpublished(self._connection, old)
        self._connection.rollback()
        gone = {row.position for row in old if seen.has(self._old[row.position])} - waiting
        self._old.clear()
        return [row for row in found if row.position not in gone]

    def _take(self, data: bytes, found: list[OutboxRow]) -> None:
        if data[:1] == b"k":
            end, _, wants_answer = struct.unpack_from(">QqB", data, 1)
            if not self._is_inside and not found and self._settled == self._given:
                self._read_lsn = self._confirmed_lsn = max(self._confirmed_lsn, end)  # nothing of ours is before it
            if wants_answer:
                self._last_word = 0.0
            return
        change = decode(data[25:])
        if isinstance(change, Begin):
            self._is_inside, self._xid = True, change.xid
            self._may_be_published = change.commit_lsn < self._known_lsn
            if not self._may_be_published:
                self._snapshot = None  # whatever it has was committed before
            self._skips = self._snapshot is not None and self._snapshot.has(change.xid)
        elif isinstance(change, Commit):
            self._is_inside, self._read_lsn = False, change.end_lsn
        elif isinstance(change, Relation):
            places = {name: (i, oid) for i, (name, oid) in enumerate(change.columns)}
            # a column that is younger than the row is not there: NULL, as the table has it
            self._columns[change.id] = [places.get(name, NO_COLUMN) for name in self._outbox.columns]
        elif isinstance(change, Insert) and not self._skips:
            given = [*change.values, None]
            values = [value_of(given[i], oid) for i, oid in self._columns[change.relation]]
            position = int(str(values[-1]))
            values[-1] = position
            if self._may_be_published:
                self._old[position] = self._xid
            found += self._outbox.rows_of([values])

    def settle(self, rows: Sequence[OutboxRow]) -> None:
        """They were published."""
        left = len(rows)
        for _ in range(SETTLE_TRIES):
            left -= self._outbox.settle(self._connection, rows)
            self._connection.commit()
            if not left:
                break
            time.sleep(LOOK_SECONDS)  # a row that isn't seen yet can't be deleted; one that is gone is no matter
        self._settled += len(rows)
        self._confirm()

    def _confirm(self) -> None:
        """The log up to where all is settled that was given out."""
        while self._marks and self._marks[0][0] <= self._settled:
            self._confirmed_lsn = self._marks.popleft()[1]

    def keep_alive(self) -> None:
        """Say where we are, once in a while."""
        if self._stream is None or time.monotonic() - self._last_word < KEEP_ALIVE_SECONDS:
            return
        self._last_word = time.monotonic()
        try:
            self._say()
        except psycopg.Error as error:
            raise StreamLost(str(error)) from None

    def _say(self) -> None:
        now = round((time.time() - POSTGRES_EPOCH_SECONDS) * 1_000_000)
        lsn = self._confirmed_lsn
        self._stream.pgconn.put_copy_data(b"r" + struct.pack(">QQQqB", lsn, lsn, lsn, now, 0))
        self._stream.pgconn.flush()
