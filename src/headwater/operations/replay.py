"""Replay: events of a range are handled again, by the group itself, and none but those.

The group's offsets go back to where the range begins; what is below the old frontier and outside the range is passed
over. The inbox gets a new generation, so that it doesn't take the events for repeated ones; handlers that act on the
world outside stay silent unless asked. Parked events stay parked, in their place.
"""

import time
from collections.abc import Mapping
from typing import NamedTuple

from headwater.kafka.admin import CommittedPosition
from headwater.kafka.reader import Place
from headwater.runtime.frontier import Progress, Replay, decode_metadata, encode_metadata


class Planned(NamedTuple):
    """What becomes of one partition."""

    topic: str
    partition: int
    start: int
    end: int
    frontier: int
    metadata: str

    @property
    def events(self) -> int:
        """How many offsets are handled again."""
        return self.end - self.start


def plan(
    committed: Mapping[Place, CommittedPosition],
    starts: Mapping[Place, int],
    ends: Mapping[Place, int] | None,
    *,
    outside_effects: bool = False,
    generation: int | None = None,
) -> list[Planned]:
    """Partitions in which something below the frontier lies in the range. ends: exclusive; None: up to the frontier."""
    generation = generation or time.time_ns() // 1_000_000
    found = []
    for place, start in sorted(starts.items()):
        position = committed.get(place)
        if position is None:
            continue  # nothing was handled, so nothing can be handled again
        end = min(ends[place], position.offset) if ends is not None else position.offset
        if start >= end:
            continue
        progress = decode_metadata(position.metadata) or Progress()
        until = max(position.offset, progress.replay.until if progress.replay else 0)
        replay = Replay(generation, start, end, until, outside_effects)
        found.append(Planned(*place, start, end, position.offset, encode_metadata(Progress(replay=replay))))
    return found


def moved(position: CommittedPosition | None, target: int) -> str:
    """The metadata with which a group's offset is moved: back is a replay, forward is none. Empty for a group that is
    not ours."""
    progress = decode_metadata(position.metadata) if position is not None else None
    if position is None or progress is None:
        return ""
    if target >= position.offset:
        return encode_metadata(Progress())
    until = max(position.offset, progress.replay.until if progress.replay else 0)
    return encode_metadata(Progress(replay=Replay(time.time_ns() // 1_000_000, target, until, until)))
