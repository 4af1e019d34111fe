"""The thread that owns a group member's consumer: it takes batches, commits, and answers the group.

Batches go over to the event loop by one call each; commits are read off the lanes. The loop never waits for the thread,
and the thread goes on polling whatever the handlers do, so a handler may take hours.

Back-pressure: a bounded buffer per partition. When it is full nothing is taken; when it is still full after a second
the full partitions are paused, and the thread polls on for the others. Resumed when half empty.

Rebalance: a revoked partition's lane finishes the event at work, for at most REVOKE_SECONDS, and its frontier is
committed before the partition goes. A lost partition's lane is stopped and commits nothing.

Commits are sent once a second and answered while the thread polls: a broker that is away stops nothing.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable

from headwater.kafka.consumer import ConsumerFailed, KafkaConsumer, Message, TopicPartition
from headwater.runtime.lane import Lane

logger = logging.getLogger(__name__)

BATCH = 500
TAKE_SECONDS = 0.1
COMMIT_SECONDS = 1.0
FULL_EVENTS = 1000  # per partition
FULL_BYTES = 16 * 1024 * 1024
PAUSE_AFTER_SECONDS = 1.0
REVOKE_SECONDS = 10.0
LAST_COMMIT_SECONDS = 5.0  # for the commit of a revoke or a stop; what it misses is handled again

Position = tuple[int, str]
"""An offset and its metadata."""


class ConsumerThread:
    def __init__(
        self,
        consumer: KafkaConsumer,
        topic: str,
        loop: asyncio.AbstractEventLoop,
        new_lane: Callable[[int, Callable[[], None]], Lane],
        failed: Callable[[Exception], None],
    ) -> None:
        self._consumer = consumer
        self._topic = topic
        self._loop = loop
        consumer.on_refused = self._refused
        self._new_lane = new_lane
        self._failed = failed
        self._lanes: dict[int, Lane] = {}
        self._committed: dict[int, Position] = {}
        self._paused: set[int] = set()
        self._full_since: float | None = None
        self._space = threading.Event()
        self._stop_seconds: float | None = None
        self._thread = threading.Thread(target=self._run, name=f"consumer-{topic}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def request_stop(self, seconds: float) -> None:
        """Take nothing more, let the lanes finish for so long, commit, leave the group."""
        self._stop_seconds = seconds
        self._space.set()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._consumer.subscribe([self._topic], self._assigned, self._revoked, self._lost)
            next_commit = time.monotonic() + COMMIT_SECONDS
            while self._stop_seconds is None:
                self._take()
                if time.monotonic() >= next_commit:
                    self._commit(self._lanes)
                    next_commit = time.monotonic() + COMMIT_SECONDS
            self._stop(self._stop_seconds)
        except ConsumerFailed as error:
            self._failed(error)
        except Exception as error:
            logger.exception("consumer_failed topic=%s", self._topic)
            self._failed(error)
        finally:
            for lane in self._lanes.values():
                self._call(lane.stop)
            self._consumer.close()

    def _refused(self, places: list[TopicPartition]) -> None:
        """The next round tries again; what was not committed is handled again after a crash, never lost."""
        for place in places:
            self._committed.pop(place.partition, None)

    # Taking

    def _take(self) -> None:
        full = [number for number, lane in self._lanes.items() if _is_full(lane)]
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
        messages = self._consumer.take(BATCH, TAKE_SECONDS)
        if messages:
            self._hand_over(messages)

    def _resume(self) -> None:
        ready = [number for number in self._paused if number in self._lanes and _is_half_empty(self._lanes[number])]
        if ready:
            self._consumer.resume(self._places(ready))
            self._paused.difference_update(ready)

    def _hand_over(self, messages: list[Message]) -> None:
        batches: dict[int, list[Message]] = {}
        for message in messages:
            batches.setdefault(message.partition() or 0, []).append(message)
        work = []
        for number, batch in batches.items():
            lane = self._lanes.get(number)
            if lane is not None:
                lane.taken += len(batch)
                lane.taken_bytes += sum(len(message.value() or b"") for message in batch)
                work.append((lane, batch))
        self._call(_add_all, work)

    def _places(self, numbers: list[int]) -> list[TopicPartition]:
        return [TopicPartition(self._topic, number) for number in numbers]

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the application is gone
            self._loop.call_soon_threadsafe(function, *arguments)

    # Rebalances, called by the client inside `take` and `close`

    def _assigned(self, partitions: list[TopicPartition]) -> None:
        self._consumer.begin_at_committed(partitions)
        for place in partitions:
            lane = self._new_lane(place.partition, self._space.set)
            self._lanes[place.partition] = lane
            self._committed.pop(place.partition, None)
            self._paused.add(place.partition)  # the client remembers a pause over a rebalance: resume it in any case
            self._call(lane.start)

    def _revoked(self, partitions: list[TopicPartition]) -> None:
        gone = self._take_away(partitions)
        deadline = time.monotonic() + REVOKE_SECONDS
        self._stop_lanes(gone)
        self._wait_stopped(gone, deadline, time.sleep)
        self._consumer.commit_now(self._news(gone))

    def _lost(self, partitions: list[TopicPartition]) -> None:
        gone = self._take_away(partitions)
        self._stop_lanes(gone)

    def _take_away(self, partitions: list[TopicPartition]) -> dict[int, Lane]:
        numbers = [place.partition for place in partitions]
        self._paused.difference_update(numbers)
        return {number: self._lanes.pop(number) for number in numbers if number in self._lanes}

    # Stopping

    def _stop(self, seconds: float) -> None:
        """The lanes finish while the thread goes on polling: the group must not think that this member is gone."""
        deadline = time.monotonic() + seconds
        self._stop_lanes(self._lanes)
        self._wait_stopped(self._lanes, deadline, self._consumer.poll_paused)
        self._commit_last(self._lanes)
        self._lanes.clear()

    def _stop_lanes(self, lanes: dict[int, Lane]) -> None:
        for lane in lanes.values():
            self._call(lane.stop)

    def _wait_stopped(self, lanes: dict[int, Lane], deadline: float, meanwhile: Callable[[float], None]) -> None:
        while any(not lane.stopped.is_set() for lane in list(lanes.values())):
            if time.monotonic() > deadline:
                for lane in lanes.values():
                    if not lane.stopped.is_set():
                        logger.warning("handler_cut_off topic=%s partition=%d", self._topic, lane.partition)
                        self._call(lane.cancel)
                return
            meanwhile(0.01)

    def _commit_last(self, lanes: dict[int, Lane]) -> None:
        self._commit(lanes)
        deadline = time.monotonic() + LAST_COMMIT_SECONDS
        while self._consumer.commits_under_way:
            if time.monotonic() > deadline:
                logger.warning("commit_unanswered topic=%s effect=handled_again", self._topic)
                return
            self._consumer.poll_paused(0.01)

    # Committing

    def _commit(self, lanes: dict[int, Lane]) -> None:
        """What has changed since the last time, if that was answered."""
        if not self._consumer.commits_under_way:
            self._consumer.commit_soon(self._news(lanes))

    def _news(self, lanes: dict[int, Lane]) -> list[TopicPartition]:
        news = []
        for number, lane in lanes.items():
            frontier = lane.frontier
            if frontier is not None and self._committed.get(number) != (frontier, lane.metadata):
                position = self._committed[number] = (frontier, lane.metadata)
                news.append(TopicPartition(self._topic, number, *position))
        return news


def _add_all(work: list[tuple[Lane, list[Message]]]) -> None:
    for lane, batch in work:
        lane.add(batch)


def _is_full(lane: Lane) -> bool:
    return lane.taken - lane.done >= FULL_EVENTS or lane.taken_bytes - lane.done_bytes >= FULL_BYTES


def _is_half_empty(lane: Lane) -> bool:
    return lane.taken - lane.done <= FULL_EVENTS // 2 and lane.taken_bytes - lane.done_bytes <= FULL_BYTES // 2
