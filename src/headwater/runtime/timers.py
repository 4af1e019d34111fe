"""The thread that fires timers: see `headwater.store.schedule`. Each process of an application has one; they don't wait for
each other."""

import logging
import threading
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from headwater.event.codec import restamped
from headwater.store import schedule
from headwater.store.database import Database
from headwater.store.outbox import Outbox, OutboxRow

logger = logging.getLogger(__name__)

BATCH = 500
LONGEST_WAIT_SECONDS = 1.0  # another process may have set one that is due sooner
TROUBLE_SECONDS = 1.0


class Timers:
    def __init__(self, database: Database, outbox: Outbox, fired: Callable[[], None]) -> None:
        """fired: told when there are new rows in the outbox."""
        self._database = database
        self._outbox = outbox
        self._fired = fired
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="timers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """A timer was set."""
        self._wake.set()

    def stop(self) -> None:
        self._stopped.set()
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._wake.clear()
            try:
                with self._database.engine.begin() as connection:
                    fired = schedule.fire(connection, self._outbox, BATCH, _stamped)
            except SQLAlchemyError as error:
                logger.error("timers_wait seconds=%.1f error=%s", TROUBLE_SECONDS, str(error).split("\n")[0])
                self._stopped.wait(TROUBLE_SECONDS)
                continue
            if fired.rows:
                self._fired()
            if fired.rows < BATCH:
                soon = fired.wait_ms / 1000 if fired.wait_ms is not None else LONGEST_WAIT_SECONDS
                self._wake.wait(min(soon, LONGEST_WAIT_SECONDS))


def _stamped(row: OutboxRow) -> OutboxRow:
    """An event happens when its timer fires, not when it was set."""
    payload, headers = restamped(row.payload, row.headers)
    return row._replace(payload=payload, headers=headers)
