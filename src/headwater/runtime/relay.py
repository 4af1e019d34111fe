"""The relay: rows of the outbox to their topics, in order, each at least once.

One relay at a time works on a database, whoever starts it: PostgreSQL's advisory lock on the connection that reads and
deletes, a locked file beside an SQLite database. It reads what is complete (see `headwater.store.outbox`), sends it in
order, waits for the acknowledgements and deletes it. A crash in between sends rows again, never out of order: the
producer stops at the first record that can't be sent, and so does the relay, loudly.
"""

import fcntl
import functools
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import Connection, NullPool, create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from headwater.kafka.producer import Acknowledged, KafkaProducer, NotPublished, Profile
from headwater.settings import Settings
from headwater.store.database import Database
from headwater.store.outbox import OutboxRow, delete_rows, read_rows, rows_older_than

logger = logging.getLogger(__name__)

BATCH = 1000
POLL_SECONDS = 0.1  # for rows that another process has committed; one's own commits wake the relay
TROUBLE_SECONDS = 1.0
ACK_SECONDS = 60.0
STOP_SECONDS = 3.0
HELD_SECONDS = 60
ADVISORY_LOCK = 0x68656164  # "head"
# A record that fails for good stops those behind it, instead of leaving a gap that a later retry would fill too late.
# (log_level 3: the client warns at every start that this is experimental.)
GAPLESS = {"enable.gapless.guarantee": "true", "linger.ms": "1", "log_level": "3"}


class Relay:
    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = replace(settings, kafka={**settings.kafka, **GAPLESS})
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._lock_file: int | None = None
        self._producer: KafkaProducer | None = None
        self._next_look = 0.0
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Rows were committed."""
        self._wake.set()

    def stop(self) -> None:
        """What is under way has a few seconds; what is left is sent at the next start."""
        self._stopped.set()
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._lead_and_work()
            except (SQLAlchemyError, NotPublished) as error:
                logger.error("relay_waits seconds=%.1f error=%s", TROUBLE_SECONDS, str(error).split("\n")[0])
                self._drop_producer()
            except Exception:
                logger.exception("relay_failed")
                self._drop_producer()
            self._stopped.wait(TROUBLE_SECONDS)
        self._drop_producer()
        if self._lock_file is not None:
            os.close(self._lock_file)

    def _lead_and_work(self) -> None:
        # A connection of its own, not the pool's: the lock lives as long as it does, and must not outlive this.
        engine = create_engine(self._database.engine.url, poolclass=NullPool)
        if self._database.kind == "sqlite":
            engine = self._database.engine
        with engine.connect() as connection:
            if self._lead(connection):
                self._work(connection)

    def _lead(self, connection: Connection) -> bool:
        """Whether this relay is the one."""
        if connection.dialect.name == "postgresql":
            query = "SELECT pg_try_advisory_lock(:lock, CAST(CAST('headwater_outbox' AS regclass) AS oid)::int)"
            mine = connection.execute(text(query), {"lock": ADVISORY_LOCK}).scalar_one()
            connection.commit()
            return bool(mine)
        if self._lock_file is None:
            path = os.path.realpath(self._database.url.database or "") + "-relay"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            self._lock_file = descriptor
        return True

    def _work(self, connection: Connection) -> None:
        """Until stopped. Raises NotPublished, SQLAlchemyError."""
        while not self._stopped.is_set():
            self._wake.clear()
            rows = read_rows(connection, BATCH)
            connection.rollback()  # no transaction is open while records are under way
            if not rows:
                self._look_for_held_rows(connection)
                self._wake.wait(POLL_SECONDS)
                continue
            sent, trouble = self._send(rows)
            if sent:
                delete_rows(connection, sent)
                connection.commit()
            if trouble is not None:
                raise trouble

    def _look_for_held_rows(self, connection: Connection) -> None:
        """Rows that can't be read yet, because an open transaction of the database could still come before them."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + HELD_SECONDS
        held = rows_older_than(connection, HELD_SECONDS)
        connection.rollback()
        if held:
            logger.warning(
                "outbox_held rows=%d older_than_seconds=%d reason=a transaction is open for as long", held, HELD_SECONDS
            )

    def _send(self, rows: Sequence[OutboxRow]) -> tuple[list[OutboxRow], NotPublished | None]:
        """The rows that were acknowledged, and what kept the others."""
        if self._producer is None:
            self._producer = KafkaProducer(self._settings, Profile.LATENCY)
        round_ = Round(len(rows))
        for place, row in enumerate(rows):
            self._producer.send(
                row.topic, row.key, row.payload, row.headers, functools.partial(round_.acknowledged, place)
            )
            if isinstance(round_.results[place], NotPublished):  # refused before it was sent: nothing may overtake it
                round_.expect(place + 1)
                break
        deadline = time.monotonic() + ACK_SECONDS
        while not round_.done.wait(0.1):
            if self._stopped.is_set():
                deadline = min(deadline, time.monotonic() + STOP_SECONDS)
            if time.monotonic() > deadline:
                break
        results = list(round_.results)
        sent = [row for row, result in zip(rows, results, strict=True) if isinstance(result, Acknowledged)]
        if len(sent) == len(rows):
            return sent, None
        failures = [result for result in results if isinstance(result, NotPublished)]
        return sent, failures[0] if failures else NotPublished("no acknowledgement in time")

    def _drop_producer(self) -> None:
        if self._producer is not None:
            self._producer.close(STOP_SECONDS)
            self._producer = None


class Round:
    """The acknowledgements of some records; told in the producer's thread."""

    def __init__(self, count: int) -> None:
        self.results: list[Acknowledged | NotPublished | None] = [None] * count
        self.done = threading.Event()
        self._left = count
        self._lock = threading.Lock()

    def acknowledged(self, place: int, result: Acknowledged | NotPublished) -> None:
        with self._lock:
            self.results[place] = result
            self._left -= 1
            if self._left <= 0:
                self.done.set()

    def expect(self, count: int) -> None:
        """No more than the first so many were sent."""
        with self._lock:
            self._left -= len(self.results) - count
            if self._left <= 0:
                self.done.set()
