"""How much of a handler's work goes at once, over all its partitions in this process: slots, and the outage breaker.

Each key at work takes a slot. While the breaker is open nobody takes one but the probe: an event that had failed, one
that is parked and due, or one that was not tried yet, in turn, so that one bad event can't keep the breaker open.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from typing import Protocol

from headwater.runtime.breaker import LONGEST_PROBE_SECONDS, Breaker, Outage

logger = logging.getLogger(__name__)

NO_EPOCH = -1


class Worker(Protocol):
    """An owner of a partition, as far as its pace goes."""

    @property
    def parked_keys(self) -> int: ...

    def go_on(self) -> None:
        """There is a slot, or the breaker is closed."""

    def offer_probe(self) -> bool:
        """Begin one event that is not at work, if there is one."""


class Pace:
    def __init__(
        self, name: str, slots: int, now_ms: Callable[[], int], changed: Callable[[Outage | None], None]
    ) -> None:
        """changed: told when the breaker opens and when it closes."""
        self.breaker = Breaker()
        self.free = slots
        self.is_shut = False
        """Nothing may begin: no transaction is open (exactly_once)."""
        self._name = name
        self._now_ms = now_ms
        self._changed = changed
        self._workers: list[Worker] = []
        self._starved: deque[Worker] = deque()
        self._waiters: deque[asyncio.Future[bool]] = deque()
        self._slot_waiters: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        """Until the next probe."""
        self._is_probing = False
        """One is under way: the timer is for the case that it doesn't come to an end."""
        self._turn = 0
        self._chance = random.Random()

    def join(self, worker: Worker) -> None:
        self._workers.append(worker)
        self.probe_again()

    def leave(self, worker: Worker) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
        if worker in self._starved:
            self._starved.remove(worker)
        if not self._workers:
            self._stop_timer()
        else:
            self.probe_again()  # the probe may have gone with it
            self.count_parked()  # and the parked keys with it

    def start_anew(self) -> None:
        """All workers are gone, and what they had at work with them; whoever aborts knows when the outage is over."""
        self.breaker = Breaker(self.breaker.only_unavailable)
        self._starved.clear()
        self._workers.clear()
        self._stop_timer()

    def recovered(self) -> None:
        """Told after `start_anew`, when it works again."""
        self._changed(None)

    # Slots

    def wants_slot(self, worker: Worker) -> None:
        """It found none free, and is told when one is."""
        if worker not in self._starved:
            self._starved.append(worker)

    async def slot(self) -> None:
        """Take one, when there is one."""
        if self.free > 0:
            self.free -= 1
            return
        waiter = asyncio.get_running_loop().create_future()
        self._slot_waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.release()  # it was given, and nobody takes it
            raise

    def release(self) -> bool:
        """Whether somebody waited for a slot: then it is theirs first."""
        self.free += 1
        while self.free > 0 and self._slot_waiters:
            waiter = self._slot_waiters.popleft()
            if not waiter.done():
                self.free -= 1
                waiter.set_result(None)
                return True
        woken = False
        for _ in range(len(self._starved)):
            if self.free <= 0:
                break
            self._starved.popleft().go_on()
            woken = True
        return woken

    # The breaker

    def succeeded(self, key: object, epoch: int) -> None:
        if self.breaker.succeeded(key, epoch):
            self._closed()
        elif self.breaker.is_open and epoch == self.breaker.epoch:
            self._probe_soon(0.0, epoch)  # it is open because of parked keys: this one made it less

    def failed(self, key: object, epoch: int, error: str) -> None:
        """As transient."""
        self._watch(epoch, lambda: self.breaker.failed(key, epoch, error, self._now_ms()))

    def failed_again(self, epoch: int) -> None:
        """A parked event, as transient."""
        self._watch(epoch, lambda: self.breaker.failed_again(epoch))

    def unavailable(self, epoch: int, error: str) -> None:
        self._watch(epoch, lambda: self.breaker.unavailable(epoch, error, self._now_ms()))

    def probe_again(self, epoch: int | None = None) -> None:
        """The probe came to an end that says nothing. epoch: of the attempt; None when the probe may never have begun one."""
        if self.breaker.is_open:
            self._probe_soon(self.breaker.pause_seconds, self.breaker.epoch if epoch is None else epoch)

    def count_parked(self) -> None:
        count = sum(worker.parked_keys for worker in self._workers)
        closed = False

        def tell() -> None:
            nonlocal closed
            closed = self.breaker.parked_keys(count, self._now_ms())

        self._watch(NO_EPOCH, tell)
        if closed:
            self._closed()

    def _watch(self, epoch: int, tell: Callable[[], None]) -> None:
        was_open = self.breaker.is_open
        tell()
        if self.breaker.outage is not None:
            if not was_open:
                logger.error("breaker_opened handler=%s reason=%s", self._name, self.breaker.outage.reason)
                self._changed(self.breaker.outage)
            self._probe_soon(self.breaker.pause_seconds, epoch)

    def _closed(self) -> None:
        logger.info("breaker_closed handler=%s", self._name)
        self._stop_timer()
        self._changed(None)
        waiters, self._waiters = self._waiters, deque()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(False)
        for worker in list(self._workers):
            worker.go_on()

    async def wait_for_turn(self) -> bool:
        """While the breaker is open: until it closes, or until this one is the probe; whether it is."""
        if self.breaker.is_open:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                return bool(await waiter)
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
        return False

    def _probe_soon(self, seconds: float, epoch: int) -> None:
        """epoch: of the attempt that has ended; only a probe begins while the breaker is open."""
        if self._timer is not None and not (self._is_probing and epoch == self.breaker.epoch):
            return
        self._stop_timer()
        pause = seconds * self._chance.uniform(0.75, 1.0)
        self._timer = asyncio.get_running_loop().call_later(pause, self._probe)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._is_probing = None, False

    def _probe(self) -> None:
        """Those that failed and those that did not are asked in turn."""
        self._stop_timer()
        if not self.breaker.is_open:
            return
        self._turn += 1
        asked = (self._probe_waiter, self._probe_other)
        for ask in asked if self._turn % 2 else asked[::-1]:
            if ask():
                self._is_probing = True
                self._timer = asyncio.get_running_loop().call_later(LONGEST_PROBE_SECONDS, self._probe)
                return
        self._probe_soon(self.breaker.pause_seconds, NO_EPOCH)  # nothing is there to try

    def _probe_waiter(self) -> bool:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(True)
                return True
        return False

    def _probe_other(self) -> bool:
        for _ in range(len(self._workers)):
            worker = self._workers.pop(0)
            self._workers.append(worker)
            if worker.offer_probe():
                return True
        return False
