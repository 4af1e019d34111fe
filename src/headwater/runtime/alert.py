"""Alerts: what somebody should know now, told to a webhook once when it begins and once when it is over.

    HEADWATER_ALERT_WEBHOOK=http://127.0.0.1:9000/alerts

    POST {"alert": "breaker", "state": "raised", "group": "inventory", "topic": "orders", "detail": ..., "at": ISO-8601}

dead_letter   events were given up on: at once for the first; those of the next minute are told when it is over, or
              when the application stops, with their count. A kill -9 takes what was not told yet.
              There is no recovery.
breaker       the handler waits for an outage to end
tier          the lag in seconds is above the tier's alarm; over when it is below the target
projection    an event can't be applied, and its partition waits; over when none waits
audit         a chain can't be written now; over when it is again
lag           a group doesn't keep up (`headwater lag --watch`); over when it does again
gap           committed events were no longer in the topic (`on_gap="skip"`)

They are sent by a thread of their own, in order, each tried three times; what can't be told is logged. Nothing waits for
them: when a hundred are waiting, the oldest is dropped.
"""

import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from datetime import UTC, datetime

logger = logging.getLogger(__name__)

TRIES = 3
TRY_SECONDS = 5.0
PAUSE_SECONDS = 1.0
MOST_WAITING = 100
TOGETHER_SECONDS = 60.0

RAISED = "raised"
RECOVERED = "recovered"


class Alerts:
    def __init__(self, webhook: str | None, source: str) -> None:
        """Nothing is sent without a webhook; what is raised is logged in any case."""
        self._webhook = webhook
        self._source = source
        self._raised: set[tuple[str, str]] = set()
        self._gathered: dict[tuple[str, str], tuple[int, str, str]] = {}
        """How many, with the topic and the detail of the last."""
        self._gather_ends: dict[tuple[str, str], float] = {}
        self._waiting: deque[dict[str, object]] = deque(maxlen=MOST_WAITING)
        self._wake = threading.Event()
        self._stopping = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def raised(self, alert: str, group: str, topic: str, detail: str) -> None:
        """Told once, until it has recovered."""
        with self._lock:
            if (alert, group) in self._raised:
                return
            self._raised.add((alert, group))
        self._tell(alert, RAISED, group, topic, detail)

    def recovered(self, alert: str, group: str, topic: str, detail: str = "") -> None:
        with self._lock:
            if (alert, group) not in self._raised:
                return
            self._raised.discard((alert, group))
        self._tell(alert, RECOVERED, group, topic, detail)

    def happened(self, alert: str, group: str, topic: str, detail: str) -> None:
        """What has no end: the first is told at once, those of the next minute together."""
        with self._lock:
            what = (alert, group)
            if time.monotonic() < self._gather_ends.get(what, 0.0):
                count = self._gathered[what][0] if what in self._gathered else 0
                self._gathered[what] = (count + 1, topic, detail)
                self._wake.set()
                return
            self._gather_ends[what] = time.monotonic() + TOGETHER_SECONDS
        self._tell(alert, RAISED, group, topic, detail)

    def _tell_gathered(self) -> None:
        """Those whose minute is over; all of them in the end."""
        with self._lock:
            now = time.monotonic()
            due = [what for what in self._gathered if self._stopping or self._gather_ends[what] <= now]
            found = [(what, self._gathered.pop(what)) for what in due]
            self._gather_ends.update(dict.fromkeys(due, now + TOGETHER_SECONDS))
        for (alert, group), (count, topic, detail) in found:
            self._tell(alert, RAISED, group, topic, f"{count} more, the last: {detail}" if count > 1 else detail, count)

    def _seconds_to_gathered(self) -> float | None:
        with self._lock:
            ends = [self._gather_ends[what] for what in self._gathered]
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _tell(self, alert: str, state: str, group: str, topic: str, detail: str, count: int = 1) -> None:
        logger.warning("alert alert=%s state=%s group=%s topic=%s detail=%s", alert, state, group, topic, detail)
        if self._webhook is None:
            return
        self._waiting.append(
            {
                "alert": alert,
                "state": state,
                "source": self._source,
                "group": group,
                "topic": topic,
                "detail": detail,
                "count": count,
                "at": datetime.now(UTC).isoformat(),
            }
        )
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)
                self._thread.start()
        self._wake.set()

    def close(self, seconds: float = TRY_SECONDS) -> None:
        """What waits has so long."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            self._tell_gathered()
            while self._waiting:
                self._send(self._waiting.popleft())
            if self._stopping and not self._gathered:
                return
            self._wake.wait(self._seconds_to_gathered())
            self._wake.clear()

    def _send(self, content: dict[str, object]) -> None:
        assert self._webhook is not None
        for attempt in range(TRIES):
            try:
                request = urllib.request.Request(
                    self._webhook, json.dumps(content).encode(), {"Content-Type": "application/json"}
                )
                with urllib.request.urlopen(request, timeout=TRY_SECONDS):
                    return
            except (OSError, urllib.error.HTTPError, ValueError) as error:
                trouble = error
            if attempt < TRIES - 1 and not self._stopping:
                time.sleep(PAUSE_SECONDS)
        logger.error("alert_not_told alert=%s group=%s error=%s", content["alert"], content["group"], trouble)
