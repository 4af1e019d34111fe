"""The relay: rows of the outbox to their topics, in order, each at least once.

One relay at a time works on a shard of a database, whoever starts it: PostgreSQL's advisory lock on the connection that reads
and deletes, a locked file beside an SQLite database. It reads what is complete (see `headwater.store.outbox`), sends it in
order, waits for the acknowledgements and deletes it; the next rows are read and sent meanwhile. A crash in between sends rows
again, in order: the producer stops at the first record that can't be sent, and so does the relay, loudly. What it has under way
is given up before the lock is.

Not        Fenced: a relay whose process, or whose connection to PostgreSQL, stands still for long enough for another one to
           take over may have up to 4,000 rows on the wire, which the broker can append behind what the other one has sent
           again.

Of several processes each leads its part of the shards, and the others' when they go. Processes that count shards differently
don't work at once: their keys would be in two hands.
"""

import logging
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from headwater.kafka.producer import KafkaProducer, NotPublished, Profile
from headwater.settings import Settings
from headwater.store.database import Database
from headwater.store.lock import Lock
from headwater.store.outbox import Outbox, OutboxRow, Source, StreamLost

logger = logging.getLogger(__name__)

BATCH = 1000
BATCH_BYTES = 4 << 20
FIRST_BATCH = 100
"""Before it is known how large rows are."""
MOST_ROUNDS = 4
"""Batches that are under way at once."""
POLL_SECONDS = 0.1  # for rows that another process has committed; one's own commits wake the relay
TROUBLE_SECONDS = 1.0
ACK_SECONDS = 60.0
STOP_SECONDS = 3.0
FULL_SECONDS = 0.01
WORD_SECONDS = 1.0
HELD_SECONDS = 60
LOOK_SECONDS = 60.0
SHARE_SECONDS = 2.0  # between looks at who else leads shards
ADVISORY_LOCK = 0x68656164  # "head"
PRESENCE = 1_000_000  # above every shard's number
# A record that fails for good stops those behind it, instead of leaving a gap that a later retry would fill too late. One
# that is given up for the time it has taken does not: before that, all are given up (ACK_SECONDS).
# (log_level 3: the client warns at every start that this is experimental.)
GAPLESS = {"enable.gapless.guarantee": "true", "message.timeout.ms": "300000", "linger.ms": "1", "log_level": "3"}


def gapless(settings: Settings) -> Settings:
    """For a producer of which no record is left out that others came behind."""
    given = {name: value for name, value in settings.kafka.items() if name != "delivery.timeout.ms"}
    return replace(settings, kafka={**given, **GAPLESS})


class Rows(Protocol):
    """Where the rows come from."""

    def open(self) -> None: ...

    def close(self) -> None: ...

    def next(self, limit: int, seconds: float) -> list[OutboxRow]:
        """Rows that are there, or come within that time, and were not given out before."""

    def settle(self, rows: Sequence[OutboxRow]) -> None:
        """They were published. In the order in which they were given out."""

    def keep_alive(self) -> None:
        """Called while acknowledgements are waited for."""


class Polling:
    """Asks the table."""

    def __init__(self, outbox: Outbox, connection: Connection, shard: int, wake: threading.Event) -> None:
        self._outbox = outbox
        self._connection = connection
        self._shard = shard
        self._wake = wake
        self._next_word = 0.0
        self._given: set[int] = set()
        """The positions of rows that are under way. One that comes later may have a lower position than they have: it took it
        before it knew which transaction it was of."""

    def open(self) -> None: ...

    def close(self) -> None: ...

    def next(self, limit: int, seconds: float) -> list[OutboxRow]:
        self._wake.clear()
        rows = self._outbox.read_rows(self._connection, limit, self._shard, self._given)
        self._connection.rollback()  # no transaction is open while records are under way
        self._given.update(row.position for row in rows)
        if not rows:
            self._wake.wait(seconds)
        return rows

    def settle(self, rows: Sequence[OutboxRow]) -> None:
        self._outbox.settle(self._connection, rows)
        self._connection.commit()
        self._given.difference_update(row.position for row in rows)

    def keep_alive(self) -> None:
        """Whether the database still knows us: the lock ends with the connection."""
        if time.monotonic() >= self._next_word:
            self._next_word = time.monotonic() + WORD_SECONDS
            self._connection.execute(text("SELECT 1"))
            self._connection.rollback()


class Relay:
    """Of an application: a thread for each shard."""

    def __init__(self, database: Database, settings: Settings, outbox: Outbox) -> None:
        self.leads: set[int] = set()
        """The shards that are led from here."""
        self.name = f"headwater-relay-{uuid.uuid4().hex[:12]}"
        """By which the relays of this process are known to the others."""
        self._shards = [ShardRelay(self, database, settings, outbox, shard) for shard in range(outbox.shards)]

    def start(self) -> None:
        for each in self._shards:
            each.start()

    def wake(self) -> None:
        """Rows were committed."""
        for each in self._shards:
            each.wake()

    def stop(self) -> None:
        """What is under way has a few seconds; what is left is sent at the next start."""
        for each in self._shards:
            each.ask_to_stop()
        for each in self._shards:
            each.join()


class ShardRelay:
    def __init__(self, relay: Relay, database: Database, settings: Settings, outbox: Outbox, shard: int) -> None:
        self._relay = relay
        self._database = database
        self._settings = gapless(settings)
        self._outbox = outbox
        self._shard = shard
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._stop_by = math.inf
        self._lock = Lock(database, "relay")
        self._producer: KafkaProducer | None = None
        self._next_look = 0.0
        self._next_share = 0.0
        self._thread = threading.Thread(target=self._run, name=f"relay-{shard}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def ask_to_stop(self) -> None:
        self._stop_by = time.monotonic() + STOP_SECONDS
        self._stopped.set()
        self._wake.set()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._lead_and_work()
            except (SQLAlchemyError, NotPublished, StreamLost) as error:
                logger.error("relay_waits seconds=%.1f error=%s", TROUBLE_SECONDS, str(error).split("\n")[0])
            except Exception:
                logger.exception("relay_failed")
            finally:
                self._relay.leads.discard(self._shard)
            self._stopped.wait(TROUBLE_SECONDS)
        self._drop_producer(STOP_SECONDS)
        self._lock.release()

    def _lead_and_work(self) -> None:
        if self._database.kind == "sqlite":
            with self._database.own_connection(self._relay.name) as connection:
                if self._lock.take(connection):
                    self._work(connection)
            return
        with self._database.own_connection(self._relay.name) as connection:
            while not self._stopped.is_set():
                if self._lead(connection):
                    self._relay.leads.add(self._shard)
                    self._work(connection)
                    return
                self._stopped.wait(TROUBLE_SECONDS)  # present all the while, so that others leave it its share

    # Leading

    def _lead(self, connection: Connection) -> bool:
        """Whether this relay is the one of its shard."""
        presence = {"space": self._space(connection), "number": PRESENCE + self._outbox.shards}
        connection.execute(text("SELECT pg_advisory_unlock_shared(:space, :number)"), presence)  # of the turn before
        connection.execute(text("SELECT pg_advisory_lock_shared(:space, :number)"), presence)
        others, processes = self._present(connection)
        if others:
            logger.warning("relay_waits reason=another process has %s shards, this one %d", others, self._outbox.shards)
            connection.execute(text("SELECT pg_advisory_unlock_shared(:space, :number)"), presence)
            connection.commit()
            return False
        if len(self._relay.leads) >= self._share(processes):
            return False
        wanted = {"space": presence["space"], "number": self._shard}
        mine = connection.execute(text("SELECT pg_try_advisory_lock(:space, :number)"), wanted).scalar_one()
        connection.commit()
        return bool(mine)

    def _space(self, connection: Connection) -> int:
        """Of the locks: the table's id, apart from other users of advisory locks."""
        query = text("SELECT CAST(CAST(:name AS regclass) AS oid)::int # :lock")
        found = connection.execute(query, {"name": self._outbox.name, "lock": ADVISORY_LOCK}).scalar_one()
        return int(found)

    def _present(self, connection: Connection) -> tuple[str, int]:
        """Other counts of shards that relays of this table have, and how many processes have ours."""
        query = text(
            "SELECT l.objid::bigint - :presence, count(DISTINCT a.application_name) FROM pg_locks l "
            "JOIN pg_stat_activity a USING (pid) WHERE l.locktype = 'advisory' AND l.objsubid = 2 AND l.granted "
            "AND l.classid = CAST(CAST(:space AS bigint) & 4294967295 AS oid) AND l.objid::bigint > :presence "
            "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) GROUP BY 1"
        )
        found = connection.execute(query, {"presence": PRESENCE, "space": self._space(connection)}).all()
        connection.commit()
        counts = {int(count): int(processes) for count, processes in found}
        processes = counts.pop(self._outbox.shards, 1)
        return ", ".join(map(str, sorted(counts))), processes

    def _share(self, processes: int) -> int:
        return math.ceil(self._outbox.shards / max(1, processes))

    def _leads_too_many(self, connection: Connection) -> bool:
        """Whether this shard is to be given up, so that another process has its share."""
        if self._outbox.shards == 1 or time.monotonic() < self._next_share:
            return False
        self._next_share = time.monotonic() + SHARE_SECONDS
        _, processes = self._present(connection)
        led = sorted(self._relay.leads)
        return led.index(self._shard) >= self._share(processes) if self._shard in led else False

    # Working

    def _rows(self, connection: Connection) -> Rows:
        if self._outbox.source is Source.REPLICATION:
            from headwater.store.replication import Replication

            return Replication(self._outbox, self._database.url, connection)
        return Polling(self._outbox, connection, self._shard, self._wake)

    def _work(self, connection: Connection) -> None:
        """Until stopped. Raises NotPublished, SQLAlchemyError, StreamLost."""
        rows_from = self._rows(connection)
        under_way: deque[Round] = deque()
        limit = FIRST_BATCH
        try:
            rows_from.open()
            while not self._stopped.is_set() and not self._leads_too_many(connection):
                self._look(connection)
                rows = rows_from.next(limit, 0.0 if under_way else POLL_SECONDS)
                if rows:
                    limit = _limit_after(rows)
                    under_way.append(self._send(rows, rows_from))
                    if under_way[-1].failures:
                        break  # nothing may overtake what was refused
                if under_way and (not rows or len(under_way) == MOST_ROUNDS):
                    self._settle(under_way.popleft(), rows_from)
                while under_way and under_way[0].done.is_set():
                    self._settle(under_way.popleft(), rows_from)
            while under_way:
                self._settle(under_way.popleft(), rows_from)
        except BaseException:
            self._drop_producer(0.0)  # while nobody else can have the lock
            raise
        finally:
            rows_from.close()

    def _look(self, connection: Connection) -> None:
        """Now and then: rows that can't be read yet, because an open transaction could still come before them, and rows
        that were kept for long enough."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_SECONDS
        status = self._outbox.status(connection)
        connection.rollback()
        if self._outbox.shards == 1 and status.oldest_seconds is not None and status.oldest_seconds > HELD_SECONDS:
            logger.warning(
                "outbox_held rows=%d oldest_seconds=%.0f reason=a transaction is open for as long", status.waiting,
                status.oldest_seconds,
            )  # fmt: skip
        while self._shard == 0 and not self._stopped.is_set() and self._outbox.clean(connection):
            connection.commit()
        connection.commit()

    def _send(self, rows: Sequence[OutboxRow], rows_from: Rows) -> "Round":
        """Raises NotPublished when there is no room for them."""
        if self._producer is None:
            self._producer = KafkaProducer(self._settings, Profile.LATENCY)
        round_ = Round(rows)
        records = [(row.topic, row.key, row.payload, row.headers) for row in rows]
        sent = self._producer.send_in_order(records, round_.answered)
        deadline = time.monotonic() + ACK_SECONDS
        while sent < len(rows) and not round_.failures:
            rows_from.keep_alive()
            if time.monotonic() > min(deadline, self._stop_by):
                raise NotPublished("the client's queue is full")
            time.sleep(FULL_SECONDS)
            sent = self._producer.send_in_order(records, round_.answered, sent)
        round_.cut(sent)
        return round_

    def _settle(self, round_: "Round", rows_from: Rows) -> None:
        """Wait for its acknowledgements. Raises NotPublished, SQLAlchemyError, StreamLost."""
        deadline = time.monotonic() + ACK_SECONDS
        while not round_.done.wait(0.1):
            rows_from.keep_alive()
            if self._stopped.is_set():
                deadline = min(deadline, self._stop_by)
            if time.monotonic() > deadline:
                break
        sent, trouble = round_.outcome()
        if sent:
            rows_from.settle(sent)
        if trouble is not None:
            raise trouble

    def _drop_producer(self, seconds: float) -> None:
        """What is under way has so long."""
        if self._producer is not None:
            self._producer.close(seconds)
            self._producer = None


def _limit_after(rows: Sequence[OutboxRow]) -> int:
    """How many rows of their size make a batch."""
    size = sum(len(row.payload or b"") for row in rows)
    return max(1, min(BATCH, BATCH_BYTES * len(rows) // max(1, size)))


class Round:
    """Rows that are under way, and the answers to them, which come in the producer's thread."""

    def __init__(self, rows: Sequence[OutboxRow]) -> None:
        self.rows = rows
        self.done = threading.Event()
        """All that were sent are answered."""
        self.failures: list[NotPublished] = []
        self._acknowledged: list[int] = []
        self._sent = len(rows)

    def answered(self, place: int, failure: NotPublished | None) -> None:
        if failure is None:
            self._acknowledged.append(place)
        else:
            self.failures.append(failure)
        self._look()

    def cut(self, count: int) -> None:
        """Only the first so many were sent."""
        self._sent = count
        self._look()

    def _look(self) -> None:
        if len(self._acknowledged) + len(self.failures) >= self._sent:
            self.done.set()

    def outcome(self) -> tuple[Sequence[OutboxRow], NotPublished | None]:
        """The rows that were acknowledged, and what kept the others."""
        acknowledged = sorted(self._acknowledged)
        if len(acknowledged) == len(self.rows):
            return self.rows, None
        failures = self.failures or [NotPublished("no acknowledgement in time")]
        return [self.rows[place] for place in acknowledged], failures[0]
