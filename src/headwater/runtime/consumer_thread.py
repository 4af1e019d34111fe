"""The thread that owns a group member's consumer: it takes batches, commits, and answers the group.

Batches go over to the event loop by one call each; commits are read off the owners. The loop never waits for the thread,
and the thread goes on polling whatever the handlers do, so a handler may take hours. Each assignment of a partition gets
an owner of its own, with a token that grows: what an owner of an earlier assignment still does is committed by nobody.

Back-pressure: a bounded buffer per partition. When it is full nothing is taken; when it is still full after a second
the full partitions are paused, and the thread polls on for the others. Resumed when half empty.

Rebalance: a revoked partition's owner finishes what is at work, for at most REVOKE_SECONDS, and its frontier is
committed before the partition goes. A lost partition's owner is stopped and commits nothing.

At most once: what is taken is committed before it is handed over.

Commits are sent once a second and answered while the thread polls: a broker that is away stops nothing.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from headwater.kafka.consumer import (
    Begun,
    ConsumerFailed,
    KafkaConsumer,
    KafkaException,
    Message,
    OutOfRange,
    TopicPartition,
)
from headwater.runtime import crash_point
from headwater.runtime.frontier import Progress, Replay, decode_metadata, encode_metadata
from headwater.runtime.owner import Owner

logger = logging.getLogger(__name__)

BATCH = 500
TAKE_SECONDS = 0.1
COMMIT_SECONDS = 1.0
FULL_EVENTS = 1000  # per partition
FULL_BYTES = 16 * 1024 * 1024
PAUSE_AFTER_SECONDS = 1.0
REVOKE_SECONDS = 10.0
REPLAY_TRIES = 5  # to commit a replay before it begins
REPLAY_PAUSE_SECONDS = 0.2
LAST_COMMIT_SECONDS = 5.0  # for the commit of a revoke or a stop; what it misses is handled again

Position = tuple[int, str]
"""An offset and its metadata."""


class Watcher(Protocol):
    """Told by the thread of what happens to its partitions."""

    def new_owner(self, begun: Begun, progress: Progress, token: int, space: Callable[[], None]) -> Owner: ...

    def assigned(self, owner: Owner) -> None: ...

    def taken_away(self, owner: Owner) -> None: ...

    def committed(self, partition: int, token: int, offset: int) -> None: ...

    def gap(self, partition: int, message: str) -> bool:
        """Committed events are gone: whether to go on with what is left."""

    def add(self, work: list[tuple[Owner, list[Message]]]) -> None:
        """On the loop: records for their owners."""

    def about_to_go(self, seconds: float) -> None:
        """Partitions are about to be taken away: wait, at most so long, for what must come to its end before."""

    def went(self) -> None:
        """They are gone."""


class ConsumerThread:
    def __init__(
        self,
        consumer: KafkaConsumer,
        topic: str,
        loop: asyncio.AbstractEventLoop,
        watcher: Watcher,
        failed: Callable[[Exception], None],
        *,
        commits_first: bool = False,
        commits: bool = True,
    ) -> None:
        """commits_first: before the records are handed over (at most once). commits: False when somebody else does."""
        self._consumer = consumer
        self._topic = topic
        self._loop = loop
        consumer.on_refused = self._refused
        consumer.on_committed = self._acknowledged
        self._watcher = watcher
        self._failed = failed
        self._commits_first = commits_first
        self._commits = commits and not commits_first
        self._reset_asked = False
        self.group_metadata: object = None
        """As of the last take, for who commits in transactions: a generation that is gone by then is refused."""
        self._owners: dict[int, Owner] = {}
        self._tokens: dict[int, int] = {}
        self._token = time.time_ns() // 1000  # grows over restarts too, which makes a history readable
        self._committed: dict[int, Position] = {}
        self._paused: set[int] = set()
        self._full_since: float | None = None
        self._space = threading.Event()
        self._stop_seconds: float | None = None
        self._thread = threading.Thread(target=self._run, name=f"consumer-{topic}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def request_stop(self, seconds: float) -> None:
        """Take nothing more, let the owners finish for so long, commit, leave the group."""
        self._stop_seconds = seconds
        self._space.set()

    def reset(self) -> None:
        """From the loop: the owners are of no use any more; new ones begin where the group has committed."""
        self._reset_asked = True
        self._space.set()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._consumer.subscribe([self._topic], self._assigned, self._revoked, self._lost)
            next_commit = time.monotonic() + COMMIT_SECONDS
            while self._stop_seconds is None:
                if self._reset_asked:
                    self._begin_again()
                self._take()
                if time.monotonic() >= next_commit:
                    self._commit(self._owners)
                    next_commit = time.monotonic() + COMMIT_SECONDS
            self._stop(self._stop_seconds)
        except (ConsumerFailed, OutOfRange) as error:
            self._failed(error)
        except Exception as error:
            logger.exception("consumer_failed topic=%s", self._topic)
            self._failed(error)
        finally:
            for owner in self._owners.values():
                self._call(owner.stop)
            self._consumer.close()

    def _refused(self, places: list[TopicPartition]) -> None:
        """The next round tries again; what was not committed is handled again after a crash, never lost."""
        for place in places:
            self._committed.pop(place.partition, None)

    # Taking

    def _take(self) -> None:
        full = [number for number, owner in self._owners.items() if _is_full(owner)]
        if full and not set(full) <= self._paused:
            now = time.monotonic()
            self._full_since = self._full_since or now
            if now - self._full_since < PAUSE_AFTER_SECONDS:
                self._space.clear()
                self._space.wait(0.02)
                return
            self._consumer.pause(self._places(full))
            self._paused.update(full)
        self._full_since = None
        self._resume()
        if not self._commits and not self._commits_first:
            self.group_metadata = self._consumer.group_metadata()
        try:
            messages = self._consumer.take(BATCH, TAKE_SECONDS)
        except OutOfRange as gap:
            if not self._watcher.gap(gap.partition, str(gap)):
                raise
            self._skip(gap.partition)
            return
        if messages and (not self._commits_first or self._commit_first(messages)):
            self._hand_over(messages)

    def _commit_first(self, messages: list[Message]) -> bool:
        """At most once. False when it could not be said that they are done, and they are read again."""
        firsts: dict[int, int] = {}
        for message in messages:
            firsts.setdefault(message.partition() or 0, message.offset() or 0)
        ends = {message.partition() or 0: (message.offset() or 0) + 1 for message in messages}
        places = [TopicPartition(self._topic, p, end, self._metadata_of(p, end)) for p, end in ends.items()]
        if self._consumer.commit_now(places):
            return True
        for partition, first in firsts.items():
            if partition in self._owners:
                self._consumer.seek(self._topic, partition, first)
        return False

    def _metadata_of(self, partition: int, end: int) -> str:
        """A replay lasts until the group is where it was."""
        owner = self._owners.get(partition)
        replay = owner.assignment.progress.replay if owner is not None else None
        return encode_metadata(Progress(replay=replay if replay is not None and end < replay.until else None))

    def _resume(self) -> None:
        ready = [number for number in self._paused if number in self._owners and _is_half_empty(self._owners[number])]
        if ready:
            self._consumer.resume(self._places(ready))
            self._paused.difference_update(ready)

    def _hand_over(self, messages: list[Message]) -> None:
        batches: dict[int, list[Message]] = {}
        for message in messages:
            batches.setdefault(message.partition() or 0, []).append(message)
        work = []
        for number, batch in batches.items():
            owner = self._owners.get(number)
            if owner is not None:
                owner.taken += len(batch)
                owner.taken_bytes += sum(len(message.value() or b"") for message in batch)
                work.append((owner, batch))
        self._call(self._watcher.add, work)

    def _places(self, numbers: list[int]) -> list[TopicPartition]:
        return [TopicPartition(self._topic, number) for number in numbers]

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        def guarded() -> None:
            try:
                function(*arguments)
            except Exception as error:  # a partition that stands still in silence would be worse than an end
                logger.exception("owner_failed topic=%s", self._topic)
                self._failed(error)

        with contextlib.suppress(RuntimeError):  # the loop is closed: the application is gone
            self._loop.call_soon_threadsafe(guarded)

    # Rebalances, called by the client inside `take` and `close`

    def _assigned(self, partitions: list[TopicPartition]) -> None:
        for begun in self._consumer.begin_at_committed(partitions, lambda: self._stop_seconds is not None):
            self._own(begun)

    def _own(self, begun: Begun) -> None:
        if self._stop_seconds is not None:
            return  # it comes too late to be begun
        number = begun.partition
        self._token += 1
        progress = self._progress_of(begun)
        owner = self._watcher.new_owner(begun, progress, self._token, self._space.set)
        self._owners[number] = owner
        self._tokens[number] = self._token
        self._committed.pop(number, None)
        self._paused.add(number)  # the client remembers a pause over a rebalance: resume it in any case
        self._call(owner.start)
        self._watcher.assigned(owner)

    def _skip(self, partition: int) -> None:
        """Retention has passed what comes next: the same owner goes on at what is left; what it has in hand is none of
        that."""
        if partition in self._owners:
            self._paused.add(partition)  # the client forgets whether it was
            self._consumer.begin_at_earliest(self._topic, partition, lambda: self._stop_seconds is not None)

    def _begin_again(self) -> None:
        self._reset_asked = False
        partitions = self._places(list(self._owners))
        for owner in self._take_away(partitions).values():
            self._call(owner.stop)
            self._call(owner.cancel)
        for begun in self._consumer.seek_to_committed(partitions, lambda: self._stop_seconds is not None):
            self._own(begun)

    def _progress_of(self, begun: Begun) -> Progress:
        """How far the group had come. A commit that another tool made is a replay up to the end of now; that is committed
        before anything is handled again, or a crash would begin another replay."""
        if begun.committed is None:
            return Progress()
        progress = decode_metadata(begun.metadata)
        if progress is not None:
            return progress
        try:
            end = self._consumer.end_offset(self._topic, begun.partition)
        except KafkaException:
            end = begun.committed  # nothing is known to be repeated
        # Whether any of it was handled before is not known, so nobody stays silent.
        replay = Replay(time.time_ns() // 1_000_000, begun.committed, end, end, outside_effects=True)
        progress = Progress(replay=replay)
        position = TopicPartition(self._topic, begun.partition, begun.committed, encode_metadata(progress))
        for _ in range(REPLAY_TRIES):
            if self._consumer.commit_now([position]):
                break
            time.sleep(REPLAY_PAUSE_SECONDS)
        else:
            logger.warning(
                "replay_not_committed topic=%s partition=%d effect=a crash begins another", self._topic, begun.partition
            )
        logger.info(
            "replay_begins topic=%s partition=%d from=%d until=%d", self._topic, begun.partition, begun.committed, end
        )
        return progress

    def _revoked(self, partitions: list[TopicPartition]) -> None:
        deadline = time.monotonic() + REVOKE_SECONDS
        self._watcher.about_to_go(REVOKE_SECONDS)
        gone = self._take_away(partitions)
        self._stop_owners(gone)
        self._wait_stopped(gone, deadline, time.sleep)
        self._consumer.commit_now(self._news(gone))
        self._watcher.went()

    def _lost(self, partitions: list[TopicPartition]) -> None:
        gone = self._take_away(partitions)
        self._stop_owners(gone)

    def _take_away(self, partitions: list[TopicPartition]) -> dict[int, Owner]:
        numbers = [place.partition for place in partitions]
        self._paused.difference_update(numbers)
        gone = {number: self._owners.pop(number) for number in numbers if number in self._owners}
        for owner in gone.values():
            self._watcher.taken_away(owner)
        return gone

    # Stopping

    def _stop(self, seconds: float) -> None:
        """The owners finish while the thread goes on polling: the group must not think that this member is gone."""
        deadline = time.monotonic() + seconds
        self._watcher.about_to_go(seconds)
        self._stop_owners(self._owners)
        self._wait_stopped(self._owners, deadline, self._consumer.poll_paused)
        self._commit_last(self._owners)
        for owner in self._owners.values():
            self._watcher.taken_away(owner)
        self._owners.clear()

    def _stop_owners(self, owners: dict[int, Owner]) -> None:
        for owner in owners.values():
            self._call(owner.stop)

    def _wait_stopped(self, owners: dict[int, Owner], deadline: float, meanwhile: Callable[[float], None]) -> None:
        while any(not owner.stopped.is_set() for owner in list(owners.values())):
            if time.monotonic() > deadline:
                for owner in owners.values():
                    if not owner.stopped.is_set():
                        logger.warning("handler_cut_off topic=%s partition=%d", self._topic, owner.partition)
                        self._call(owner.cancel)
                return
            meanwhile(0.01)

    def _commit_last(self, owners: dict[int, Owner]) -> None:
        self._commit(owners)
        deadline = time.monotonic() + LAST_COMMIT_SECONDS
        while self._consumer.commits_under_way:
            if time.monotonic() > deadline:
                logger.warning("commit_unanswered topic=%s effect=handled_again", self._topic)
                return
            self._consumer.poll_paused(0.01)

    # Committing

    def _commit(self, owners: dict[int, Owner]) -> None:
        """What has changed since the last time, if that was answered."""
        if not self._consumer.commits_under_way:
            self._consumer.commit_soon(self._news(owners))

    def _news(self, owners: dict[int, Owner]) -> list[TopicPartition]:
        news = []
        for number, owner in owners.items():
            position = owner.committable
            if position is not None and self._committed.get(number) != position and self._commits:
                self._committed[number] = position
                news.append(TopicPartition(self._topic, number, *position))
        if news:
            crash_point.reached("before_commit")
        return news

    def _acknowledged(self, places: list[TopicPartition]) -> None:
        crash_point.reached("after_commit")
        for place in places:
            self._watcher.committed(place.partition, self._tokens.get(place.partition, 0), place.offset)


def _is_full(owner: Owner) -> bool:
    return owner.taken - owner.done >= FULL_EVENTS or owner.taken_bytes - owner.done_bytes >= FULL_BYTES


def _is_half_empty(owner: Owner) -> bool:
    return owner.taken - owner.done <= FULL_EVENTS // 2 and owner.taken_bytes - owner.done_bytes <= FULL_BYTES // 2
