"""`_schemas`: what was decided is written there, and becomes true when it was read back.

A thread follows the topic from its beginning; every record is applied on the event loop, in order. One registry writes at
a time (see leader.py). Whoever becomes the writer writes a NOOP first and waits until it has read it: then nothing of the
writer before it is missing.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from headwater.kafka.admin import AdminError, KafkaAdmin
from headwater.kafka.consumer import ConsumerFailed, KafkaException, Message
from headwater.kafka.producer import KafkaProducer, LoopProducer, NotPublished
from headwater.kafka.reader import KafkaReader
from headwater.registry.record import NoopKey, Record, UnknownRecord, decode, encode
from headwater.registry.subject import Registry
from headwater.settings import Settings

logger = logging.getLogger(__name__)

TOPIC = "_schemas"
TAKE = 1000
WAIT_SECONDS = 0.1
TROUBLE_SECONDS = 1.0
WRITE_SECONDS = 20.0
SEND_SECONDS = 3.0
"""Half of a session: what can't be sent for longer is given up, and can't come behind what another writer has decided since."""


class StoreFailed(Exception):
    """What was decided may not have been written; the message says why."""


class Storage:
    def __init__(
        self, settings: Settings, registry: Registry, loop: asyncio.AbstractEventLoop, topic: str = TOPIC
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._loop = loop
        self.topic = topic
        self.applied = 0
        """The offset behind the last record that was applied."""
        self._news = asyncio.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="schemas", daemon=True)
        self._producer: KafkaProducer | None = None
        self._sender: LoopProducer | None = None

    def prepare(self) -> None:
        """See that the topic is there. Blocks. Raises AdminError."""
        admin = KafkaAdmin(self._settings)
        admin.check_reachable()
        counts = admin.partition_counts()
        if self.topic not in counts:
            admin.create_topic(self.topic, 1, -1, {"cleanup.policy": "compact"})
        elif counts[self.topic] != 1:
            raise AdminError(f"{self.topic} has {counts[self.topic]} partitions; a registry's topic has one.")
        elif admin.topic_configs(self.topic)["cleanup.policy"].value != "compact":
            raise AdminError(f"{self.topic} is not compacted: set its cleanup.policy to compact, or schemas get lost.")

    def start(self) -> None:
        kafka = {**self._settings.kafka, "message.timeout.ms": str(int(SEND_SECONDS * 1000))}
        self._producer = KafkaProducer(replace(self._settings, kafka=kafka))
        self._sender = LoopProducer(self._producer, self._loop)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(5.0)
        if self._producer is not None:
            self._producer.close(5.0)

    async def catch_up(self) -> None:
        """Until everything that was written before now is applied. Raises StoreFailed."""
        await self.write([Record(NoopKey(), None)])

    async def write(self, records: Sequence[Record]) -> None:
        """Until they are applied. Raises StoreFailed."""
        assert self._sender is not None
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                end = 0
                for record in records:
                    key, value = encode(record)
                    sent = await self._sender.send(self.topic, key, value, [], partition=0)
                    end = max(end, sent.offset + 1)
                while self.applied < end:
                    self._news.clear()
                    await self._news.wait()
        except NotPublished as error:
            raise StoreFailed(str(error)) from None
        except TimeoutError:
            raise StoreFailed(f"no answer within {WRITE_SECONDS:.0f} s") from None

    # Following, in the thread

    def _follow(self) -> None:
        reader = KafkaReader(self._settings, {(self.topic, 0): 0})
        while not self._stopping.is_set():
            try:
                messages, ended = reader.take(1, WAIT_SECONDS)
                more, ended_later = reader.take(TAKE, 0) if messages else ([], {})
            except (ConsumerFailed, KafkaException) as error:
                logger.warning("schemas_unreadable topic=%s error=%s", self.topic, error)
                self._stopping.wait(TROUBLE_SECONDS)
                continue
            messages += more
            ends = [*ended.values(), *ended_later.values(), *((message.offset() or 0) + 1 for message in messages)]
            if ends:
                self._call(self._apply, messages, max(ends))
        reader.close()

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the registry is gone
            self._loop.call_soon_threadsafe(function, *arguments)

    def _apply(self, messages: list[Message], end: int) -> None:
        for message in messages:
            try:
                record = decode(message.key(), message.value())
            except UnknownRecord as error:
                logger.warning("record_ignored topic=%s offset=%s reason=%s", self.topic, message.offset(), error)
                continue
            self._registry.apply(record.key, record.value)
        self.applied = max(self.applied, end)
        self._news.set()
