"""The rows of a projection: read and written in memory, kept in tables of the application's database.

A read model has two sides. The live one has the tables' own names and is what everybody reads; a rebuild fills tables of
the same shape beside it, `NAME__rebuild`, and in the end takes its place in one transaction. `headwater_projections` says
how far each side is; a side's progress is saved in the transaction of its rows, never apart from them.

Needs    Mapped classes with a primary key of their own, without foreign keys, whose columns give back what was put (no
         rounding; on SQLite no time zones). Everybody else only reads the tables.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

import msgspec
from sqlalchemy import (
    Column,
    Connection,
    Constraint,
    Enum,
    Index,
    MetaData,
    Table,
    bindparam,
    delete,
    func,
    inspect,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import NoInspectionAvailable, OperationalError
from sqlalchemy.orm import Mapper

from headwater.store.tables import projections

R = TypeVar("R")
Key = tuple[Any, ...]

REBUILD = "__rebuild"
REBUILT = r"%\_\_rebuild%"
MAX_IDENTIFIER = 63  # PostgreSQL's
COPY_ROWS = 200
"""From so many on, COPY is faster than INSERT."""
DIGEST_ROWS = 10_000  # at a time
DIGEST_BITS = 128


class InvalidReadModel(TypeError):
    """A class that can't hold the rows of a projection; the message says what to change."""


class Side(StrEnum):
    LIVE = "live"
    REBUILD = "rebuild"


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


class Shape(NamedTuple):
    """A mapped class, and the table that it is kept in."""

    cls: type
    mapper: Mapper[Any]
    table: Table
    attributes: tuple[tuple[str, Column[Any]], ...]
    """The names of the attributes, each with its column in `table`."""
    key: tuple[str, ...]
    """The attributes of the primary key."""


def shape_of(cls: type, side: Side = Side.LIVE) -> Shape:
    """Raises InvalidReadModel."""
    mapper: Any
    try:
        mapper = inspect(cls)
    except NoInspectionAvailable:
        mapper = None
    if not isinstance(mapper, Mapper) or not isinstance(mapper.local_table, Table):
        raise InvalidReadModel(
            f"{cls.__name__} is no mapped class: declare its table, as in class {cls.__name__}(Base)."
        )
    table = mapper.local_table
    if any(column.foreign_keys for column in table.columns):
        raise InvalidReadModel(
            f"the table {table.name} has foreign keys: the rows of a projection stand for themselves."
        )
    if table.schema is not None:
        raise InvalidReadModel(
            f"the table {table.name} is in the schema {table.schema}: leave that to the search path."
        )
    if any(column.default is not None and not column.default.is_scalar for column in table.columns):
        raise InvalidReadModel(f"the table {table.name} has a default that is computed: let the functions say it.")
    if any(isinstance(column.type, Enum) and column.type.native_enum for column in table.columns):
        raise InvalidReadModel(
            f"the table {table.name} has an enum type of the database, which two tables can't both make: write "
            "Enum(..., native_enum=False)."
        )
    beside = _beside(table, REBUILD)
    parts: list[Index | Constraint] = [*beside.indexes, *beside.constraints]
    longest = max([beside.name, *(str(each.name) for each in parts)], key=len)
    if len(longest) > MAX_IDENTIFIER:
        raise InvalidReadModel(f"{longest} would be too long a name beside {table.name}: {MAX_IDENTIFIER} at most.")
    if any(column.server_default is not None or column.identity is not None for column in table.columns):
        raise InvalidReadModel(
            f"the table {table.name} leaves values to the database: a rebuild could not repeat them."
        )
    kept = table if side is Side.LIVE else beside
    attributes = tuple((each.key, kept.c[each.columns[0].name]) for each in mapper.column_attrs)
    names = {column.name: name for name, column in attributes}
    return Shape(cls, mapper, kept, attributes, tuple(names[column.name] for column in kept.primary_key.columns))


def _beside(table: Table, suffix: str) -> Table:
    """The same table, and whatever it names, under another name."""
    copy = table.to_metadata(MetaData(), name=table.name + suffix)
    parts: list[Index | Constraint] = [*copy.indexes, *copy.constraints]
    for named in parts:
        if named.name is not None and suffix not in str(named.name):  # some are made of the table's
            named.name = f"{named.name}{suffix}"
    return copy


class TableRows:
    """The rows of one class, in memory: what was read, and what is to be written."""

    def __init__(self, shape: Shape, *, is_empty: bool) -> None:
        """is_empty: the table has nothing but what was written from here, so that what isn't known isn't there."""
        self.shape = shape
        self._knows_all = is_empty
        self._rows: dict[Key, Any] = {}
        """None: there is no such row."""
        self._changed: dict[Key, bool] = {}
        """Those to be written, in order; whether the table has none of that key yet."""

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, connection: Connection, key: Key) -> Any:
        if len(key) != len(self.shape.key):
            raise InvalidReadModel(
                f"{self.shape.cls.__name__} has the key ({', '.join(self.shape.key)}): {len(key)} values were given."
            )
        try:
            return self._rows[key]
        except KeyError:
            pass
        found = None if self._knows_all else self._read(connection, key)
        self._rows[key] = found
        return found

    def find(self, connection: Connection, equal: Mapping[str, object]) -> list[Any]:
        """Rows by values of their attributes, ordered by key."""
        self.write(connection)
        columns = dict(self.shape.attributes)
        unknown = [name for name in equal if name not in columns]
        if unknown:
            raise InvalidReadModel(f"{self.shape.cls.__name__} has no {', '.join(unknown)}: {', '.join(columns)}.")
        query = self._select().where(*(columns[name] == value for name, value in equal.items()))
        found = []
        for values in connection.execute(query.order_by(*self.shape.table.primary_key.columns)):
            row = self._row(values)
            found.append(self._rows.setdefault(self._key_of(row), row))
        return found

    def put(self, row: Any) -> None:
        key = self._key_of(row)
        if None in key:
            raise InvalidReadModel(f"a {self.shape.cls.__name__} without its key, {', '.join(self.shape.key)}.")
        given = row.__dict__
        if len(given) <= len(self.shape.attributes):  # with SQLAlchemy's own, one more when all are there
            for name, column in self.shape.attributes:
                given.setdefault(name, _default(column))  # now: whoever reads it next sees what the table will have
        is_new = self._changed.get(key, self._knows_all and self._rows.get(key) is None)
        self._rows[key] = row
        self._changed[key] = is_new

    def delete(self, key: Key) -> None:
        is_new = self._changed.get(key, False)
        self._rows[key] = None
        self._changed[key] = is_new

    def forget(self) -> None:
        """What is in memory makes room; it is in the table."""
        assert not self._changed
        self._rows.clear()
        self._knows_all = False

    def write(self, connection: Connection) -> None:
        """What was changed."""
        new: list[Any] = []
        old: list[Any] = []
        gone: list[Key] = []
        for key, is_new in self._changed.items():
            row = self._rows[key]
            if row is not None:
                (new if is_new else old).append(row)
            elif not is_new:
                gone.append(key)
        self._changed.clear()
        table = self.shape.table
        if gone:
            columns = list(table.primary_key.columns)
            statement = delete(table).where(*(column == bindparam(f"key_{i}") for i, column in enumerate(columns)))
            connection.execute(statement, [{f"key_{i}": value for i, value in enumerate(key)} for key in gone])
        if connection.dialect.name == "postgresql" and len(new) + len(old) >= COPY_ROWS:
            if new:
                self._copy(connection, table.name, new)
            if old:
                self._copy_over(connection, old)
        elif new or old:
            values = [{column.name: row.__dict__[name] for name, column in self.shape.attributes} for row in new + old]
            connection.execute(self._upsert(connection.dialect.name), values)

    def _read(self, connection: Connection, key: Key) -> Any:
        columns = self.shape.table.primary_key.columns
        query = self._select().where(*(column == value for column, value in zip(columns, key, strict=True)))
        values = connection.execute(query).first()
        return self._row(values) if values is not None else None

    def _select(self) -> Any:
        return select(*(column for _, column in self.shape.attributes))

    def _row(self, values: Sequence[Any]) -> Any:
        row = self.shape.mapper.class_manager.new_instance()
        for (name, _), value in zip(self.shape.attributes, values, strict=True):
            row.__dict__[name] = value
        return row

    def _key_of(self, row: Any) -> Key:
        given = row.__dict__
        return tuple([given.get(name) for name in self.shape.key])

    def _upsert(self, dialect: str) -> Any:
        table = self.shape.table
        made = (postgresql.insert if dialect == "postgresql" else sqlite.insert)(table)
        return _over(made, table)

    def _copy_over(self, connection: Connection, rows: Sequence[Any]) -> None:
        table = self.shape.table
        staged = f"headwater_staged_{hashlib.blake2b(table.name.encode(), digest_size=8).hexdigest()}"
        quoted = connection.dialect.identifier_preparer.quote
        connection.exec_driver_sql(
            f"CREATE TEMPORARY TABLE IF NOT EXISTS {quoted(staged)} (LIKE {quoted(table.name)}) ON COMMIT DELETE ROWS"
        )
        self._copy(connection, staged, rows)
        names = [column.name for column in table.columns]
        beside = Table(staged, MetaData(), *(Column(column.name, column.type) for column in table.columns))
        connection.execute(_over(postgresql.insert(table).from_select(names, select(*beside.columns)), table))
        connection.exec_driver_sql(f"TRUNCATE {quoted(staged)}")

    def _copy(self, connection: Connection, name: str, rows: Sequence[Any]) -> None:
        """Into the table of that name, which has the columns of ours."""
        dialect = connection.dialect
        quoted = dialect.identifier_preparer.quote
        attributes = self.shape.attributes
        processors = [column.type.dialect_impl(dialect).bind_processor(dialect) for _, column in attributes]
        columns = ", ".join(quoted(column.name) for _, column in attributes)
        driver: Any = connection.connection.driver_connection
        with driver.cursor() as cursor, cursor.copy(f"COPY {quoted(name)} ({columns}) FROM STDIN") as copy:
            for row in rows:
                values = [row.__dict__[name] for name, _ in attributes]
                for i, process in enumerate(processors):
                    if process is not None:
                        values[i] = process(values[i])
                copy.write_row(values)


def _default(column: Column[Any]) -> Any:
    default: Any = column.default
    return default.arg if default is not None and default.is_scalar else None


def _over(made: Any, table: Table) -> Any:
    """An insert that replaces the row that is there."""
    keys = [column.name for column in table.primary_key.columns]
    others = {column.name: made.excluded[column.name] for column in table.columns if column.name not in keys}
    if not others:
        return made.on_conflict_do_nothing(index_elements=keys)
    return made.on_conflict_do_update(index_elements=keys, set_=others)


class Rows:
    """What the functions of a projection read and write. They see what they have written; the database gets it with the
    progress, in one transaction."""

    def __init__(self, connection: Connection, shapes: Sequence[Shape], *, is_empty: bool = False) -> None:
        """is_empty: the tables have nothing yet."""
        self._connection = connection
        self.is_ahead = False
        """Something may be written that is not part of any progress yet: it is to be saved before the transaction ends."""
        self._tables = {shape.cls: TableRows(shape, is_empty=is_empty) for shape in shapes}

    def get(self, cls: type[R], *key: object) -> R | None:
        """The row of that key, to be changed and `put` again. Raises InvalidReadModel for a class of no table of it."""
        found: R | None = self._of(cls).get(self._connection, key)
        return found

    def find(self, cls: type[R], **equal: object) -> list[R]:
        """The rows with these values, ordered by key: `rows.find(OrderRow, customer_id="c-7")`."""
        self.is_ahead = True
        return self._of(cls).find(self._connection, equal)

    def put(self, row: object) -> None:
        """It replaces the row of its key."""
        self._of(type(row)).put(row)

    def delete(self, cls: type, *key: object) -> None:
        """Nothing happens when there is none."""
        self._of(cls).delete(key)

    def write(self) -> None:
        for each in self._tables.values():
            each.write(self._connection)
        self.is_ahead = False

    def make_room(self, most: int) -> None:
        """Forget what is written when there are more rows than that in memory."""
        for each in self._tables.values():
            if len(each) > most:
                each.forget()

    def _of(self, cls: type) -> TableRows:
        try:
            return self._tables[cls]
        except KeyError:
            names = ", ".join(each.__name__ for each in self._tables)
            raise InvalidReadModel(f"{cls.__name__} is no table of this projection: {names}.") from None


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
