"""A projection built anew, beside the live one, and put in its place; or compared with it.

1. The ends of its topics are taken; everything up to them is applied to tables beside the live ones.
2. What the live side has come further meanwhile is applied too, until nothing is missing.
3. In one transaction the tables take the place of the live ones, with their progress.

A rebuild that was stopped goes on where it was. Compared (`check`): the live side's rows and progress are looked at in one
snapshot, the rebuild goes exactly as far, and the digests of the rows are the same or not.
"""

import gc
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from headwater.domain.projection import Projection
from headwater.domain.projector import advanced
from headwater.domain.repeats import WINDOW, Repeats
from headwater.event.codec import Undecodable
from headwater.kafka.admin import KafkaAdmin
from headwater.kafka.consumer import Message
from headwater.kafka.reader import SILENCE_SECONDS, KafkaReader, Place, Told, offset_of, place_of
from headwater.kafka.registry_client import RegistryUnreachable
from headwater.runtime.decoding import SchemaSource
from headwater.settings import Settings
from headwater.store import read_model
from headwater.store.database import Database, is_unavailable
from headwater.store.lock import Lock
from headwater.store.read_model import Digest, Progress, digest
from headwater.store.rows import Rows, Side, shape_of

GC_THRESHOLD = 100_000
"""Rows by the ten thousand are no garbage: looking for it among them takes a quarter of the time."""
SAVE_EVENTS = 20_000
"""So many are in memory before they are written."""
MOST_ROWS = 500_000
"""Of a table in memory; beyond it, rows are read from the table again."""
ROUNDS = 10
"""Of catching up with the live side, before it is made to wait for the last of them."""
LOCK_TRIES = 15
"""To get the tables from those that read them, for two seconds each."""
LOCKED_SILENCE_SECONDS = 5.0
"""Without a word from the broker, while everybody who reads the tables waits for us."""


class CannotRebuild(Exception):
    """The message says why, and what to do."""


class Result(NamedTuple):
    events: int
    """That were applied by this rebuild, from its beginning."""
    seconds: float
    live: list[Digest]
    """Of the rows that were there; empty unless they were compared."""
    rebuilt: list[Digest]

    @property
    def is_equal(self) -> bool:
        return self.live == self.rebuilt


class Rebuild:
    def __init__(
        self, projection: Projection, database: Database, settings: Settings, schemas: SchemaSource, tell: Told
    ) -> None:
        """tell: called now and then."""
        self._projection = projection
        self._database = database
        self._settings = settings
        self._tell = tell
        self._admin = KafkaAdmin(settings)
        self._admin.check_reachable()
        names = [topic.name for topic in projection.topics]
        self._topic_ids = {each.name: each.topic_id for each in self._admin.describe_topics(names)}
        self._decoders = projection.decoders(self._topic_ids, schemas)
        self._shapes = projection.shapes(Side.REBUILD)
        self._progress = Progress(projection.version)
        self._positions: dict[Place, int] = {}
        self._repeats = Repeats()
        self._begun = self._all = 0
        self._skipped: frozenset[tuple[str, int, int]] = frozenset()

    def run(self, *, check: bool = False, anew: bool = False, allow_gap: bool = False) -> Result:
        """check: compare, and change nothing. anew: don't go on with one that was stopped. allow_gap: of what is left, where
        retention has taken the beginning. Raises CannotRebuild, SQLAlchemyError, AdminError, ConsumerFailed."""
        started = time.monotonic()
        lock = Lock(self._database, f"rebuild-{self._projection.name}")
        with self._database.own_connection(f"headwater-rebuild-{self._projection.name}") as connection:
            if not lock.take(connection):
                raise CannotRebuild(f"{self._projection.name} is being rebuilt already, by another process.")
            before = gc.get_threshold()
            gc.set_threshold(GC_THRESHOLD)
            try:
                return self._run(connection, started, check, anew, allow_gap)
            finally:
                gc.set_threshold(*before)
                lock.release()

    def _run(self, connection: Connection, started: float, check: bool, anew: bool, allow_gap: bool) -> Result:
        places = self._places()
        starts = self._admin.start_offsets(places)
        if not allow_gap:
            self._check_beginnings(starts)
        if not check:
            self._check_obstacles(connection)
        digests: list[Digest] = []
        ends: Mapping[Place, int]
        if check:
            live, digests = self._look_at_live(connection)
            ends = {place: live.offset(*place) or 0 for place in places}
        else:
            ends = self._admin.last_stable_offsets(places)
        self._prepare(connection, check, anew)
        self._positions = {place: max(self._progress.offset(*place) or 0, starts[place]) for place in places}
        self._begun = sum(self._positions.values())
        self._all = sum(max(0, end - self._positions[place]) for place, end in ends.items())
        reader = KafkaReader(self._settings, {})
        try:
            self._learn_repeats(reader, starts)
            rows = Rows(connection, self._shapes, is_empty=not self._progress.topics)
            self._read_to(connection, reader, rows, ends)
            if check:
                rebuilt = self._digests(connection)
                self._drop(connection)
                return Result(self._progress.events, time.monotonic() - started, digests, rebuilt)
            self._exchange(connection, reader, rows)
        finally:
            reader.close()
        return Result(self._progress.events, time.monotonic() - started, [], [])

    # Before

    def _places(self) -> list[Place]:
        counts = self._admin.partition_counts()
        return [(topic, i) for topic in self._decoders for i in range(counts[topic])]

    def _check_beginnings(self, starts: Mapping[Place, int]) -> None:
        """Raises CannotRebuild."""
        gone = [
            f"{topic}-{partition} begins at {offset}" for (topic, partition), offset in starts.items() if offset > 0
        ]
        if gone:
            raise CannotRebuild(
                f"retention has taken the beginning of {gone[0]}"
                + (f", and of {len(gone) - 1} more partitions" if len(gone) > 1 else "")
                + ": what is left makes other rows. Keep what rebuilds need, in a compacted topic or for longer; or say "
                "--allow-gap, and build it from what is left."
            )

    def _check_obstacles(self, connection: Connection) -> None:
        """Raises CannotRebuild."""
        with connection.begin():
            live = read_model.load_progress(connection, self._projection.name, Side.LIVE)
            if live is None or live.version != self._projection.version:
                return  # it was declared otherwise
            for cls in self._projection.tables:
                found = read_model.obstacles(connection, shape_of(cls))
                if found:
                    raise CannotRebuild(
                        f"the table {shape_of(cls).table.name} has {', '.join(found)}, which new tables would not have: declare "
                        "them, or take them away and make them again afterwards."
                    )

    def _look_at_live(self, connection: Connection) -> tuple[Progress, list[Digest]]:
        """In one snapshot. Raises CannotRebuild."""
        with read_model.snapshot(connection):
            live = read_model.load_progress(connection, self._projection.name, Side.LIVE)
            if live is None:
                raise CannotRebuild(f"{self._projection.name} has no live side yet: there is nothing to compare with.")
            for topic, known in live.topics.items():
                if topic in self._decoders and known.topic_id != self._topic_ids.get(topic):
                    raise CannotRebuild(f"the topic {topic} was made anew since: there is nothing to compare with.")
            return live, [digest(connection, shape_of(cls)) for cls in self._projection.tables]

    def _prepare(self, connection: Connection, check: bool, anew: bool) -> None:
        """The tables, with what an earlier rebuild has brought them."""
        name = self._projection.name
        with connection.begin():
            live = read_model.load_progress(connection, name, Side.LIVE)
            self._skipped = frozenset(live.skipped) if live is not None else frozenset()
            found = read_model.load_progress(connection, name, Side.REBUILD)
            goes_on = (
                not anew
                and found is not None
                and found.version == self._projection.version
                and all(known.topic_id == self._topic_ids.get(topic) for topic, known in found.topics.items())
                and all(read_model.is_there(connection, each) for each in self._shapes)
            )
            if goes_on and found is not None:
                if check:
                    raise CannotRebuild(
                        f"a rebuild of {name} was stopped: run it again without --check, and it goes on and ends; or say --anew "
                        "here, and give up what it has done."
                    )
                self._check_skipped(found.skipped, {place: found.offset(*place) or 0 for place in self._places()})
                self._progress = msgspec.structs.replace(found, skipped=tuple(self._skipped))
                return
            self._progress = msgspec.structs.replace(self._progress, skipped=tuple(self._skipped))
            read_model.drop(connection, self._shapes)
            read_model.create(connection, self._shapes)
            read_model.save_progress(connection, name, Side.REBUILD, self._progress)

    def _check_skipped(self, skipped: Iterable[tuple[str, int, int]], positions: Mapping[Place, int]) -> None:
        """What is left out now, and was then, is the same as far as it has come. Raises CannotRebuild."""
        for topic, partition, offset in self._skipped.symmetric_difference(skipped):
            if offset < positions.get((topic, partition), 0):
                is_out = (topic, partition, offset) in self._skipped
                raise CannotRebuild(
                    f"{topic}:{partition}:{offset} is {'left out' if is_out else 'not left out any more'} since this rebuild "
                    "passed it: run it again with --anew."
                )

    # Reading

    def _read_to(
        self, connection: Connection, reader: KafkaReader, rows: Rows, ends: Mapping[Place, int], *, saves: bool = True
    ) -> None:
        """saves: in transactions of its own, instead of one that is open. Raises CannotRebuild, ConsumerFailed."""
        unsaved = 0
        silence_seconds = SILENCE_SECONDS if saves else LOCKED_SILENCE_SECONDS
        for records in reader.up_to(ends, self._positions, silence_seconds):
            if saves:
                with connection.begin():
                    unsaved += self._apply(records, rows)
                    if unsaved >= SAVE_EVENTS or rows.is_ahead:
                        self._save(connection, rows)
                        unsaved = 0
            else:
                self._apply(records, rows)
            self._repeats.passed(self._positions)
            self._tell(min(sum(self._positions.values()) - self._begun, self._all), self._all)
        if saves:
            with connection.begin():
                self._save(connection, rows)
        else:
            self._save(connection, rows)

    def _learn_repeats(self, reader: KafkaReader, starts: Mapping[Place, int]) -> None:
        """Of what an earlier rebuild has applied. Raises ConsumerFailed, RegistryUnreachable."""
        before = {place: max(starts[place], offset - WINDOW) for place, offset in self._positions.items()}
        for records in reader.up_to(self._positions, before):
            for record in records:
                self._projection.pass_over(record, self._decoders[place_of(record)[0]], self._repeats)

    def _apply(self, records: Sequence[Message], rows: Rows) -> int:
        """Raises CannotRebuild."""
        for record in records:
            place, offset = place_of(record), offset_of(record)
            if (*place, offset) in self._skipped:
                self._projection.pass_over(record, self._decoders[place[0]], self._repeats)
                continue
            try:
                self._projection.apply(record, self._decoders[place[0]], rows, self._repeats)
            except RegistryUnreachable:
                raise
            except Exception as error:
                if is_unavailable(error):
                    raise
                kind = "can't be read" if isinstance(error, Undecodable) else "can't be applied"
                raise CannotRebuild(
                    f"{place[0]}-{place[1]} at {offset} {kind}: {type(error).__name__}: {error}\n"
                    "  Mend what handles it and run this again, it goes on where it is; or leave the event out: "
                    f"headwater projections skip --force MODULE:APP {self._projection.name} {place[0]}:{place[1]}:{offset}"
                ) from error
        self._progress = msgspec.structs.replace(self._progress, events=self._progress.events + len(records))
        return len(records)

    def _save(self, connection: Connection, rows: Rows) -> None:
        """In the transaction that is open."""
        rows.write()
        rows.make_room(MOST_ROWS)
        self._progress = advanced(self._progress, self._positions, self._topic_ids, events=self._progress.events)
        read_model.save_progress(connection, self._projection.name, Side.REBUILD, self._progress)

    # After

    def _exchange(self, connection: Connection, reader: KafkaReader, rows: Rows) -> None:
        """Raises CannotRebuild."""
        rounds = waits = 0
        while True:
            try:
                behind = self._try_to_exchange(connection, reader, rows, waits_for_us=rounds == ROUNDS)
            except OperationalError as error:
                if not read_model.is_locked(error):
                    raise
                waits += 1
                if waits == LOCK_TRIES:
                    raise CannotRebuild(
                        f"{self._projection.name} is rebuilt, but somebody reads its tables without end: end that, and run "
                        "this again; it goes on here."
                    ) from None
                continue
            if not behind:
                return
            rounds += 1
            self._add(behind)
            self._read_to(connection, reader, rows, behind)

    def _try_to_exchange(
        self, connection: Connection, reader: KafkaReader, rows: Rows, *, waits_for_us: bool
    ) -> dict[Place, int]:
        """Where the live side is further; it was exchanged when it is nowhere. waits_for_us: what is missing is read while
        the live side waits. Raises OperationalError."""
        name = self._projection.name
        with connection.begin():
            live = read_model.load_progress(connection, name, Side.LIVE, lock=True)
            if live is not None:
                before, self._skipped = self._skipped, frozenset(live.skipped)
                self._check_skipped(before, self._positions)
            behind = self._behind(live)
            if behind and not waits_for_us:
                return behind
            # before anything is read: what is in memory could not be taken back with this transaction
            read_model.lock(connection, self._projection.tables)
            if behind:
                self._add(behind)
                self._read_to(connection, reader, rows, behind, saves=False)
            read_model.swap(connection, self._projection.tables)
            read_model.save_progress(connection, name, Side.LIVE, self._as_live(live))
            read_model.drop_progress(connection, name, Side.REBUILD)
            return {}

    def _add(self, behind: Mapping[Place, int]) -> None:
        """Partitions that are new since the beginning."""
        new = self._admin.start_offsets([place for place in behind if place not in self._positions])
        self._positions.update(new)
        self._begun += sum(new.values())

    def _behind(self, live: Progress | None) -> dict[Place, int]:
        """Where the live side is further."""
        if live is None:
            return {}
        return {
            (topic, partition): offset
            for topic, known in live.topics.items()
            if topic in self._decoders and known.topic_id == self._topic_ids.get(topic)
            for partition, offset in known.offsets.items()
            if offset > self._positions.get((topic, partition), 0)
        }

    def _as_live(self, before: Progress | None) -> Progress:
        generation = before.generation + 1 if before is not None else 0
        skipped = before.skipped if before is not None else ()
        return msgspec.structs.replace(self._progress, generation=generation, skipped=skipped)

    def _digests(self, connection: Connection) -> list[Digest]:
        with connection.begin():
            return [digest(connection, shape) for shape in self._shapes]

    def _drop(self, connection: Connection) -> None:
        with connection.begin():
            read_model.drop(connection, self._shapes)
            read_model.drop_progress(connection, self._projection.name, Side.REBUILD)
