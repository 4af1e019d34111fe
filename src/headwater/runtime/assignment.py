"""What the owner of a partition is given: the assignment, its handler's policy, and the doors to the outside."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from headwater.runtime.frontier import Progress
from headwater.runtime.lane import Attempted, Key
from headwater.runtime.retry import FailureKinds, GivingUp, Retry
from headwater.runtime.retry_topic import ParkedRecord, Request


class Received(Protocol):
    """A record of the source topic: a client's message, or what was read back from the retry topic."""

    def partition(self) -> int | None: ...
    def offset(self) -> int | None: ...
    def key(self) -> bytes | None: ...
    def value(self) -> bytes | None: ...
    def headers(self) -> Iterable[Any] | None:
        """Names and values."""

    def timestamp(self) -> tuple[int, int]: ...


class Doors(Protocol):
    """What an owner needs of the outside. Each `send` returns when it is acknowledged and raises NotPublished."""

    async def attempt(self, event: Received, attempted: Attempted | None, generation: int) -> None:
        """Call the handler and publish what it returns. Raises what it raises, Undecodable, and Unknown for an event that
        is not for it."""

    async def attempt_batch(self, events: Sequence[Received], generation: int) -> list[BaseException | None]:
        """An outcome per event. Raises what the handler raises."""

    def is_wanted(self, event: Received) -> bool:
        """Whether the handler is for events of this type; also true for what can't be decoded."""

    async def send_parked(self, event: Received, attempted: Attempted | None) -> int:
        """Its place in the retry topic."""

    async def send_done(self, event_offset: int, key: Key) -> None: ...

    async def send_dead(self, event: Received, attempted: Attempted) -> int | None:
        """The dead letter's offset; None when it turns out that the event was handled (inbox)."""

    async def read_back(self, place: int) -> list[ParkedRecord]:
        """What the retry topic has from that place on, at least the record there. Raises ConsumerFailed."""

    async def read_dead(self, dead_offset: int) -> tuple[Received, int] | None:
        """With the inbox generation that it was given up in; None when retention has taken it."""

    async def answer(self, request: Request, done: bool) -> None:
        """The request was obeyed, or (not `done`) can't be."""

    def now_ms(self) -> int: ...

    def note(self, event: str, **fields: object) -> None:
        """A line of the history."""


class Policy(NamedTuple):
    """What a handler wants, as far as its owners must know."""

    name: str
    retry: Retry | None
    giving_up: GivingUp
    kinds: FailureKinds
    settles_first: bool = False
    """At most once: an event is settled before it is handled, and failing it once is the end of it."""
    batch: int = 0
    """How many events a batch handler gets at most; 0 for a handler of single events."""
    outside_effects: bool = False


class Assignment(NamedTuple):
    topic: str
    partition: int
    token: int
    frontier: int | None
    """As committed; None for a group that begins."""
    progress: Progress
    topic_id: str = ""


class Stopped(Exception):
    """The partition is being given up: what is at hand stays unsettled."""


class Failure(NamedTuple):
    """An attempt that failed."""

    error: BaseException
    epoch: int
    """Of the breaker, when it began."""


class ReadBack:
    """A parked record, as the source had it."""

    __slots__ = ("_partition", "source")

    def __init__(self, record: ParkedRecord, partition: int) -> None:
        self.source = record.source
        self._partition = partition

    def partition(self) -> int:
        return self._partition

    def offset(self) -> int:
        return self.source.offset

    def key(self) -> bytes | None:
        return self.source.key

    def value(self) -> bytes | None:
        return self.source.value

    def headers(self) -> list[tuple[str, str | bytes | None]]:
        return self.source.headers

    def timestamp(self) -> tuple[int, int]:
        return (1, self.source.timestamp_ms)


def key_of(event: Received) -> Key:
    """Its offset for one that has none: it stands alone."""
    key = event.key()
    return key if key is not None else event.offset() or 0
