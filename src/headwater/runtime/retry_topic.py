"""The retry topic and the dead-letter topic of a group: their shapes and their records.

For a group and a source topic there are `<topic>.<group>.retry`, compacted, and `<topic>.<group>.dead`, kept for 90
days, each with the source's partitions. The group subscribes to neither: whoever owns partition p of the source owns
p of both.

Records of the retry topic, by their key:

    8 bytes, the source offset, big-endian   parked: the value is the original one, the headers are the original ones
                                             and behind them ours, from `headwater-topic-id` on. Without a value: done.
    `r` and 8 bytes, an offset of the dead-letter topic
                                             a request: {"action": "redrive", "dead_offset": 7, "by": ..., "at_ms": ...}
    `d` and 8 bytes, the same                what was done about the dead letter: {"action": ..., "at_ms": ...}

A dead letter has the key, the value and the headers of the source, and behind them those of a parked record and where
it came from. Each parked and done record states a true fact, whoever writes it: "this offset failed here and all
earlier ones of its key are settled", "this offset is handled or dead-lettered". So the last record of an offset counts,
and a process that has lost its partition does no harm by writing one.
"""

import struct
from typing import NamedTuple

import msgspec

from headwater.kafka.producer import Headers
from headwater.runtime.lane import NO_OFFSET, Attempted

HEADER_ROOM = 64 * 1024
"""What a record of these topics may be larger than its source's."""
RETRY_CONFIGS = {
    "cleanup.policy": "compact",
    "segment.bytes": str(32 * 1024 * 1024),
    "max.compaction.lag.ms": str(3600 * 1000),
}
DEAD_CONFIGS = {"cleanup.policy": "delete", "retention.ms": str(90 * 24 * 3600 * 1000)}

TOPIC_ID = "headwater-topic-id"
"""The first of ours: what stands before the last one of this name is the original's."""
KEY = "headwater-key"
TIMESTAMP = "headwater-timestamp"
ATTEMPTS = "headwater-attempts"
DUE_AT = "headwater-due-at"
FIRST_FAILED_AT = "headwater-first-failed-at"
CLASS = "headwater-class"
ERROR = "headwater-error"
OWNER = "headwater-owner"
NULL = "headwater-null"
HELD = "headwater-held"
REDRIVEN = "headwater-redriven"
GENERATION = "headwater-inbox-generation"
TOPIC = "headwater-topic"
PARTITION = "headwater-partition"
OFFSET = "headwater-offset"
GROUP = "headwater-group"
GIVEN_UP_AT = "headwater-given-up-at"

REDRIVE = "redrive"
DISCARD = "discard"


def retry_topic(topic: str, group: str) -> str:
    return f"{topic}.{group}.retry"


def dead_topic(topic: str, group: str) -> str:
    return f"{topic}.{group}.dead"


class SourceRecord(NamedTuple):
    """A record as the source topic has it, wherever it was read from."""

    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int


class ParkedRecord(NamedTuple):
    source: SourceRecord
    topic_id: str
    attempted: Attempted | None
    place: int = NO_OFFSET
    """Its offset in the retry topic."""


class Done(NamedTuple):
    offset: int
    key: bytes | None


class Request(msgspec.Struct, frozen=True):
    """What an operator asks about a dead letter."""

    action: str
    dead_offset: int
    by: str
    at_ms: int


class Resolved(msgspec.Struct, frozen=True):
    """What was done about a dead letter."""

    action: str
    at_ms: int
    dead_offset: int = NO_OFFSET


class TakenBack(NamedTuple):
    """The request about this dead letter was answered."""

    dead_offset: int


class Unreadable(ValueError):
    """A record that is none of ours."""


RetryRecord = ParkedRecord | Done | Request | Resolved | TakenBack


def offset_key(offset: int, prefix: bytes = b"") -> bytes:
    return prefix + struct.pack(">q", offset)


def encode_parked(source: SourceRecord, topic_id: str, attempted: Attempted | None, owner: str) -> Headers:
    """The headers of a parked record; its key is `offset_key`, its value `parked_value`."""
    headers: Headers = [*source.headers, (TOPIC_ID, topic_id.encode())]
    if source.key is not None:
        headers.append((KEY, source.key))
    headers.append((TIMESTAMP, b"%d" % source.timestamp_ms))
    if source.value is None:
        headers.append((NULL, b"1"))
    if attempted is not None:
        headers += _attempt_headers(attempted)
    headers.append((OWNER, owner.encode()))
    return headers


def encode_done(key: bytes | None) -> Headers:
    return [(KEY, key)] if key is not None else []


def parked_value(source: SourceRecord) -> bytes:
    """Never null, which would say that it is done."""
    return source.value if source.value is not None else b""


def _attempt_headers(attempted: Attempted) -> Headers:
    headers: Headers = [
        (ATTEMPTS, b"%d" % attempted.attempts),
        (DUE_AT, b"%d" % attempted.due_ms),
        (FIRST_FAILED_AT, b"%d" % attempted.first_failed_ms),
        (CLASS, attempted.kind.encode()),
        (ERROR, attempted.error.encode()),
    ]
    if attempted.held != NO_OFFSET:
        headers.append((HELD, b"%d" % attempted.held))
    if attempted.is_redriven:
        headers.append((REDRIVEN, b"1"))
    if attempted.generation:
        headers.append((GENERATION, b"%d" % attempted.generation))
    return headers


def dead_headers(
    source: SourceRecord,
    topic_id: str,
    attempted: Attempted,
    owner: str,
    place: tuple[str, int, str],
    now_ms: int,
) -> Headers:
    """place: source topic, partition, group."""
    topic, partition, group = place
    return [
        *encode_parked(source, topic_id, attempted, owner),
        (TOPIC, topic.encode()),
        (PARTITION, b"%d" % partition),
        (OFFSET, b"%d" % source.offset),
        (GROUP, group.encode()),
        (GIVEN_UP_AT, b"%d" % now_ms),
    ]


def split_headers(headers: Headers) -> tuple[Headers, dict[str, bytes]]:
    """Those of the original, and ours. Raises Unreadable."""
    for i in range(len(headers) - 1, -1, -1):
        if headers[i][0] == TOPIC_ID:
            return headers[:i], {name: _bytes(value) for name, value in headers[i:]}
    raise Unreadable("it has no header " + TOPIC_ID)


def _bytes(value: str | bytes | None) -> bytes:
    return value.encode() if isinstance(value, str) else value or b""


def read_parked(offset: int, value: bytes, headers: Headers, place: int) -> ParkedRecord:
    """Raises Unreadable."""
    original, ours = split_headers(headers)
    try:
        attempted = None
        if ATTEMPTS in ours:
            attempted = Attempted(
                int(ours[ATTEMPTS]),
                int(ours[DUE_AT]),
                int(ours[FIRST_FAILED_AT]),
                ours[CLASS].decode(),
                ours[ERROR].decode("utf-8", "replace"),
                int(ours.get(HELD, NO_OFFSET)),
                REDRIVEN in ours,
                int(ours.get(GENERATION, 0)),
            )
        source = SourceRecord(
            offset, ours.get(KEY), None if NULL in ours else value, original, int(ours.get(TIMESTAMP, -1))
        )
    except (KeyError, ValueError) as error:
        raise Unreadable(f"its headers make no sense: {error!r}") from None
    return ParkedRecord(source, ours[TOPIC_ID].decode(), attempted, place)


def read_retry_record(key: bytes | None, value: bytes | None, headers: Headers, place: int) -> RetryRecord:
    """Raises Unreadable."""
    if key is not None and len(key) == 8:
        offset = int(struct.unpack(">q", key)[0])
        if value is None:
            return Done(offset, next((_bytes(value) for name, value in headers if name == KEY), None))
        return read_parked(offset, value, headers, place)
    if key is None or len(key) != 9 or key[:1] not in (b"r", b"d"):
        raise Unreadable(f"its key is {key!r}")
    if value is None:
        return TakenBack(int(struct.unpack(">q", key[1:])[0]))
    try:
        if key[:1] == b"r":
            return msgspec.json.decode(value, type=Request)
        resolved = msgspec.json.decode(value, type=Resolved)
    except msgspec.MsgspecError as error:
        raise Unreadable(str(error)) from None
    return msgspec.structs.replace(resolved, dead_offset=int(struct.unpack(">q", key[1:])[0]))


class DeadLetter(NamedTuple):
    """A record of the dead-letter topic."""

    partition: int
    dead_offset: int
    source: SourceRecord
    topic: str
    group: str
    topic_id: str
    attempted: Attempted
    given_up_ms: int


def read_dead_letter(
    partition: int, dead_offset: int, key: bytes | None, value: bytes | None, headers: Headers
) -> DeadLetter:
    """Raises Unreadable."""
    original, ours = split_headers(headers)
    try:
        source = SourceRecord(int(ours[OFFSET]), key, value, original, int(ours.get(TIMESTAMP, -1)))
        attempted = Attempted(
            int(ours[ATTEMPTS]),
            int(ours[DUE_AT]),
            int(ours[FIRST_FAILED_AT]),
            ours[CLASS].decode(),
            ours[ERROR].decode("utf-8", "replace"),
            generation=int(ours.get(GENERATION, 0)),
        )
        return DeadLetter(
            partition, dead_offset, source, ours[TOPIC].decode(), ours[GROUP].decode(), ours[TOPIC_ID].decode(),
            attempted, int(ours[GIVEN_UP_AT]),
        )  # fmt: skip
    except (KeyError, ValueError) as error:
        raise Unreadable(f"its headers make no sense: {error!r}") from None
