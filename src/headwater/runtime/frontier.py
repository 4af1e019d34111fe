"""The frontier of a partition: the first offset that is not settled, and all that is ever committed.

Its metadata travels with each commit:

    hw1:{"done": "...", "waiting": {...}, "parked": 3, "replay": {...}}

`done` is a bitmap, base64, of what is settled beyond the frontier: bit i of it speaks of frontier + 1 + i. A restart
repeats little by it; it is left out where it doesn't fit, so nothing may depend on it. `waiting` and `parked` tell
`headwater groups describe`, on any Kafka, what the partition waits for. `replay` says which offsets are handled again.
A commit without the prefix was made by another tool: a replay is meant.
"""

import base64
from collections.abc import Iterable

import msgspec

PREFIX = "hw1:"
MAX_METADATA = 4000  # Kafka's offset.metadata.max.bytes is 4,096


class Waiting(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a whole partition waits for."""

    reason: str
    since_ms: int


class Replay(msgspec.Struct, frozen=True, omit_defaults=True):
    """Offsets below `until`, the frontier before the replay: those in [start, end) are handled again, others not."""

    generation: int
    """Of the inbox: under a new one, events that it knows are handled again."""
    start: int
    end: int
    until: int
    outside_effects: bool = False
    """Whether handlers that act on the world outside are called as well."""


class Progress(msgspec.Struct, frozen=True, omit_defaults=True):
    done: str = ""
    waiting: Waiting | None = None
    parked: int = 0
    replay: Replay | None = None


class Frontier:
    def __init__(self, start: int | None) -> None:
        """start: where reading begins; None where that is not known before the first event."""
        self._next = start
        self._unsettled: dict[int, None] = {}

    @property
    def offset(self) -> int | None:
        """None before anything is known."""
        for offset in self._unsettled:
            return offset
        return self._next

    @property
    def position(self) -> int:
        """The offset behind the last one that was taken."""
        return self._next or 0

    @property
    def is_clear(self) -> bool:
        """Whether all that was taken is settled."""
        return not self._unsettled

    def take(self, offsets: Iterable[int]) -> None:
        """Ascending offsets were handed over."""
        offset = None
        for offset in offsets:
            self._unsettled[offset] = None
        if offset is not None:
            self._next = offset + 1

    def settle(self, offset: int) -> None:
        self._unsettled.pop(offset, None)

    def advance(self, position: int) -> None:
        """All below it counts as settled without having been taken."""
        self._next = position

    def done_beyond(self) -> str:
        """The bitmap; empty where nothing is settled beyond the frontier."""
        frontier = self.offset
        if frontier is None or not self._unsettled:
            return ""
        size = self.position - frontier - 1
        if size <= 0 or size > MAX_METADATA * 8:  # more than fits even before it is encoded
            return ""
        bits = (1 << size) - 1
        for offset in self._unsettled:
            if offset != frontier:
                bits &= ~(1 << (offset - frontier - 1))
        return base64.b64encode(bits.to_bytes((size + 7) // 8, "little")).decode() if bits else ""


def encode_metadata(progress: Progress) -> str:
    """At most MAX_METADATA characters: first the bitmap is left out, then the reason is cut."""
    for candidate in (progress, msgspec.structs.replace(progress, done="")):
        text = PREFIX + msgspec.json.encode(candidate).decode()
        if len(text.encode()) <= MAX_METADATA:
            return text if text != PREFIX + "{}" else PREFIX
    assert progress.waiting is not None
    short = msgspec.structs.replace(progress.waiting, reason=progress.waiting.reason[:500] + "...")
    return PREFIX + msgspec.json.encode(msgspec.structs.replace(progress, done="", waiting=short)).decode()


def decode_metadata(metadata: str) -> Progress | None:
    """None for a commit that is not ours."""
    text = metadata.rstrip("\0")  # librdkafka ends it with one
    if not text.startswith(PREFIX):
        return None
    try:
        return msgspec.json.decode(text.removeprefix(PREFIX) or "{}", type=Progress)
    except msgspec.MsgspecError:
        return Progress()


def finished_offsets(frontier: int, done: str) -> set[int]:
    """What a bitmap says; nothing where it can't be read."""
    try:
        bits = int.from_bytes(base64.b64decode(done), "little")
    except ValueError:
        return set()
    return {frontier + 1 + i for i in range(bits.bit_length()) if bits >> i & 1}
