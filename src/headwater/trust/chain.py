"""The format of an audit topic: every record is a copy of an event, chained to the one before by its hash.

    headers   those of the event, then
              headwater-audit-source     TOPIC:PARTITION:OFFSET of the event
              headwater-audit-topic-id   of its topic: one that is made anew is another one
              headwater-audit-time       its timestamp, in milliseconds
              headwater-audit-kept       what is kept of it: `copy` or `digest`
              headwater-audit-sequence   1, 2, 3, ... in this partition of the audit topic
              headwater-audit-digest     SHA-256 of the event, in hex
              headwater-audit-hash       SHA-256 of the chain up to here, in hex
    key, value   the event's; where only its digest is kept, both null, and no headers but those of the audit

    digest   = SHA-256( bytes(key) bytes(value) count(headers) { bytes(name) bytes(value) }* )
    bytes(x) = length i32 big-endian, -1 for null, then the bytes          count = i32 big-endian
    hash n   = SHA-256( hash n-1 as 32 bytes, then the text "SEQUENCE SOURCE TOPIC_ID TIME KEPT DIGEST" )
    hash 0   = SHA-256( the text "headwater audit 1 TOPIC PARTITION" ), of the audit topic's partition

Worked example, partition 0 of `audit`: an event without headers, key `k`, value `v`, at `orders:2:7`, topic id `id`, time 1000,
of which a copy is kept:

    digest   83f1a4a6be7ec7ed7cdbe36190516bbe976c9ae14ffe7fe27ec055d1193f55a3
    hash 0   6bebfcea32cff1540ccaf65e0b715d9d7962023c7df7eddd512c54ac5d4e6ea4
    hash 1   bc687a17270de3c2260d3263c7e84d023d84a59a30bc9158bae276859669d987
"""

import hashlib
import struct
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

PREFIX = "headwater-audit-"
NAMES = ("source", "topic-id", "time", "kept", "sequence", "digest", "hash")
SOURCE, TOPIC_ID, TIME, KEPT, SEQUENCE, DIGEST, HASH = (f"{PREFIX}{name}" for name in NAMES)

LINK_HEADERS = len(NAMES)

Headers = Sequence[tuple[str, bytes | str | None]]


class Head(NamedTuple):
    """Where a chain is."""

    sequence: int
    hash: bytes

    def __str__(self) -> str:
        return f"{self.sequence} {self.hash.hex()}"


class Kept(StrEnum):
    """How much of an event its record has. It is part of the chain: nobody takes a copy away and calls it a digest."""

    COPY = "copy"
    DIGEST = "digest"


class Link(NamedTuple):
    """What makes an event part of a chain."""

    source: str
    topic_id: str
    time_ms: int
    kept: Kept
    digest: str


def beginning(topic: str, partition: int) -> Head:
    return Head(0, hashlib.sha256(f"headwater audit 1 {topic} {partition}".encode()).digest())


def digest_of(key: bytes | None, value: bytes | None, headers: Headers) -> str:
    parts = [_framed(key), _framed(value), struct.pack(">i", len(headers))]
    for name, content in headers:
        parts += [_framed(name.encode()), _framed(content.encode() if isinstance(content, str) else content)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _framed(data: bytes | None) -> bytes:
    return struct.pack(">i", -1) if data is None else struct.pack(">i", len(data)) + data


def after(head: Head, link: Link) -> Head:
    sequence = head.sequence + 1
    text = f"{sequence} {link.source} {link.topic_id} {link.time_ms} {link.kept} {link.digest}"
    return Head(sequence, hashlib.sha256(head.hash + text.encode()).digest())


def headers_of_link(link: Link, head: Head) -> list[tuple[str, str | bytes | None]]:
    """head: with the link."""
    return [
        (SOURCE, link.source.encode()),
        (TOPIC_ID, link.topic_id.encode()),
        (TIME, str(link.time_ms).encode()),
        (KEPT, link.kept.encode()),
        (SEQUENCE, str(head.sequence).encode()),
        (DIGEST, link.digest.encode()),
        (HASH, head.hash.hex().encode()),
    ]


def link_in(headers: Headers) -> tuple[Link, Head] | None:
    """What a record of an audit topic says of itself; None when it says nothing of the kind."""
    found = dict(headers[-LINK_HEADERS:])  # what comes before is the event's, whatever it is called
    try:
        said = {name: found[name].decode() for name in map(PREFIX.__add__, NAMES)}  # type: ignore[union-attr]
        link = Link(said[SOURCE], said[TOPIC_ID], int(said[TIME]), Kept(said[KEPT]), said[DIGEST])
        return link, Head(int(said[SEQUENCE]), bytes.fromhex(said[HASH]))
    except (KeyError, ValueError, AttributeError):
        return None


def place_in(source: str) -> tuple[str, int, int]:
    """Topic, partition and offset. Raises ValueError."""
    topic, partition, offset = source.rsplit(":", 2)
    return topic, int(partition), int(offset)
