"""The outage breaker of a handler: when nothing works, it waits as a whole instead of parking one key after another.

It opens
- at once on an *unavailable* error;
- when at least 5 keys and half of the last 20 attempts failed as transient. Events that are tried for the first time
  count, and all successes; a parked event that fails once more says nothing new, and a handful of bad events must not
  look like an outage whenever they are due together;
- above 10,000 parked keys.

While it is open nothing new is begun, but for one event at a time, the probe. A probe that succeeds closes it; one that
fails makes the next wait for longer. While something is unavailable no attempt counts. State only; the owner asks and
tells.
"""

from collections import deque
from typing import NamedTuple

RECENT = 20
FAILING_KEYS = 5
MOST_PARKED_KEYS = 10_000
CLOSES_AT_PARKED_KEYS = 9_000  # so that it doesn't open and close with each key
FIRST_PROBE_SECONDS = 0.5
LONGEST_PROBE_SECONDS = 10.0


class Outage(NamedTuple):
    """Why the breaker is open."""

    reason: str
    since_ms: int
    is_unavailable: bool
    """Seen by an error that says so: then no attempt counts."""


class Breaker:
    def __init__(self, only_unavailable: bool = False) -> None:
        """only_unavailable: nothing else opens it (exactly_once, where a batch is brought to its end)."""
        self.only_unavailable = only_unavailable
        self.outage: Outage | None = None
        self.epoch = 0
        """Grows whenever it opens or closes: an attempt says in which one it began."""
        self.pause_seconds = FIRST_PROBE_SECONDS
        self._recent: deque[tuple[object, bool]] = deque(maxlen=RECENT)
        self._is_crowded = False

    @property
    def is_open(self) -> bool:
        return self.outage is not None

    @property
    def is_crowded(self) -> bool:
        """Open because of parked keys."""
        return self._is_crowded

    @property
    def has_failures(self) -> bool:
        """Among the recent attempts: while there are none, successes need not be told."""
        return bool(self._recent)

    def succeeded(self, key: object, epoch: int) -> bool:
        """True when this closed it."""
        if self.outage is None:
            if self._recent:
                self._recent.append((key, True))
                if all(is_good for _, is_good in self._recent):
                    self._recent.clear()
            return False
        if epoch != self.epoch or self._is_crowded:
            return False
        self._close()
        return True

    def failed_again(self, epoch: int) -> None:
        """A parked event, as transient."""
        if self.outage is not None:
            self._probe_failed(epoch)

    def failed(self, key: object, epoch: int, error: str, now_ms: int) -> None:
        """An event that was not parked, as transient."""
        if self.outage is not None:
            self._probe_failed(epoch)
            return
        if self.only_unavailable:
            return
        self._recent.append((key, False))
        failing = [key for key, is_good in self._recent if not is_good]
        if len(set(failing)) >= FAILING_KEYS and len(failing) * 2 >= RECENT:
            self._open(f"{len(failing)} of the last {len(self._recent)} attempts failed, last: {error}", now_ms, False)

    def unavailable(self, epoch: int, error: str, now_ms: int) -> None:
        if self.outage is not None:
            self._probe_failed(epoch)
            return
        self._open(error, now_ms, True)

    def parked_keys(self, count: int, now_ms: int) -> bool:
        """How many are parked now, in all partitions of this process; True when this closed it."""
        if self.outage is None and count > MOST_PARKED_KEYS and not self.only_unavailable:
            self._open(f"{count} keys are parked", now_ms, False)
            self._is_crowded = True
        elif self._is_crowded and count <= CLOSES_AT_PARKED_KEYS:
            self._close()
            return True
        return False

    def _open(self, reason: str, now_ms: int, is_unavailable: bool) -> None:
        self.outage = Outage(reason, now_ms, is_unavailable)
        self.epoch += 1
        self.pause_seconds = FIRST_PROBE_SECONDS
        self._recent.clear()

    def _close(self) -> None:
        self.outage = None
        self._is_crowded = False
        self.epoch += 1

    def _probe_failed(self, epoch: int) -> None:
        if epoch == self.epoch and not self._is_crowded:
            self.pause_seconds = min(self.pause_seconds * 2, LONGEST_PROBE_SECONDS)
