"""A bounded job: handlers over their topics up to now. The same handlers, groups and promises as without an end.

Now is the end of each partition when it is asked; an empty poll says nothing about an end. A partition is done when its group
has committed as far, or nothing but a transaction's markers and what was compacted away is between, and nothing of it is
parked: retries are waited for, until they end in success or a dead letter; a key that is held, until somebody decides.
"""

import time
from collections.abc import Sequence

from headwater.kafka.admin import KafkaAdmin
from headwater.kafka.consumer import ConsumerFailed
from headwater.kafka.reader import KafkaReader
from headwater.runtime.frontier import decode_metadata
from headwater.runtime.subscription import Runner
from headwater.settings import Settings

STILL_SECONDS = 2.0  # without progress, before it is looked what is left
LOOK_SECONDS = 5.0


class Job:
    def __init__(
        self, settings: Settings, work: Sequence[tuple[str, str]], beside: Sequence[tuple[Runner, Sequence[str]]] = ()
    ) -> None:
        """work: groups, each with its topic. beside: what has no groups, each with its topics."""
        self._settings = settings
        self._admin = KafkaAdmin(settings)
        self._work = work
        self._beside = beside
        self._starts: dict[tuple[str, int], int] = {}
        self._ends: dict[tuple[str, int], int] = {}
        self._seen: dict[tuple[str, str, int], tuple[int, float]] = {}
        """By group and place: how far it was, since when."""

    def take_ends(self) -> None:
        """Of partitions that have anything. Raises AdminError."""
        counts = self._admin.partition_counts()
        topics = dict.fromkeys(
            [topic for _, topic in self._work] + [topic for _, names in self._beside for topic in names]
        )
        places = [(topic, partition) for topic in topics for partition in range(counts[topic])]
        self._starts, ends = self._admin.start_offsets(places), self._admin.end_offsets(places)
        self._ends = {place: end for place, end in ends.items() if end > self._starts[place]}

    def is_done(self) -> bool:
        """Raises AdminError."""
        for group, topic in self._work:
            committed = self._admin.committed(group)
            for place, end in self._ends.items():
                if place[0] != topic:
                    continue
                position = committed.get(place)
                offset = position.offset if position is not None else self._starts[place]
                if offset < end and not self._is_rest_empty(group, place, offset, end):
                    return False
                progress = decode_metadata(position.metadata) if position is not None else None
                if progress is not None and progress.parked:
                    return False
        return all(
            runner.is_done({place: end for place, end in self._ends.items() if place[0] in topics})
            for runner, topics in self._beside
        )

    def _is_rest_empty(self, group: str, place: tuple[str, int], offset: int, end: int) -> bool:
        """Whether no record is left, of a group that has come no further for a while."""
        known, since = self._seen.get((group, *place), (-1, 0.0))
        now = time.monotonic()
        if known != offset:
            self._seen[group, *place] = (offset, now)
            return False
        if now - since < STILL_SECONDS:
            return False
        self._seen[group, *place] = (offset, now)
        reader = KafkaReader(self._settings, {place: offset})
        try:
            deadline = now + LOOK_SECONDS
            while time.monotonic() < deadline:
                messages, ended = reader.take(1, 0.2)
                if messages:
                    return (messages[0].offset() or 0) >= end
                if ended.get(place, -1) >= end:
                    return True
            return False
        except ConsumerFailed:
            return False
        finally:
            reader.close()
