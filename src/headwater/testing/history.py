"""The checker: whether what an application did kept the promises of its delivery class.

    HEADWATER_HISTORY=history headwater run shop.inventory:app      # as often, and under what faults, you like
    headwater verify history --group inventory-reservation

It reads the histories that the processes wrote (headwater.runtime.history) beside the topic itself, the group's retry
and dead-letter topics, its committed offsets and, if there is one, the table of effects.

    C1  every offset below the frontier is ok, dead, or outstanding in the retry topic
    C2  per key, the first oks ascend (dead and redriven ones exempt)
    C3  per assignment and key, oks strictly ascend (the same)
    C4  no ok of an event while an earlier one of its key was parked by that owner
    C5  one effect per event id; effects of a key in the order of its events
    C6  at each acknowledged commit, everything below was settled before
    C7  dead letters have the attempts that the policy says, and the source's bytes
    C8  under hold, nothing of a key is ok after a dead letter until that one is redriven or discarded
    C9  under at_most_once, which commits first (C1 and C6 say nothing there), nothing is started twice; what was redriven,
        and keys with such events, exempt
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import text

from headwater.kafka.admin import KafkaAdmin
from headwater.kafka.consumer import Message, headers_of
from headwater.kafka.reader import read_all
from headwater.operations.failures import letter_of
from headwater.runtime.retry_topic import (
    DeadLetter,
    Done,
    ParkedRecord,
    Unreadable,
    dead_topic,
    read_retry_record,
    retry_topic,
)
from headwater.settings import Settings
from headwater.store.database import Database


class Violation(NamedTuple):
    rule: str
    partition: int
    offsets: tuple[int, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.rule} partition {self.partition} offsets {', '.join(map(str, self.offsets))}: {self.text}"


class Line(NamedTuple):
    """A line of a history."""

    at_ms: int
    process: int
    place: int
    """In its file."""
    event: str
    partition: int
    token: int
    offset: int | None
    fields: Mapping[str, Any]


class SourceEvent(NamedTuple):
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, str | bytes | None]]
    event_id: str | None


class Effect(NamedTuple):
    event_id: str
    key: str
    serial: int


class Evidence(NamedTuple):
    """Everything that the checker looks at."""

    lines: Sequence[Line]
    source: Mapping[int, Mapping[int, SourceEvent]]
    """By partition and offset."""
    committed: Mapping[int, int]
    outstanding: Mapping[int, set[int]]
    """Offsets that are parked, by partition."""
    letters: Sequence[DeadLetter]
    effects: Sequence[Effect] | None = None


class Report(NamedTuple):
    counts: Mapping[str, int]
    violations: Sequence[Violation]


def read_lines(folder: str, group: str) -> list[Line]:
    """In the order of time. A last line that was cut off by a crash is left out. Raises OSError."""
    lines = []
    for process, path in enumerate(sorted(Path(folder).glob("*.jsonl"))):
        for place, raw in enumerate(path.read_text().splitlines()):
            try:
                found = json.loads(raw)
            except ValueError:
                continue
            if found["g"] == group:
                lines.append(
                    Line(found["t"], process, place, found["e"], found["p"], found["a"], found.get("o"), found)
                )
    return sorted(lines, key=lambda line: (line.at_ms, line.process, line.place))


def gather(settings: Settings, folder: str, group: str, topic: str, effects: tuple[str, str] | None = None) -> Evidence:
    """effects: the URL of a database and a table with event_id, key and serial. Raises AdminError, OSError."""
    admin = KafkaAdmin(settings)
    counts = admin.partition_counts()
    source: dict[int, dict[int, SourceEvent]] = defaultdict(dict)
    for message in read_all(settings, admin, [topic]):
        source[message.partition() or 0][message.offset() or 0] = _source_event(message)
    outstanding: dict[int, set[int]] = defaultdict(set)
    letters: list[DeadLetter] = []
    if retry_topic(topic, group) in counts:
        for message in read_all(settings, admin, [retry_topic(topic, group)]):
            _follow(outstanding[message.partition() or 0], message)
    if dead_topic(topic, group) in counts:
        found = (letter_of(message) for message in read_all(settings, admin, [dead_topic(topic, group)]))
        letters = [letter for letter in found if letter is not None]
    committed = {index: position.offset for (name, index), position in admin.committed(group).items() if name == topic}
    rows = read_effects(*effects) if effects is not None else None
    return Evidence(read_lines(folder, group), source, committed, outstanding, letters, rows)


def _source_event(message: Message) -> SourceEvent:
    headers = headers_of(message)
    ids = [value for name, value in headers if name == "headwater-event-id"]
    event_id = ids[-1].decode() if ids and isinstance(ids[-1], bytes) else None
    return SourceEvent(message.key(), message.value(), headers, event_id)


def _follow(parked: set[int], message: Message) -> None:
    try:
        record = read_retry_record(message.key(), message.value(), headers_of(message), message.offset() or 0)
    except Unreadable:
        return
    if isinstance(record, ParkedRecord):
        parked.add(record.source.offset)
    elif isinstance(record, Done):
        parked.discard(record.offset)


def read_effects(url: str, table: str) -> list[Effect]:
    """Raises InvalidDatabase, SQLAlchemyError."""
    database = Database(url)
    name = database.engine.dialect.identifier_preparer.quote(table)
    try:
        with database.engine.connect() as connection:
            rows = connection.execute(text(f"SELECT event_id, key, serial FROM {name}")).all()
    finally:
        database.engine.dispose()
    return [Effect(str(row[0]), str(row[1]), int(row[2])) for row in rows]


def check(evidence: Evidence, *, complete: bool = False) -> Report:
    """complete: also everything beyond the frontier must be ok, dead or outstanding: the run is over."""
    violations: list[Violation] = []
    by_partition: dict[int, list[Line]] = defaultdict(list)
    for line in evidence.lines:
        by_partition[line.partition].append(line)
    for partition in sorted({*by_partition, *evidence.source}):
        violations += _Partition(evidence, partition, by_partition[partition]).check(complete)
    if evidence.effects is not None:
        violations += _check_effects(evidence)
    counts = Counter(line.event for line in evidence.lines)
    counts["processes"] = len({line.process for line in evidence.lines})
    counts["source"] = sum(len(events) for events in evidence.source.values())
    counts["outstanding"] = sum(len(offsets) for offsets in evidence.outstanding.values())
    counts["effects"] = len(evidence.effects or ())
    return Report(counts, violations)


class _Partition:
    def __init__(self, evidence: Evidence, partition: int, lines: Sequence[Line]) -> None:
        self.partition = partition
        self.lines = lines
        self.source = evidence.source.get(partition, {})
        self.committed = evidence.committed.get(partition)
        self.outstanding = evidence.outstanding.get(partition, set())
        self.letters = [letter for letter in evidence.letters if letter.partition == partition]
        self.dead = {letter.source.offset for letter in self.letters}
        self.redriven = {line.offset for line in lines if line.fields.get("r")}
        self.replayed = {line.token for line in lines if line.event == "assign" and line.fields.get("replay")}
        self.found: list[Violation] = []

    def check(self, complete: bool) -> list[Violation]:
        if any(line.fields.get("first") for line in self.lines if line.event == "assign"):
            self._starts()
        else:
            self._settled(complete)
            self._commits()
        self._order()
        self._letters()
        if any(line.fields.get("hold") for line in self.lines if line.event == "assign"):
            self._holds()
        return self.found

    def _key(self, offset: int) -> bytes | None:
        event = self.source.get(offset)
        return event.key if event is not None else None

    def _is_exempt(self, offset: int) -> bool:
        return offset in self.dead or offset in self.redriven

    def _violated(self, rule: str, text: str, *offsets: int) -> None:
        self.found.append(Violation(rule, self.partition, offsets, text))

    def _settled(self, complete: bool) -> None:
        """C1."""
        handled = {line.offset for line in self.lines if line.event in ("ok", "skip", "dead")} | self.dead
        for offset in sorted(self.source):
            if offset in handled or offset in self.outstanding:
                continue
            if complete or (self.committed is not None and offset < self.committed):
                self._violated("C1", "it was neither handled, nor is it a dead letter or parked", offset)

    def _starts(self) -> None:
        """C9."""
        starts = Counter(line.offset for line in self.lines if line.event == "start" and line.offset is not None)
        parked = {self._key(line.offset) for line in self.lines if line.event == "park" and line.offset is not None}
        for offset, count in sorted(starts.items()):
            if count > 1 and offset not in self.redriven and self._key(offset) not in parked:
                self._violated("C9", f"it was started {count} times", offset)

    def _order(self) -> None:
        """C2, C3, C4."""
        first: dict[bytes, int] = {}
        seen: set[int] = set()
        last: dict[tuple[int, bytes], int] = {}
        parked: dict[tuple[int, bytes], set[int]] = defaultdict(set)
        for line in self.lines:
            offset = line.offset
            key = self._key(offset) if offset is not None else None
            if offset is None or key is None or line.event not in ("ok", "park", "load", "done"):
                continue
            owner = (line.token, key)
            if line.event in ("park", "load"):
                parked[owner].add(offset)
            elif line.event == "done":
                parked[owner].discard(offset)
            elif not self._is_exempt(offset):
                self._ok(line, offset, key, first, seen, last, parked[owner])

    def _ok(
        self,
        line: Line,
        offset: int,
        key: bytes,
        first: dict[bytes, int],
        seen: set[int],
        last: dict[tuple[int, bytes], int],
        parked: Iterable[int],
    ) -> None:
        if offset not in seen:
            if first.get(key, -1) > offset:
                self._violated("C2", f"it was first handled after {first[key]} of its key", offset, first[key])
            first[key] = max(offset, first.get(key, -1))
            seen.add(offset)
        if line.token not in self.replayed:
            before = last.get((line.token, key), -1)
            if before >= offset:
                self._violated("C3", f"one owner handled it after {before} of its key", offset, before)
            last[line.token, key] = max(offset, before)
        waiting = [each for each in parked if each < offset and not self._is_exempt(each)]
        if waiting:
            self._violated("C4", f"it was handled while {min(waiting)} of its key was parked", offset, min(waiting))

    def _commits(self) -> None:
        """C6."""
        settled: set[int] = set()
        everything = sorted(self.source)
        at = 0  # everything before it was found settled
        for line in self.lines:
            if line.offset is None:
                continue
            if line.event in ("ok", "skip", "dead", "park", "load"):
                settled.add(line.offset)
            elif line.event == "commit":
                while at < len(everything) and everything[at] in settled:
                    at += 1
                if at < len(everything) and everything[at] < line.offset:
                    offset = everything[at]
                    self._violated("C6", f"{line.offset} was committed before it was settled", offset, line.offset)
                    settled.add(offset)

    def _letters(self) -> None:
        """C7."""
        attempts = {line.fields["n"] for line in self.lines if line.event == "assign" and "n" in line.fields}
        for letter in self.letters:
            event = self.source.get(letter.source.offset)
            offset = letter.source.offset
            if event is not None and (event.key, event.value, event.headers) != (
                letter.source.key,
                letter.source.value,
                letter.source.headers,
            ):
                self._violated("C7", "its dead letter has other bytes", offset)
            if letter.attempted.kind == "transient" and attempts and letter.attempted.attempts not in attempts:
                self._violated("C7", f"it was given up on after {letter.attempted.attempts} attempts", offset)

    def _holds(self) -> None:
        """C8."""
        held: dict[bytes, set[int]] = defaultdict(set)
        handled: set[int] = set()
        for line in self.lines:
            offset = line.offset
            key = self._key(offset) if offset is not None else None
            if offset is None or key is None:
                continue
            if line.event == "dead" and offset not in handled:
                held[key].add(offset)
            elif line.event == "done":
                held[key].discard(offset)
            elif line.event == "ok":
                handled.add(offset)
                held[key].discard(offset)
                before = [each for each in held[key] if each < offset]
                if before:
                    self._violated("C8", f"it was handled while {min(before)} of its key was held", offset, min(before))


def _check_effects(evidence: Evidence) -> list[Violation]:
    """C5."""
    assert evidence.effects is not None
    places = {
        event.event_id: (partition, offset, event.key)
        for partition, events in evidence.source.items()
        for offset, event in events.items()
    }
    exempt = {(letter.partition, letter.source.offset) for letter in evidence.letters}
    found = []
    seen: set[str] = set()
    last: dict[bytes, tuple[int, int]] = {}
    for effect in sorted(evidence.effects, key=lambda each: each.serial):
        partition, offset, key = places.get(effect.event_id, (-1, -1, None))
        if effect.event_id in seen:
            found.append(Violation("C5", partition, (offset,), f"the event {effect.event_id} took effect twice"))
        seen.add(effect.event_id)
        if key is None or (partition, offset) in exempt:
            continue
        if key in last and last[key][0] == partition and last[key][1] > offset:
            text = f"its effect came after that of {last[key][1]} of its key"
            found.append(Violation("C5", partition, (offset, last[key][1]), text))
        last[key] = (partition, offset)
    return found
