"""Whether an audit topic is what was written: read by code that shares nothing with what wrote it.

The format is that of `headwater.trust.chain`, put down here once more, so that a mistake there is not made here too. What a
record says of itself is believed as far as the next one confirms it: one fault is reported once, and what follows is checked on.
"""

import hashlib
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

Place = tuple[str, str, int]
"""A topic, its id, and the number of a partition."""
Event = tuple[str, str, int, int]
"""A place and an offset."""

MOST_GONE = 100_000
"""Records of one gap whose numbers are remembered, in case they come later."""

Headers = Sequence[tuple[str, bytes | str | None]]


class Fault(StrEnum):
    CHANGED = "changed"
    """A record, or its place in the chain, is not what was written."""
    MISSING = "missing"
    """Records between two others are gone."""
    MOVED = "moved"
    """A record stands behind one that came after it."""
    INSERTED = "inserted"
    """A record that is no part of the chain."""
    NOT_AUDITED = "not audited"
    """An event that has no record."""
    HEAD = "head"
    """The chain doesn't have what it had when its head was kept."""


class Finding(NamedTuple):
    partition: int
    offset: int
    """Of the audit topic; for what is not there, of what comes next. Of the source, for events."""
    fault: Fault
    detail: str


class Verifier:
    """Of one partition of an audit topic; `feed` it from its first record on."""

    def __init__(self, topic: str, partition: int, *, is_whole: bool = True) -> None:
        """is_whole: the partition has its first record still; else the first one there is believed."""
        self.partition = partition
        self.findings: list[Finding] = []
        self.records = 0
        self.first = 1
        """The record that it begins with."""
        self.spare = 0
        """Copies too many, of a writer that was suspended: no part of the chain, and of events that are in it."""
        self.sequence = 0
        self._hashes = {hashlib.sha256(f"headwater audit 1 {topic} {partition}".encode()).hexdigest()}
        """What may be the hash of the last record: what it says, and what it should be where that differs; none: anything."""
        self.events: dict[Place, dict[int, bytes]] = {}
        """The digests by offset."""
        self._believes = not is_whole
        self._gone: set[int] = set()
        self._at = 0
        self._kept: dict[int, str] = {}

    def expect(self, sequence: int, hash_: str) -> None:
        """The chain must go through here."""
        self._kept[sequence] = hash_

    @property
    def hash(self) -> str:
        """Of the chain up to here, if there are no findings."""
        return next(iter(self._hashes), "")

    def feed(self, offset: int, key: bytes | None, value: bytes | None, headers: Headers) -> None:
        self._at = offset
        own, last = headers[:-7], headers[-7:]  # the audit's come last, whatever the event's are called
        said = {name[16:]: str(_text(content)) for name, content in last if name.startswith("headwater-audit-")}
        if not said:
            self._find(Fault.INSERTED, "it is no audit record")
            return
        self.records += 1
        try:
            sequence, hash_, digest = int(said["sequence"]), said["hash"], said["digest"]
            bytes.fromhex(hash_)
            topic, partition, source_offset = said["source"].rsplit(":", 2)
            event = (topic, said["topic-id"], int(partition), int(source_offset))
            is_copy = {"copy": True, "digest": False}[said["kept"]]
            rest = f" {said['source']} {said['topic-id']} {said['time']} {said['kept']} {digest}"
        except (KeyError, ValueError):
            self._find(Fault.CHANGED, "what it says of itself can't be read")
            self.sequence, self._hashes = self.sequence + 1, set()
            return
        is_changed = (_digest(key, value, own) != digest) if is_copy else (key, value, list(own)) != (None, None, [])
        if is_changed:
            self._find(Fault.CHANGED, f"record {sequence}: the event of {said['source']} is not what was audited")
        if self._believes:
            self._believes = False
            self.first = sequence
            self._go_on(sequence, {hash_}, event, digest)
            return
        wanted = self.sequence + 1
        hashes = {
            hashlib.sha256(bytes.fromhex(before) + f"{wanted}{rest}".encode()).hexdigest() for before in self._hashes
        }
        if not hashes or hash_ in hashes:
            if sequence != wanted:
                self._find(Fault.CHANGED, f"record {wanted}: it says that it is record {sequence}")
            self._go_on(wanted, {hash_}, event, digest)
        elif sequence < wanted:
            self._judge_late(sequence, event, digest)
        elif sequence == wanted:
            if not is_changed:
                self._find(Fault.CHANGED, f"record {sequence}: what it says, or its hash, is not what was written")
            self._go_on(sequence, {hash_, *hashes}, None if not is_changed else event, digest)
        else:
            self._gone.update(range(wanted, min(sequence, wanted + MOST_GONE)))
            self._find(
                Fault.MISSING,
                f"record {wanted}" if wanted == sequence - 1 else f"records {wanted} to {sequence - 1}",
            )
            self._go_on(sequence, {hash_}, event, digest)

    def _go_on(self, sequence: int, hashes: set[str], event: Event | None, digest: str) -> None:
        """event: None when it is not sure whose record it is."""
        self.sequence, self._hashes = sequence, hashes
        if self._kept.get(sequence, self.hash) not in hashes:
            self._find(Fault.HEAD, f"record {sequence} had another hash when its head was kept")
        if event is not None:
            self._note(event, digest)

    def end(self) -> None:
        """All was fed."""
        for sequence in self._kept:
            if sequence < self.first:
                self._find(
                    Fault.HEAD,
                    f"the chain begins at record {self.first}, and went through {sequence}: its beginning is cut off",
                )
            if sequence > self.sequence:
                self._find(
                    Fault.HEAD, f"the chain ends at record {self.sequence}, and went to {sequence}: its end is cut off"
                )

    def _judge_late(self, sequence: int, event: Event, digest: str) -> None:
        if sequence in self._gone:
            self._gone.discard(sequence)
            self._find(Fault.MOVED, f"record {sequence} stands behind record {self.sequence}")
            self._note(event, digest)
        elif self.events.get(event[:3], {}).get(event[3]) == _bytes(digest):
            self.spare += 1
        else:
            self._find(Fault.INSERTED, f"it says that it is record {sequence}, which there is")

    def _note(self, event: Event, digest: str) -> None:
        known = self.events.setdefault(event[:3], {})
        if event[3] in known:
            self._find(Fault.INSERTED, f"the event of {event[0]}:{event[2]}:{event[3]} is in the chain twice")
        known[event[3]] = _bytes(digest)

    def _find(self, fault: Fault, detail: str) -> None:
        self.findings.append(Finding(self.partition, self._at, fault, detail))


class Events:
    """The events of audited topics, beside their records."""

    def __init__(self, verifiers: Sequence[Verifier]) -> None:
        self.compared = 0
        self.before = 0
        """Older than the first record that is left."""
        self.waiting = 0
        """Newer than what is audited: their records may be still to come."""
        self._digests: dict[Place, dict[int, bytes]] = {}
        for each in verifiers:
            for place, known in each.events.items():
                if place in self._digests:  # a place has one chain, unless somebody wrote in another
                    self._digests[place] = {**self._digests[place], **known}
                else:
                    self._digests[place] = known
        self._ends = {place: (min(known), max(known)) for place, known in self._digests.items()}
        self._is_whole = all(each.first == 1 for each in verifiers)

    def judge(
        self, place: Place, offset: int, key: bytes | None, value: bytes | None, headers: Headers
    ) -> Finding | None:
        """What is wrong with an event."""
        topic, _, partition = place
        digest = self._digests.get(place, {}).get(offset)
        if digest is None:
            oldest, newest = self._ends.get(place, (-1, -1))
            if offset > newest:
                self.waiting += 1
                return None
            if not self._is_whole and offset < oldest:
                self.before += 1
                return None
            return Finding(
                partition, offset, Fault.NOT_AUDITED, f"the event of {topic}:{partition}:{offset} has no record"
            )
        self.compared += 1
        if digest == _bytes(_digest(key, value, headers)):
            return None
        return Finding(partition, offset, Fault.CHANGED, f"the event of {topic}:{partition}:{offset} was changed since")


def _digest(key: bytes | None, value: bytes | None, headers: Headers) -> str:
    sha = hashlib.sha256()
    for field in (key, value):
        _add(sha, field)
    sha.update(len(headers).to_bytes(4, "big"))
    for name, content in headers:
        _add(sha, name.encode())
        _add(sha, content.encode() if isinstance(content, str) else content)
    return sha.hexdigest()


def _add(sha: "hashlib._Hash", field: bytes | None) -> None:
    sha.update((-1 if field is None else len(field)).to_bytes(4, "big", signed=True))
    sha.update(field or b"")


def _bytes(digest: str) -> bytes:
    """Half as large; of what is no digest, itself, which is equal to none."""
    try:
        return bytes.fromhex(digest)
    except ValueError:
        return digest.encode()


def _text(content: bytes | str | None) -> str | None:
    return content.decode("utf-8", "replace") if isinstance(content, bytes) else content
