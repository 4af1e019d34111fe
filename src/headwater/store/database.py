"""A database by its URL, for sync and async code alike.

    sqlite:///orders.db                          postgresql://user@host/orders

The driver is chosen here: psycopg serves both sides of PostgreSQL, sqlite3 and aiosqlite those of SQLite. SQLite is
opened for several processes: write-ahead log, whole syncs, writers that wait for each other instead of failing.
"""

from functools import cached_property
from typing import Any

from sqlalchemy import Connection, Engine, NullPool, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

BUSY_MS = 15_000  # a writer waits this long for another one


class InvalidDatabase(ValueError):
    """A URL that can't be used; the message says what can."""


class Database:
    def __init__(self, url: str) -> None:
        """Raises InvalidDatabase."""
        try:
            self.url = make_url(url)
            self.kind = self.url.get_backend_name()
        except Exception as error:
            raise InvalidDatabase(f"{url!r} is no database URL: write sqlite:///FILE or postgresql://...") from error
        if self.kind not in ("sqlite", "postgresql"):
            raise InvalidDatabase(f"the database {self.kind} is not supported: use SQLite or PostgreSQL.")

    def _with_driver(self, driver: str) -> URL:
        return self.url.set(drivername=driver)

    @cached_property
    def engine(self) -> Engine:
        if self.kind == "postgresql":
            return create_engine(self._with_driver("postgresql+psycopg"), pool_pre_ping=True)
        engine = create_engine(self._with_driver("sqlite"))
        _prepare_sqlite(engine)
        return engine

    def own_connection(self, name: str) -> Connection:
        """Not the pool's, for PostgreSQL's locks that live as long as a connection. name: by which the server knows it."""
        if self.kind == "sqlite":
            return self.engine.connect()
        return create_engine(
            self.engine.url,
            poolclass=NullPool,
            # no statements prepared by the server: it would plan for arrays without looking into them
            connect_args={"application_name": name[:63], "prepare_threshold": None},
        ).connect()

    @cached_property
    def async_engine(self) -> AsyncEngine:
        if self.kind == "postgresql":
            return create_async_engine(self._with_driver("postgresql+psycopg"), pool_pre_ping=True)
        engine = create_async_engine(self._with_driver("sqlite+aiosqlite"))
        _prepare_sqlite(engine.sync_engine)
        return engine

    @cached_property
    def sessions(self) -> "sessionmaker[Session]":
        return sessionmaker(self.engine, expire_on_commit=False)

    @cached_property
    def async_sessions(self) -> "async_sessionmaker[Any]":
        return async_sessionmaker(self.async_engine, expire_on_commit=False)

    async def close(self) -> None:
        if "async_engine" in self.__dict__:
            await self.async_engine.dispose()
        if "engine" in self.__dict__:
            self.engine.dispose()


# PostgreSQL's classes of a server that can't serve: connection exceptions, too many connections, shutting down.
UNAVAILABLE_STATES = ("08", "53300", "57P")
UNAVAILABLE_WORDS = ("unable to open database file", "disk i/o error", "database or disk is full")  # SQLite's


def is_unavailable(error: BaseException) -> bool:
    """Whether the database can't be reached or can't serve, so that nothing else would work either."""
    if not isinstance(error, DBAPIError):
        return False
    if error.connection_invalidated or isinstance(error, InterfaceError):
        return True
    if not isinstance(error, OperationalError):
        return False
    state = getattr(error.orig, "sqlstate", None)
    if state is not None:
        return str(state).startswith(UNAVAILABLE_STATES)
    if type(error.orig).__module__.startswith("psycopg"):
        return True  # no answer from the server at all
    return any(words in str(error.orig).lower() for words in UNAVAILABLE_WORDS)


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def connect(connection: Any, record: object) -> None:
        connection.isolation_level = None  # transactions begin where SQLAlchemy says, not where sqlite3 guesses
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY_MS}", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        # A transaction that reads first and writes later could not wait for another writer: take the lock at once.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
