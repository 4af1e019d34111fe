"""The thread that fires timers: see `headwater.store.schedule`. Each process of an application has one; they don't wait for
each other."""

import logging
import threading
from collections.abc import Callable

from headwater.event.codec import restamped
from headwater.store import schedule
from headwater.store.database import Database
from headwater.store.outbox import Outbox, OutboxRow

logger = logging.getLogger(__name__)

BATCH = 500
LONGEST_WAIT_SECONDS = 1.0  # another process may have set one that is due sooner
TROUBLE_SECONDS = 1.0
STOP_SECONDS = 5.0


class Timers:
    def __init__(self, database: Database, application: str, outbox: Outbox, fired: Callable[[], None]) -> None:
        """fired: told when there are new rows in the outbox."""
        self._database = database
        self._application = application
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
        self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._wake.clear()
            try:
                with self._database.engine.begin() as connection:
                    fired = schedule.fire(connection, self._application, self._outbox, BATCH, _stamped)
            except Exception as error:  # a thread that ends would end all timers
                logger.error("timers_wait seconds=%.1f error=%s", TROUBLE_SECONDS, str(error).split("\n")[0])
                self._stopped.wait(TROUBLE_SECONDS)
                continue
            for name, trouble in fired.put_off:
                logger.error("timer_put_off name=%s seconds=%.0f error=%s", name, schedule.PUT_OFF_MS / 1000, trouble)
            if fired.rows:
                self._fired()
            if fired.rows < BATCH:
                soon = fired.wait_ms / 1000 if fired.wait_ms is not None else LONGEST_WAIT_SECONDS
                self._wake.wait(min(soon, LONGEST_WAIT_SECONDS))


def _stamped(row: OutboxRow) -> OutboxRow:
    """An event happens when its timer fires, not when it was set."""
    payload, headers = restamped(row.payload, row.headers)
    return row._replace(payload=payload, headers=headers)
