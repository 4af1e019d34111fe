"""A bounded job: handlers over their topics up to now. The same handlers, groups and promises as without an end.

Now is the end of each partition when it is asked; an empty poll says nothing about an end. A partition is done when its group
has committed as far, and nothing of it is parked: retries are waited for, until they end in success or a dead letter.
"""

from collections.abc import Sequence

from headwater.kafka.admin import KafkaAdmin
from headwater.runtime.frontier import decode_metadata


class Job:
    def __init__(self, admin: KafkaAdmin, work: Sequence[tuple[str, str]]) -> None:
        """work: groups, each with its topic."""
        self._admin = admin
        self._work = work
        self._ends: dict[tuple[str, int], int] = {}

    def take_ends(self) -> None:
        """Of partitions that have anything. Raises AdminError."""
        counts = self._admin.partition_counts()
        topics = dict.fromkeys(topic for _, topic in self._work)
        places = [(topic, partition) for topic in topics for partition in range(counts[topic])]
        starts, ends = self._admin.start_offsets(places), self._admin.end_offsets(places)
        self._ends = {place: end for place, end in ends.items() if end > starts[place]}

    def is_done(self) -> bool:
        """Raises AdminError."""
        for group, topic in self._work:
            committed = self._admin.committed(group)
            for place, end in self._ends.items():
                if place[0] != topic:
                    continue
                position = committed.get(place)
                if position is None or position.offset < end:
                    return False
                progress = decode_metadata(position.metadata)
                if progress is not None and progress.parked:
                    return False
        return True
