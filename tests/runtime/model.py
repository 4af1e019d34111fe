"""Random schedules of one partition: the real owner, lanes, pace and breaker, on a loop with virtual time.

The outside is modelled: a source, a retry topic and a dead-letter topic that append now and acknowledge later (or never,
or refuse), committed offsets, an inbox. Owners crash at any moment, or live on as zombies that go on writing; operators
redrive and discard; outages come and go. At the end everything is healed, and must come to rest with every promise kept.
"""

import asyncio
import heapq
import random
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple

from headwater.kafka.producer import NotPublished
from headwater.runtime.assignment import Assignment, Policy, Received
from headwater.runtime.frontier import Progress, decode_metadata
from headwater.runtime.lane import NO_OFFSET, Attempted, Key
from headwater.runtime.owner import Owner
from headwater.runtime.pace import Pace
from headwater.runtime.retry import FailureKinds, GivingUp, Retry
from headwater.runtime.retry_topic import DISCARD, REDRIVE, Done, ParkedRecord, Request, SourceRecord, TakenBack
from headwater.runtime.strands import Strand

KEYS = (b"a", b"b", None)
LONGEST_SECONDS = 3000.0
STOP_SECONDS = 100.0  # what is at work may have to wait for its outage to end, and pauses grow to 30 s


class Poison(Exception):
    pass


class Unavailable(Exception):
    pass


class GivenUpBefore(Poison):
    pass


class Event:
    __slots__ = ("_key", "_offset")

    def __init__(self, offset: int, key: bytes | None) -> None:
        self._offset = offset
        self._key = key

    def offset(self) -> int:
        return self._offset

    def key(self) -> bytes | None:
        return self._key

    def value(self) -> bytes:
        return b"%d" % self._offset

    def headers(self) -> list[tuple[str, str | bytes | None]]:
        return []

    def timestamp(self) -> tuple[int, int]:
        return (1, 0)


class Loop(asyncio.AbstractEventLoop):
    """Just enough of a loop: what is ready runs in order, time jumps to what is next."""

    def __init__(self) -> None:
        self.now = 0.0
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._count = 0
        self.errors: list[dict[str, Any]] = []

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def create_future(self) -> "asyncio.Future[Any]":
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: Any = None
    ) -> "asyncio.Task[Any]":
        task = asyncio.Task(coro, loop=self)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.errors.append(context)

    def step(self) -> bool:
        """One thing that is ready, or else the next timer. False when there is nothing left."""
        while self._ready:
            handle = self._ready.popleft()
            if not handle._cancelled:  # type: ignore[attr-defined]
                handle._run()
                return True
        while self._timers:
            when, _, handle = heapq.heappop(self._timers)
            if not handle._cancelled:  # type: ignore[attr-defined]
                self.now = max(self.now, when)
                handle._run()
                return True
        return False


class Options(NamedTuple):
    giving_up: GivingUp = GivingUp.SKIP
    has_inbox: bool = False
    has_breaker: bool = True
    kind: str = "async"
    """async, sync or batch."""
    settles_first: bool = False
    """At most once; has no inbox."""
    has_retry: bool = True
    """Whether there is a retry topic; without one there is no poison either, which would be tried for ever."""


class Violation(Exception):
    """A promise is broken."""


class Process:
    """One owner and its doors."""

    def __init__(self, world: "World", token: int) -> None:
        self.world = world
        self.token = token
        self.is_dead = False
        self.is_zombie = False
        self.parked: set[int] = set()
        frontier, progress = world.committed
        self.read_to = len(world.retry)
        retry = Retry(2 + world.chance.randrange(2), "1s..4s") if world.options.has_retry else None
        kinds = FailureKinds(poison=(Poison,), unavailable=(Unavailable,))
        self.slots = 1 + world.chance.randrange(4)
        self.pace = Pace("model", self.slots, self.now_ms, lambda outage: None)
        self.pace._chance = world.chance
        if not world.options.has_breaker:
            self.pace.breaker.failed = lambda *_: None  # type: ignore[method-assign,assignment]
        self.owner = Owner(
            Policy(
                "model",
                retry,
                world.options.giving_up,
                kinds,
                world.options.settles_first,
                4 if world.options.kind == "batch" else 0,
            ),
            Assignment("t", 0, token, frontier, progress, "id"),
            self,
            self.pace,
            threads=self if world.options.kind == "sync" else None,
            failed=self.failed,
            chance=world.chance,
        )
        self.owner.work.look_later = lambda: None  # type: ignore[method-assign]  # the model looks when it commits
        if world.prepare is not None:
            world.prepare(self.owner)
        self.owner.start()
        self.owner.read_retry_topic([record for record in world.retry[: self.read_to] if record is not None])
        if retry is not None:
            self.owner.loaded()
        self.at_work = 0
        self.began_at = self.position = frontier or 0

    def failed(self, error: Exception) -> None:
        self.world.broken(f"the owner broke: {error!r}")

    # What the consumer thread does

    def deliver(self) -> None:
        world = self.world
        if self.position < len(world.source):
            end = min(len(world.source), self.position + 1 + world.chance.randrange(4))
            batch = [Event(offset, world.source[offset]) for offset in range(self.position, end)]
            self.position = end
            if world.options.settles_first:
                if self.is_zombie:
                    return  # its commit is refused
                world.committed = (end, Progress())
            self.owner.add(batch)

    def follow(self) -> None:
        records = self.world.retry[self.read_to :]
        self.read_to += len(records)
        self.owner.read_retry_topic([record for record in records if record is not None])

    def commit(self) -> None:
        self.owner.look()
        if self.owner.committable is not None and not self.world.options.settles_first:
            frontier, metadata = self.owner.committable
            progress = decode_metadata(metadata)
            assert progress is not None
            self.world.commit(frontier, progress)

    # Doors

    async def _io(self) -> None:
        if self.is_dead:
            await self.world.loop.create_future()
        world = self.world
        await asyncio.sleep(world.chance.random() * 0.5 if world.chance.random() < 0.8 else world.chance.random() * 5)
        if self.is_dead:
            await world.loop.create_future()

    async def _send(self, append: Callable[[], int]) -> int:
        world = self.world
        await self._io()
        fate = world.chance.random() if not world.is_healed else 1.0
        if fate < 0.05:
            raise NotPublished("refused")
        place = append()
        if fate < 0.08:
            raise NotPublished("timed out, though it is there")
        await self._io()
        return place

    async def attempt(self, event: Received, attempted: Attempted | None, generation: int) -> None:
        offset = event.offset()
        assert offset is not None
        if event.value() != b"%d" % offset:
            self.world.broken(f"{offset} came with the value {event.value()!r}")
        self.at_work += 1
        if self.at_work > self.slots + 1 and not self.is_dead:  # one more: the probe
            self.world.broken(f"{self.at_work} are handled at once, with {self.slots} slots")
        try:
            if self.world.options.has_inbox:
                await self._io()
            await self._io()
            trouble = self._trouble(offset, attempted)
            if trouble is not None:
                raise trouble
            self._take_effect(offset, attempted)
            await self._io()
        finally:
            self.at_work -= 1

    async def attempt_batch(self, events: Sequence[Received], generation: int) -> list[BaseException | None]:
        """An outcome per event; with an inbox one transaction for all of them."""
        await self._io()
        world = self.world
        outcomes: list[BaseException | None] = [self._trouble(event.offset() or 0, None) for event in events]
        if world.options.has_inbox:
            for outcome in outcomes:
                if outcome is not None:
                    raise outcome
        bad: set[object] = set()
        for event, outcome in zip(events, outcomes, strict=True):
            if outcome is not None and event.key() is not None:
                bad.add(event.key())
            elif outcome is None and event.key() not in bad:  # what follows a bad one is handled once more: no matter
                self._take_effect(event.offset() or 0, None)
        await self._io()
        return outcomes

    # Threads of a sync handler: a strand runs at one moment, and is over at a later one

    def put(self, strand: Strand) -> None:
        chance = self.world.chance

        def over() -> None:
            if not self.is_dead:
                strand.runner.ended(strand)

        def run() -> None:
            if not self.is_dead:
                strand.run(lambda: None, self.attempt_sync)
                self.world.loop.call_later(chance.random() * 0.5, over)

        self.world.loop.call_later(chance.random() * 0.5, run)

    def attempt_sync(self, event: Received, generation: int) -> None:
        offset = event.offset()
        assert offset is not None
        trouble = self._trouble(offset, None)
        if trouble is not None:
            raise trouble
        self._take_effect(offset, None)

    def _trouble(self, offset: int, attempted: Attempted | None) -> Exception | None:
        """Why the handler fails, if it does."""
        world = self.world
        world.attempts[offset] += 1
        # A redrive, and what waits behind it, is in the retry topic, where a zombie finds it as well.
        is_redriven = world.source[offset] in {world.source[each] for each in world.redriven}
        if world.options.settles_first and world.attempts[offset] > 1 and not is_redriven:
            world.broken(f"{offset} was handled twice")
        if world.options.has_inbox:
            state = world.inbox.get(offset)
            if state == "done":
                return None
            if state == "dead" and not (attempted is not None and attempted.is_redriven):
                return GivenUpBefore()
        if offset in world.poison:
            return Poison("poison")
        return None if world.is_healed else world.trouble(offset)

    def _take_effect(self, offset: int, attempted: Attempted | None) -> None:
        world = self.world
        is_redriven = attempted is not None and attempted.is_redriven
        if world.options.has_inbox:
            if world.inbox.get(offset) == "done":
                world.handled(self, offset, False)
                return
            world.inbox[offset] = "done"
            world.effect(offset)
        world.handled(self, offset, is_redriven)

    def is_wanted(self, event: Received) -> bool:
        return True

    async def send_parked(self, event: Received, attempted: Attempted | None) -> int:
        offset = event.offset()
        assert offset is not None
        source = SourceRecord(offset, event.key(), event.value(), [], 0)

        def append() -> int:
            return self.world.append(lambda place: ParkedRecord(source, "id", attempted, place))

        place = await self._send(append)
        self.parked.add(offset)
        return place

    async def send_done(self, offset: int, key: Key) -> None:
        await self._send(lambda: self.world.append(lambda _: Done(offset, key if isinstance(key, bytes) else None)))
        self.parked.discard(offset)

    async def send_dead(self, event: Received, attempted: Attempted) -> int | None:
        world = self.world
        offset = event.offset()
        assert offset is not None
        if world.options.has_inbox:
            await self._io()
            if world.inbox.get(offset) == "done":
                return None
            world.inbox[offset] = "dead"

        def append() -> int:
            world.dead.append((offset, event.key()))
            world.given_up(offset)
            return len(world.dead) - 1

        return await self._send(append)

    async def read_back(self, place: int) -> list[ParkedRecord]:
        await self._io()
        if not self.world.is_healed and self.world.chance.random() < 0.1:
            raise RuntimeError("it can't be read now")
        return [record for record in self.world.retry[place : place + 3] if isinstance(record, ParkedRecord)]

    async def read_dead(self, dead_offset: int) -> tuple[Received, int] | None:
        await self._io()
        return (Event(*self.world.dead[dead_offset]), 0) if dead_offset < len(self.world.dead) else None

    async def answer(self, request: Request, done: bool) -> None:
        world = self.world

        await self._send(lambda: world.append(lambda _: TakenBack(request.dead_offset)))

    def now_ms(self) -> int:
        return round(self.world.loop.now * 1000)

    def note(self, event: str, **fields: object) -> None:
        pass


class World:
    def __init__(self, seed: int, options: Options, prepare: Callable[[Owner], None] | None = None) -> None:
        self.chance = random.Random(seed)
        self.options = options
        self.prepare = prepare
        self.loop = Loop()
        count = 3 + self.chance.randrange(6)
        self.source = [self.chance.choice(KEYS) for _ in range(count)]
        self.poison = {offset for offset in range(count) if self.chance.random() < 0.15 and options.has_retry}
        self.flaky = {offset: self.chance.randrange(6) for offset in range(count) if self.chance.random() < 0.4}
        self.retry: list[Any] = []
        self.dead: list[tuple[int, bytes | None]] = []
        self.committed: tuple[int | None, Progress] = (None, Progress())
        self.inbox: dict[int, str] = {}
        self.is_healed = False
        self.is_out = False
        self.processes: list[Process] = []
        self.first_ok: dict[int, int] = {}
        self.redriven: set[int] = set()
        self.discarded: set[int] = set()
        self.dead_offsets: set[int] = set()
        self.last_of: dict[tuple[int, bytes], int] = {}
        self.effects: list[int] = []
        self.attempts: Counter[int] = Counter()
        self.violation: Violation | None = None

    # What the outside keeps

    def append(self, make: Callable[[int], object]) -> int:
        self.retry.append(make(len(self.retry)))
        return len(self.retry) - 1

    def trouble(self, offset: int) -> Exception | None:
        if self.is_out:
            return Unavailable("out")
        if self.flaky.get(offset, 0) > 0:
            self.flaky[offset] -= 1
            return RuntimeError("flaky")
        return None

    # Promises, as far as they can be seen on the way

    def broken(self, text: str) -> None:
        """Kept, because an owner takes what its doors raise for a failure of the handler."""
        self.violation = self.violation or Violation(text)

    def outstanding(self) -> set[int]:
        found: dict[int, bool] = {}
        for record in self.retry:
            if isinstance(record, ParkedRecord):
                found[record.source.offset] = True
            elif isinstance(record, Done):
                found[record.offset] = False
        return {offset for offset, is_parked in found.items() if is_parked}

    def commit(self, frontier: int, progress: Progress) -> None:
        """C6: everything below was settled before."""
        parked = self.outstanding()
        for offset in range(frontier):
            if not (offset in self.first_ok or offset in self.dead_offsets or offset in parked):
                self.broken(f"C6: the frontier {frontier} passes {offset}")
        self.committed = (frontier, progress)

    def handled(self, process: Process, offset: int, is_redriven: bool) -> None:
        key = self.source[offset]
        exempt = is_redriven or offset in self.redriven
        if key is not None and not exempt:
            last = self.last_of.get((process.token, key), NO_OFFSET)
            if offset <= last:
                self.broken(f"C3: owner {process.token} handled {offset} after {last}")
            self.last_of[process.token, key] = offset
            for earlier in process.parked:
                if earlier < offset and self.source[earlier] == key and earlier not in self.redriven:
                    self.broken(f"C4: {offset} was handled while {earlier} was parked")
        if offset not in self.first_ok:
            # At most once, only the zombie has what it took: its successor can't wait for it.
            is_with_zombie = self.options.settles_first and any(each.is_zombie for each in self.processes)
            if key is not None and not exempt and not is_with_zombie:
                for later in self.first_ok:
                    if later > offset and self.source[later] == key and offset not in self.dead_offsets:
                        self.broken(f"C2: {offset} was first handled after {later}")
            if key is not None and self.options.giving_up is GivingUp.HOLD:
                for earlier in self.dead_offsets - set(self.first_ok) - self.discarded - self.redriven:
                    if earlier < offset and self.source[earlier] == key:
                        self.broken(f"C8: {offset} was handled while {earlier} was held")
            self.first_ok[offset] = len(self.first_ok)

    def effect(self, offset: int) -> None:
        if offset in self.effects:
            self.broken(f"C5: {offset} took effect twice")
        key = self.source[offset]
        if key is not None and offset not in self.redriven and offset not in self.dead_offsets:
            late = [other for other in self.effects if other > offset and self.source[other] == key]
            if late:
                self.broken(f"C5: the effect of {offset} came after that of {late[0]}")
        self.effects.append(offset)

    def given_up(self, offset: int) -> None:
        self.dead_offsets.add(offset)

    # A schedule

    def run(self) -> None:
        asyncio._set_running_loop(self.loop)
        try:
            self._start()
            for _ in range(30 + self.chance.randrange(120)):
                self._act()
                for _ in range(self.chance.randrange(6)):
                    self.loop.step()
            self._heal()
        finally:
            for process in self.processes:  # coroutines that are thrown away run their last lines
                process.owner.work.is_stopping = True
                process.pace._starved.clear()
            self.processes.clear()
            asyncio._set_running_loop(None)

    def _start(self) -> None:
        self.processes.append(Process(self, len(self.processes)))

    @property
    def current(self) -> Process:
        return self.processes[-1]

    def _act(self) -> None:
        what = self.chance.random()
        if what < 0.45:
            self.current.deliver()
        elif what < 0.6:
            self.current.commit()
        elif what < 0.64:
            self._crash()
        elif what < 0.66:
            self._stop()
        elif what < 0.72 and self.dead:
            self._ask()
        elif what < 0.76:
            self.is_out = self.chance.random() < 0.5
        elif what < 0.8:
            self.current.follow()

    def _crash(self) -> None:
        process = self.current
        if self.chance.random() < 0.6:
            process.is_dead = True
            for task in list(process.owner.work.tasks):
                task._log_destroy_pending = False  # type: ignore[attr-defined]
        else:
            process.is_zombie = True
        self._start()

    def _stop(self) -> None:
        """A stop or a revoke: what is at work has some time to end; the frontier is committed; somebody else begins."""
        process = self.current
        process.owner.stop()
        must_end = self.chance.random() < 0.3
        self.is_healed, was_healed = must_end or self.is_healed, self.is_healed
        ends = self.loop.now + STOP_SECONDS
        for _ in range(100_000 if must_end else self.chance.randrange(200)):
            if process.owner.stopped.is_set() or self.loop.now > ends or not self.loop.step():
                break
        self.is_healed = was_healed
        if must_end and not process.owner.stopped.is_set():
            self.broken(f"a stop doesn't end, though everything works: {self._state(process)}")
        if not process.owner.stopped.is_set():
            process.owner.cancel()
        if process.owner.stopped.is_set():
            self._check_slots(process)
            if self.options.settles_first and not process.owner.work.is_cancelled:
                taken = range(process.began_at, process.position)
                left = [offset for offset in taken if not self.attempts[offset] and offset not in self.outstanding()]
                if left:
                    self.broken(f"{left} were committed and never handled, in a stop that had time")
        process.commit()
        process.is_dead = True
        self._start()

    def _check_slots(self, process: Process) -> None:
        if process.pace.free != process.slots:
            self.broken(f"{process.slots - process.pace.free} slots are lost")

    def _ask(self) -> None:
        dead_offset = self.chance.randrange(len(self.dead))
        action = self.chance.choice((REDRIVE, DISCARD))
        offset = self.dead[dead_offset][0]
        (self.redriven if action == REDRIVE else self.discarded).add(offset)
        self.append(lambda _: Request(action, dead_offset, "model", 0))

    def _heal(self) -> None:
        self.is_healed, self.is_out = True, False
        is_fresh = self.chance.random() < 0.5
        for process in self.processes if is_fresh else self.processes[:-1]:
            process.is_dead = True
        if is_fresh:
            self._start()  # it sees what zombies wrote as well
        process = self.current
        deadline = self.loop.now + LONGEST_SECONDS
        next_turn = self.loop.now
        while not self._is_at_rest(process):
            if self.loop.now >= next_turn:
                process.deliver()
                process.follow()
                process.commit()
                next_turn = self.loop.now + 1
                self.loop.call_later(1.0, lambda: None)
            if self.violation is not None:
                raise self.violation
            if not self.loop.step() or self.loop.now > deadline:
                raise Violation(f"it does not come to rest: {self._state(process)}")
        process.commit()
        self._check(is_fresh)

    def _is_at_rest(self, process: Process) -> bool:
        owner = process.owner
        if (
            process.position < len(self.source)
            or not owner.work.frontier.is_clear
            or owner.work.tasks
            or owner._requests._waiting
        ):
            return False
        if process.read_to < len(self.retry) and any(isinstance(r, Request) for r in self.retry[process.read_to :]):
            return False
        return all(self._is_held(lane) for lane in owner.work.lanes.by_key.values())

    def _is_held(self, lane: Any) -> bool:
        attempt = lane.parked.attempt if lane.parked else None
        return attempt is not None and attempt.held != NO_OFFSET and not lane.queue

    def _state(self, process: Process) -> object:
        lanes = [
            (lane.key, lane.is_at_work, lane.is_parking, lane.is_retrying, lane.queue, lane.parked and len(lane.parked))
            for lane in process.owner.work.lanes.by_key.values()
        ]
        owner, pace = process.owner, process.pace
        return lanes, owner.work.frontier.offset, len(owner.work.tasks), pace.breaker.outage, pace.free

    def _check(self, is_fresh: bool) -> None:
        """C1: nothing is lost."""
        if self.violation is not None:
            raise self.violation
        parked = self.outstanding()
        for offset in range(0 if self.options.settles_first else len(self.source)):
            if not (offset in self.first_ok or offset in self.dead_offsets or offset in parked):
                raise Violation(f"C1: {offset} is lost")
        for offset in parked:
            if is_fresh and self.options.giving_up is GivingUp.SKIP:
                raise Violation(f"{offset} stays parked")
        for process in self.processes[-1:]:
            self._check_slots(process)
            if self.violation is not None:
                raise self.violation
            if process.owner.work.lanes.parked_keys != sum(
                1 for lane in process.owner.work.lanes.by_key.values() if lane.parked
            ):
                raise Violation(f"the counts are wrong: {self._state(process)}")
        if self.options.has_inbox:
            for offset in self.first_ok:
                if offset not in self.effects:
                    raise Violation(f"C5: {offset} took no effect")


def run_schedules(first: int, count: int, options: Options, prepare: Callable[[Owner], None] | None = None) -> int:
    """How many were run. Raises Violation, with the seed that replays it."""
    for seed in range(first, first + count):
        try:
            World(seed, options, prepare).run()
        except Exception as error:
            raise Violation(f"seed {seed}, {options}: {error!r}") from error
    return count
