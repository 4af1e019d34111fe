"""Reads the retry topic and the dead-letter topic for the owners of a group's partitions, without a group of its own.

One thread per handler follows the retry partitions of what is owned: from the beginning to where the partition ended at
the takeover, which is when its owner may begin; then on, for what operators ask. What is due and no longer at hand, and
dead letters, are read back by a second thread, on demand.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from headwater.kafka.admin import AdminError, KafkaAdmin
from headwater.kafka.consumer import ConsumerFailed, Gone, KafkaException, Message, headers_of
from headwater.kafka.reader import KafkaReader
from headwater.runtime.daemon_executor import DaemonExecutor
from headwater.runtime.owner import Owner
from headwater.runtime.retry_topic import ParkedRecord, RetryRecord, Unreadable, read_retry_record
from headwater.settings import Settings

logger = logging.getLogger(__name__)

TAKE = 500
TAKE_SECONDS = 0.1
TROUBLE_SECONDS = 1.0
READ_BACK_RECORDS = 200
READ_BACK_BYTES = 4 * 1024 * 1024
READ_BACK_SECONDS = 3.0  # well below the time-out of a transaction

T = TypeVar("T")


class RetryReader:
    def __init__(
        self,
        settings: Settings,
        retry_topic: str,
        dead_topic: str,
        loop: asyncio.AbstractEventLoop,
        grow: Callable[[int], None],
        failed: Callable[[Exception], None],
        *,
        is_transactional: bool = False,
    ) -> None:
        """grow: see that the retry topic and the dead-letter topic have so many partitions; raises AdminError. failed:
        told when the thread breaks."""
        self._settings = settings
        self._retry_topic = retry_topic
        self._dead_topic = dead_topic
        self._loop = loop
        self._grow = grow
        self._failed = failed
        self._late: dict[int, Owner] = {}
        """Whose retry partition could not be asked yet."""
        self._changes: queue.SimpleQueue[tuple[Owner, bool]] = queue.SimpleQueue()
        self._owners: dict[int, Owner] = {}
        self._ends: dict[int, int] = {}
        """Of the partitions that are not loaded yet."""
        self._stopping = threading.Event()
        self._reader: KafkaReader | None = None
        self._admin: KafkaAdmin | None = None
        self._isolation = "read_committed" if is_transactional else "read_uncommitted"
        self._back: KafkaReader | None = None
        self._back_executor = DaemonExecutor(1, f"read-back-{retry_topic}")
        self._thread = threading.Thread(target=self._run, name=f"retry-{retry_topic}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()

    def add(self, owner: Owner) -> None:
        """Load its retry partition, then follow it."""
        self._changes.put((owner, True))

    def remove(self, owner: Owner) -> None:
        self._changes.put((owner, False))

    # Following

    def _run(self) -> None:
        self._reader = KafkaReader(self._settings, {}, isolation=self._isolation)
        try:
            while not self._stopping.is_set():
                self._change()
                if self._owners:
                    self._take()
        except Exception as error:
            logger.exception("retry_reader_failed topic=%s", self._retry_topic)
            self._failed(error)
        finally:
            self._reader.close()

    def _change(self) -> None:
        """Partitions that came and went."""
        added, self._late = self._late, {}
        wait = not self._owners and not added
        while True:
            try:
                owner, is_added = self._changes.get(timeout=TAKE_SECONDS) if wait else self._changes.get_nowait()
            except queue.Empty:
                break
            wait = False
            if is_added:
                added[owner.partition] = owner
            elif added.get(owner.partition) is owner:
                del added[owner.partition]
            elif self._owners.get(owner.partition) is owner:
                self._leave(owner.partition)
        if added:
            self._begin(added)

    def _leave(self, partition: int) -> None:
        del self._owners[partition]
        self._ends.pop(partition, None)
        assert self._reader is not None
        self._reader.remove(self._retry_topic, partition)

    def _begin(self, added: dict[int, Owner]) -> None:
        """An empty retry partition needs no reading before its owner may go."""
        assert self._reader is not None
        places = [(self._retry_topic, partition) for partition in added]
        try:
            # Asked for all at once: the client asks for one partition of a new topic after the other, half a second each.
            self._admin = self._admin or KafkaAdmin(self._settings)
            starts, ends = self._admin.start_offsets(places), self._admin.end_offsets(places)
        except AdminError as error:
            logger.warning("retry_topic_waits topic=%s error=%s", self._retry_topic, error)
            try:
                self._grow(max(added) + 1)
            except AdminError as trouble:
                logger.error("retry_topic_missing topic=%s error=%s", self._retry_topic, trouble)
            self._admin = None  # it would go on with the leaders that it knows
            self._stopping.wait(TROUBLE_SECONDS)
            self._late = added
            return
        for partition, owner in added.items():
            # The end is the true one, also beyond a transaction that is still open.
            start, end = starts[self._retry_topic, partition], ends[self._retry_topic, partition]
            if partition in self._owners:
                self._leave(partition)
            self._owners[partition] = owner
            self._reader.add(self._retry_topic, partition, start)
            if start >= end:
                self._call(owner.loaded)
            else:
                self._ends[partition] = end

    def _take(self) -> None:
        assert self._reader is not None
        try:
            messages, ended = self._reader.take(TAKE, TAKE_SECONDS)
        except ConsumerFailed as error:
            logger.warning("retry_topic_unreadable topic=%s error=%s", self._retry_topic, error)
            if isinstance(error, Gone) and error.partition in self._owners:
                # The topic was deleted and made again: what is asked of it now is at its start.
                self._late[error.partition] = self._owners[error.partition]
                self._leave(error.partition)
            self._stopping.wait(TROUBLE_SECONDS)
            return
        found: dict[int, list[Message]] = {}
        for message in messages:
            found.setdefault(message.partition() or 0, []).append(message)
        for partition, batch in found.items():
            owner = self._owners.get(partition)
            if owner is None:
                continue
            end = self._ends.get(partition)
            if end is None:
                self._hand_over(owner, batch)
                continue
            self._hand_over(owner, [message for message in batch if (message.offset() or 0) < end])
            if (batch[-1].offset() or 0) >= end - 1:
                self._loaded(owner)
                self._hand_over(owner, [message for message in batch if (message.offset() or 0) >= end])
        for (_, partition), end in ended.items():
            # What is left up to the end was compacted away, or is a transaction's marker. Reading stops before a
            # transaction that is still open: that is not the end that is waited for.
            if partition in self._owners and end >= self._ends.get(partition, end + 1):
                self._loaded(self._owners[partition])

    def _loaded(self, owner: Owner) -> None:
        self._ends.pop(owner.partition, None)
        self._call(owner.loaded)

    def _hand_over(self, owner: Owner, messages: list[Message]) -> None:
        records = [record for message in messages if (record := read_record(message)) is not None]
        if records:
            self._call(owner.read_retry_topic, records)

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the application is gone
            self._loop.call_soon_threadsafe(function, *arguments)

    # Reading back

    async def read_back(self, partition: int, place: int) -> list[ParkedRecord]:
        """The record at that place of the retry topic, and some of those behind it. Raises ConsumerFailed."""
        messages = await self._in_back(lambda: self._read_at(self._retry_topic, partition, place, READ_BACK_RECORDS))
        return [record for message in messages if isinstance(record := read_record(message), ParkedRecord)]

    async def read_dead(self, partition: int, dead_offset: int) -> Message | None:
        """None when it is there no more. Raises ConsumerFailed."""
        try:
            messages = await self._in_back(lambda: self._read_at(self._dead_topic, partition, dead_offset, 1))
        except Gone:
            return None
        return messages[0] if messages and messages[0].offset() == dead_offset else None

    async def _in_back(self, read: Callable[[], T]) -> T:
        return await self._loop.run_in_executor(self._back_executor, read)

    def _read_at(self, topic: str, partition: int, offset: int, count: int) -> list[Message]:
        if self._back is None:
            self._back = KafkaReader(self._settings, {}, isolation=self._isolation)
        found: list[Message] = []
        size = 0
        deadline = time.monotonic() + READ_BACK_SECONDS
        self._back.only(topic, partition, offset)
        try:
            while len(found) < count and size < READ_BACK_BYTES and not self._stopping.is_set():
                messages, ended = self._back.take(count - len(found), TAKE_SECONDS)
                found += messages
                size += sum(len(message.value() or b"") for message in messages)
                if ended or (found and not messages):
                    break
                if time.monotonic() > deadline:
                    raise ConsumerFailed(f"{topic}-{partition} at {offset}: no answer in {READ_BACK_SECONDS:.0f} s")
        except KafkaException as error:
            raise ConsumerFailed(str(error)) from None
        finally:
            self._back.nothing()
        return found


def read_record(message: Message) -> RetryRecord | None:
    """None for what is none of ours, which is said."""
    try:
        return read_retry_record(message.key(), message.value(), headers_of(message), message.offset() or 0)
    except Unreadable as error:
        logger.warning("retry_record_ignored topic=%s partition=%s offset=%s reason=%s",
                       message.topic(), message.partition(), message.offset(), error)  # fmt: skip
        return None
