"""The thread that writes an audit.

The group of its name shares out the partitions of the audit topic; whoever has one writes its chain, of the source partitions
that belong to it. Where the chain is and how far its sources are audited is committed now and then, in one commit; after a
crash the records behind it say the rest. With transactions, records and commit are one, and a successor fences off who wrote
before. Without, who may have lost its partition looks whether the chain still ends where it left it, and begins anew otherwise.
"""

import functools
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

from headwater.kafka.admin import AdminError, KafkaAdmin
from headwater.kafka.consumer import (
    ConsumerFailed,
    KafkaConsumer,
    KafkaException,
    Message,
    TopicPartition,
    headers_of,
)
from headwater.kafka.producer import Acknowledged, KafkaProducer, NotPublished, Profile, TransactionalProducer
from headwater.kafka.reader import KafkaReader, Place, offset_of, place_of
from headwater.runtime import crash_point
from headwater.runtime.relay import gapless
from headwater.runtime.subscription import Surroundings
from headwater.trust.audit import Audit
from headwater.trust.chain import Head, Kept, Link, after, beginning, digest_of, headers_of_link, link_in, place_in

logger = logging.getLogger(__name__)

BATCH = 500
TURN_SECONDS = 0.1
TROUBLE_SECONDS = 1.0
ACK_SECONDS = 30.0
TAIL_SECONDS = 30.0
STOP_SECONDS = 10.0
SAY_SECONDS = 60.0
SHOW_SECONDS = 2.0
LOOK_SECONDS = 30.0
RENEWAL_SECONDS = 24 * 3600.0
UNSURE_SECONDS = 2.0
"""Without a word from the group for this long, it may have gone on without us: a third of the session's time-out."""
KAFKA = {"session.timeout.ms": "6000", "heartbeat.interval.ms": "500"}
ALERT = "audit"


class Broken(Exception):
    """The chain must be looked at anew: somebody else may have written, or we may have without knowing."""


class Taken(Exception):
    """The partition is another process's now."""


def chain_of(place: Place, chains: int) -> int:
    """The partition of the audit topic that a source partition belongs to, for ever."""
    digest = hashlib.sha256(f"{place[0]}:{place[1]}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % chains


class Chain:
    """A partition of the audit topic, in the hands of this process."""

    def __init__(
        self,
        audit: Audit,
        partition: int,
        around: Surroundings,
        consumer: KafkaConsumer,
        admin: KafkaAdmin,
        tell: Callable[[str], None],
        is_ours: Callable[[], bool],
        *,
        transacts: bool,
    ) -> None:
        """tell: of what is wrong and doesn't end it. is_ours: asks the group. Raises NotPublished, AdminError, ConsumerFailed,
        Broken, Taken."""
        self._audit = audit
        self._place = (audit.topic.name, partition)
        self._around = around
        self._consumer = consumer
        self._admin = admin
        self._transactions: TransactionalProducer | None = None
        self._reader: KafkaReader | None = None
        self._tell = tell
        self._ids: dict[str, str] = {}
        """Of the source topics."""
        self._read: set[Place] = set()
        """Source partitions that the reader has."""
        self._next_show = self._next_look = self._next_renewal = 0.0
        if transacts:  # first of all: from now on nobody else writes
            # it is what finds out whether there are transactions
            self._transactions = TransactionalProducer(around.settings, f"{audit.name}-{partition}", is_quiet=True)
        self._producer = self._transactions or KafkaProducer(gapless(around.settings), Profile.THROUGHPUT)
        try:
            committed = admin.committed(audit.name)
            places = self._places()
            self._describe(places)
            ours = {place: committed[place] for place in places if place in committed}
            self.positions = {
                place: position.offset for place, position in ours.items() if position.metadata == self._ids[place[0]]
            }
            is_whole = admin.start_offsets([self._place])[self._place] == 0
            self._head: Head | None = (
                beginning(*self._place) if is_whole else None
            )  # None: what is left has to be believed
            self._next = 0
            """The offset behind the chain."""
            found = committed.get(self._place)
            if found is not None and found.metadata and len(self.positions) == len(places):
                # otherwise some positions are lost, as a group's are after a week without news, or somebody has set them:
                # the chain itself has them
                sequence, hash_ = found.metadata.split()
                self._head, self._next = Head(int(sequence), bytes.fromhex(hash_)), found.offset
            self._read_tail(is_ours)
            for place, position in ours.items():
                if not position.metadata:  # set by hand, past what is gone: never back, as nothing is audited twice
                    self.positions[place] = max(self.positions.get(place, 0), position.offset)
            self._shown: dict[Place, int] = {}
            self._reader = KafkaReader(around.settings, {})
            self._look()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._transactions is not None:
            self._transactions.abort(1.0)
        self._producer.close(1.0)
        if self._reader is not None:
            self._reader.close()

    def turn(self, is_sure: Callable[[], bool]) -> int:
        """How many events it has audited. Raises Broken, NotPublished, ConsumerFailed, AdminError."""
        assert self._reader is not None
        self._look()
        records, ended = self._reader.take(BATCH, TURN_SECONDS)
        if records:
            self._append(records, is_sure)
        for place, end in ended.items():
            self.positions[place] = max(self.positions.get(place, 0), end)
        self._show()
        return len(records)

    def _places(self) -> list[Place]:
        """The source partitions that belong to this chain. Raises AdminError."""
        counts = self._admin.partition_counts()
        places = [(topic.name, i) for topic in self._audit.of for i in range(counts.get(topic.name, 0))]
        return [place for place in places if chain_of(place, self._audit.topic.partitions) == self._place[1]]

    def _read_tail(self, is_ours: Callable[[], bool]) -> None:
        """What was written behind the last commit; where positions are lost, all of it. Raises ConsumerFailed, Taken."""
        start = self._admin.start_offsets([self._place])[self._place]
        positions = {self._place: max(self._next, start)}
        reader = KafkaReader(self._around.settings, {})
        try:
            for batch in reader.up_to(self._admin.end_offsets([self._place]), positions, TAIL_SECONDS):
                for record in batch:
                    self._pass(record)
                if not is_ours():  # all of it may take longer than the group has patience
                    raise Taken
        finally:
            reader.close()
        self._next = positions[self._place]

    def _pass(self, record: Message) -> None:
        said = link_in(headers_of(record))
        if said is None or (self._head is not None and said[1] != after(self._head, said[0])):
            return  # no part of the chain: see the verifier
        link, self._head = said
        topic, partition, offset = place_in(link.source)
        if link.topic_id == self._ids.get(topic):
            self.positions[topic, partition] = max(self.positions.get((topic, partition), 0), offset + 1)

    def _look(self) -> None:
        """Now and then: partitions that are new. Raises AdminError."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_SECONDS
        assert self._reader is not None
        new = [place for place in self._places() if place not in self._read]
        starts, ends = self._admin.start_offsets(new), self._admin.end_offsets(new)
        self._describe(new)
        for place in new:
            offset = self.positions.get(place, starts[place])
            if not starts[place] <= offset <= ends[place]:
                self._tell(
                    f"{place[0]}-{place[1]} is not audited: it was up to {offset}, and goes from {starts[place]} to "
                    f"{ends[place]}. Stop the audit, `headwater groups reset {self._audit.name} --topic {place[0]} "
                    f"--partition {place[1]} --to earliest --execute`, start it: what is between is missing for good."
                )
                continue
            self.positions[place] = offset
            self._reader.add(*place, offset)
            self._read.add(place)

    def _describe(self, places: Sequence[Place]) -> None:
        """The ids of their topics. Raises AdminError."""
        names = sorted({topic for topic, _ in places})
        if names:
            self._ids.update({each.name: each.topic_id for each in self._admin.describe_topics(names)})

    def _append(self, records: Sequence[Message], is_sure: Callable[[], bool]) -> None:
        topic, partition = self._place
        head, positions = self._head or beginning(*self._place), dict(self.positions)
        if self._transactions is not None:
            self._transactions.begin()
        elif not is_sure() or self._end() != self._next:
            raise Broken("another process may be writing the chain")
        acknowledged: list[Future[Acknowledged]] = []
        for record in records:
            place, offset = place_of(record), offset_of(record)
            headers = headers_of(record)
            key, value = record.key(), record.value()
            is_copied = self._audit.copies and size_of(record, headers) <= self._audit.largest_bytes
            link = Link(
                f"{place[0]}:{place[1]}:{offset}",
                self._ids[place[0]],
                record.timestamp()[1],
                Kept.COPY if is_copied else Kept.DIGEST,
                digest_of(key, value, headers),
            )
            head = after(head, link)
            kept = [*headers, *headers_of_link(link, head)] if is_copied else headers_of_link(link, head)
            future: Future[Acknowledged] = Future()
            acknowledged.append(future)
            self._producer.send(
                topic, key if is_copied else None, value if is_copied else None, kept,
                lambda result, future=future: _settle(future, result), partition=partition,  # type: ignore[misc]
            )  # fmt: skip
            positions[place] = offset + 1
        crash_point.reached("audit_sent")
        deadline = time.monotonic() + ACK_SECONDS
        offset = self._next - 1
        for future in acknowledged:
            offset = future.result(max(0.0, deadline - time.monotonic())).offset
        crash_point.reached("audit_acknowledged")
        self._commit(positions, head, offset + 1)
        self._head, self._next, self.positions = head, offset + 1, positions
        crash_point.reached("audit_committed")

    def _commit(self, positions: Mapping[Place, int], head: Head, end: int) -> None:
        """Raises NotPublished. Without transactions a commit that fails is made up for by the next one."""
        places = self._commits(positions)
        places.append(TopicPartition(*self._place, end, str(head)))
        if self._transactions is not None:
            self._transactions.commit(places, self._consumer.group_metadata(), ACK_SECONDS)
        elif not self._consumer.commit_now(places):
            return
        self._shown, self._next_renewal = dict(positions), time.monotonic() + RENEWAL_SECONDS

    def _show(self) -> None:
        """How far it has read where nothing was to be audited, such as a transaction's markers; and all of it once a day, as a
        group's positions are forgotten that nobody renews."""
        now = time.monotonic()
        if now < self._next_show or (self.positions == self._shown and now < self._next_renewal):
            return
        self._next_show = now + SHOW_SECONDS
        if self._consumer.commit_now(self._commits(self.positions)):
            self._shown, self._next_renewal = dict(self.positions), now + RENEWAL_SECONDS

    def _commits(self, positions: Mapping[Place, int]) -> list[TopicPartition]:
        """With the ids of their topics: one that is made anew is another one."""
        return [TopicPartition(*place, offset, self._ids.get(place[0], "")) for place, offset in positions.items()]

    def _end(self) -> int:
        try:
            return self._consumer.end_offset(*self._place)
        except KafkaException as error:
            raise Broken(error.args[0].str()) from None


class Auditor:
    def __init__(self, audit: Audit, around: Surroundings) -> None:
        kafka = {**KAFKA, **around.settings.kafka}
        self._audit = audit
        self._around = around._replace(settings=replace(around.settings, kafka=kafka))
        self._admin = KafkaAdmin(around.settings)
        self._stopped = threading.Event()
        self._chains: dict[int, Chain | None] = {}
        """Those that are ours; None until it is read where they are."""
        self._transacts = True
        self._turned = 0.0
        self._said, self._next_say = "", 0.0
        self._thread = threading.Thread(target=self._run, name=f"audit-{audit.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(STOP_SECONDS)

    def is_done(self, ends: Mapping[Place, int]) -> bool:
        """Raises AdminError."""
        committed = self._admin.committed(self._audit.name)
        names = {topic.name for topic in self._audit.of}
        return all(
            place in committed and committed[place].offset >= end for place, end in ends.items() if place[0] in names
        )

    def _run(self) -> None:
        consumer = KafkaConsumer(self._around.settings, self._audit.name, "classic")

        def assigned(places: list[TopicPartition]) -> None:
            consumer.begin_at_committed(places, self._stopped.is_set)
            self._chains.update(dict.fromkeys(place.partition for place in places))

        def gone(places: list[TopicPartition]) -> None:
            for place in places:
                self._give_up(place.partition)
                self._chains.pop(place.partition, None)
                self._recovered(place.partition)

        consumer.subscribe([self._audit.topic.name], assigned, gone, gone)
        while not self._stopped.is_set():
            try:
                consumer.poll_paused(0.0 if any(self._chains.values()) else TURN_SECONDS)
                self._turned = time.monotonic()
                for partition in list(self._chains):
                    consumer.poll_paused(0.0)  # with many chains a turn takes long
                    self._turned = time.monotonic()
                    if partition in self._chains:
                        self._turn(partition, consumer)
            except ConsumerFailed as error:
                self._trouble(str(error))
            except Exception:
                logger.exception("audit_failed name=%s", self._audit.name)
                self._stopped.wait(TROUBLE_SECONDS)
        for partition in self._chains:
            self._give_up(partition)
        consumer.close()

    def _turn(self, partition: int, consumer: KafkaConsumer) -> None:
        try:
            chain = self._chains[partition]
            if chain is None:
                chain = self._open(partition, consumer)
                if partition not in self._chains:
                    chain.close()
                    return
                self._chains[partition] = chain
            chain.turn(lambda: time.monotonic() - self._turned < UNSURE_SECONDS)
            self._recovered(partition)
        except Taken:
            return
        except (Broken, NotPublished, ConsumerFailed, AdminError, TimeoutError) as error:
            self._give_up(partition)
            self._trouble(f"partition {partition}: {error}")
            self._around.alerts.raised(ALERT, f"{self._audit.name}-{partition}", self._audit.topic.name, str(error))

    def _give_up(self, partition: int) -> None:
        """It is begun anew, if it is still ours."""
        chain = self._chains.get(partition)
        if chain is not None:
            self._chains[partition] = None
            chain.close()

    def _open(self, partition: int, consumer: KafkaConsumer) -> Chain:
        """With transactions, if the cluster has them. Raises as Chain does."""

        def is_ours() -> bool:
            consumer.poll_paused(0.0)
            self._turned = time.monotonic()
            return partition in self._chains

        chain = functools.partial(
            Chain, self._audit, partition, self._around, consumer, self._admin, self._say, is_ours
        )
        if self._transacts:
            try:
                return chain(transacts=True)
            except NotPublished as error:
                if not error.lacks_transactions:
                    raise
                self._transacts = False
                logger.warning(
                    "audit_without_transactions name=%s effect=a writer that is suspended may leave a copy too many reason=%s",
                    self._audit.name, error,
                )  # fmt: skip
        return chain(transacts=False)

    def _recovered(self, partition: int) -> None:
        self._around.alerts.recovered(ALERT, f"{self._audit.name}-{partition}", self._audit.topic.name)

    def _trouble(self, error: str) -> None:
        self._say(error)
        self._stopped.wait(TROUBLE_SECONDS)

    def _say(self, error: str) -> None:
        """It is logged when it is another than the last one, and once a minute."""
        if error != self._said or time.monotonic() >= self._next_say:
            self._said, self._next_say = error, time.monotonic() + SAY_SECONDS
            logger.error("audit_waits name=%s error=%s", self._audit.name, error)


def size_of(record: Message, headers: Sequence[tuple[str, str | bytes | None]]) -> int:
    """Of the record in bytes, about."""
    parts = [record.key() or b"", record.value() or b"", *(part or b"" for header in headers for part in header)]
    return sum(map(len, parts))


def _settle(future: "Future[Acknowledged]", result: Acknowledged | NotPublished) -> None:
    if isinstance(result, NotPublished):
        future.set_exception(result)
    else:
        future.set_result(result)
