"""One at a time, over all processes that share a database: PostgreSQL's advisory lock on a connection, a locked file beside an
SQLite database. Whoever dies gives it back."""

import fcntl
import os

from sqlalchemy import Connection, text

from headwater.store.database import Database


class Lock:
    def __init__(self, database: Database, name: str) -> None:
        self._database = database
        self._name = name
        self._file: int | None = None

    def take(self, connection: Connection) -> bool:
        """Whether it is ours: on PostgreSQL as long as the connection lives, on SQLite until it is released."""
        if self._database.kind == "postgresql":
            query = text("SELECT pg_try_advisory_lock(hashtextextended(current_schema() || ' ' || :name, 0))")
            mine = bool(connection.execute(query, {"name": f"headwater {self._name}"}).scalar_one())
            connection.commit()
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

    def release(self) -> None:
        """Of the file; a connection is closed."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
