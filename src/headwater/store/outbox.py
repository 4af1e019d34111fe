"""Outbox: events that are published if, and only if, the business transaction commits.

Promise    A row written in a unit of work reaches its topic at least once, in the order of the commits of its key; the
           event id travels as a header, so that a consumer can make it once.
Not        Order between keys. The order of the commits of PostgreSQL transactions that share no row: those of one key
           go in the order of their inserts (by logical replication: of their commits). Anything, if rows are written
           outside the transaction that they speak of.
Needs      PostgreSQL: the transaction-id horizon (rows below pg_snapshot_xmin are complete, no open transaction can
           still put one before them). SQLite: one writer at a time, so positions become visible in order.
Proof      tests/store/test_outbox.py::test_commits_that_overtake_each_other_are_published_in_order

The table is our own, `headwater_outbox`, or one that is there already:

    Outbox("outbox_events", id="id", topic="aggregate_type", route="shop.events.{}", key="aggregate_id",
           event_type="event_type", payload="payload", created_at="created_at", published_at="published_at")
    Outbox.debezium(route="outbox.event.{}")
"""

import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, Self

import msgspec
from sqlalchemy import (
    JSON,
    Column,
    ColumnElement,
    Connection,
    Engine,
    LargeBinary,
    MetaData,
    Select,
    String,
    Table,
    Text,
    TextClause,
    any_,
    bindparam,
    cast,
    delete,
    func,
    insert,
    literal_column,
    not_,
    select,
    text,
    update,
)
from sqlalchemy.exc import NoSuchTableError, SAWarning
from sqlalchemy.sql.dml import Insert
from sqlalchemy.types import NullType

from headwater.declaration import WrongDeclaration
from headwater.settings import duration_seconds
from headwater.store import tables

Headers = list[tuple[str, str | bytes | None]]

MAX_SHARDS = 64
PLAIN_NAME = re.compile("[a-z_][a-z0-9_]{0,62}")
CLEAN_ROWS = 10_000
POSITION, XACT_ID = "headwater_position", "headwater_xact_id"
NEEDED_HEADERS = ("headwater-event-version", "headwater-timestamp", "headwater-source", "headwater-correlation-id")
"""Without them, an event whose value is its data alone can't be told what it is."""


class InvalidOutbox(WrongDeclaration, ValueError):
    """A table that can't be the outbox; the message says what it lacks, and the statements that give it."""


class NotMigrated(InvalidOutbox):
    """It lacks the columns that order needs; `Outbox.migration` has the statements."""


class StreamLost(Exception):
    """The replication stream ended, or can't be read; the message says why."""


class Source(StrEnum):
    """How the relay learns of rows."""

    POLLING = "polling"
    REPLICATION = "replication"
    """PostgreSQL's logical replication."""


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


class Status(NamedTuple):
    waiting: int
    """Rows that are not published yet."""
    oldest_seconds: float | None
    """How long the oldest of them waits; None without one, or where the table has no time."""


class Outbox:
    """A table, its columns, and how it is relayed."""

    def __init__(
        self,
        table: str = "headwater_outbox",
        *,
        id: str = "event_id",
        topic: str = "topic",
        route: str = "{}",
        key: str = "key",
        event_type: str = "event_type",
        payload: str = "payload",
        headers: Mapping[str, str] | None = None,
        created_at: str | None = "created_at",
        published_at: str | None = None,
        id_header: str = "headwater-event-id",
        kept: str = "7d",
        shards: int = 1,
        source: str = "polling",
    ) -> None:
        """Columns, by what they hold; and

        route: the topic's name, with {} for what the column `topic` holds.
        headers: further columns, and the header that each becomes, without a value for NULL; the type's is
        headwater-event-type unless said.
        id_header: the header that the event's id becomes.
        published_at: set on rows that are published, which are deleted when they are `kept` for so long. None: they are
        deleted at once.
        shards: how many relays work at once, each on its keys (PostgreSQL).
        source: polling, or replication (PostgreSQL with wal_level=logical).
        Raises InvalidOutbox, InvalidSetting.
        """
        if not PLAIN_NAME.fullmatch(table):
            raise InvalidOutbox(
                f"the table {table!r} can't be the outbox: its name must be small letters, digits and _, without a schema, which "
                "is the search path's to say."
            )
        if route.count("{}") != 1:
            raise InvalidOutbox(f"route={route!r} must have one {{}}, where the column {topic} goes.")
        if not 1 <= shards <= MAX_SHARDS:
            raise InvalidOutbox(f"shards={shards}: 1 to {MAX_SHARDS}.")
        if source not in list(Source):
            raise InvalidOutbox(f"source={source!r}: {' or '.join(Source)}.")
        self.name = table
        self.is_own = table == tables.outbox.name
        if self.is_own and (id, topic, route, key, event_type, payload, headers, created_at, published_at, id_header) != (
            "event_id", "topic", "{}", "key", "event_type", "payload", None, "created_at", None, "headwater-event-id"
        ):  # fmt: skip
            raise InvalidOutbox(f"columns are those of a table of your own: name it, {table} has its own.")
        self.source = Source(source)
        if self.source is Source.REPLICATION and shards > 1:
            raise InvalidOutbox("replication is one stream, in the order of the commits: shards are for polling.")
        self.shards = shards
        self.kept_seconds = duration_seconds(kept)
        self.published_at = published_at
        self._created_at = created_at
        self._names = {"id": id, "topic": topic, "key": key, "event_type": event_type, "payload": payload}
        self._headers = {event_type: "headwater-event-type", **(headers or {})}
        self._id_header = id_header
        self._prefix, _, self._suffix = route.partition("{}")
        self._table: Table = tables.outbox
        self._position: ColumnElement[Any] = tables.outbox.c.position
        self._insert: Insert = insert(tables.outbox)

    @classmethod
    def debezium(
        cls,
        table: str = "outbox",
        *,
        route: str = "outbox.event.{}",
        headers: Mapping[str, str] | None = None,
        created_at: str | None = None,
        shards: int = 1,
        source: str = "polling",
    ) -> Self:
        """Debezium's table (id, aggregatetype, aggregateid, type, payload) and its EventRouter's records: the id is in the
        header `id`. headers: as its table.fields.additional.placement."""
        outbox = cls(
            table, id="id", topic="aggregatetype", route=route, key="aggregateid", event_type="type", payload="payload",
            headers=headers, created_at=created_at, id_header="id", shards=shards, source=source,
        )  # fmt: skip
        outbox._headers = dict(headers or {})
        return outbox

    # Getting ready

    def prepare(self, engine: Engine) -> None:
        """Look at the table. Raises InvalidOutbox."""
        kind = engine.dialect.name
        if self.source is Source.REPLICATION and kind == "postgresql":
            from headwater.store.replication import check_server

            check_server(engine)
        if kind != "postgresql" and (self.shards > 1 or self.source is Source.REPLICATION):
            raise InvalidOutbox("shards and replication need PostgreSQL.")
        if self.is_own:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SAWarning)  # types that it doesn't know are none of ours to write
                self._table = Table(self.name, MetaData(), autoload_with=engine)
        except NoSuchTableError:
            raise InvalidOutbox(
                f"there is no table {self.name} for the outbox: create it, or leave `table` out."
            ) from None
        wanted = [*self._names.values(), *self._headers, *filter(None, (self._created_at, self.published_at))]
        missing = [name for name in dict.fromkeys(wanted) if name not in self._table.c]
        if missing:
            has = ", ".join(self._table.c.keys())
            raise InvalidOutbox(f"the table {self.name} has no column {', '.join(missing)}: it has {has}.")
        if kind == "postgresql":
            statements = self.migration()
            if statements:
                raise NotMigrated(
                    f"the table {self.name} can't be read in order yet. Run, once, in the application's database:\n"
                    + "\n".join(f"  {statement};" for statement in statements)
                )
            self._position = self._table.c[POSITION]
        else:
            self._position = literal_column("rowid")
        self._insert = insert(self._table).values({name: self._parameter(name) for name in self._written()})

    def migration(self) -> list[str]:
        """Statements that give a PostgreSQL table what order needs: other writers' inserts stay as they are."""
        table = self._table
        found = []
        if POSITION not in table.c:
            found.append(f"ALTER TABLE {self.name} ADD COLUMN {POSITION} bigint GENERATED BY DEFAULT AS IDENTITY")
            where = f" WHERE {self.published_at} IS NULL" if self.published_at is not None else ""
            found.append(f"CREATE INDEX {self.name}_{POSITION} ON {self.name} ({POSITION}){where}")
        if XACT_ID not in table.c:
            found.append(f"ALTER TABLE {self.name} ADD COLUMN {XACT_ID} xid8 NOT NULL DEFAULT pg_current_xact_id()")
        return found

    # Writing

    def insert_rows(self) -> Insert:
        """The statement that `values` are for."""
        return self._insert

    def values(self, rows: Sequence[OutboxRow]) -> list[dict[str, object]]:
        """Raises InvalidOutbox for a topic that the route doesn't lead to, and for bytes in a column of text."""
        return [self._own_values(row) if self.is_own else self._mapped_values(row) for row in rows]

    def _own_values(self, row: OutboxRow) -> dict[str, object]:
        return {
            "event_id": row.event_id,
            "topic": row.topic,
            "key": row.key,
            "event_type": row.event_type,
            "payload": row.payload,
            "headers": encode_headers(row.headers),
        }

    def _written(self) -> list[str]:
        names = [*self._names.values(), *self._headers]
        return list(dict.fromkeys(names)) + ([self._created_at] if self._created_at is not None else [])

    def _parameter(self, name: str) -> Any:
        column: Column[Any] = self._table.c[name]
        if name == self._created_at:
            return func.now()
        if isinstance(column.type, LargeBinary):
            return bindparam(f"{name}_", type_=LargeBinary)
        return cast(bindparam(f"{name}_", type_=Text), column.type)

    def _mapped_values(self, row: OutboxRow) -> dict[str, object]:
        names = self._names
        found: dict[str, object] = {}
        given = dict(row.headers)
        lost = [name for name in NEEDED_HEADERS if name in given and name not in self._headers.values()]
        if lost and row.payload is not None and "headwater-timestamp" in given:  # no envelope in the value has them
            raise InvalidOutbox(
                f"{row.topic} has a schema, so its envelope is in the headers: give {self.name} columns for {', '.join(lost)}, "
                "headers={column: header}."
            )
        for column, header in self._headers.items():
            found[column] = given.get(header)
        found[names["id"]] = row.event_id
        found[names["topic"]] = self._routed(row.topic)
        found[names["key"]] = row.key
        found[names["event_type"]] = row.event_type
        found[names["payload"]] = row.payload
        return {f"{name}_": self._fitting(name, value) for name, value in found.items()}

    def _routed(self, topic: str) -> str:
        if not (topic.startswith(self._prefix) and topic.endswith(self._suffix)):
            raise InvalidOutbox(f"the outbox leads to {self._prefix}...{self._suffix}, and not to {topic}.")
        return topic[len(self._prefix) : len(topic) - len(self._suffix)]

    def _fitting(self, name: str, value: object) -> object:
        if isinstance(self._table.c[name].type, LargeBinary):
            return value.encode() if isinstance(value, str) else value
        if not isinstance(value, bytes):
            return value
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise InvalidOutbox(f"{self.name}.{name} holds text, and this is none: make it bytea.") from None

    # Reading

    def read_rows(
        self, connection: Connection, limit: int, shard: int = 0, without: Collection[int] = ()
    ) -> list[OutboxRow]:
        """The next rows to publish, in order: none that an open transaction could still come before.

        without: positions of rows that are had already.
        """
        query = self._select().order_by(self._position).limit(limit)
        if connection.dialect.name == "postgresql":
            query = query.where(text(f"{self.xact_id} < pg_snapshot_xmin(pg_current_snapshot())"))
            if self.shards > 1:
                query = query.where(self._shard() == shard)
        if without:
            query = query.where(not_(self._is_one_of(connection, without)))
        return self.rows_of(connection.execute(query).all())

    def _is_one_of(self, connection: Connection, positions: Collection[int]) -> ColumnElement[bool]:
        if connection.dialect.name == "postgresql":  # one parameter, however many they are
            given = "{" + ",".join(map(str, positions)) + "}"  # a list's elements are adapted one by one
            return self._position == any_(bindparam("positions", given, type_=NullType()))
        return self._position.in_(positions)

    def read_all(
        self, connection: Connection, after: int, limit: int, where: TextClause, parameters: Mapping[str, object]
    ) -> list[OutboxRow]:
        """Rows behind that position, in order."""
        query = self._select().where(self._position > after, where).order_by(self._position).limit(limit)
        return self.rows_of(connection.execute(query, dict(parameters)).all())

    def _shard(self) -> ColumnElement[Any]:
        key = self._table.c[self._names["key"]]
        words = func.encode(key, "hex") if isinstance(key.type, LargeBinary) else cast(key, Text)
        return func.mod(func.hashtext(func.coalesce(words, "")).op("&")(0x7FFFFFFF), self.shards)

    def _select(self) -> "Select[Any]":
        columns = self._table.c
        if self.is_own:
            return select(columns.event_id, columns.topic, columns.key, columns.event_type, columns.payload,
                          columns.headers, columns.position)  # fmt: skip
        names = self._names
        wanted = [names["id"], names["topic"], names["key"], names["event_type"], names["payload"], *self._headers]
        query = select(*(self._as_text(columns[name]).label(f"c{i}") for i, name in enumerate(wanted)), self._position)
        return query.where(columns[self.published_at].is_(None)) if self.published_at is not None else query

    def _as_text(self, column: Column[Any]) -> ColumnElement[Any]:
        if isinstance(column.type, LargeBinary | String) and not isinstance(column.type, JSON):
            return column
        return cast(column, Text)

    def rows_of(self, found: Sequence[Any]) -> list[OutboxRow]:
        if self.is_own:
            return [
                OutboxRow(id, topic, key, kind, payload, decode_headers(headers), position)
                for id, topic, key, kind, payload, headers, position in found
            ]
        return [self.row_of(values) for values in found]

    def row_of(self, values: Sequence[Any]) -> OutboxRow:
        """Of id, topic, key, type, payload, the headers' columns, and the position."""
        id, topic, key, kind, payload, *more, position = values
        headers: Headers = [(self._id_header, str(id).encode())]
        headers += [(header, _bytes(value)) for header, value in zip(self._headers.values(), more, strict=True)]
        name = f"{self._prefix}{topic}{self._suffix}"
        return OutboxRow(str(id), name, _bytes(key), str(kind), _bytes(payload), headers, position)

    @property
    def xact_id(self) -> str:
        """The column with the id of the transaction that wrote the row, on PostgreSQL."""
        return "xact_id" if self.is_own else XACT_ID

    @property
    def columns(self) -> list[str]:
        """As `row_of` and `rows_of` take them, by name."""
        if self.is_own:
            return ["event_id", "topic", "key", "event_type", "payload", "headers", "position"]
        return [*self._names.values(), *self._headers, POSITION]

    def unpublished(self, connection: Connection, rows: Sequence[OutboxRow]) -> set[int]:
        """The positions of those that still wait."""
        query = select(self._position).where(self._is_one_of(connection, [row.position for row in rows]))
        if self.published_at is not None:
            query = query.where(self._table.c[self.published_at].is_(None))
        return {int(position) for (position,) in connection.execute(query)}

    # Settling

    def settle(self, connection: Connection, rows: Sequence[OutboxRow]) -> int:
        """They were published; how many were found."""
        these = self._is_one_of(connection, [row.position for row in rows])
        if self.published_at is None:
            return int(connection.execute(delete(self._table).where(these)).rowcount)
        marked = update(self._table).where(these).values({self.published_at: func.now()})
        return int(connection.execute(marked).rowcount)

    def clean(self, connection: Connection) -> int:
        """Delete some of the rows that were kept for long enough; how many there were."""
        if self.published_at is None:
            return 0
        column = self._table.c[self.published_at]
        before: Any = text("now() - make_interval(secs => :seconds)")
        if connection.dialect.name == "sqlite":
            before = text("datetime('now', '-' || :seconds || ' seconds')")
        old = select(self._position).where(column < before).limit(CLEAN_ROWS)
        statement = delete(self._table).where(self._position.in_(old))
        return int(connection.execute(statement, {"seconds": self.kept_seconds}).rowcount)

    # Looking

    def status(self, connection: Connection) -> Status:
        age = "NULL"
        if self._created_at is not None:
            age = f"EXTRACT(EPOCH FROM now() - min({self._created_at}))"
            if connection.dialect.name == "sqlite":
                age = f"(julianday('now') - julianday(min({self._created_at}))) * 86400"
        count: Any = func.count()
        query = select(count, literal_column(age)).select_from(self._table)
        if self.published_at is not None:
            query = query.where(self._table.c[self.published_at].is_(None))
        waiting, seconds = connection.execute(query).one()
        return Status(int(waiting), max(0.0, float(seconds)) if seconds is not None else None)


encode_headers = msgspec.msgpack.Encoder().encode
decode_headers: Callable[[bytes], Any] = msgspec.msgpack.Decoder(list[tuple[str, bytes]]).decode


def _bytes(value: object) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    return bytes(value) if isinstance(value, memoryview | bytearray) else str(value).encode()
