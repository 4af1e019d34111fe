"""The owner of a partition, for one assignment of it: takes its events through the lanes, and keeps the promises.

An event that fails is tried in place for at most two seconds; then it is parked in the retry topic with everything
behind it in its key, one record after the acknowledgement of the one before, and counts as settled. Parked events are
tried when they are due, smallest offset of a key first. What is given up on goes to the dead-letter topic.

    handled            settle
    failed             in place -> parked -> settle
    poison, spent      dead letter -> settle
    retry handled      done record -> the next of the key
    retry failed       parked record again, with one attempt more
    retry given up     dead letter -> done record (skip), or parked record that is held (hold)

All of it runs on the event loop, in these parts:

    incoming -> async_runner | strands | batches -> lane_runner -> parking <- redrive      each on work, the shared state

A cancelled attempt is no failure: nothing of it is parked or settled. What an owner does after its partition is gone
changes nothing: its frontier is read no more, and the records it may still write state true facts.
"""

import random
from collections.abc import Callable, Sequence

from headwater.runtime.assignment import Assignment, Doors, Policy, Received
from headwater.runtime.async_runner import AsyncRunner
from headwater.runtime.batches import BatchRunner
from headwater.runtime.lane_runner import LaneRunner
from headwater.runtime.pace import Pace
from headwater.runtime.parking import Parking
from headwater.runtime.redrive import Requests
from headwater.runtime.retry import GivingUp
from headwater.runtime.retry_topic import Request, Resolved, RetryRecord, TakenBack
from headwater.runtime.strands import StrandRunner, Threads
from headwater.runtime.work import Work


class Owner:
    def __init__(
        self,
        policy: Policy,
        assignment: Assignment,
        doors: Doors,
        pace: Pace,
        *,
        threads: Threads | None = None,
        space: Callable[[], None] = lambda: None,
        failed: Callable[[Exception], None] = lambda error: None,
        chance: random.Random | None = None,
        writes_history: bool = False,
    ) -> None:
        """threads: where a sync handler runs. space: called when buffered events were settled; failed: when the owner
        itself breaks."""
        self.assignment = assignment
        self.partition = assignment.partition
        self.taken = 0
        self.taken_bytes = 0
        """Handed over so far; counted by the consumer thread, which bounds what is taken and not done."""
        self.last_committed: tuple[int, str] | None = None
        """Kept by who commits in transactions."""
        self.work = Work(
            policy, assignment, doors, pace, self, over=self._check_stopped, space=space, failed=failed, chance=chance
        )
        self.stopped = self.work.stopped
        self._writes_history = writes_history
        self._parking = Parking(self.work, self)
        self._requests = Requests(self.work, self._parking)
        self._lanes = LaneRunner(self.work, self._parking)
        self._runner: AsyncRunner | StrandRunner | BatchRunner
        if policy.batch:
            self._runner = BatchRunner(self.work, self._lanes)
        elif threads is not None:
            self._runner = StrandRunner(self.work, self._lanes, threads, self._check_stopped)
        else:
            self._runner = AsyncRunner(self.work, self._lanes)

    # What others read

    @property
    def committable(self) -> tuple[int, str] | None:
        """The frontier and its metadata; None before there is one. Read by the consumer thread."""
        return self.work.committable

    @property
    def done(self) -> int:
        """How many of the events that were taken are settled."""
        return self.work.done

    @property
    def done_bytes(self) -> int:
        return self.work.done_bytes

    @property
    def first_waiting_ms(self) -> int | None:
        """The time of the first event that is not settled; read by who watches the lag."""
        return self.work.first_waiting_ms

    @property
    def parked_keys(self) -> int:
        return self.work.lanes.parked_keys

    @property
    def is_stopping(self) -> bool:
        return self.work.is_stopping

    @property
    def is_loaded(self) -> bool:
        """Whether it knows what is parked, and may begin."""
        return self.work.is_loaded

    @property
    def is_idle(self) -> bool:
        """Whether all that it was given is settled and nothing is at work."""
        work = self.work
        return work.frontier.is_clear and not work.tasks and not work.settle_running()

    @property
    def has_due(self) -> bool:
        """Whether something is to be done without a new event."""
        if not self.work.is_loaded or self.work.is_stopping:
            return False
        return self._requests.has_due or self._parking.has_due

    # Life

    def start(self) -> None:
        """On the loop, before anything else."""
        work, assignment = self.work, self.assignment
        work.pace.join(self)
        work.doors.note(
            "assign",
            i=assignment.topic_id,
            o=assignment.frontier,
            n=work.policy.retry.attempts if work.policy.retry is not None else None,
            hold=work.policy.giving_up is GivingUp.HOLD,
            first=work.policy.settles_first,
            replay=assignment.progress.replay is not None,
        )
        if assignment.progress.replay is not None:
            self.look()

    def read_retry_topic(self, records: Sequence[RetryRecord]) -> None:
        """In order. Parked and done count at the takeover only: those written by others later matter at the next one."""
        for record in records:
            if isinstance(record, Request | TakenBack | Resolved):
                self._requests.read(record)
            elif not self.work.is_loaded:
                self._parking.read(record)
        self._requests.obey()

    def loaded(self) -> None:
        """The retry topic was read up to where it ended when the partition was assigned."""
        if self.work.is_loaded:
            return
        self.work.is_loaded = True
        for offset in self._parking.loaded():
            if self._writes_history:
                self.work.doors.note("load", o=offset)
        self.go_on()

    def add(self, messages: Sequence[Received]) -> None:
        """Records of the source, in order."""
        if not self.work.is_stopping:
            self.work.take(messages)
            self._pump()

    def go_on(self) -> None:
        """Something changed that it may have waited for."""
        self._parking.bury_strangers()
        self._requests.obey()
        self._parking.wake()
        self._pump()
        self.work.look_later()

    def look(self) -> None:
        """See how far it has come."""
        self.work.look()

    def _pump(self) -> None:
        """See that somebody works, if there is something to do."""
        self._runner.pump()
        if self.work.is_stopping:
            self._check_stopped()

    def offer_probe(self) -> bool:
        """While the breaker is open: one event that is not at work. Rather one that was not tried yet: those that are
        parked have failed before. Where too many are parked, they are what must become less."""
        work = self.work
        if not work.is_loaded or work.has_strangers or work.is_stopping or work.pace.free < 0:
            return False  # or there is one beyond the limit already
        if work.pace.breaker.is_crowded:
            return self._parking.try_one()
        for _ in range(len(work.incoming)):
            event = work.incoming.popleft()
            lane = self._lanes.arrive(event)
            if lane is not None:
                work.take_slot()
                work.spawn(self._lanes.run_lane(lane, event, is_probe=True))
                return True
        return self._parking.try_one()

    # Stopping

    def stop(self) -> None:
        """Begin nothing more; `stopped` is set when what is at work is done."""
        work = self.work
        if work.is_stopping:
            return
        work.is_stopping = True
        work.stop_asked.set()
        self._parking.stop()
        if work.policy.settles_first:
            self._runner.pump()  # what is at hand is committed already: it is now or never
        self._check_stopped()

    def cancel(self) -> None:
        """The time for stopping is over: async handlers are cancelled, their events stay unsettled."""
        work = self.work
        work.is_cancelled = True
        work.incoming.clear()
        work.stop_asked.set()
        for task in list(work.tasks):
            task.cancel()
        self._check_stopped()

    def _check_stopped(self) -> None:
        work = self.work
        if not work.is_stopping or work.stopped.is_set() or work.tasks:
            return
        is_left = work.policy.settles_first and work.incoming and work.is_loaded
        is_through = not work.settle_running() and not is_left
        if is_through or work.is_cancelled:
            work.close()
