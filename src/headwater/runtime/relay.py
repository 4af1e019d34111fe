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
from collections.abc import Sequence

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from headwater.kafka.producer import Acknowledged, KafkaProducer, NotPublished, Profile
from headwater.settings import Settings
from headwater.store.database import Database
from headwater.store.outbox import OutboxRow, delete_rows, read_rows

logger = logging.getLogger(__name__)

BATCH = 1000
POLL_SECONDS = 0.1  # for rows that another process has committed; one's own commits wake the relay
TROUBLE_SECONDS = 1.0
ACK_SECONDS = 60.0
ADVISORY_LOCK = 0x68656164  # "head"
# A record that fails for good stops those behind it, instead of leaving a gap that a later retry would fill too late.
# (log_level 3: the client warns at every start that this is experimental.)
GAPLESS = {"enable.gapless.guarantee": "true", "linger.ms": "1", "log_level": "3"}


class Relay:
    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = Settings(
            settings.bootstrap_servers, settings.database_url, settings.create_topics, {**settings.kafka, **GAPLESS}
        )
        self._wake = threading.Event()
        self._stopping = False
        self._lock_file: int | None = None
        self._producer: KafkaProducer | None = None
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Rows were committed."""
        self._wake.set()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping:
            try:
                with self._database.engine.connect() as connection:
                    if self._lead(connection):
                        self._work(connection)
            except (SQLAlchemyError, NotPublished) as error:
                logger.error("relay_waits seconds=%.1f error=%s", TROUBLE_SECONDS, str(error).split("\n")[0])
                self._drop_producer()
            except Exception:
                logger.exception("relay_failed")
                self._drop_producer()
            if not self._stopping:
                self._wake.wait(TROUBLE_SECONDS)
                self._wake.clear()
        self._drop_producer()
        if self._lock_file is not None:
            os.close(self._lock_file)

    def _lead(self, connection: Connection) -> bool:
        """Whether this relay is the one."""
        if connection.dialect.name == "postgresql":
            mine = connection.execute(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": ADVISORY_LOCK}).scalar_one()
            connection.commit()
            return bool(mine)
        if self._lock_file is None:
            descriptor = os.open(f"{self._database.url.database}-relay", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            self._lock_file = descriptor
        return True

    def _work(self, connection: Connection) -> None:
        """Until stopped. Raises NotPublished, SQLAlchemyError."""
        while not self._stopping:
            self._wake.clear()
            rows = read_rows(connection, BATCH)
            connection.rollback()  # no transaction is open while records are under way
            if not rows:
                self._wake.wait(POLL_SECONDS)
                continue
            sent, trouble = self._send(rows)
            if sent:
                delete_rows(connection, sent)
                connection.commit()
            if trouble is not None:
                raise trouble

    def _send(self, rows: Sequence[OutboxRow]) -> tuple[list[OutboxRow], NotPublished | None]:
        """The rows that were acknowledged before the first that was not."""
        if self._producer is None:
            self._producer = KafkaProducer(self._settings, Profile.LATENCY)
        results: list[Acknowledged | NotPublished | None] = [None] * len(rows)
        left = len(rows)
        done = threading.Event()
        lock = threading.Lock()

        def acknowledged(place: int, result: Acknowledged | NotPublished) -> None:
            nonlocal left
            results[place] = result
            with lock:
                left -= 1
                if left == 0:
                    done.set()

        for place, row in enumerate(rows):
            self._producer.send(row.topic, row.key, row.payload, row.headers, functools.partial(acknowledged, place))
            if isinstance(results[place], NotPublished):  # refused before it was sent: nothing may overtake it
                with lock:
                    left -= len(rows) - place - 1
                    if left <= 0:
                        done.set()
                break
        if not done.wait(ACK_SECONDS):
            return [], NotPublished(f"no acknowledgement within {ACK_SECONDS:.0f} s")
        for place, result in enumerate(results):
            if not isinstance(result, Acknowledged):
                error = result or NotPublished("not sent")
                return list(rows[:place]), error
        return list(rows), None

    def _drop_producer(self) -> None:
        if self._producer is not None:
            self._producer.close()
            self._producer = None
