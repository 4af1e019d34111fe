"""The thread that keeps a projection up to date.

One process at a time does, whoever has its lock. It reads all partitions of its topics from where the database says, and a
batch is one transaction: the rows, and how far they are. An event that can't be applied is tried again until it can, or until
somebody leaves it out (`headwater projections skip`); its partition waits, the others go on.

Its progress is also committed to the group of its name, so that every tool that shows lag shows its lag.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from headwater.domain.projection import Projection
from headwater.domain.repeats import WINDOW, Repeats
from headwater.kafka.admin import AdminError, KafkaAdmin
from headwater.kafka.consumer import ConsumerFailed, Message
from headwater.kafka.reader import KafkaReader, Place, offset_of, place_of
from headwater.kafka.registry_client import RegistryUnreachable
from headwater.runtime import frontier
from headwater.runtime.subscription import CannotStart, Surroundings
from headwater.store import read_model
from headwater.store.database import is_unavailable
from headwater.store.lock import Lock
from headwater.store.read_model import Progress, Stuck, TopicProgress
from headwater.store.rows import Rows, Side

logger = logging.getLogger(__name__)

BATCH = 2000
MOST_ROWS = 100_000
"""Of a table in memory."""
TAKE_SECONDS = 0.2
TROUBLE_SECONDS = 1.0
STOP_SECONDS = 10.0
SAY_SECONDS = 60.0
SHOW_SECONDS = 2.0  # between commits to the group, which only tools read
LOOK_SECONDS = 30.0  # between looks for new partitions
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 60.0
ALERT = "projection"


class Waits(CannotStart):
    """The projection can't go on now; the message says what to do."""


class Exchanged(Exception):
    """The live side was exchanged meanwhile: begin with what it is now."""


class Held(NamedTuple):
    """A partition waits for one of its events."""

    offset: int
    error: str
    attempts: int
    due: float
    since_ms: int
    is_tried: bool = False
    """It is read again, just now."""


class Projector:
    def __init__(self, projection: Projection, around: Surroundings, topic_ids: Mapping[str, str]) -> None:
        assert around.database is not None
        self._projection = projection
        self._around = around
        self._database = around.database
        self._topic_ids = topic_ids
        self._decoders = projection.decoders(topic_ids, around.schemas)
        self._shapes = projection.shapes(Side.LIVE)
        self._name = f"headwater-projection-{projection.name}"
        self._lock = Lock(self._database, f"projection-{projection.name}")
        self._admin = KafkaAdmin(around.settings)
        self._stopped = threading.Event()
        self._said, self._next_say = "", 0.0
        self._waits: Waits | None = None
        self._reset()
        self._thread = threading.Thread(target=self._run, name=f"projection-{projection.name}", daemon=True)

    def _reset(self) -> None:
        """What is known holds as long as this process has the lock."""
        self._generation = -1
        self._rows: Rows | None = None
        self._positions: dict[Place, int] = {}
        """The next offset, of every partition."""
        self._repeats = Repeats()
        self._held: dict[Place, Held] = {}
        self._shown: dict[Place, tuple[int, str]] = {}
        self._next_show = 0.0
        self._next_look = 0.0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What is at work is finished first."""
        self._stopped.set()
        self._thread.join(STOP_SECONDS)

    def is_done(self, ends: Mapping[Place, int]) -> bool:
        """Whether it is as far as that, here or in another process. Raises SQLAlchemyError, AdminError, Waits."""
        if self._waits is not None:
            raise self._waits
        committed = self._admin.committed(self._projection.name)
        with self._database.engine.connect() as connection:
            progress = read_model.load_progress(connection, self._projection.name, Side.LIVE)
        if progress is None:
            return False
        mine = {**{place: each.offset for place, each in committed.items()}, **self._positions}
        return all(
            max(progress.offset(*place) or 0, mine.get(place, 0)) >= end
            for place, end in ends.items()
            if place[0] in self._decoders
        )

    # Its life

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                with self._database.own_connection(self._name) as connection:
                    if self._lock.take(connection):
                        self._work(connection)
            except Exchanged:
                continue
            except Waits as error:
                self._waits = error
                self._trouble(str(error))
            except (SQLAlchemyError, ConsumerFailed, AdminError, RegistryUnreachable) as error:
                self._trouble(str(error).split("\n")[0])
            except Exception:
                logger.exception("projection_failed name=%s", self._projection.name)
            finally:
                self._lock.release()
            self._stopped.wait(TROUBLE_SECONDS)

    def _trouble(self, error: str) -> None:
        """It is logged when it is another than the last one, and once a minute."""
        if error == self._said and time.monotonic() < self._next_say:
            return
        self._said, self._next_say = error, time.monotonic() + SAY_SECONDS
        logger.error("projection_waits name=%s error=%s", self._projection.name, error)

    def _work(self, connection: Connection) -> None:
        """Until stopped. Raises Waits, Exchanged, SQLAlchemyError, ConsumerFailed, AdminError, RegistryUnreachable."""
        self._reset()
        progress = self._prepare(connection)
        self._waits = None
        self._generation = progress.generation
        reader = KafkaReader(self._around.settings, {})
        try:
            while not self._stopped.is_set():
                self._look(reader, progress)
                self._retry(reader)
                records, ended = reader.take(BATCH, TAKE_SECONDS)
                if records:
                    self._apply(connection, reader, records)
                for place, end in ended.items():
                    if place not in self._held:
                        self._positions[place] = max(self._positions.get(place, 0), end)
                self._show()
        finally:
            reader.close()

    def _prepare(self, connection: Connection) -> Progress:
        """Raises Waits, SQLAlchemyError."""
        projection = self._projection
        with connection.begin():
            progress = read_model.load_progress(connection, projection.name, Side.LIVE, lock=True)
            if progress is None:
                for shape in self._shapes:
                    if not read_model.is_there(connection, shape):
                        read_model.create(connection, [shape])
                    elif read_model.has_rows(connection, shape):
                        raise Waits(
                            f"the table {shape.table.name} has rows that are not this projection's: empty it, or "
                            f"`{command(projection)}`."
                        )
                progress = Progress(projection.version)
                read_model.save_progress(connection, projection.name, Side.LIVE, progress)
            if progress.version != projection.version:
                raise Waits(
                    f"the rows are of version {progress.version}, and this is version {projection.version}: "
                    f"`{command(projection)}`."
                )
            for shape in self._shapes:
                if not read_model.is_there(connection, shape):
                    raise Waits(f"the table {shape.table.name} is gone: `{command(projection)}`.")
                different = read_model.differences(connection, shape)
                if different:
                    raise Waits(
                        f"the table {shape.table.name} is not as declared ({different}): raise the projection's version, "
                        f"and `{command(projection)}`."
                    )
        names = [topic.name for topic in projection.topics]
        self._topic_ids = {each.name: each.topic_id for each in self._admin.describe_topics(names)}
        self._decoders = projection.decoders(self._topic_ids, self._around.schemas)
        for name, known in progress.topics.items():
            if name in self._topic_ids and known.topic_id != self._topic_ids[name]:
                raise Waits(f"the topic {name} was made anew since: `{command(projection)} --anew`.")
        return progress

    def _look(self, reader: KafkaReader, progress: Progress) -> None:
        """Now and then: partitions that are new. Raises AdminError, Waits."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_SECONDS
        counts = self._admin.partition_counts()
        places = [(topic, i) for topic in self._decoders for i in range(counts.get(topic, 0))]
        new = [place for place in places if place not in self._positions]
        starts = self._admin.start_offsets(new)
        for place in new:
            offset = progress.offset(*place) or 0
            if offset < starts[place]:
                raise Waits(
                    f"{place[0]}-{place[1]} begins at {starts[place]}, and the projection is at {offset}: retention has taken "
                    f"what is between. `{command(self._projection)} --allow-gap` builds it from what is left."
                )
            self._positions[place] = offset
            reader.add(*place, max(starts[place], offset - WINDOW))

    def _retry(self, reader: KafkaReader) -> None:
        now = time.monotonic()
        for place, held in self._held.items():
            if held.due <= now and not held.is_tried:
                self._held[place] = held._replace(is_tried=True)
                reader.add(*place, held.offset)

    # Events

    def _apply(self, connection: Connection, reader: KafkaReader, records: Sequence[Message]) -> None:
        """In one transaction; one by one when that fails. Raises Exchanged, SQLAlchemyError, RegistryUnreachable."""
        records = [record for record in records if self._is_next(record)]
        if not records:
            return
        try:
            self._transact(connection, records)
        except (Exchanged, RegistryUnreachable):
            raise
        except Exception as error:
            if is_unavailable(error):
                raise
            if len(records) == 1:
                self._hold(connection, reader, records[0], error)
                return
            for record in records:
                if self._stopped.is_set():
                    raise Exchanged from None  # what is left is read again
                self._apply(connection, reader, [record])

    def _is_next(self, record: Message) -> bool:
        """Not what a partition that waits has behind its event."""
        held = self._held.get(place_of(record))
        return held is None or held.is_tried

    def _transact(self, connection: Connection, records: Sequence[Message]) -> None:
        # Far behind, the rows of one batch serve the next; otherwise they are read anew, as somebody may have mended them.
        rows, self._rows = self._rows or Rows(connection, self._shapes), None
        with connection.begin():
            progress = self._load(connection)
            offsets = {place: progress.offset(*place) or 0 for place in map(place_of, records)}
            applied = 0
            for record in records:
                place, offset = place_of(record), offset_of(record)
                decoder = self._decoders[place[0]]
                if offset < offsets[place] or (*place, offset) in progress.skipped:
                    self._projection.pass_over(record, decoder, self._repeats)
                    continue
                self._projection.apply(record, decoder, rows, self._repeats)
                offsets[place] = offset + 1
                applied += 1
            rows.write()
            stuck = tuple(
                each for each in progress.stuck if offsets.get((each.topic, each.partition), 0) <= each.offset
            )
            read_model.save_progress(
                connection, self._projection.name, Side.LIVE,
                advanced(progress, offsets, self._topic_ids, events=progress.events + applied, stuck=stuck),
            )  # fmt: skip
        if len(records) == BATCH:
            rows.make_room(MOST_ROWS)
            self._rows = rows
        self._repeats.passed(offsets)
        for place, offset in offsets.items():
            self._positions[place] = max(self._positions.get(place, 0), offset)
            self._held.pop(place, None)
        if not stuck:  # also of what another turn, or another process, has held
            self._around.alerts.recovered(ALERT, self._projection.name, place_of(records[0])[0])

    def _hold(self, connection: Connection, reader: KafkaReader, record: Message, error: Exception) -> None:
        """Its partition waits for it. Raises Exchanged, SQLAlchemyError."""
        place, offset = place_of(record), offset_of(record)
        reader.remove(*place)
        before = self._held.get(place)
        attempts, since_ms = 1, now_ms()
        if before is not None and before.offset == offset:
            attempts, since_ms = before.attempts + 1, before.since_ms
        pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (attempts - 1))
        said = f"{type(error).__name__}: {error}"
        self._held[place] = Held(offset, said, attempts, time.monotonic() + pause, since_ms)
        logger.error(
            "projection_event_failed name=%s topic=%s partition=%d offset=%d attempts=%d seconds=%.1f error=%s",
            self._projection.name, *place, offset, attempts, pause, said.split("\n")[0],
        )  # fmt: skip
        self._around.alerts.raised(ALERT, self._projection.name, place[0], f"{place[0]}-{place[1]} at {offset}: {said}")
        with connection.begin():
            progress = self._load(connection)
            others = tuple(each for each in progress.stuck if (each.topic, each.partition) != place)
            stuck = (*others, Stuck(*place, offset, said, attempts, now_ms() + int(pause * 1000)))
            read_model.save_progress(
                connection, self._projection.name, Side.LIVE,
                advanced(progress, {place: offset}, self._topic_ids, events=progress.events, stuck=stuck),
            )  # fmt: skip

    def _load(self, connection: Connection) -> Progress:
        """Locked. Raises Exchanged."""
        progress = read_model.load_progress(connection, self._projection.name, Side.LIVE, lock=True)
        if progress is None or progress.generation != self._generation:
            raise Exchanged
        return progress

    def _show(self) -> None:
        """To the tools that know groups."""
        if time.monotonic() < self._next_show:
            return
        self._next_show = time.monotonic() + SHOW_SECONDS
        now = {place: (offset, self._metadata(place)) for place, offset in self._positions.items()}
        changed = {place: shown for place, shown in now.items() if shown != self._shown.get(place)}
        if not changed:
            return
        try:
            self._admin.alter_committed(self._projection.name, changed)
        except AdminError as error:
            logger.debug("projection_not_shown name=%s error=%s", self._projection.name, error)
            return
        self._shown = now

    def _metadata(self, place: Place) -> str:
        held = self._held.get(place)
        if held is None:
            return ""
        waiting = frontier.Waiting(f"an event failed: {held.error}", held.since_ms)
        return frontier.encode_metadata(frontier.Progress(waiting=waiting))


def now_ms() -> int:
    return int(time.time() * 1000)


def advanced(
    progress: Progress,
    offsets: Mapping[Place, int],
    topic_ids: Mapping[str, str],
    *,
    events: int,
    stuck: tuple[Stuck, ...] = (),
) -> Progress:
    """The progress with some partitions further."""
    topics = dict(progress.topics)
    for (topic, partition), offset in offsets.items():
        known = topics.get(topic)
        before = known.offsets if known is not None else {}
        topics[topic] = TopicProgress(topic_ids[topic], {**before, partition: offset})
    return msgspec.structs.replace(progress, topics=topics, events=events, stuck=stuck)


def command(projection: Projection) -> str:
    return f"headwater projections rebuild MODULE:APP {projection.name}"
