"""One at a time, over all processes that share a database: PostgreSQL's advisory lock on a connection, a locked file beside an
SQLite database. Whoever dies gives it back."""

import contextlib
import fcntl
import os

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from headwater.store.database import Database


class Lock:
    def __init__(self, database: Database, name: str) -> None:
        self._database = database
        self._name = name
        self._file: int | None = None
        self._connection: Connection | None = None

    def take(self, connection: Connection) -> bool:
        """Whether it is ours: on PostgreSQL as long as the connection lives, on SQLite until it is released."""
        if self._database.kind == "postgresql":
            mine = self._ask(connection, "pg_try_advisory_lock")
            if mine:
                self._connection = connection
            return mine
        if self._file is None:
            path = f"{os.path.realpath(self._database.url.database or '')}-{self._name.replace(os.sep, '_')}"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            self._file = descriptor
        return True

    def _ask(self, connection: Connection, function: str) -> bool:
        query = text(f"SELECT {function}(hashtextextended(current_schema() || ' ' || :name, 0))")
        found = bool(connection.execute(query, {"name": f"headwater {self._name}"}).scalar_one())
        connection.commit()
        return found

    def release(self) -> None:
        """At once; the end of a connection is noticed by the server only a little later."""
        if self._connection is not None:
            with contextlib.suppress(SQLAlchemyError):
                if not self._connection.closed:
                    self._connection.rollback()
                    self._ask(self._connection, "pg_advisory_unlock")
            self._connection = None
        if self._file is not None:
            os.close(self._file)
            self._file = None
