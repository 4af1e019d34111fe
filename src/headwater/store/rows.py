"""The rows of a projection in memory: what its functions read and write, and how that comes into tables.

Needs    Mapped classes with a primary key of their own, without foreign keys, whose columns give back what was put (no
         rounding; on SQLite no time zones).
"""

import hashlib
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Column, Connection, Constraint, Enum, Index, MetaData, Table, bindparam, delete, inspect, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import NoInspectionAvailable
from sqlalchemy.orm import Mapper

from headwater.declaration import WrongDeclaration

R = TypeVar("R")
Key = tuple[Any, ...]

REBUILD = "__rebuild"
MAX_IDENTIFIER = 63  # PostgreSQL's
COPY_ROWS = 200
"""From so many on, COPY is faster than INSERT."""


class InvalidReadModel(WrongDeclaration, TypeError):
    """A class that can't hold the rows of a projection; the message says what to change."""


class Side(StrEnum):
    LIVE = "live"
    REBUILD = "rebuild"


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
        self._names = {name for name, _ in shape.attributes}
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
        if not given.keys() >= self._names:
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
