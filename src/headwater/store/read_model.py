"""Read models: how far they are, and the tables of their two sides.

The live side has the tables' own names and is what everybody reads; a rebuild fills tables of the same shape beside it,
`NAME__rebuild`, and in the end takes its place in one transaction. `headwater_projections` says how far each side is; a side's
progress is saved in the transaction of its rows, never apart from them. Everybody else only reads the tables.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import msgspec
from sqlalchemy import Connection, delete, func, inspect, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import OperationalError

from headwater.store.rows import REBUILD, Shape, Side, shape_of
from headwater.store.tables import projections

REBUILT = r"%\_\_rebuild%"
DIGEST_ROWS = 10_000  # at a time
DIGEST_BITS = 128


class TopicProgress(msgspec.Struct, frozen=True):
    topic_id: str
    offsets: dict[int, int]
    """By partition, the next one to be read."""


class Stuck(msgspec.Struct, frozen=True):
    """An event that a partition waits for."""

    topic: str
    partition: int
    offset: int
    error: str
    attempts: int
    due_ms: int = 0
    """When it is tried again, in ms since the epoch."""


class Progress(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far a side of a read model is."""

    version: str
    generation: int = 0
    """How often the live side was exchanged."""
    events: int = 0
    topics: dict[str, TopicProgress] = {}
    stuck: tuple[Stuck, ...] = ()
    skipped: tuple[tuple[str, int, int], ...] = ()
    """Topic, partition, offset of events that somebody decided to leave out, in a rebuild too."""

    def offset(self, topic: str, partition: int) -> int | None:
        found = self.topics.get(topic)
        return found.offsets.get(partition) if found is not None else None

    def without(self, topic: str, partition: int, offset: int) -> "Progress":
        """Leaving out an event; the partition goes on behind it if it waits for it."""
        topics, known = self.topics, self.topics.get(topic)
        is_stuck = any((each.topic, each.partition, each.offset) == (topic, partition, offset) for each in self.stuck)
        if known is not None and (is_stuck or known.offsets.get(partition) == offset):
            topics = {**topics, topic: TopicProgress(known.topic_id, {**known.offsets, partition: offset + 1})}
        return msgspec.structs.replace(
            self,
            topics=topics,
            stuck=tuple(
                each for each in self.stuck if (each.topic, each.partition, each.offset) != (topic, partition, offset)
            ),
            skipped=tuple(dict.fromkeys((*self.skipped, (topic, partition, offset)))),
        )


# Progress


def load_progress(connection: Connection, name: str, side: Side, *, lock: bool = False) -> Progress | None:
    """lock: nobody else reads it so, or saves it, until this transaction ends."""
    query = select(projections.c.progress).where(projections.c.name == name, projections.c.side == side)
    found = connection.execute(query.with_for_update() if lock else query).scalar_one_or_none()
    return msgspec.json.decode(found, type=Progress) if found is not None else None


def save_progress(connection: Connection, name: str, side: Side, progress: Progress) -> None:
    dialect = connection.dialect.name
    made = (postgresql.insert if dialect == "postgresql" else sqlite.insert)(projections)
    values = {"progress": msgspec.json.encode(progress).decode(), "updated_at": func.now()}
    connection.execute(
        made.values(name=name, side=side, **values).on_conflict_do_update(index_elements=["name", "side"], set_=values)
    )


def drop_progress(connection: Connection, name: str, side: Side) -> None:
    connection.execute(delete(projections).where(projections.c.name == name, projections.c.side == side))


# Tables


def create(connection: Connection, shapes: Iterable[Shape]) -> None:
    for shape in shapes:
        shape.table.create(connection)


def is_there(connection: Connection, shape: Shape) -> bool:
    return inspect(connection).has_table(shape.table.name)


def has_rows(connection: Connection, shape: Shape) -> bool:
    return connection.execute(select(*shape.table.primary_key.columns).limit(1)).first() is not None


def differences(connection: Connection, shape: Shape) -> str:
    """What columns the table lacks, or has beyond those that are declared; empty when there are none."""
    there = {column["name"] for column in inspect(connection).get_columns(shape.table.name)}
    declared = {column.name for column in shape.table.columns}
    parts = [f"it has no {name}" for name in sorted(declared - there)]
    return ", ".join([*parts, *(f"it has {name}" for name in sorted(there - declared))])


def drop(connection: Connection, shapes: Iterable[Shape]) -> None:
    for shape in shapes:
        shape.table.drop(connection, checkfirst=True)


LOCK_TIMEOUT = "2s"
"""While we wait for those that read a table, all others wait behind us."""


LOCKED_STATES = ("55P03", "40P01")  # waited for too long; a deadlock with somebody who wants them in another order


def lock(connection: Connection, classes: Iterable[type]) -> None:
    """Nobody reads the live tables until this transaction ends. Raises OperationalError."""
    if connection.dialect.name != "postgresql":
        return  # whoever writes to SQLite has all of it
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
    quoted = connection.dialect.identifier_preparer.quote
    there = [quoted(shape.table.name) for shape in map(shape_of, classes) if is_there(connection, shape)]
    if there:
        connection.exec_driver_sql(f"LOCK TABLE {', '.join(there)} IN ACCESS EXCLUSIVE MODE")


OBSTACLES = text(
    "SELECT 'the trigger ' || tgname FROM pg_trigger WHERE tgrelid = to_regclass(:table) AND NOT tgisinternal "
    "UNION ALL SELECT 'the policy ' || polname FROM pg_policy WHERE polrelid = to_regclass(:table) "
    "UNION ALL SELECT 'a place in the publication ' || pubname FROM pg_publication_rel r JOIN pg_publication p "
    "ON p.oid = r.prpubid WHERE prrelid = to_regclass(:table) "
    "UNION ALL SELECT DISTINCT 'the view ' || v.oid::regclass FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid "
    "JOIN pg_class v ON v.oid = r.ev_class WHERE d.classid = 'pg_rewrite'::regclass AND d.refobjid = to_regclass(:table) "
    "AND v.oid <> d.refobjid "
    "UNION ALL SELECT 'the foreign key ' || conname || ' of ' || conrelid::regclass FROM pg_constraint "
    "WHERE confrelid = to_regclass(:table) "
    "UNION ALL SELECT 'rights on the column ' || attname FROM pg_attribute WHERE attrelid = to_regclass(:table) "
    "AND attacl IS NOT NULL"
)


def obstacles(connection: Connection, shape: Shape) -> list[str]:
    """What a table that takes its place would lack."""
    if connection.dialect.name != "postgresql":
        return []
    quoted = connection.dialect.identifier_preparer.quote
    found = [str(each) for (each,) in connection.execute(OBSTACLES, {"table": quoted(shape.table.name)})]
    if is_there(connection, shape):
        declared = {index.name for index in shape.table.indexes}
        there = {
            index["name"]
            for index in inspect(connection).get_indexes(shape.table.name)
            if "duplicates_constraint" not in index
        }
        found += [f"the index {name}" for name in sorted(str(name) for name in there - declared)]
    return found


def is_locked(error: OperationalError) -> bool:
    """Whether somebody else had the tables for longer than we waited."""
    return getattr(error.orig, "sqlstate", None) in LOCKED_STATES


def swap(connection: Connection, classes: Iterable[type]) -> None:
    """The rebuilt tables become the live ones, with the rights that others had on those; after `lock`."""
    for cls in classes:
        live, rebuilt = shape_of(cls).table, shape_of(cls, Side.REBUILD).table
        quoted = connection.dialect.identifier_preparer.quote
        is_postgres = connection.dialect.name == "postgresql"
        grants = connection.execute(GRANTS, {"table": live.name}).all() if is_postgres else []
        live.drop(connection, checkfirst=True)
        connection.exec_driver_sql(f"ALTER TABLE {quoted(rebuilt.name)} RENAME TO {quoted(live.name)}")
        if is_postgres:
            _rename_all(connection, live.name)
            for grantee, privilege in grants:
                whom = "PUBLIC" if grantee == "PUBLIC" else quoted(grantee)
                connection.exec_driver_sql(f"GRANT {privilege} ON {quoted(live.name)} TO {whom}")
        else:
            for index in rebuilt.indexes:
                index.drop(connection)
            for index in live.indexes:
                index.create(connection)


GRANTS = text(
    "SELECT grantee, privilege_type FROM information_schema.table_privileges "
    "WHERE table_schema = current_schema() AND table_name = :table AND grantee <> current_user"
)
CONSTRAINTS = text(
    "SELECT conname FROM pg_constraint WHERE conrelid = CAST(CAST(:table AS text) AS regclass) AND conname LIKE :pattern"
)
INDEXES = text(
    "SELECT indexname FROM pg_indexes WHERE schemaname = current_schema() AND tablename = :table AND indexname LIKE :pattern"
)


def _rename_all(connection: Connection, table: str) -> None:
    """PostgreSQL keeps what belonged to a table under its old names."""
    quoted = connection.dialect.identifier_preparer.quote
    for (name,) in connection.execute(CONSTRAINTS, {"table": quoted(table), "pattern": REBUILT}).all():
        new = quoted(name.replace(REBUILD, ""))
        connection.exec_driver_sql(f"ALTER TABLE {quoted(table)} RENAME CONSTRAINT {quoted(name)} TO {new}")
    for (name,) in connection.execute(INDEXES, {"table": table, "pattern": REBUILT}).all():
        connection.exec_driver_sql(f"ALTER INDEX {quoted(name)} RENAME TO {quoted(name.replace(REBUILD, ''))}")


# Digests


@contextmanager
def snapshot(connection: Connection) -> Iterator[None]:
    """All that is read in it is of one moment."""
    with connection.begin():
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        yield


class Digest(NamedTuple):
    """Of the rows of a table, in whatever order they lie."""

    table: str
    rows: int
    value: str


def digest(connection: Connection, shape: Shape) -> Digest:
    """The sum of the rows' BLAKE2b hashes: equal for equal rows."""
    total, rows = 0, 0
    query = select(*(column for _, column in shape.attributes))
    for values in connection.execute(query, execution_options={"yield_per": DIGEST_ROWS}):
        data = msgspec.json.encode(list(values), enc_hook=str)
        total += int.from_bytes(hashlib.blake2b(data, digest_size=DIGEST_BITS // 8).digest(), "big")
        rows += 1
    return Digest(shape.cls.__table__.name, rows, f"{total % 2**DIGEST_BITS:0{DIGEST_BITS // 4}x}")  # type: ignore[attr-defined]
