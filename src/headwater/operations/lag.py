"""Lag: how far groups are behind, in records and in seconds, and whether they keep up; on any Kafka.

`partition_rows` is one look at one group. A `LagWatch` looks at all groups again and again, remembers what they committed, and
judges each partition (`headwater.operations.verdict`). What the group of a Headwater handler or projection waits for stands in
the metadata of its commits.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import msgspec

from headwater.kafka.admin import CommittedPosition, GroupDescription, GroupMember, KafkaAdmin
from headwater.kafka.consumer import ConsumerFailed
from headwater.kafka.reader import KafkaReader, Place, place_of
from headwater.operations.verdict import Commit, Verdict, judge, of_group
from headwater.runtime.frontier import decode_metadata
from headwater.settings import Settings

WINDOW = 10
"""Looks, and commits, by which a partition is judged."""
AGES_SECONDS = 2.0
"""At most, of each look, for reading the records that groups are at."""
SMALL_FETCHES = {"max.partition.fetch.bytes": "1024", "queued.max.messages.kbytes": "1024"}


class ReplayRow(msgspec.Struct, frozen=True):
    """Events from `start` to before `end` are handled again, the others up to `until` are not."""

    start: int
    end: int
    until: int
    outside_effects: bool


class PartitionRow(msgspec.Struct, frozen=True):
    """One partition of a group."""

    topic: str
    partition: int
    committed: int | None
    end: int
    lag: int | None
    member: str | None
    waiting: str | None
    parked: int = 0
    """How many keys are parked."""
    replay: ReplayRow | None = None


def partition_rows(client: KafkaAdmin, group: str) -> list[PartitionRow]:
    """What the group has committed and what its members are assigned to, with the lag in records."""
    described = client.describe_group(group)
    owners = {place: member.client_id for member in described.members for place in member.partitions}
    committed = client.committed(group)
    counts = client.partition_counts()
    topics = {topic for topic, _ in [*committed, *owners]}
    places = sorted((topic, index) for topic in topics for index in range(counts.get(topic, 0)))
    ends = client.end_offsets(places)
    starts = client.start_offsets([place for place in places if place not in committed])
    rows = []
    for place in places:
        position = committed.get(place)
        lag = ends[place] - (position.offset if position is not None else starts[place])
        rows.append(
            PartitionRow(
                place[0],
                place[1],
                position.offset if position is not None else None,
                ends[place],
                max(lag, 0),
                owners.get(place),
                waiting_for(position.metadata) if position is not None else None,
                parked_in(position.metadata) if position is not None else 0,
                replay_in(position.metadata) if position is not None else None,
            )
        )
    return rows


def waiting_for(metadata: str) -> str | None:
    """What a Headwater handler's partition waits for, if it does."""
    progress = decode_metadata(metadata)
    if progress is None:
        return None
    if progress.waiting is not None:
        seconds = max(0, time.time() - progress.waiting.since_ms / 1000)
        return f"for {seconds:.0f} s: {progress.waiting.reason}"
    if progress.parked:
        return f"{progress.parked} {'key is' if progress.parked == 1 else 'keys are'} parked"
    return None


def parked_in(metadata: str) -> int:
    progress = decode_metadata(metadata)
    return progress.parked if progress is not None else 0


def replay_in(metadata: str) -> ReplayRow | None:
    """The replay that is to come or under way."""
    progress = decode_metadata(metadata)
    if progress is None or progress.replay is None:
        return None
    return ReplayRow(progress.replay.start, progress.replay.end, progress.replay.until, progress.replay.outside_effects)


# Watching


class PartitionLag(msgspec.Struct, frozen=True):
    """One partition of a group, at one look."""

    topic: str
    partition: int
    committed: int | None
    start: int
    end: int
    lag: int
    seconds: float | None
    """Since the record was written that comes next; 0 without lag, None where it could not be read in time."""
    verdict: Verdict | None
    """None before it was watched for long enough."""
    waiting: str | None
    member_id: str = ""
    client_id: str = ""
    host: str = ""


class GroupLag(msgspec.Struct, frozen=True):
    """A group at one look."""

    group: str
    state: str
    members: int
    verdict: Verdict | None
    partitions: list[PartitionLag]

    @property
    def lag(self) -> int:
        return sum(each.lag for each in self.partitions)

    @property
    def seconds(self) -> float | None:
        """Of the partition that is furthest behind."""
        return max((each.seconds for each in self.partitions if each.seconds is not None), default=None)

    @property
    def without_member(self) -> int:
        """Partitions that nobody has."""
        return sum(1 for each in self.partitions if not each.member_id)


class History:
    """What was seen of one partition of a group."""

    def __init__(self) -> None:
        self.commits: deque[Commit] = deque(maxlen=WINDOW)
        self.ends: deque[int] = deque(maxlen=WINDOW)
        self._looks = 0

    def add(self, committed: int | None, end: int, lag: int, now_ms: int, *, is_alive: bool) -> None:
        """is_alive: a member has the partition. Commits carry no time that others can ask for, so an offset that stays counts as
        committed again as long as somebody is there who could."""
        self._looks += 1
        self.ends.append(end)
        if committed is not None and (is_alive or not self.commits or committed != self.commits[-1].offset):
            self.commits.append(Commit(committed, now_ms, lag))

    def verdict(self, lag: int, now_ms: int, allowed_lag: int) -> Verdict | None:
        """None before it is known for a whole window."""
        return judge(list(self.commits), self.ends, lag, now_ms, allowed_lag) if self._looks >= WINDOW else None


class LagWatch:
    """Looks at groups again and again. For one thread."""

    def __init__(
        self,
        settings: Settings,
        *,
        groups: Collection[str] = (),
        allowed_lag: int = 0,
        now_ms: Callable[[], int] = lambda: int(time.time() * 1000),
    ) -> None:
        """groups: only these; none: all. allowed_lag: records behind that are always OK."""
        self._client = KafkaAdmin(settings)
        self._only = frozenset(groups)
        self._allowed_lag = allowed_lag
        self._now_ms = now_ms
        self._histories: dict[tuple[str, Place], History] = {}
        small = {**settings.kafka, **SMALL_FETCHES}
        self._reader = KafkaReader(replace(settings, kafka=small), {}, isolation="read_uncommitted")

    def close(self) -> None:
        self._reader.close()

    def look(self) -> list[GroupLag]:
        """Raises AdminError."""
        client = self._client
        names = sorted(name for name in client.group_states() if not self._only or name in self._only)
        described = {name: client.describe_group(name) for name in names}
        committed = {name: client.committed(name) for name in names}
        counts = client.partition_counts()
        places = {name: _places_of(described[name], committed[name], counts) for name in names}
        everywhere = sorted({place for each in places.values() for place in each})
        ends, starts = client.end_offsets(everywhere), client.start_offsets(everywhere)
        now_ms = self._now_ms()
        at = {
            (name, place): committed[name][place].offset if place in committed[name] else starts[place]
            for name in names
            for place in places[name]
        }
        lags = {what: max(0, ends[what[1]] - offset) for what, offset in at.items()}
        ages = self._ages({(what[1], at[what]) for what, lag in lags.items() if lag}, now_ms)
        histories, self._histories = self._histories, {}
        found = []
        for name in names:
            owners = {place: member for member in described[name].members for place in member.partitions}
            rows = []
            for place in places[name]:
                what = (name, place)
                history = self._histories[what] = histories.get(what) or History()
                position, owner, lag = committed[name].get(place), owners.get(place), lags[what]
                offset = position.offset if position is not None else None
                history.add(offset, ends[place], lag, now_ms, is_alive=owner is not None)
                rows.append(
                    PartitionLag(
                        *place, offset, starts[place], ends[place], lag,
                        ages.get((place, at[what])) if lag else 0.0,
                        history.verdict(lag, now_ms, self._allowed_lag),
                        waiting_for(position.metadata) if position is not None else None,
                        *((owner.member_id, owner.client_id, owner.host) if owner is not None else ()),
                    )
                )  # fmt: skip
            verdicts = [row.verdict for row in rows if row.verdict is not None]
            verdict = of_group(verdicts) if len(verdicts) == len(rows) else None
            found.append(GroupLag(name, described[name].state.lower(), len(described[name].members), verdict, rows))
        return found

    def _ages(self, wanted: set[tuple[Place, int]], now_ms: int) -> dict[tuple[Place, int], float]:
        """How many seconds ago the records at those offsets, or the next ones there are, were written."""
        found: dict[tuple[Place, int], float] = {}
        deadline = time.monotonic() + AGES_SECONDS
        left = sorted(wanted)
        while left and time.monotonic() < deadline:
            turn = dict(reversed(left))  # of each partition one offset at a time, the lowest first
            left = [each for each in left if turn[each[0]] != each[1]]
            for (topic, partition), offset in turn.items():
                self._reader.add(topic, partition, offset)
            missing = set(turn)
            while missing and time.monotonic() < deadline:
                try:
                    messages, ended = self._reader.take(100, 0.05)
                except ConsumerFailed:  # retention was faster, or the leader is away: not known this time
                    continue
                for message in messages:
                    place = place_of(message)
                    if place in missing:
                        missing.discard(place)
                        found[place, turn[place]] = max(0.0, (now_ms - message.timestamp()[1]) / 1000)
                missing.difference_update(ended)
            for topic, partition in turn:
                self._reader.remove(topic, partition)
        return found


def _places_of(
    described: GroupDescription, committed: Mapping[Place, CommittedPosition], counts: Mapping[str, int]
) -> list[Place]:
    """Of topics that are still there."""
    owned: Sequence[GroupMember] = described.members
    topics = {topic for topic, _ in [*committed, *(place for member in owned for place in member.partitions)]}
    return sorted((topic, index) for topic in topics for index in range(counts.get(topic, 0)))
