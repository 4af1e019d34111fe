"""Lanes: one queue per key, and which event of a key may go when. State only, no I/O; its owner drives it.

A lane exists while its key has something at work, waiting or parked. The rules by which an event from the source
enters (offset o, key k), in this order:

    1. o is parked in k                                     settled
    2. k has parked events, and o is before the last        settled: what was parked proves that the earlier ones are
    3. o is at or below the floor of k                      settled: it was handled after having been parked
    4. k has parked events, or is about to have some        parked, behind them
    5. else                                                 handled, or queued behind the event at work

Parked events are tried again smallest offset first; the order is that of the source, never that of the retry topic.
The proof, and the search for counterexamples with a rule taken out: tests/runtime/test_model.py.
"""

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

E = TypeVar("E")
"""An event as its owner keeps it: not looked into here."""

Key = bytes | int
"""A record's key; its offset where it has none: it stands alone and delays nobody."""

NO_OFFSET = -1


class Verdict(Enum):
    """What becomes of an event that arrives."""

    SETTLED = "it was handled or parked before"
    RUN = "it is handled now"
    QUEUED = "it waits behind others of its key"
    PARK = "it waits to be parked, and nobody parks for its key at the moment"


class Attempted(NamedTuple):
    """What is known of a parked event that has failed."""

    attempts: int
    due_ms: int
    first_failed_ms: int
    kind: str
    error: str
    held: int = NO_OFFSET
    """The offset of its dead letter, when the key is held; else NO_OFFSET."""
    is_redriven: bool = False
    generation: int = 0
    """Of the inbox; not 0 for what was first tried inside a replay."""


class Parked:
    """The parked offsets of a key, ascending, each with its place in the retry topic: 16 bytes each."""

    def __init__(self) -> None:
        self._offsets = array("q")
        self._places = array("q")
        self._first = 0
        self.attempted: dict[int, Attempted] = {}
        """Of those that have been tried; the others wait behind them."""

    def __len__(self) -> int:
        return len(self._offsets) - self._first

    def __contains__(self, offset: int) -> bool:
        i = bisect_left(self._offsets, offset, self._first)
        return i < len(self._offsets) and self._offsets[i] == offset

    def __iter__(self) -> Iterator[int]:
        return iter(self._offsets[self._first :])

    @property
    def smallest(self) -> int:
        return self._offsets[self._first]

    @property
    def largest(self) -> int:
        return self._offsets[-1]

    @property
    def place(self) -> int:
        """Of the smallest."""
        return self._places[self._first]

    @property
    def attempt(self) -> Attempted | None:
        """Of the smallest; None when it waits only because others of its key do."""
        return self.attempted.get(self.smallest)

    def add(self, offset: int, place: int, attempted: Attempted | None) -> None:
        """New, or written again."""
        if not len(self) or offset > self._offsets[-1]:
            self._offsets.append(offset)
            self._places.append(place)
        else:
            i = bisect_left(self._offsets, offset, self._first)
            if self._offsets[i] == offset:
                self._places[i] = place
            else:
                self._offsets.insert(i, offset)
                self._places.insert(i, place)
        if attempted is not None:
            self.attempted[offset] = attempted
        else:
            self.attempted.pop(offset, None)

    def remove(self, offset: int) -> bool:
        """Whether it was there."""
        if offset not in self:
            return False
        if offset == self.smallest:
            self.remove_smallest()
        else:
            i = bisect_left(self._offsets, offset, self._first)
            del self._offsets[i], self._places[i]
            self.attempted.pop(offset, None)
        return True

    def remove_smallest(self) -> None:
        self.attempted.pop(self.smallest, None)
        self._first += 1
        if self._first > 1024 and self._first * 2 > len(self._offsets):  # give the memory back now and then
            del self._offsets[: self._first], self._places[: self._first]
            self._first = 0


class Lane(Generic[E]):
    """One key. `queue` waits for its turn: behind the event at work, or to be parked."""

    __slots__ = ("is_at_work", "is_parking", "is_retrying", "key", "parked", "queue")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.queue: deque[tuple[int, E]] | None = None
        self.parked: Parked | None = None
        self.is_at_work = True
        self.is_parking = False
        self.is_retrying = False


class Lanes(Generic[E]):
    """All lanes of one partition under one owner."""

    def __init__(self, *, replayed_below: int = 0) -> None:
        """replayed_below: rules 2 and 3 are off up to this offset, where events are meant to be handled again."""
        self.by_key: dict[Key, Lane[E]] = {}
        self.parked_keys = 0
        self._floors: dict[Key, int] = {}
        self._replayed_below = replayed_below

    # Events from the source

    def arrive(self, offset: int, key: Key, event: E) -> tuple[Verdict, Lane[E] | None]:
        lane = self.by_key.get(key)
        if lane is None:
            if self._floors and self._is_below_floor(offset, key):
                return Verdict.SETTLED, None
            lane = self.by_key[key] = Lane(key)
            return Verdict.RUN, lane
        if lane.parked and self._is_settled(offset, lane.parked):
            return Verdict.SETTLED, lane
        if self._floors and self._is_below_floor(offset, key):
            return Verdict.SETTLED, lane
        if lane.queue is None:
            lane.queue = deque()
        lane.queue.append((offset, event))
        if (lane.parked or lane.is_retrying) and not lane.is_at_work and not lane.is_parking:
            return Verdict.PARK, lane
        return Verdict.QUEUED, lane

    def _is_settled(self, offset: int, parked: Parked) -> bool:
        """Rules 1 and 2."""
        return offset in parked or self._replayed_below <= offset < parked.largest

    def _is_below_floor(self, offset: int, key: Key) -> bool:
        """Rule 3."""
        return self._replayed_below <= offset <= self._floors.get(key, NO_OFFSET)

    def next_of(self, lane: Lane[E]) -> tuple[int, E] | None:
        """The event at work is settled: the one behind it, if the lane goes on; None when its owner lets go of it.

        A key that got parked events meanwhile (a redrive) does not go on: its queue is to be parked.
        """
        if lane.queue and not lane.parked:
            return lane.queue.popleft()
        lane.is_at_work = False
        self._free(lane)
        return None

    def _free(self, lane: Lane[E]) -> None:
        if not (lane.is_at_work or lane.is_parking or lane.is_retrying or lane.queue or lane.parked):
            del self.by_key[lane.key]

    # Parking

    def begin_parking(self, lane: Lane[E], first: tuple[int, E] | None = None) -> None:
        """From now on what comes for the key waits to be parked. first: the event at work, which goes before them."""
        if lane.queue is None:
            lane.queue = deque()
        if first is not None:
            lane.queue.appendleft(first)
        lane.is_at_work = False
        lane.is_parking = True

    def next_to_park(self, lane: Lane[E]) -> tuple[int, E] | None:
        """One at a time: each is sent after the one before was acknowledged."""
        assert lane.is_parking
        return lane.queue[0] if lane.queue else None

    def is_parked(self, lane: Lane[E], offset: int, place: int, attempted: Attempted | None) -> None:
        """The record is acknowledged; it was the first of the queue, or is written again."""
        if lane.is_parking and lane.queue and lane.queue[0][0] == offset:
            lane.queue.popleft()
        self._add(lane, offset, place, attempted)

    def _add(self, lane: Lane[E], offset: int, place: int, attempted: Attempted | None) -> None:
        if lane.parked is None:
            lane.parked = Parked()
        if not lane.parked:
            self.parked_keys += 1
        lane.parked.add(offset, place, attempted)

    def end_parking(self, lane: Lane[E]) -> None:
        lane.is_parking = False
        self._free(lane)

    def load(self, key: Key, offset: int, place: int, attempted: Attempted | None) -> Lane[E]:
        """A parked record was found at the takeover, or is put back by a redrive."""
        lane = self.by_key.get(key)
        if lane is None:
            lane = self.by_key[key] = Lane(key)
            lane.is_at_work = False
        self._add(lane, offset, place, attempted)
        return lane

    def unload(self, key: Key, offset: int) -> None:
        """A done record was found at the takeover."""
        lane = self.by_key.get(key)
        if lane is not None and lane.parked and lane.parked.remove(offset) and not lane.parked:
            self.parked_keys -= 1
            self._free(lane)

    def holds(self, key: Key, offset: int) -> bool:
        """Whether it is parked."""
        lane = self.by_key.get(key)
        return lane is not None and lane.parked is not None and offset in lane.parked

    def is_busy(self, lane: Lane[E], offset: int) -> bool:
        """Whether something is under way that could be about this event."""
        if lane.is_at_work or lane.is_retrying:
            return True
        return lane.is_parking and any(queued == offset for queued, _ in lane.queue or ())

    # Parked events

    def begin_retry(self, lane: Lane[E]) -> int:
        """The smallest parked offset is being tried."""
        assert lane.parked
        assert not lane.is_retrying
        lane.is_retrying = True
        return lane.parked.smallest

    def is_done(self, lane: Lane[E], offset: int) -> None:
        """It was handled, dead-lettered or discarded, and that is acknowledged: the next one's turn.

        It was the smallest when it began; a redrive may have put an earlier one before it.
        """
        assert lane.parked
        was_there = lane.parked.remove(offset)
        assert was_there
        if not lane.parked:
            self.parked_keys -= 1
        self._floors[lane.key] = max(offset, self._floors.get(lane.key, NO_OFFSET))

    def end_retry(self, lane: Lane[E]) -> None:
        lane.is_retrying = False
        self._free(lane)

    def forget_floors(self, position: int) -> None:
        """Those below the next offset that arrives: nothing at or below them can come again to this owner."""
        if self._floors:
            self._floors = {key: floor for key, floor in self._floors.items() if floor >= position}
